"""The contract of every rank policy in the catalogue: ranks in bounds for exactly the participants, equal answers to equal questions."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitft.catalog import RANK_POLICIES
from splitft.lora import Layout
from splitft.ranks.base import RankPolicy
from splitft.types import Key

from ..unit.cost_shapes import DEVICE, SHAPE, cost_model
from .variants import Variant

CLIENTS = 5
RANK = 8
FIELDS: dict[str, list[dict[str, Any]]] = {
    "splitft": [{"rank_at_cut": 1, "side": "both"}, {"rank_at_cut": RANK}],
    "budget": [{"upload_bytes": 20_000, "memory_share": 0}],
    "importance": [
        {"share": 0.4, "rank_set": [2, 8], "cool_down_rounds": 0, "dead_band": 0},
        {"share": 1.0, "smoothing": 0, "cool_down_rounds": 1},
    ],
}
VARIANTS = [Variant("ranks", name, chosen) for name in RANK_POLICIES for chosen in ({}, *FIELDS.get(name, []))]
every_policy = pytest.mark.parametrize("variant", VARIANTS, ids=repr)

WIDTHS = {Key(index, item.module): (item.inputs, item.outputs) for index, block in enumerate(SHAPE.blocks) for item in block.projections}
LAYOUT = Layout.of(WIDTHS, RANK, 1.0)
UNEVEN = Layout.of(WIDTHS, {key: RANK if key.block % 2 else 3 for key in WIDTHS}, 1.0)  # a rank of its own for every key
HISTORY = st.lists(
    st.tuples(
        st.dictionaries(st.integers(0, CLIENTS - 1), st.integers(1, 5), min_size=1),
        st.one_of(st.just([]), st.lists(st.floats(0.0, 1e6), min_size=len(WIDTHS), max_size=len(WIDTHS))),
    ),
    min_size=1,
    max_size=7,
)


def start(variant: Variant, layout: Layout = LAYOUT) -> tuple[RankPolicy, Any]:
    """The policy and its first state, for a U-shaped run whose last block stays on the clients."""
    policy = variant.build()
    costs = [cost_model(modules=(), rank=RANK, exit_on_client=True, tail_blocks=1, sequence_tokens=8 + client) for client in range(CLIENTS)]
    return policy, policy.init(layout, [DEVICE] * CLIENTS, costs)


def play(policy: RankPolicy, state: Any, history: list[Any], layout: Layout = LAYOUT, stored: bool = False) -> list[Any]:
    answers = []
    for index, (cuts, importance) in enumerate(history, 1):
        ranks, state = policy.plan(index, cuts, importance, layout, state)
        state = json.loads(json.dumps(dict(state), allow_nan=False)) if stored else state
        answers.append(ranks)
    return answers


@every_policy
@pytest.mark.parametrize("layout", [LAYOUT, UNEVEN], ids=["even", "uneven"])
@settings(max_examples=20)
@given(history=HISTORY)
def test_ranks_are_in_bounds_for_exactly_the_participants(variant: Variant, layout: Layout, history: list[Any]) -> None:
    policy, state = start(variant, layout)
    for (cuts, _), ranks in zip(history, play(policy, state, history, layout), strict=True):
        assert set(ranks) == set(cuts)
        for own in ranks.values():
            assert isinstance(own, tuple)
            assert all(type(rank) is int and 0 <= rank <= entry.rank for rank, entry in zip(own, layout.entries, strict=True))


@every_policy
@settings(max_examples=20)
@given(history=HISTORY)
def test_blocks_of_the_server_keep_their_rank_except_beside_the_cut(variant: Variant, history: list[Any]) -> None:
    for (cuts, _), ranks in zip(history, play(*start(variant), history), strict=True):
        for client, cut in cuts.items():
            kept = {rank for rank, entry in zip(ranks[client], LAYOUT.entries, strict=True) if cut < entry.key.block < 5}
            assert kept <= {RANK}


@every_policy
@settings(max_examples=20)
@given(history=HISTORY)
def test_the_same_history_gives_the_same_ranks(variant: Variant, history: list[Any]) -> None:
    """Whatever the order in which the participants are named."""
    turned = [(dict(reversed(cuts.items())), importance) for cuts, importance in history]
    assert play(*start(variant), history) == play(*start(variant), turned)


@every_policy
@settings(max_examples=20)
@given(history=HISTORY)
def test_a_state_survives_a_checkpoint(variant: Variant, history: list[Any]) -> None:
    policy, state = start(variant)
    assert play(policy, json.loads(json.dumps(dict(state))), history, stored=True) == play(policy, state, history)


@every_policy
@settings(max_examples=20)
@given(history=HISTORY)
def test_a_plan_does_not_change_what_it_was_given(variant: Variant, history: list[Any]) -> None:
    policy, state = start(variant)
    for index, (cuts, importance) in enumerate(history, 1):
        before = json.dumps([dict(state), sorted(cuts.items()), importance], sort_keys=True)
        _, after = policy.plan(index, cuts, importance, LAYOUT, state)
        assert json.dumps([dict(state), sorted(cuts.items()), importance], sort_keys=True) == before
        state = after


@every_policy
def test_a_policy_that_calls_itself_uniform_is(variant: Variant) -> None:
    policy, state = start(variant, UNEVEN)
    own = tuple(entry.rank for entry in UNEVEN.entries)
    ranks, _ = policy.plan(1, {0: 1, 3: 5}, [], UNEVEN, state)
    if policy.uniform:
        assert ranks == {0: own, 3: own}


@every_policy
def test_round_index_alone_changes_nothing(variant: Variant) -> None:
    policy, state = start(variant)
    assert policy.plan(1, {0: 2}, [], LAYOUT, state)[0] == policy.plan(99, {0: 2}, [], LAYOUT, state)[0]
