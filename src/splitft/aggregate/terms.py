"""What the rules for low-rank products share: the weighted terms of the exact mean, and starts cut off at a rank without an SVD.

Axes: n participants, e entries of the layout, p adapter parameters, r rank, i input width, o output width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from splitft.aggregate.base import Updates, weighted_sum
from splitft.errors import AdapterError
from splitft.lora import Layout
from splitft.lowrank import energy
from splitft.types import Factors, Key

# A sum of w B A, as best_factors takes it.
Terms = list[tuple[float, Factors]]


def own_ranks(updates: Updates) -> Tensor:
    """Rank of every participant's own part of every entry [n e], int64; the layout's where nothing else is said."""
    full = torch.tensor([entry.rank for entry in updates.layout.entries])
    return full.expand(len(updates.clients), -1) if updates.ranks is None else torch.minimum(updates.ranks, full)


def mean_terms(updates: Updates) -> dict[Key, Terms]:
    """For every key the terms w_i B_i A_i whose sum is the exact mean, without the zeros behind smaller ranks. A participant without
    tokens makes no term, having no weight; nor does one without an adapter on that key, its product being zero: it weighs all the same."""
    terms: dict[Key, Terms] = {entry.key: [] for entry in updates.layout.entries}
    participants = zip(updates.clients, updates.weights().tolist(), updates.values, own_ranks(updates).tolist(), strict=True)
    # By client, since where singular values tie at the rank the order of terms would choose between equally good answers.
    for _, weight, row, ranks in sorted(participants, key=lambda participant: participant[0]):
        if weight == 0:
            continue
        for (key, factors), rank in zip(updates.layout.factors(row).items(), ranks, strict=True):
            if rank > 0:
                terms[key].append((weight, Factors(factors.a[:rank], factors.b[:, :rank])))
    return terms


def mean_row(weights: Tensor, values: Tensor) -> Tensor:
    """Weighted sum of the rows of `values` [n p] in float64 and in their order, rounded to float32 once."""
    return weighted_sum(weights.tolist(), values).float()


def require_equal_ranks(updates: Updates, rule: str) -> None:
    """AdapterError naming the first key whose rank differs between participants."""
    ranks = own_ranks(updates)
    unequal = (ranks != ranks[:1]).any(0)
    if bool(unequal.any()):
        column = int(unequal.nonzero()[0])
        key = updates.layout.entries[column].key
        raise AdapterError(
            f"{rule}: the participants' ranks of {key} are {ranks[:, column].tolist()}, needed are equal ones.",
            'set ranks.name to "uniform", or aggregator.name to "product" or "stack".',
        )


def cut_off(layout: Layout, row: Tensor, ranks: Tensor) -> tuple[Tensor, float]:
    """An adapter [p] with the first rows of A and columns of B up to `ranks` [e] and zeros behind, and the share of its squared norm
    (scales included) that the rest makes; above 1 where the two parts cancel each other."""
    lost, whole = 0.0, 0.0
    for (key, factors), rank in zip(layout.factors(row).items(), ranks.tolist(), strict=True):
        square = layout.by_key[key].scale ** 2
        lost += square * energy(Factors(factors.a[rank:], factors.b[:, rank:]))
        whole += square * energy(factors)
    return row * layout.active(ranks.tolist()), lost / whole if whole > 0 else 0.0
