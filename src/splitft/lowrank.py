"""Algebra of low-rank products: sums of B A without forming them, best approximation at a lower rank, and gauges.

The same product B A has many factors: B M^-1, M A for any invertible M. Where a rule must choose, it chooses A with orthogonal rows of
length `GAUGE` (about that of LoRA's random A, so that training goes on at the pace it began with), never the balanced one, in which
directions that are not used yet would be zero on both sides and could not learn.

Axes: r rank, i input width, o output width, n terms of a sum, p adapter parameters, e entries of the layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from splitft.lora import Layout
from splitft.types import Factors, Key

GAUGE = 1 / math.sqrt(3)


def best_factors(terms: Sequence[tuple[float, Factors]], rank: int) -> tuple[Factors, float, float]:
    """Factors A [rank, i], B [o, rank] (float64) of the best approximation of sum of w B A at `rank`, its squared error, and the squared
    norm of the exact sum.

    Best in the Frobenius norm (Eckart and Young 1936, DOI 10.1007/BF02288367). Rows are ordered by singular value; rows of A without
    one span the rest of the terms' A rows while there are any, then are zero. A term of weight 0 only lends its directions.
    """
    a = torch.cat([factors.a for _, factors in terms]).double()
    b = torch.cat([weight * factors.b.double() for weight, factors in terms], dim=1)
    if len(a) > min(a.shape[1], len(b)):  # more terms than the sum has rows or columns: then the sum itself is the smallest form
        _, singular, vh = torch.linalg.svd(b @ a, full_matrices=False)
    else:
        basis, right = torch.linalg.qr(a.T)
        core = torch.linalg.qr(b, mode="r").R @ right.T  # the sum in orthonormal bases: the same singular values
        _, singular, vh = torch.linalg.svd(core, full_matrices=False)
        vh = vh @ basis.T
    kept = min(rank, int((singular > _noise(a, b)).sum()))
    rows = vh[:kept]
    new_a, new_b = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
    new_a[:kept] = rows * GAUGE
    # The projection of the sum on these rows, rather than left singular vectors times values: no second basis is needed.
    new_b[:, :kept] = b @ (a @ rows.T) / GAUGE
    if kept < rank:
        spare = _other_directions(a, rows)[: rank - kept]
        new_a[kept : kept + len(spare)] = spare * GAUGE
    return Factors(new_a, new_b), float(singular[kept:].square().sum()), float(singular.square().sum())


def _noise(a: Tensor, b: Tensor) -> float:
    """What rounding alone may make of a singular value of b [o k] a [k i] that is zero, also where large terms cancel."""
    level: float = float((a.norm(dim=1) * b.norm(dim=0)).sum()) * max(1, *a.shape) * torch.finfo(a.dtype).eps
    return level


def _other_directions(a: Tensor, rows: Tensor) -> Tensor:
    """Orthonormal rows that span what the rows of `a` [.. i] reach beyond the orthonormal `rows` [r i], the strongest first."""
    rest = a - (a @ rows.T) @ rows
    rest = rest - (rest @ rows.T) @ rows  # once more, since the first pass leaves rounding errors of the size of `a`
    _, singular, vh = torch.linalg.svd(rest, full_matrices=False)
    directions: Tensor = vh[singular > float(a.norm()) * max(1, *a.shape) * torch.finfo(a.dtype).eps]
    return directions


def align(factors: Factors, reference: Factors) -> Factors:
    """The factors of the same product that are nearest to `reference` under a rotation of the rank axis (orthogonal Procrustes:
    Schoenemann 1966, DOI 10.1007/BF02289451), so that a global adapter does not jump to other coordinates from round to round."""
    a, b = factors.a.double(), factors.b.double()
    u, _, vh = torch.linalg.svd(a @ reference.a.double().T + b.T @ reference.b.double())
    rotation = (u @ vh).T
    return Factors(rotation @ a, b @ rotation.T)


def energy(factors: Factors) -> float:
    """Squared Frobenius norm of B A."""
    a, b = factors.a.double(), factors.b.double()
    return float(((b.T @ b) * (a @ a.T)).sum())


def truncate(layout: Layout, row: Tensor, ranks: Tensor) -> tuple[Tensor, float]:
    """An adapter [p] whose keys are brought down to `ranks` [e] by their best approximation, padded with zeros, and the share of its
    squared norm (scales included) that is lost. Keys that keep their rank are left as they are, factors and all."""
    result, lost, whole = row.clone(), 0.0, 0.0
    factors = layout.factors(row)
    for entry, rank in zip(layout.entries, ranks.tolist(), strict=True):
        own, square = factors[entry.key], entry.scale**2
        if rank >= entry.rank:
            whole += square * energy(own)
            continue
        shorter, error, total = best_factors([(1.0, own)], rank)
        lost, whole = lost + square * error, whole + square * total
        write(layout, result, entry.key, pad(shorter, entry.rank))
    return result, lost / whole if whole > 0 else 0.0


def pad(factors: Factors, rank: int) -> Factors:
    """The same product at a higher rank: rows of A and columns of B of zeros behind."""
    a, b = factors
    if a.shape[0] >= rank:
        return factors
    return Factors(
        torch.cat([a, a.new_zeros(rank - a.shape[0], a.shape[1])]), torch.cat([b, b.new_zeros(b.shape[0], rank - b.shape[1])], dim=1)
    )


def write(layout: Layout, row: Tensor, key: Key, factors: Factors) -> None:
    """Put the factors of one key into a row [p], in place."""
    entry = layout.by_key[key]
    row[entry.start : entry.middle] = factors.a.to(row.dtype).reshape(-1)
    row[entry.middle : entry.end] = factors.b.to(row.dtype).reshape(-1)
