"""The `product` rule: the optimum of a dense SVD, with and without rank partitions, and what thirty rounds do to the higher ranks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from unit.lowrank_cases import (
    LAYOUT,
    RANK,
    assert_same,
    drawn,
    least_error,
    mean_products,
    merged,
    padded,
    products,
    ranks_of,
    updates,
)

from splitft.aggregate.base import Aggregator, Updates
from splitft.aggregate.product import Product
from splitft.aggregate.zero_pad import ZeroPad
from splitft.lora import Layout
from splitft.rng import torch_stream
from splitft.types import Key

Case = Callable[[], Updates]


def random_clients() -> Updates:
    return updates([3, 1, 100], drawn(3, 1))


def unequal_ranks() -> Updates:
    ranks = ranks_of(4, 1, 2, 0, 3)
    return updates([5, 7, 1, 2, 4], padded(drawn(5, 2), ranks), ranks)


def ranks_by_key() -> Updates:
    ranks = torch.tensor([[4, 1, 2], [2, 4, 0], [1, 1, 1]])
    return updates([1, 2, 3], padded(drawn(3, 3), ranks), ranks)


def opposite() -> Updates:
    """Two clients whose updates cancel but for a trace, and a third that is small."""
    values = drawn(3, 4)
    for entry in LAYOUT.entries:
        values[1, entry.start : entry.middle] = values[0, entry.start : entry.middle]
        values[1, entry.middle : entry.end] = -values[0, entry.middle : entry.end] * (1 + 1e-3)
    return updates([1, 1, 1], values * torch.tensor([1.0, 1.0, 0.03])[:, None])


def duplicated_values() -> Updates:
    """Orthogonal clients of equal size on the same rows: at the rank, the cut falls between equal singular values."""
    values = torch.zeros(5, LAYOUT.parameters)
    for entry in LAYOUT.entries:
        for k in range(5):
            values[k, entry.start + k] = 1.0
            values[k, entry.middle + k * entry.rank] = 1.0
    return updates([2] * 5, values)


def rank_deficient() -> Updates:
    return updates([2, 3, 4], drawn(1, 5).expand(3, -1))


def one_huge_and_many_tiny() -> Updates:
    values = drawn(9, 6)
    values[1:] *= 1e-3
    return updates([1_000_000, *[1] * 8], values)


CASES = [random_clients, unequal_ranks, ranks_by_key, opposite, duplicated_values, rank_deficient, one_huge_and_many_tiny]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)


def excess(rule: Aggregator, given_updates: Updates) -> float:
    """By how much the error of the merged adapter exceeds the least possible, as a share of the mean's norm; the worst key."""
    found, worst = products(LAYOUT, merged(rule, drawn(1, 99)[0], given_updates).adapters), 0.0
    for key, exact in mean_products(given_updates).items():
        error = float(np.linalg.norm(exact - found[key]))
        worst = max(worst, (error - least_error(exact, RANK) ** 0.5) / float(np.linalg.norm(exact)))
    return worst


@every_case
def test_it_reaches_the_least_error_of_a_dense_svd(case: Case) -> None:
    assert excess(Product(), case()) <= 1e-5


@pytest.mark.parametrize("case", [random_clients, unequal_ranks, ranks_by_key, opposite, duplicated_values], ids=lambda case: case.__name__)
def test_zero_padding_does_not(case: Case) -> None:
    assert excess(ZeroPad(), case()) > 0.05


@every_case
def test_the_discarded_energy_is_what_the_dense_svd_discards(case: Case) -> None:
    means = mean_products(case())
    wanted = sum(least_error(exact, RANK) for exact in means.values()) / sum(float((exact**2).sum()) for exact in means.values())
    metrics = merged(Product(), drawn(1)[0], case()).metrics
    assert metrics == {"discarded_energy": pytest.approx(wanted, rel=1e-5, abs=1e-12)}


def test_a_start_lends_directions_and_never_a_value() -> None:
    """The merge is the same product wherever the round began, and rows of A without a value can still learn."""
    given_updates = updates([1, 1], padded(drawn(2, 1), ranks_of(1, 1)), ranks_of(1, 1))
    one, other = (merged(Product(), before, given_updates).adapters for before in (drawn(1, 8)[0], 1e3 * drawn(1, 9)[0]))
    assert_same(products(LAYOUT, one), products(LAYOUT, other), 1e-5)
    for factors in LAYOUT.factors(one).values():
        assert int(torch.linalg.matrix_rank(factors.a)) == RANK
        assert int(torch.linalg.matrix_rank(factors.b)) == 2


