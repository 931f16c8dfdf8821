"""Mean of zero-padded factors: the baseline for unequal ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from splitft.aggregate.base import Aggregator, Merged, State, Updates, require_finite
from splitft.aggregate.terms import cut_off, mean_row
from splitft.errors import ConfigError
from splitft.lora import Layout
from splitft.lowrank import energy

WEIGHTS = ("tokens", "norm")


@dataclass(frozen=True)
class ZeroPad(Aggregator):
    """Factors of smaller ranks are padded with zeros, then A and B are averaged apart; a client starts from the first rows and columns
    of the global factors (HetLoRA, without its self-pruning of ranks).

    What it loses: the product of means is not the mean of products; rows that few clients own are averaged with zeros and fade, in A
    and in B, so twice over in the product; and the first rows are not the best ones, so starting a small client costs more than it
    must (the share is reported). A baseline: prefer `product`.

    `weights`: "tokens" trained, or "norm", the paper's ||B A||_F of each client, over all its keys with their scales (the paper does
    not say over which; our reconstruction). With "norm" a client without tokens still counts for nothing, and tokens decide when every
    norm is zero. ConfigError for anything else.
    """

    weights: str = "tokens"

    references: ClassVar[tuple[str, ...]] = ("2401.06432",)
    unequal_ranks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ConfigError(f"aggregator.weights is {self.weights!r}.", f"choose one of {', '.join(WEIGHTS)}.")
        object.__setattr__(self, "linear", self.weights == "tokens")  # a client's norm takes its row

    def distribute(self, layout: Layout, row: Tensor, ranks: Tensor) -> tuple[Tensor, float]:
        """The first rows and columns, as they are."""
        return cut_off(layout, row, ranks)

    def merge(self, before: Tensor, updates: Updates, state: State) -> Merged:
        if self.weights == "tokens":
            return Merged(updates.mean(), state)
        require_finite(updates)
        weights = updates.weights()
        norms = torch.tensor([_norm(updates.layout, row) for row in updates.values], dtype=torch.float64) * (weights > 0)
        return Merged(mean_row(norms / norms.sum() if float(norms.sum()) > 0 else weights, updates.values), state)


def _norm(layout: Layout, row: Tensor) -> float:
    """Frobenius norm of an adapter's whole update, scales included."""
    return math.sqrt(max(0.0, sum(layout.by_key[key].scale ** 2 * energy(own) for key, own in layout.factors(row).items())))
