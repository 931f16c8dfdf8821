"""Rank policy `importance`: worked examples of the hand-out, the trigger, the cool-down and the average."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from splitft.catalog import build
from splitft.errors import CheckpointError, ConfigError, ResourceError
from splitft.lora import Layout
from splitft.ranks.importance import ImportanceRanks, allocate, reordered
from splitft.types import Key

from .cost_shapes import DEVICE, cost_model

LAYOUT = Layout.of({Key(block, "attn.c_attn"): (32, 96) for block in range(6)}, 8, 1.0)
UNIT = 128  # parameters of one rank


def start(layout: Layout = LAYOUT, rank: int = 8, **fields: Any) -> tuple[ImportanceRanks, Any]:
    policy = build("ranks", "importance", fields)
    return policy, policy.init(layout, [DEVICE], [cost_model(rank=rank)])


def plan(policy: ImportanceRanks, state: Any, round_index: int, importance: list[float], cut: int = 6) -> tuple[tuple[int, ...], Any]:
    ranks, state = policy.plan(round_index, {0: cut}, importance, LAYOUT, state)
    return ranks[0], state


def give(scores: list[float], units: float, ladder: tuple[int, ...] = (1, 2, 4, 8)) -> list[int]:
    return allocate(scores, LAYOUT.entries[: len(scores)], ladder, units * UNIT)


def test_ranks_follow_the_scores_where_doublings_are_worth_the_same() -> None:
    # Steps in order of gain: 8 -> 2 (8), 8 -> 4 (4), 4 -> 2 (4), 8 -> 8 (2), 4 -> 4 (2), 2 -> 2 (2) ..
    assert give([8, 4, 2, 1], 1 + 1 + 1 + 1) == [1, 1, 1, 1]
    assert give([8, 4, 2, 1], 5) == [2, 1, 1, 1]
    assert give([8, 4, 2, 1], 8) == [4, 2, 1, 1]
    assert give([8, 4, 2, 1], 15) == [8, 4, 2, 1]
    assert give([8, 4, 2, 1], 32) == [8, 8, 8, 8]
    # 3 -> 2 (3), 2 -> 2 (2), 3 -> 4 (1.5, no longer fits): the first must not run ahead.
    assert give([3, 2], 5) == [2, 2]


def test_one_dominant_entry_does_not_starve_the_others_below_the_lowest_rank() -> None:
    assert give([1e9, 1, 1, 1], 11) == [8, 1, 1, 1]
    assert give([1e9, 1, 1, 1], 14, (2, 8)) == [8, 2, 2, 2]


def test_equal_scores_move_together_or_not_at_all() -> None:
    assert give([3, 3, 3], 5) == [1, 1, 1]
    assert give([3, 3, 3], 6) == [2, 2, 2]
    assert give([0, 0, 0], 12) == [4, 4, 4]
    assert give([0.1 + 0.2, 0.3, 0.3], 5) == [1, 1, 1], "rounding breaks no tie"


def test_what_the_first_cannot_take_the_next_may_up_to_its_rank() -> None:
    # 4 -> 8 of the first no longer fits; the second follows as far as 4 and no further.
    assert give([100, 1], 4 + 1) == [4, 1]
    assert give([100, 1], 4 + 2) == [4, 2]
    assert give([100, 1], 4 + 4 - 1) == [4, 2]
    assert give([100, 1], 4 + 4) == [4, 4]
    assert give([100, 1], 4 + 4 + 3) == [8, 2]


def test_wide_entries_pay_for_their_width() -> None:
    layout = Layout.of({Key(0, "narrow"): (10, 10), Key(0, "wide"): (40, 40)}, 8, 1.0)
    # Steps: narrow to 8 and wide to 2 cost 7 x 20 + 80.
    assert allocate([8, 2], layout.entries, (1, 2, 4, 8), 20 + 80 + 7 * 20 + 80) == [8, 2]
    assert allocate([8, 2], layout.entries, (1, 2, 4, 8), 20 + 80 + 7 * 20 + 79) == [8, 1]


def test_before_any_importance_ranks_are_uniform_at_the_budget() -> None:
    for share, rank in ((1.0, 8), (0.5, 4), (0.4, 2), (0.25, 2), (0.125, 1)):
        assert plan(*start(share=share), 1, [])[0] == (rank,) * 6
    assert plan(*start(share=0.5), 1, [], cut=2)[0] == (4, 4, 8, 8, 8, 8)


def test_a_share_whose_product_rounds_down_still_buys_the_rank() -> None:
    layout = Layout.of({Key(0, "attn.c_attn"): (32, 96)}, 50, 1.0)
    policy, state = start(layout, share=0.58, rank_set=[1, 29, 50])
    assert 0.58 * (50 * UNIT) < 29 * UNIT
    assert policy.plan(1, {0: 1}, [], layout, state)[0][0] == (29,)


def test_the_top_of_the_default_rank_set_is_the_layouts_own_rank() -> None:
    for rank, ladder in ((1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8)), (9, (1, 2, 4, 8, 9))):
        layout = Layout.of({Key(0, "attn.c_attn"): (32, 96)}, rank, 1.0)
        assert ImportanceRanks()._ladder(layout) == ladder


def test_importance_is_divided_by_parameters_per_rank() -> None:
    layout = Layout.of({Key(0, "attn.c_attn"): (32, 96), Key(0, "mlp.c_fc"): (32, 480)}, 8, 1.0)
    policy, state = start(layout, cool_down_rounds=0)
    _, state = policy.plan(1, {0: 1}, [], layout, state)
    _, after = policy.plan(2, {0: 1}, [128.0, 1024.0], layout, state)
    assert after["planned"] == [1.0, 2.0]


def test_the_average_remembers() -> None:
    policy, state = start(smoothing=0.75, cool_down_rounds=0)
    _, state = plan(policy, state, 2, [4.0] * 6)
    assert state["average"] == [4.0] * 6
    _, state = plan(policy, state, 3, [0.0] * 6)
    assert state["average"] == [3.0] * 6
    _, state = plan(policy, state, 4, [])
    assert state["average"] == [3.0] * 6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_round_that_diverged_is_not_believed(bad: float) -> None:
    policy, state = start(cool_down_rounds=0)
    _, state = plan(policy, state, 2, [6, 5, 4, 3, 2, 1])
    ranks, after = plan(policy, state, 3, [bad, *[1e9] * 5])
    assert after == state
    assert ranks == plan(policy, state, 3, [])[0]


def test_nothing_is_planned_anew_before_the_cool_down_is_over() -> None:
    policy, state = start(share=0.5, smoothing=0, cool_down_rounds=4, dead_band=0)
    seen = []
    for round_index in range(1, 13):
        importance = [1.0, 1.0, 1.0, 1.0, 1.0, 100.0] if round_index < 6 else [100.0, 1.0, 1.0, 1.0, 1.0, 1.0]
        ranks, state = plan(policy, state, round_index, importance if round_index > 1 else [])
        seen.append((ranks, state["planned_round"]))
    first, second = (2, 2, 2, 2, 2, 8), (8, 2, 2, 2, 2, 2)
    assert [ranks for ranks, _ in seen] == [(4,) * 6] * 3 + [first] * 4 + [second] * 5
    assert [when for _, when in seen] == [0] * 3 + [4] * 4 + [8] * 5


def test_a_change_of_order_inside_the_dead_band_changes_nothing() -> None:
    policy, state = start(share=0.5, smoothing=0, cool_down_rounds=0, dead_band=0.1)
    before, state = plan(policy, state, 1, [60.0, 50.0, 4.0, 3.0, 2.0, 1.0])
    # One of 15 pairs is 0.067, two are 0.133.
    ranks, state = plan(policy, state, 2, [50.0, 60.0, 4.0, 3.0, 2.0, 1.0])
    assert (ranks, state["planned_round"]) == (before, 1)
    ranks, state = plan(policy, state, 3, [50.0, 60.0, 3.0, 4.0, 2.0, 1.0])
    assert (ranks != before, state["planned_round"]) == (True, 3)


def test_reordered_counts_pairs() -> None:
    assert reordered([3, 2, 1], [30, 20, 10]) == 0
    assert reordered([3, 2, 1], [1, 2, 3]) == 1
    assert reordered([3, 2, 1], [2, 3, 1]) == pytest.approx(1 / 3)
    assert reordered([0, 0, 0], [1, 2, 3]) == 0.5
    assert reordered([0, 0, 0], [5, 5, 5]) == 0
    assert reordered([1], [2]) == reordered([], []) == 0


def test_a_share_that_does_not_hold_the_lowest_rank_is_refused_and_the_remedy_works() -> None:
    with pytest.raises(ResourceError, match=r"ranks\.share 0\.1 of rank 8 does not hold rank 1") as caught:
        start(share=0.1)
    assert "Set ranks.share to 0.125 or more" in caught.value.remedy
    assert plan(*start(share=0.125), 1, [])[0] == (1,) * 6
    with pytest.raises(ResourceError, match="does not hold rank 4"):
        start(share=0.4, rank_set=[4, 8])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share": 0}, r"ranks\.share is 0; allowed are numbers above 0"),
        ({"share": 1.01}, r"ranks\.share is 1\.01"),
        ({"share": "all"}, r"ranks\.share is 'all'"),
        ({"smoothing": 1}, r"ranks\.smoothing is 1; allowed"),
        ({"dead_band": -0.1}, r"ranks\.dead_band is -0\.1"),
        ({"dead_band": True}, r"ranks\.dead_band is True"),
        ({"cool_down_rounds": 1.5}, r"ranks\.cool_down_rounds is 1\.5; allowed are whole numbers"),
        ({"rank_set": [0, 2]}, r"ranks\.rank_set is \[0, 2\]; allowed are ascending whole numbers from 1"),
        ({"rank_set": [4, 2]}, r"ranks\.rank_set is \[4, 2\]"),
        ({"rank_set": [2, 2]}, r"ranks\.rank_set is \[2, 2\]"),
        ({"rank_set": [2, "8"]}, r"ranks\.rank_set is \[2, '8'\]"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("ranks", "importance", fields)


def test_a_rank_set_above_the_layout_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank_set has 16; allowed is at most lora\.rank, 8"):
        start(rank_set=[1, 16])


def test_a_state_for_other_adapters_is_refused() -> None:
    policy, state = start()
    with pytest.raises(CheckpointError, match=r"no average for 6 adapters"):
        plan(policy, {**state, "average": [1.0]}, 2, [])
    with pytest.raises(CheckpointError, match="no planned"):
        plan(policy, {"server_end": 6, "average": []}, 2, [])


def test_the_state_is_plain_json() -> None:
    policy, state = start(cool_down_rounds=0)
    _, state = plan(policy, state, 1, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert json.loads(json.dumps(state, allow_nan=False)) == state