def test_in_the_second_round_equal_updates_leave_the_factors_themselves_in_place() -> None:
    """The first merge brings the rows of A to their gauge; from then on an adapter nobody changes does not move in any coordinate."""
    start = merged(Product(), drawn(1)[0], updates([1], drawn(1))).adapters
    again = merged(Product(), start, updates([1, 5, 2], start.expand(3, -1))).adapters
    torch.testing.assert_close(again, start, rtol=1e-5, atol=1e-5)


def test_a_small_change_of_the_clients_is_a_small_change_of_the_factors() -> None:
    """The ordered factors of the same product lie elsewhere altogether."""
    start = merged(Product(), drawn(1)[0], updates([1], drawn(1))).adapters
    moved = merged(Product(), start, updates([1, 1], start + 1e-3 * drawn(2, 3))).adapters
    ordered, _ = Product(partitioned=True).distribute(LAYOUT, moved, ranks_of(RANK)[0])
    assert float((moved - start).norm()) < 0.01 * float(start.norm())
    assert float((ordered - start).norm()) > 0.5 * float(start.norm())


@pytest.mark.parametrize("rule", [Product(), Product(partitioned=True)], ids=["plain", "partitioned"])
@given(seed=st.integers(0, 1000), tokens=st.lists(st.integers(0, 50), min_size=1, max_size=4).filter(any), factor=st.integers(2, 10**6))
def test_laws_of_weights_and_order(rule: Product, seed: int, tokens: list[int], factor: int) -> None:
    """Unit of tokens, order of participants and who trained nothing do not matter; equal updates stay as they are."""
    count = len(tokens)
    ranks = torch.stack([torch.tensor([(seed + 3 * k + e) % 4 + 1 for e in range(3)]) for k in range(count)])
    values, before = padded(drawn(count, seed), ranks), drawn(1, seed + 1)[0]
    wanted = merged(rule, before, updates(tokens, values, ranks)).adapters
    scaled = merged(rule, before, updates([factor * count for count in tokens], values, ranks)).adapters
    backwards = Updates(tuple(range(count))[::-1], tuple(tokens[::-1]), values.flip(0), LAYOUT, ranks.flip(0))
    idle = updates([*tokens, 0], torch.cat([values, 1e6 * drawn(1, 7)]), torch.cat([ranks, ranks_of(4)]))
    assert_same(products(LAYOUT, scaled), products(LAYOUT, wanted), 1e-5)
    assert torch.equal(merged(rule, before, backwards).adapters, wanted)
    assert torch.equal(merged(rule, before, idle).adapters, wanted)
    equal = merged(rule, before, updates(tokens, values[:1].expand(count, -1), ranks[:1].expand(count, -1))).adapters
    assert_same(products(LAYOUT, equal), products(LAYOUT, values[0]), 1e-6)


def test_the_order_of_participants_does_not_choose_between_equally_good_answers() -> None:
    given_updates, order = duplicated_values(), [4, 3, 2, 1, 0]
    moved = Updates(tuple(order), given_updates.tokens, given_updates.values[order], LAYOUT)
    assert torch.equal(merged(Product(), drawn(1)[0], moved).adapters, merged(Product(), drawn(1)[0], given_updates).adapters)


def test_with_equal_ranks_partitions_change_nothing() -> None:
    ranks = ranks_of(3, 3, 3)
    given_updates = updates([5, 1, 2], padded(drawn(3, 1), ranks), ranks)
    plain, partitioned = (merged(Product(part), drawn(1)[0], given_updates) for part in (False, True))
    torch.testing.assert_close(plain.adapters, partitioned.adapters)
    assert plain.metrics == pytest.approx(partitioned.metrics)


def test_a_partition_is_weighted_over_its_owners_only() -> None:
    """Against the sum written out: ranks 1 and 3, and a third client that does not hold the key at all."""
    ranks = ranks_of(1, 3, 0)
    values = padded(drawn(3, 1), ranks)
    found = products(LAYOUT, merged(Product(partitioned=True), drawn(1)[0], updates([1, 3, 4], values, ranks)).adapters)
    for key, entry in LAYOUT.by_key.items():
        (a0, b0), (a1, b1) = ((a.double(), b.double()) for a, b in (LAYOUT.factors(row)[key] for row in values[:2]))
        exact = 0.25 * b0[:, :1] @ a0[:1] + 0.75 * b1[:, :1] @ a1[:1] + b1[:, 1:3] @ a1[1:3]
        np.testing.assert_allclose(found[key], entry.scale * exact.numpy(), atol=1e-5)


