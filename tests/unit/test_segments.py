"""Segments: every value is the mean of those who sent it, and nothing else counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from splitft.aggregate.average import Average
from splitft.aggregate.base import Updates
from splitft.aggregate.fed_avgm import FedAvgM
from splitft.aggregate.median import Median
from splitft.aggregate.segments import Segments
from splitft.aggregate.stack import Stack
from splitft.catalog import build
from splitft.errors import AdapterError, ConfigError
from splitft.lora import Layout
from splitft.rng import torch_stream
from splitft.types import Key

LAYOUT = Layout.of({Key(block, "q"): (4, 6) for block in range(4)}, 2, 1.0)


def drawn(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, LAYOUT.parameters, generator=torch_stream(seed, "segments-test"))


def turn(cuts: list[int], count: int, round_index: int) -> Tensor:
    """What arrives [n p]: of a client's front one segment of `count`, in turn; of its back, which is at the server, everything."""
    sent = torch.ones(len(cuts), LAYOUT.parameters, dtype=torch.bool)
    for client, cut in enumerate(cuts):
        front = torch.arange(LAYOUT.columns(0, cut).stop)
        sent[client, front] = front % count == (client + round_index) % count
    return sent


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 4)), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 3))
def test_every_value_is_the_weighted_mean_of_those_who_sent_it(clients: list[tuple[int, int]], count: int, round_index: int) -> None:
    tokens, cuts = [tokens for tokens, _ in clients], [cut for _, cut in clients]
    if not sum(tokens):
        tokens[0] = 1
    sent, values, before = turn(cuts, count, round_index), drawn(len(cuts), 1), drawn(1, 0)[0]
    updates = Updates(tuple(range(len(cuts))), tuple(tokens), values.masked_fill(~sent, 1e20), LAYOUT, None, sent)
    rule = Segments(count=count)
    merged = rule.merge(before, updates, rule.init(LAYOUT))
    covered = 0
    for column in range(LAYOUT.parameters):
        heard = [client for client in range(len(cuts)) if bool(sent[client, column]) and tokens[client]]
        covered += bool(heard)
        total = sum(tokens[client] for client in heard)
        wanted = sum(tokens[k] * float(values[k, column]) for k in heard) / total if heard else float(before[column])
        assert float(merged.adapters[column]) == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    assert merged.metrics["values_sent"] == pytest.approx(covered / LAYOUT.parameters)


def test_whole_uploads_are_the_average_to_the_last_bit() -> None:
    before, updates = drawn(1, 0)[0], Updates((0, 1, 2), (3, 1, 5), drawn(3, 1), LAYOUT)
    merged = Segments(count=3).merge(before, updates, {})
    assert torch.equal(merged.adapters, Average().merge(before, updates, {}).adapters)
    assert merged.metrics["values_sent"] == 1.0


def test_over_the_rounds_every_value_has_its_turn() -> None:
    """One client with everything on its side: nothing is left out after as many rounds as there are segments, and nothing comes twice."""
    row, goal, rule = drawn(1, 0)[0], drawn(1, 1), Segments(count=3)
    before, changed = row.clone(), torch.zeros(LAYOUT.parameters, dtype=torch.long)
    for index in range(3):
        after = rule.merge(row, Updates((0,), (2,), goal, LAYOUT, None, turn([4], 3, index)), {}).adapters
        changed += (after != row).long()
        row = after
    assert bool((before != goal[0]).all())
    assert changed.tolist() == [1] * LAYOUT.parameters
    torch.testing.assert_close(row, goal[0])


def test_the_server_s_own_blocks_always_take_part() -> None:
    cuts = [1, 1]
    updates = Updates((0, 1), (1, 1), drawn(2, 1), LAYOUT, None, turn(cuts, 4, 0))
    found = Segments(count=4).merge(drawn(1, 0)[0], updates, {}).adapters
    back = LAYOUT.columns(1, 4)
    torch.testing.assert_close(found[back], updates.values[:, back].mean(0))


def test_what_is_missing_may_be_anything_finite_but_not_a_number_is_still_refused() -> None:
    values = drawn(2, 1)
    values[1, 0] = torch.nan
    with pytest.raises(AdapterError, match="client 1"):
        Segments().merge(drawn(1, 0)[0], Updates((0, 1), (1, 1), values, LAYOUT, None, turn([4, 4], 2, 0)), {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"count": 2.0}, "count is 2.0"),
        ({"count": True}, "count is True"),
        ({"rule": "product"}, "rule is Product, which needs whole uploads"),
        ({"rule": "krum"}, "rule is Krum"),
        ({"rule": {"name": "fed_avgm", "rule": "product"}}, "rule is FedAvgM"),
        ({"rule": {"name": "median", "rule": "segments"}}, "already"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("aggregator", "segments", fields)


def test_it_says_how_many_and_over_what() -> None:
    assert (Segments(count=5).segments, Segments().folds, Segments().partial_uploads) == (5, False, True)
    assert Segments(rule=Median(rule=Stack())).folds
    assert FedAvgM(rule=Segments(count=5)).segments == 5


def test_who_trained_nothing_covers_nothing() -> None:
    before, sent = drawn(1, 0)[0], turn([4, 4], 2, 0)
    merged = Segments().merge(before, Updates((0, 1), (3, 0), drawn(2, 1), LAYOUT, None, sent), {})
    assert merged.metrics["values_sent"] == 0.5
    assert torch.equal(merged.adapters[sent[1]], before[sent[1]])
