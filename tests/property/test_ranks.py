"""What holds for every hand-out of ranks by importance."""

from __future__ import annotations

from itertools import pairwise
from typing import TypeAlias

from hypothesis import given
from hypothesis import strategies as st

from splitft.lora import Entry, Layout
from splitft.ranks.importance import ImportanceRanks, allocate, reordered
from splitft.types import Key

from ..unit.cost_shapes import DEVICE, cost_model

Hand: TypeAlias = tuple[list[float], list[Entry], tuple[int, ...], float]
LARGEST = 12
LADDERS = st.sets(st.integers(1, LARGEST), min_size=1, max_size=5).map(lambda ranks: tuple(sorted(ranks)))
SCORES = st.one_of(st.floats(0.0, 1e9), st.integers(0, 3).map(float))  # the second makes ties


@st.composite
def hands(draw: st.DrawFn) -> Hand:
    """Scores, entries of unlike widths, a ladder, and a budget that holds at least the lowest rank."""
    widths = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8))
    entries = list(Layout.of({Key(0, f"m{index}"): width for index, width in enumerate(widths)}, LARGEST, 1.0).entries)
    ladder = draw(LADDERS)
    whole = sum(entry.inputs + entry.outputs for entry in entries)
    share = draw(st.floats(0.0, 1.0))
    scores = draw(st.lists(SCORES, min_size=len(entries), max_size=len(entries)))
    return scores, entries, ladder, whole * (ladder[0] + share * (ladder[-1] - ladder[0]))


def parameters(ranks: list[int], entries: list[Entry]) -> int:
    return sum(rank * (entry.inputs + entry.outputs) for rank, entry in zip(ranks, entries, strict=True))


@given(hands())
def test_ranks_are_of_the_ladder_and_the_budget_is_never_exceeded(hand: Hand) -> None:
    scores, entries, ladder, budget = hand
    ranks = allocate(scores, entries, ladder, budget)
    assert set(ranks) <= set(ladder)
    assert parameters(ranks, entries) <= budget * (1 + 1e-9)


@given(hands())
def test_a_higher_score_never_gets_a_smaller_rank(hand: Hand) -> None:
    pairs = sorted(zip(hand[0], allocate(*hand), strict=True))
    assert all(low[1] <= high[1] for low, high in pairwise(pairs) if low[0] < high[0])
    by_score: dict[float, set[int]] = {}
    for score, rank in pairs:
        by_score.setdefault(score, set()).add(rank)
    assert all(len(ranks) == 1 for ranks in by_score.values())


@given(hands(), st.permutations(range(8)))
def test_scale_and_order_of_the_entries_do_not_matter(hand: Hand, places: list[int]) -> None:
    scores, entries, ladder, budget = hand
    ranks = allocate(scores, entries, ladder, budget)
    order = [place for place in places if place < len(entries)]
    moved = allocate([scores[place] for place in order], [entries[place] for place in order], ladder, budget)
    assert moved == [ranks[place] for place in order]
    # A power of two scales exactly, so no tie is made or broken.
    assert allocate([score * 2.0**20 for score in scores], entries, ladder, budget) == ranks


@given(hands(), st.floats(0.0, 1e9))
def test_equal_scores_get_the_largest_uniform_rank(hand: Hand, score: float) -> None:
    _, entries, ladder, budget = hand
    whole = sum(entry.inputs + entry.outputs for entry in entries)
    largest = max(rank for rank in ladder if rank * whole <= budget * (1 + 1e-9) or rank == ladder[0])
    assert allocate([score] * len(entries), entries, ladder, budget) == [largest] * len(entries)


@given(hands())
def test_the_highest_score_is_raised_as_far_as_it_goes(hand: Hand) -> None:
    scores, entries, ladder, budget = hand
    ranks = allocate(scores, entries, ladder, budget)
    top = max(scores)
    first = [index for index, score in enumerate(scores) if score >= top * (1 - 1e-9)]
    rank = ranks[first[0]]
    if rank < ladder[-1]:
        step = ladder[ladder.index(rank) + 1] - rank
        more = step * sum(entries[index].inputs + entries[index].outputs for index in first)
        assert parameters(ranks, entries) + more > budget


@given(st.lists(st.tuples(SCORES, SCORES, SCORES), max_size=8))
def test_reordering_is_a_distance_of_orders(triples: list[tuple[float, float, float]]) -> None:
    first, second, third = ([triple[place] for triple in triples] for place in range(3))
    assert reordered(first, first) == 0
    assert reordered(first, second) == reordered(second, first)
    assert 0 <= reordered(first, second) <= 1
    assert reordered(first, third) <= reordered(first, second) + reordered(second, third) + 1e-12
    assert reordered(first, [2.0 * value for value in first]) == 0


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=6), st.integers(1, 6))
def test_constant_importance_stays_uniform_for_ever(levels: list[float], cut: int) -> None:
    layout = Layout.of({Key(block, "attn.c_attn"): (32, 96) for block in range(6)}, 8, 1.0)
    policy = ImportanceRanks(cool_down_rounds=0, dead_band=0.0)
    state = policy.init(layout, [DEVICE], [cost_model()])
    for round_index, level in enumerate(levels, 1):
        ranks, state = policy.plan(round_index, {0: cut}, [level] * 6, layout, state)
        assert ranks[0] == (4,) * cut + (8,) * (6 - cut)