def test_every_start_of_the_partitioned_rule_is_ordered_and_full_ranks_lose_nothing() -> None:
    row = drawn(1)[0]
    kept = row.clone()
    start, lost = Product(partitioned=True).distribute(LAYOUT, row, ranks_of(RANK)[0])
    assert lost == pytest.approx(0.0, abs=1e-12)
    assert_same(products(LAYOUT, start), products(LAYOUT, row))
    shorter, share = Product(partitioned=True).distribute(LAYOUT, row, ranks_of(2)[0])
    assert share == pytest.approx(Product().distribute(LAYOUT, row, ranks_of(2)[0])[1])
    for key, factors in LAYOUT.factors(start).items():
        sizes = factors.b.norm(dim=0)
        assert torch.equal(sizes, sizes.sort(descending=True).values)
        torch.testing.assert_close(LAYOUT.factors(shorter)[key].b[:, :2], factors.b[:, :2])
    assert torch.equal(row, kept)


WIDE = Layout.of({Key(0, "q"): (24, 20), Key(1, "q"): (16, 32)}, 8, 1.0)


def beyond(row: Tensor, rank: int) -> float:
    """Squared norm beyond the first `rank` singular values, over all keys."""
    return sum(least_error(matrix, rank) for matrix in products(WIDE, row).values())


def rounds(rule: Product, noise: float, present: Callable[[int], bool] = lambda index: True) -> list[float]:
    """Energy above rank 2 over thirty rounds of one client with rank 8 (while `present`) and four with rank 2."""
    start = drawn(1, 5, WIDE)[0]
    state, curve = rule.init(WIDE), [beyond(start, 2)]
    for index in range(30):
        ranks = ranks_of(*[8] * present(index), 2, 2, 2, 2, layout=WIDE)
        values = torch.stack([rule.distribute(WIDE, start, own)[0] for own in ranks])
        generator = torch_stream(0, "collapse-test", index)
        values = padded(values + noise * torch.randn(values.shape, generator=generator), ranks, WIDE)
        outcome = rule.merge(start, updates([1] * len(ranks), values, ranks, WIDE), state)
        start, state = outcome.adapters, outcome.state
        curve.append(beyond(start, 2))
    return curve


def test_ranks_collapse_without_partitions_and_not_with_them() -> None:
    """Without training the higher components fall to a fifth a round, the wide client's share; with partitions they stay."""
    plain, partitioned = rounds(Product(), 0.0), rounds(Product(partitioned=True), 0.0)
    for before, after in pairwise(plain[:6]):
        assert after == pytest.approx(before / 25, rel=1e-3)
    assert plain[-1] < 1e-6 * plain[0]
    assert partitioned[-1] == pytest.approx(partitioned[0], rel=1e-3)


def test_with_small_training_the_partitions_still_hold_the_energy() -> None:
    plain, partitioned = rounds(Product(), 0.01), rounds(Product(partitioned=True), 0.01)
    assert plain[-1] < 0.01 * plain[0]
    assert partitioned[-1] > 0.8 * partitioned[0]


def test_an_absent_owner_s_components_wait_for_it() -> None:
    """In every third round only; without the memory of the widest rank the first absence would erase them."""
    assert rounds(Product(partitioned=True), 0.0, lambda index: index % 3 == 0)[-1] == pytest.approx(
        beyond(drawn(1, 5, WIDE)[0], 2), rel=1e-3
    )
    assert rounds(Product(), 0.0, lambda index: index % 3 == 0)[3] < 1e-9


def test_components_nobody_ever_owned_do_not_pile_up() -> None:
    rule, start = Product(partitioned=True), drawn(1, 5, WIDE)[0]
    ranks = ranks_of(2, 2, layout=WIDE)
    values = torch.stack([rule.distribute(WIDE, start, own)[0] for own in ranks])
    outcome = rule.merge(start, updates([1, 1], values, ranks, WIDE), rule.init(WIDE))
    assert beyond(outcome.adapters, 2) < 1e-9
    assert {name: tensor.tolist() for name, tensor in outcome.state.items()} == {"product.widest_ranks": [2, 2]}
