"""`stack` and `residual`: frozen weights and adapter together are the exact mean of the clients' products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from unit.lowrank_cases import (
    LAYOUT,
    RANK,
    WIDTHS,
    assert_same,
    drawn,
    effect,
    mean_products,
    merged,
    padded,
    products,
    ranks_of,
    updates,
)

from splitft.aggregate.average import Average
from splitft.aggregate.base import Aggregator
from splitft.aggregate.residual import Residual
from splitft.aggregate.stack import Stack
from splitft.errors import AdapterError
from splitft.rng import numpy_stream

TOKENS = st.lists(st.integers(0, 10**6), min_size=1, max_size=5).filter(any)


@pytest.mark.parametrize("rule", [Stack(), Residual()], ids=["stack", "residual"])
@given(seed=st.integers(0, 1000), tokens=TOKENS)
def test_the_effect_is_the_exact_mean(rule: Aggregator, seed: int, tokens: list[int]) -> None:
    given_updates = updates(tokens, drawn(len(tokens), seed))
    values = given_updates.values.clone()
    assert_same(effect(LAYOUT, merged(rule, drawn(1)[0], given_updates)), mean_products(given_updates))
    assert torch.equal(given_updates.values, values)


@pytest.mark.parametrize("rule", [Stack(), Residual()], ids=["stack", "residual"])
def test_weights_with_the_fold_behave_as_weights_with_every_client_s_product(rule: Aggregator) -> None:
    """y = x (W + fold)^T + scale x (B A)^T, in float64, over two merges in a row."""
    before, state, total = drawn(1)[0], rule.init(LAYOUT), {key: np.zeros((o, i)) for key, (i, o) in WIDTHS.items()}
    for number in (1, 2):
        given_updates = updates([3, 1, 100], before + 0.1 * drawn(3, number))
        outcome = rule.merge(before, given_updates, state)
        mean = mean_products(given_updates)
        for key, (inputs, outputs) in WIDTHS.items():
            stream = numpy_stream(number, "fold-test", key.block)
            weight, x = stream.normal(size=(outputs, inputs)) + total[key], stream.normal(size=(4, inputs))
            np.testing.assert_allclose(x @ (weight + effect(LAYOUT, outcome)[key]).T, x @ (weight + mean[key]).T, atol=1e-5)
            total[key] += effect(LAYOUT, outcome)[key] - products(LAYOUT, outcome.adapters)[key]
        before, state = outcome.adapters, outcome.state


def test_a_stack_takes_any_ranks_and_holds_no_zeros() -> None:
    ranks = torch.tensor([[4, 1, 0], [2, 3, 0], [1, 4, 0]])
    given_updates = updates([1, 2, 3], padded(drawn(3, 1), ranks), ranks)
    outcome = merged(Stack(), drawn(1)[0], given_updates)
    assert_same(effect(LAYOUT, outcome), mean_products(given_updates))
    assert [len(factors.a) for factors in outcome.folded.values()] == [7, 8]
    assert LAYOUT.entries[2].key not in outcome.folded
    assert all(factors.a.dtype == factors.b.dtype == torch.float32 for factors in outcome.folded.values())


def test_a_stack_leaves_fresh_adapters_that_differ_every_round_and_repeat_from_the_state() -> None:
    rule, given_updates = Stack(seed=5), updates([1], drawn(1))
    first = rule.merge(drawn(1)[0], given_updates, rule.init(LAYOUT))
    second = rule.merge(first.adapters, given_updates, first.state)
    assert torch.equal(first.adapters, LAYOUT.initial_row(6))
    assert torch.equal(second.adapters, LAYOUT.initial_row(7))
    assert torch.equal(rule.merge(first.adapters, given_updates, first.state).adapters, second.adapters)
    assert not any(matrix.any() for matrix in products(LAYOUT, second.adapters).values())


def test_a_client_without_tokens_is_not_stacked() -> None:
    outcome = merged(Stack(), drawn(1)[0], updates([4, 0], drawn(2)))
    assert {len(factors.a) for factors in outcome.folded.values()} == {RANK}


def test_a_residual_adapter_is_the_average() -> None:
    given_updates = updates([3, 1, 2], drawn(3, 1))
    assert torch.equal(merged(Residual(), drawn(1)[0], given_updates).adapters, merged(Average(), drawn(1)[0], given_updates).adapters)


def test_clients_that_agree_leave_no_residual() -> None:
    assert not merged(Residual(), drawn(1)[0], updates([3, 1, 100], drawn(1, 1).expand(3, -1))).folded
    shared_a = drawn(3, 1)
    for entry in LAYOUT.entries:
        shared_a[:, entry.start : entry.middle] = shared_a[0, entry.start : entry.middle]
    assert not merged(Residual(), drawn(1)[0], updates([3, 1, 2], shared_a)).folded


def test_a_residual_is_sent_at_its_numerical_rank() -> None:
    """Two clients: mean of products minus product of means is (w (1 - w)) (B1 - B2)(A1 - A2), of the rank of one client."""
    outcome = merged(Residual(), drawn(1)[0], updates([3, 1], drawn(2, 1)))
    first, second = drawn(2, 1)
    for key, rest in outcome.folded.items():
        assert len(rest.a) == RANK
        difference = LAYOUT.factors(first - second)[key]
        wanted = 0.1875 * (difference.b @ difference.a)
        torch.testing.assert_close(rest.b @ rest.a, wanted, rtol=1e-4, atol=1e-5)


def test_opposite_clients_fold_everything() -> None:
    """A mean adapter of zero, all of it in the residual."""
    values = drawn(1, 1).expand(2, -1).clone()
    values[1] *= -1
    outcome = merged(Residual(), drawn(1)[0], updates([1, 1], values))
    assert not outcome.adapters.any()
    assert_same(effect(LAYOUT, outcome), products(LAYOUT, values[0]))


def test_unequal_ranks_are_refused_by_the_residual_naming_key_and_ranks() -> None:
    ranks = torch.tensor([[4, 1, 2], [4, 2, 2]])
    with pytest.raises(AdapterError, match=r"residual: the participants' ranks of 0\.v are \[1, 2\]"):
        merged(Residual(), drawn(1)[0], updates([1, 1], padded(drawn(2), ranks), ranks))


def test_equal_ranks_below_the_layout_s_are_fine() -> None:
    ranks = ranks_of(2, 2, 2)
    given_updates = updates([1, 2, 3], padded(drawn(3, 1), ranks), ranks)
    assert_same(effect(LAYOUT, merged(Residual(), drawn(1)[0], given_updates)), mean_products(given_updates))
