"""`freeze_a` and `zero_pad`: starts cut off at a rank, B averaged over a common A, and weights by norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from unit.lowrank_cases import LAYOUT, RANK, assert_same, drawn, mean_products, merged, padded, products, ranks_of, updates

from splitft.aggregate.average import Average
from splitft.aggregate.base import Aggregator
from splitft.aggregate.freeze_a import FreezeA
from splitft.aggregate.zero_pad import ZeroPad
from splitft.errors import ConfigError

CUTTING: list[Aggregator] = [FreezeA(), ZeroPad()]


def trained_b(before: Tensor, ranks: Tensor, seed: int) -> Tensor:
    """What clients of these ranks send after training B alone, from their starts."""
    starts = torch.stack([FreezeA().distribute(LAYOUT, before, own)[0] for own in ranks])
    return padded(starts + FreezeA().trained(LAYOUT) * drawn(len(ranks), seed), ranks)


@given(st.integers(0, 1000), st.lists(st.tuples(st.integers(1, 100), st.integers(0, RANK)), min_size=1, max_size=5))
def test_with_a_frozen_the_mean_of_b_is_the_exact_mean_of_products_at_any_ranks(seed: int, clients: list[tuple[int, int]]) -> None:
    before, ranks = drawn(1, seed)[0], ranks_of(*(rank for _, rank in clients))
    given_updates = updates([tokens for tokens, _ in clients], trained_b(before, ranks, seed + 1), ranks)
    assert_same(products(LAYOUT, merged(FreezeA(), before, given_updates).adapters), mean_products(given_updates), 2e-6)


def test_a_frozen_stays_bit_for_bit_and_is_no_trained_column() -> None:
    before = drawn(1)[0]
    outcome = merged(FreezeA(), before, updates([1, 3], trained_b(before, ranks_of(4, 2), 1), ranks_of(4, 2)))
    for key, factors in LAYOUT.factors(outcome.adapters).items():
        assert torch.equal(factors.a, LAYOUT.factors(before)[key].a)
        assert not torch.equal(factors.b, LAYOUT.factors(before)[key].b)
        trained = LAYOUT.factors(FreezeA().trained(LAYOUT))[key]
        assert (bool(trained.a.any()), bool(trained.b.all())) == (False, True)


@pytest.mark.parametrize("rule", CUTTING, ids=["freeze_a", "zero_pad"])
def test_a_start_is_the_first_rows_and_columns_and_the_loss_is_said(rule: Aggregator) -> None:
    row, ranks = drawn(1)[0], torch.tensor([2, 0, 4])
    kept = row.clone()
    start, share = rule.distribute(LAYOUT, row, ranks)
    lost = whole = 0.0
    for (key, factors), rank in zip(LAYOUT.factors(start).items(), ranks.tolist(), strict=True):
        own = LAYOUT.factors(row)[key]
        assert torch.equal(factors.a[:rank], own.a[:rank])
        assert torch.equal(factors.b[:, :rank], own.b[:, :rank])
        assert not factors.a[rank:].any()
        assert not factors.b[:, rank:].any()
        lost += float(((products(LAYOUT, row)[key] - products(LAYOUT, start)[key]) ** 2).sum())
        whole += float((products(LAYOUT, row)[key] ** 2).sum())
    assert share == pytest.approx(lost / whole, rel=1e-5)
    assert torch.equal(row, kept)


@pytest.mark.parametrize("rule", CUTTING, ids=["freeze_a", "zero_pad"])
def test_full_ranks_and_fresh_adapters_lose_nothing(rule: Aggregator) -> None:
    row = drawn(1)[0]
    start, share = rule.distribute(LAYOUT, row, ranks_of(RANK)[0])
    assert torch.equal(start, row)
    assert share == 0.0
    assert rule.distribute(LAYOUT, LAYOUT.initial_row(0), ranks_of(1)[0])[1] == 0.0


def test_padding_by_tokens_at_equal_ranks_is_the_average() -> None:
    given_updates = updates([3, 1, 9], drawn(3, 1))
    assert torch.equal(merged(ZeroPad(), drawn(1)[0], given_updates).adapters, merged(Average(), drawn(1)[0], given_updates).adapters)


def test_rows_few_clients_own_fade_with_padding() -> None:
    row, ranks = drawn(1)[0], ranks_of(4, 1, 1, 1)
    values = torch.stack([ZeroPad().distribute(LAYOUT, row, own)[0] for own in ranks])
    found = merged(ZeroPad(), row, updates([1] * 4, values, ranks)).adapters
    for key, factors in LAYOUT.factors(found).items():
        own = LAYOUT.factors(row)[key]
        torch.testing.assert_close(factors.a[:1], own.a[:1])
        torch.testing.assert_close(factors.a[1:], own.a[1:] / 4)
        torch.testing.assert_close(factors.b[:, 1:], own.b[:, 1:] / 4)


def test_weights_by_norm_are_those_of_the_dense_products() -> None:
    values = drawn(3, 1) * torch.tensor([1.0, 3.0, 0.5])[:, None]
    norms = [np.sqrt(sum((matrix**2).sum() for matrix in products(LAYOUT, row).values())) for row in values]
    wanted = sum(norm / sum(norms) * row.double() for norm, row in zip(norms, values, strict=True))
    found = merged(ZeroPad("norm"), drawn(1)[0], updates([100, 1, 1], values)).adapters
    torch.testing.assert_close(found, torch.as_tensor(wanted).float())


def test_weights_by_norm_without_tokens_or_without_norms() -> None:
    values = drawn(2, 1)
    rule, before = ZeroPad("norm"), drawn(1)[0]
    assert torch.equal(merged(rule, before, updates([0, 5], values)).adapters, values[1])
    fresh = torch.stack([LAYOUT.initial_row(seed) for seed in (0, 1)])
    torch.testing.assert_close(merged(rule, before, updates([1, 3], fresh)).adapters, 0.25 * fresh[0] + 0.75 * fresh[1])


def test_another_weighting_is_refused_naming_the_two() -> None:
    with pytest.raises(ConfigError, match=r"aggregator\.weights is 'size'.*tokens, norm"):
        ZeroPad("size")
