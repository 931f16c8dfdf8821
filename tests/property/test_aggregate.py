"""FedAvg for any participants: the exact weighted mean, independent of order and of the precision lost on the way."""

from __future__ import annotations

from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from splitft.aggregate.average import Average
from splitft.aggregate.base import Updates
from splitft.lora import Layout
from splitft.types import Key

LAYOUT = Layout.of({Key(0, "q"): (1, 1)}, 1, 1.0)
PAIRS = st.lists(
    st.tuples(st.integers(0, 10**9), st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32)), min_size=1, max_size=12
).filter(lambda pairs: any(tokens for tokens, _, _ in pairs))


def average(pairs: list[tuple[int, float, float]]) -> list[float]:
    values = torch.tensor([[first, second] for _, first, second in pairs])
    given_updates = Updates(tuple(range(len(pairs))), tuple(tokens for tokens, _, _ in pairs), values, LAYOUT)
    merged = Average().merge(torch.full((2,), 123.0), given_updates, {})
    assert merged.state == {}
    return [float(value) for value in merged.adapters]


@given(PAIRS)
def test_it_is_the_weighted_mean_to_the_last_bits_of_float32(pairs: list[tuple[int, float, float]]) -> None:
    total = sum(tokens for tokens, _, _ in pairs)
    for column, found in enumerate(average(pairs), 1):
        exact = sum(Fraction(pair[0], total) * Fraction(pair[column]) for pair in pairs)
        largest = max(abs(pair[column]) for pair in pairs)
        assert (
            abs(Fraction(found) - exact) <= Fraction(2) ** -24 * abs(exact) + Fraction(largest) * Fraction(1, 10**14) + Fraction(2) ** -149
        )


@given(PAIRS, st.randoms(use_true_random=False))
def test_the_order_changes_nothing_that_float32_can_show(pairs: list[tuple[int, float, float]], shuffle: object) -> None:
    moved = list(pairs)
    shuffle.shuffle(moved)  # type: ignore[attr-defined]
    for first, second in zip(average(pairs), average(moved), strict=True):
        assert abs(first - second) <= 1.2e-7 * max(abs(first), abs(second)) + 1e-9


@given(PAIRS)
def test_the_mean_is_between_the_extremes(pairs: list[tuple[int, float, float]]) -> None:
    for column, found in enumerate(average(pairs), 1):
        weighted = [pair[column] for pair in pairs if pair[0] > 0]
        slack = 1e-6 * max(abs(value) for value in weighted) + 1e-30
        assert min(weighted) - slack <= found <= max(weighted) + slack


@given(PAIRS, st.integers(1, 1000))
def test_who_trained_nothing_and_the_unit_of_tokens_do_not_matter(pairs: list[tuple[int, float, float]], factor: int) -> None:
    scaled = [(tokens * factor, first, second) for tokens, first, second in pairs]
    padded = [*pairs, (0, 9e9, -9e9)]
    for plain, other, idle in zip(average(pairs), average(scaled), average(padded), strict=True):
        assert abs(plain - other) <= 1.2e-7 * abs(plain) + 1e-9
        assert abs(plain - idle) <= 1.2e-7 * abs(plain) + 1e-9
