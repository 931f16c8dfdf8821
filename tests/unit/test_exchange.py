"""engine/exchange.py: which columns a client holds, counted without making them."""

from __future__ import annotations

import itertools

import pytest
import torch

from splitft.engine.exchange import Ownership, positions, put, size_of, take
from splitft.lora import Layout
from splitft.types import Key, Plan

# Block 2 has no adapter, and ranks differ between keys.
LAYOUT = Layout.of(
    {Key(0, "q"): (3, 4), Key(0, "v"): (5, 2), Key(1, "q"): (3, 4), Key(3, "v"): (2, 6)},
    {Key(0, "q"): 3, Key(0, "v"): 2, Key(1, "q"): 4, Key(3, "v"): 1},
    1.0,
)
BLOCKS = 5
TRAINED = torch.arange(LAYOUT.parameters) % 3 != 0
RANKS: tuple[tuple[int, ...], ...] = ((), (3, 2, 4, 1), (1, 0, 2, 9), (0, 0, 0, 0))
PLACES = ((1, False, 0), (2, True, 2), (4, False, 0), (5, True, 0), (1, True, 1))


@pytest.mark.parametrize(("cut", "exit_on_client", "tail"), PLACES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("trained", [None, TRAINED], ids=["all", "some"])
def test_sizes_are_those_of_the_columns(
    cut: int, exit_on_client: bool, tail: int, ranks: tuple[int, ...], trained: torch.Tensor | None
) -> None:
    for segments in (1, 2, 3):
        for segment in range(segments):
            plan = Plan(0, cut, 1, 4, exit_on_client, tail, ranks, segments=segments, segment=segment)
            owned = Ownership(plan, BLOCKS)
            columns = positions(owned.client_columns(LAYOUT, trained))
            assert owned.client_size(LAYOUT, trained) == len(columns)
            assert owned.upload_size(LAYOUT, trained) == size_of(owned.upload_columns(LAYOUT, trained))
            blocks = {entry.key.block for entry in LAYOUT.entries for k in columns.tolist() if entry.start <= k < entry.end}
            assert blocks <= owned.held


def test_columns_of_clients_that_share_a_cut_are_the_same_and_their_own() -> None:
    """They come from one mask, which nobody may change."""
    plans = [Plan(client, 2, 1, 4, ranks=RANKS[2]) for client in range(2)]
    first, second = (Ownership(plan, BLOCKS).client_columns(LAYOUT, None) for plan in plans)
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    wanted = second.clone()
    first.zero_()
    assert torch.equal(second, wanted)
    assert torch.equal(positions(Ownership(plans[0], BLOCKS).client_columns(LAYOUT, None)), wanted)


def test_what_is_taken_can_be_put_back() -> None:
    row = torch.arange(float(LAYOUT.parameters))
    for (cut, exit_on_client, tail), ranks in itertools.product(PLACES, RANKS):
        columns = Ownership(Plan(0, cut, 1, 4, exit_on_client, tail, ranks), BLOCKS).client_columns(LAYOUT)
        taken, other = take(row, columns), torch.full_like(row, -1.0)
        put(other, columns, taken)
        chosen = other >= 0
        assert torch.equal(other[chosen], row[chosen])
        assert int(chosen.sum()) == size_of(columns) == len(taken)


def test_the_columns_of_blocks_without_adapters_are_none() -> None:
    assert [LAYOUT.columns(block, block + 1) for block in range(6)] == [
        slice(0, 31 + 4),
        slice(35, 63),
        slice(63, 63),
        slice(63, 71),
        slice(71, 71),
        slice(71, 71),
    ]
    assert LAYOUT.columns(0, 99) == slice(0, LAYOUT.parameters)
    assert LAYOUT.columns(2, 3) == LAYOUT.columns(2, 2) == slice(63, 63)
    assert Layout(()).columns(0, 3) == slice(0, 0)
