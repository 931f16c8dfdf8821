"""A stays as it was drawn; only B is trained and averaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from splitft.aggregate.base import Aggregator, Merged, State, Updates
from splitft.aggregate.terms import cut_off
from splitft.lora import Layout


@dataclass(frozen=True)
class FreezeA(Aggregator):
    """All clients share one frozen A; B is trained and its token-weighted mean taken (FFA-LoRA).

    With a common A the product is linear in B, so the mean of B is the exact mean of the products, noise added for privacy does not
    multiply, and only B travels: about half the bytes and half the trained parameters, with less capacity at the same rank. Prefer it
    for noisy updates and thin links.

    A client of a smaller rank holds the first rows of A and columns of B. The mean over all is still exact, a missing column being
    zero; but as in `product`, columns few clients own fade round by round (there `partitioned` helps). The paper has equal ranks only.
    """

    references: ClassVar[tuple[str, ...]] = ("2403.12313",)
    unequal_ranks: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def trained(self, layout: Layout) -> Tensor:
        """The columns of B."""
        mask = torch.zeros(layout.parameters, dtype=torch.bool)
        for entry in layout.entries:
            mask[entry.middle : entry.end] = True
        return mask

    def distribute(self, layout: Layout, row: Tensor, ranks: Tensor) -> tuple[Tensor, float]:
        """The first rows and columns: a best approximation would have an A of its own."""
        return cut_off(layout, row, ranks)

    def merge(self, before: Tensor, updates: Updates, state: State) -> Merged:
        return Merged(torch.where(self.trained(updates.layout), updates.mean(), before), state)
