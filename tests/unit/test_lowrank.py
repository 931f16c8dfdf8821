"""Low-rank algebra against dense float64 SVDs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from unit.lowrank_cases import LAYOUT, drawn, least_error, products, ranks_of

from splitft.lowrank import GAUGE, align, best_factors, energy, pad, truncate, write
from splitft.rng import torch_stream
from splitft.types import Factors, Key

Terms = list[tuple[float, Factors]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch_stream(seed, "lowrank-test"), dtype=torch.float64)


def factors(rank: int, inputs: int, outputs: int, seed: int = 0) -> Factors:
    return Factors(normal(rank, inputs, seed=2 * seed), normal(outputs, rank, seed=2 * seed + 1))


def dense(terms: Terms) -> Tensor:
    return torch.stack([weight * (b.double() @ a.double()) for weight, (a, b) in terms]).sum(0)


def opposite() -> Terms:
    one, two = factors(4, 9, 11), factors(4, 9, 11, seed=1)
    return [(0.5, one), (0.5, Factors(one.a, -one.b)), (1e-3, two)]


def duplicated_values() -> Terms:
    """Singular values 3, 2, 2, 2, 1, so that the cut at rank 3 falls between equals."""
    left, right = torch.linalg.qr(normal(11, 5, seed=3)).Q, torch.linalg.qr(normal(9, 5, seed=4)).Q
    return [(1.0, Factors(right.T, left * torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0], dtype=torch.float64)))]


def rank_deficient() -> Terms:
    one = factors(1, 9, 11)
    return [(0.3, Factors(one.a.repeat(4, 1), one.b.repeat(1, 4))), (0.7, Factors(torch.zeros(2, 9), torch.zeros(11, 2)))]


def huge_and_tiny() -> Terms:
    big = factors(1, 9, 11)
    return [(0.5, Factors(big.a * 1e6, big.b)), *((1e-3, factors(2, 9, 11, seed=seed)) for seed in range(1, 9))]


def wider_than_the_matrix() -> Terms:
    return [(1 / 8, factors(4, 5, 6, seed=seed)) for seed in range(8)]


def unbalanced() -> Terms:
    """The same size of product from A large and B small, and the other way round."""
    one, two = factors(3, 9, 11), factors(3, 9, 11, seed=1)
    return [(0.5, Factors(one.a * 1e6, one.b * 1e-6)), (0.5, Factors(two.a * 1e-6, two.b * 1e6))]


CASES = [opposite, duplicated_values, rank_deficient, huge_and_tiny, wider_than_the_matrix, unbalanced]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("rank", [0, 1, 3, 5, 12])
def test_no_matrix_of_the_rank_comes_nearer(case: Callable[[], Terms], rank: int) -> None:
    exact = dense(case()).numpy()
    found, error, total = best_factors(case(), rank)
    size = float((exact**2).sum())
    reached = float(((exact - (found.b @ found.a).numpy()) ** 2).sum())
    assert reached**0.5 <= least_error(exact, rank) ** 0.5 + 1e-12 * size**0.5
    assert error == pytest.approx(least_error(exact, rank), rel=1e-6, abs=1e-20 * size)
    assert total == pytest.approx(size, rel=1e-9)
    assert (found.a.shape, found.b.shape) == ((rank, exact.shape[1]), (exact.shape[0], rank))


@given(st.integers(0, 10**6), st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(1, 8), st.integers(1, 8), st.integers(0, 9))
def test_the_best_error_is_reached_for_any_shapes(seed: int, ranks: list[int], inputs: int, outputs: int, rank: int) -> None:
    terms = [((-1.0) ** k / (k + 1), factors(own, inputs, outputs, seed=seed + 7 * k)) for k, own in enumerate(ranks)]
    exact = dense(terms).numpy()
    found, error, _ = best_factors(terms, rank)
    reached = float(((exact - (found.b @ found.a).numpy()) ** 2).sum())
    assert reached == pytest.approx(least_error(exact, rank), rel=1e-9, abs=1e-22 * max(1.0, float((exact**2).sum())))
    assert error == pytest.approx(reached, rel=1e-9, abs=1e-22 * max(1.0, float((exact**2).sum())))


def test_rows_are_orthogonal_of_the_gauge_s_length_and_ordered() -> None:
    found, _, _ = best_factors([(1.0, factors(5, 9, 11))], 5)
    torch.testing.assert_close(found.a @ found.a.T, torch.eye(5, dtype=torch.float64) * GAUGE**2)
    values = found.b.norm(dim=0) * GAUGE
    np.testing.assert_allclose(values, np.linalg.svd(dense([(1.0, factors(5, 9, 11))]), compute_uv=False)[:5], rtol=1e-12)


def test_a_prefix_is_the_best_of_the_smaller_rank() -> None:
    terms = [(1.0, factors(5, 9, 11))]
    wide, narrow = best_factors(terms, 5)[0], best_factors(terms, 2)[0]
    torch.testing.assert_close(wide.b[:, :2] @ wide.a[:2], narrow.b @ narrow.a)


def test_unused_rows_of_a_span_what_the_terms_lend_and_nothing_else() -> None:
    """One used direction, three more lent at weight 0, the rank leaves room for two more than that: those stay zero."""
    used, lent = factors(1, 20, 6), factors(3, 20, 6, seed=1)
    zero = Factors(torch.zeros(4, 20, dtype=torch.float64), torch.zeros(6, 4, dtype=torch.float64))
    found, _, _ = best_factors([(1.0, used), (0.0, lent), (1.0, zero)], 6)
    span = torch.linalg.qr(torch.cat([used.a, lent.a]).T).Q
    torch.testing.assert_close(found.a @ span @ span.T, found.a)
    torch.testing.assert_close(found.a[:4] @ found.a[:4].T, torch.eye(4, dtype=torch.float64) * GAUGE**2)
    assert not found.a[4:].any()
    assert not found.b[:, 1:].any()


def test_where_terms_cancel_the_rest_is_not_taken_for_a_direction() -> None:
    one = factors(3, 9, 11)
    found, error, total = best_factors([(0.5, one), (0.5, Factors(one.a, -one.b))], 2)
    assert not found.b.any()
    torch.testing.assert_close(found.a @ found.a.T, torch.eye(2, dtype=torch.float64) * GAUGE**2)
    assert error == pytest.approx(total, abs=1e-25)


def test_aligned_factors_keep_the_product_and_no_rotation_is_nearer() -> None:
    own, reference = factors(4, 9, 11), factors(4, 9, 11, seed=1)
    turned = align(own, reference)
    torch.testing.assert_close(turned.b @ turned.a, own.b @ own.a)

    def distance(candidate: Factors) -> float:
        return float((candidate.a - reference.a).square().sum() + (candidate.b - reference.b).square().sum())

    for seed in range(50):
        rotation = torch.linalg.qr(normal(4, 4, seed=100 + seed)).Q
        assert distance(turned) <= distance(Factors(rotation @ own.a, own.b @ rotation.T))


def test_a_rotation_is_undone() -> None:
    own = factors(4, 9, 11)
    rotation = torch.linalg.qr(normal(4, 4, seed=9)).Q
    found = align(Factors(rotation @ own.a, own.b @ rotation.T), own)
    torch.testing.assert_close(found.a, own.a)
    torch.testing.assert_close(found.b, own.b)


@given(st.integers(0, 1000), st.integers(0, 5))
def test_energy_is_the_squared_norm_of_the_product(seed: int, rank: int) -> None:
    own = factors(rank, 6, 8, seed=seed)
    assert energy(own) == pytest.approx(float((own.b @ own.a).square().sum()), rel=1e-9, abs=1e-12)


def test_truncation_is_the_best_of_every_key_and_says_what_is_lost() -> None:
    row, ranks = drawn(1)[0], torch.tensor([2, 4, 1])
    kept = row.clone()
    found, share = truncate(LAYOUT, row, ranks)
    lost = whole = 0.0
    for (key, exact), rank in zip(products(LAYOUT, row).items(), ranks.tolist(), strict=True):
        error = float(((exact - products(LAYOUT, found)[key]) ** 2).sum())
        assert error == pytest.approx(least_error(exact, rank), rel=1e-5, abs=1e-9)
        lost, whole = lost + least_error(exact, rank), whole + float((exact**2).sum())
    assert share == pytest.approx(lost / whole, rel=1e-6)
    assert not found[~LAYOUT.active(ranks.tolist())].any()
    untouched = LAYOUT.by_key[Key(0, "v")]
    assert torch.equal(found[untouched.start : untouched.end], row[untouched.start : untouched.end])
    assert torch.equal(row, kept)


def test_an_adapter_of_zero_product_keeps_rows_to_learn_with() -> None:
    fresh = LAYOUT.initial_row(1)
    found, share = truncate(LAYOUT, fresh, ranks_of(2)[0])
    assert share == 0.0
    for own in LAYOUT.factors(found).values():
        torch.testing.assert_close(own.a[:2] @ own.a[:2].T, torch.eye(2) * GAUGE**2)
        assert not own.b.any()


def test_padding_and_writing_change_no_product() -> None:
    own = factors(2, 7, 9)
    longer = pad(own, 4)
    assert torch.equal(longer.b @ longer.a, own.b @ own.a)
    assert pad(own, 1) is own
    row = drawn(1)[0]
    kept = row.clone()
    write(LAYOUT, row, Key(0, "q"), longer)
    torch.testing.assert_close(LAYOUT.factors(row)[Key(0, "q")].a, longer.a.float())
    torch.testing.assert_close(LAYOUT.factors(row)[Key(0, "q")].b, longer.b.float())
    assert torch.equal(row[LAYOUT.by_key[Key(0, "q")].end :], kept[LAYOUT.by_key[Key(0, "q")].end :])


@pytest.mark.parametrize(("clients", "inputs", "outputs"), [(2, 30, 40), (9, 30, 20), (9, 20, 30), (40, 7, 9), (3, 12, 12)])
def test_many_terms_and_few_take_different_ways_to_the_same_answer(clients: int, inputs: int, outputs: int) -> None:
    """More terms than the sum has rows or columns: it is decomposed itself. Fewer: in the bases of its factors."""
    terms: Terms = [(0.1 + k, factors(4, inputs, outputs, seed=k)) for k in range(clients)]
    found, error, whole = best_factors(terms, 4)
    u, singular, vh = torch.linalg.svd(dense(terms), full_matrices=False)
    wanted = (u[:, :4] * singular[:4]) @ vh[:4]
    assert torch.allclose(found.b @ found.a, wanted, rtol=0, atol=1e-12 * float(singular[0]))
    assert error == pytest.approx(float(singular[4:].square().sum()), rel=1e-10)
    assert whole == pytest.approx(float(singular.square().sum()), rel=1e-12)
