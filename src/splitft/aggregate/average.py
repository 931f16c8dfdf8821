"""Weighted mean of the factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from splitft.aggregate.base import Aggregator, Merged, State, Updates, require_finite


@dataclass(frozen=True)
class Average(Aggregator):
    """FedAvg over LoRA factors: A and B each averaged with weights proportional to trained tokens, whoever hosted the block.

    Exact for each factor; the product of averages is not the average of products, which is the usual trade of federated LoRA. Sums are
    float64 in client order, so the result does not depend on arrival. For equal ranks. Where only some values arrived, every column is
    the mean of those that did, its weights made to sum to one again; a column that nobody sent stays as it was.
    """

    references: ClassVar[tuple[str, ...]] = ("1602.05629",)
    partial_uploads: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def merge(self, before: Tensor, updates: Updates, state: State) -> Merged:
        if updates.sent is None:
            return Merged(updates.mean(), state)
        require_finite(updates)
        return Merged(_mean_of_sent(before, updates, updates.sent), state)


def _mean_of_sent(before: Tensor, updates: Updates, sent: Tensor) -> Tensor:
    """The mean [p] of the values that arrived, column by column; `before` where there is none."""
    total, share = torch.zeros(len(before), dtype=torch.float64), torch.zeros(len(before), dtype=torch.float64)
    for weight, row, arrived in zip(updates.weights().tolist(), updates.values, sent, strict=True):
        total.add_(row.double().where(arrived, total.new_zeros(())), alpha=weight)
        share.add_(arrived.double(), alpha=weight)
    return torch.where(share > 0, total / share.clamp(min=torch.finfo(torch.float64).tiny), before.double()).float()
