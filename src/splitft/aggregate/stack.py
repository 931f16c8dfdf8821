"""Stacked factors, folded into the frozen weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from splitft.aggregate.base import Aggregator, Merged, State, Updates, require_finite
from splitft.aggregate.terms import mean_terms
from splitft.lora import Layout
from splitft.types import Factors

MERGES = "stack.merges"


@dataclass(frozen=True)
class Stack(Aggregator):
    """The exact token-weighted mean of the clients' products is added to the frozen weights, and training goes on with fresh adapters
    (FLoRA; the noise-free aggregation of HSplitLoRA).

    The factors are stacked, [w_1 B_1 .. w_n B_n][A_1; ..; A_n], so nothing is lost at any mix of ranks, and over the rounds the
    change of the weights may have any rank. The price: the rank of what every holder of the block must receive is the sum of the
    clients' ranks, the optimizer's moments mean nothing after a merge, and the result is a changed model, no longer one small adapter.
    An adapter the run started with is part of every product and so goes into the weights in the first merge.

    `seed`: fresh rows of A come from the streams of seed + merges so far, B is zero. The papers re-initialise too; which values, they
    do not say (our reconstruction: as at the start of a run). Prefer it to `product` when truncation costs quality.
    """

    seed: int = 0

    references: ClassVar[tuple[str, ...]] = ("2409.05976", "2505.02795")
    unequal_ranks: ClassVar[bool] = True
    folds: ClassVar[bool] = True
    resets: ClassVar[bool] = True

    def init(self, layout: Layout) -> State:
        return {MERGES: torch.zeros(1, dtype=torch.int64)}

    def merge(self, before: Tensor, updates: Updates, state: State) -> Merged:
        require_finite(updates)
        merges = state[MERGES] + 1
        folded = {
            key: Factors(
                torch.cat([factors.a for _, factors in terms]),
                torch.cat([(weight * factors.b.double()).float() for weight, factors in terms], dim=1),
            )
            for key, terms in mean_terms(updates).items()
            if terms
        }
        return Merged(updates.layout.initial_row(self.seed + int(merges)), {MERGES: merges}, folded)
