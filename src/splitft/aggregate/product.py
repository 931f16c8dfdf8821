"""Exact mean of the products, brought back to the layout's ranks by its best approximation."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from splitft.aggregate.base import Aggregator, Merged, State, Updates, require_finite
from splitft.aggregate.terms import Terms, mean_terms, own_ranks
from splitft.lora import Layout
from splitft.lowrank import align, best_factors, pad, write
from splitft.types import Factors

WIDEST = "product.widest_ranks"  # [e] int64: the largest rank anybody has trained an entry with so far


@dataclass(frozen=True)
class Product(Aggregator):
    """The token-weighted mean of the clients' products B A, taken exactly and re-factored by SVD (HLoRA, FlexLoRA).

    The global adapter is the best approximation of that mean at the layout's rank; every client starts from its best approximation at
    the client's rank. So ranks may differ, and with full ranks nothing is lost but what `discarded_energy` says: the share of the
    mean's squared norm, over all keys with their scales, beyond the rank. The factors are turned to lie as near as possible to the
    former ones (the papers are silent; our reconstruction), so that moments and server optimizers keep their meaning; directions in
    which the mean is zero keep a row of A, so that they can still learn.

    `partitioned`: weights by rank partition (raFLoRA). Without it, a component that few clients are wide enough to train is averaged
    with the zeros of all others and fades round by round, until only the smallest rank is left. With it, components are divided by
    index at the distinct ranks of the participants, and each part is weighted over those who own it. Components nobody present owns,
    though somebody did before, stay as they were (our reconstruction: one absence must not erase them). Every start is then ordered by
    singular value, which turns full-rank clients' factors each round too: reset their moments. With equal ranks it is the exact mean.
    `discarded_energy` then refers to the sum so weighted.

    Prefer it to `average` whenever ranks differ or clients drift apart; prefer `partitioned` when few clients hold the high ranks.
    """

    partitioned: bool = False

    references: ClassVar[tuple[str, ...]] = ("2503.00813", "2402.11505", "2602.13486")
    unequal_ranks: ClassVar[bool] = True

    def init(self, layout: Layout) -> State:
        return {WIDEST: torch.zeros(len(layout.entries), dtype=torch.int64)} if self.partitioned else {}

    def distribute(self, layout: Layout, row: Tensor, ranks: Tensor) -> tuple[Tensor, float]:
        if not self.partitioned:
            return super().distribute(layout, row, ranks)
        result, lost, whole = torch.zeros_like(row), 0.0, 0.0
        factors = layout.factors(row)
        for entry, rank in zip(layout.entries, ranks.tolist(), strict=True):
            ordered, error, total = best_factors([(1.0, factors[entry.key])], min(rank, entry.rank))
            lost, whole = lost + entry.scale**2 * error, whole + entry.scale**2 * total
            write(layout, result, entry.key, pad(ordered, entry.rank))
        return result, lost / whole if whole > 0 else 0.0

    def merge(self, before: Tensor, updates: Updates, state: State) -> Merged:
        require_finite(updates)
        layout, starts = updates.layout, updates.layout.factors(before)
        terms = mean_terms(updates)
        if self.partitioned:
            state = {WIDEST: torch.maximum(state[WIDEST], _widest(updates))}
            for entry, widest in zip(layout.entries, state[WIDEST].tolist(), strict=True):
                terms[entry.key] = _by_partition(terms[entry.key], starts[entry.key], widest)
        adapters, lost, whole = torch.zeros_like(before), 0.0, 0.0
        for entry in layout.entries:
            start = starts[entry.key]
            factors, error, total = best_factors([*terms[entry.key], (0.0, start)], entry.rank)
            lost, whole = lost + entry.scale**2 * error, whole + entry.scale**2 * total
            write(layout, adapters, entry.key, align(factors, start))
        return Merged(adapters, state, metrics={"discarded_energy": lost / whole if whole > 0 else 0.0})


def _widest(updates: Updates) -> Tensor:
    """The largest rank among those who trained, per entry [e]."""
    trained = torch.tensor([tokens > 0 for tokens in updates.tokens])
    return own_ranks(updates)[trained].amax(0)


def _by_partition(terms: Terms, start: Factors, widest: int) -> Terms:
    """The terms of one key with the weights of each rank partition shared among its owners, and the part of the start nobody owns."""
    ranks = sorted({len(factors.a) for _, factors in terms})
    parts: Terms = []
    for low, high in pairwise([0, *ranks]):
        owners = [(weight, factors) for weight, factors in terms if len(factors.a) >= high]
        share = sum(weight for weight, _ in owners)
        parts += [(weight / share, Factors(a[low:high], b[:, low:high])) for weight, (a, b) in owners]
    top = ranks[-1] if ranks else 0
    if top < widest:
        (a, b), _, _ = best_factors([(1.0, start)], widest)
        parts.append((1.0, Factors(a[top:], b[:, top:])))
    return parts
