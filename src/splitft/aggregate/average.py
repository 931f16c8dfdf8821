"""Weighted mean of the factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from splitft.aggregate.base import Aggregator, State, Updates, require_finite


@dataclass(frozen=True)
class Average(Aggregator):
    """FedAvg over LoRA factors: A and B each averaged with weights proportional to trained tokens, whoever hosted the block.

    Exact for each factor; the product of averages is not the average of products, which is the usual trade of federated LoRA. Sums are
    float64 in client order, so the result does not depend on arrival. For equal ranks.
    """

    references: ClassVar[tuple[str, ...]] = ("1602.05629",)

    def merge(self, before: Tensor, updates: Updates, state: State) -> tuple[Tensor, State]:
        require_finite(updates)
        total = before.double().mul(0.0)
        for weight, row in zip(updates.weights().tolist(), updates.values, strict=True):
            total.add_(row.double(), alpha=weight)
        return total.float(), state
