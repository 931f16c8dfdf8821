"""Coordinate-wise median over any rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from splitft.aggregate.base import Merged, State, Updates
from splitft.aggregate.middle import Middle


@dataclass(frozen=True)
class Median(Middle):
    """Coordinate-wise median of the factors (Yin et al. 2018), handed to the rule inside as the update of one client.

    Unweighted; for an even number of participants the mean of the middle two. Fewer than half of the participants can move a coordinate
    no farther than the honest ones reach, whatever they send. The price is bias: with skewed data, rare knowledge of single clients is
    outvoted, and with two participants or fewer it is the plain mean. Factors are compared, not products (our reading), which suits
    clients that start from the same adapter; unequal ranks are refused with AdapterError. In a partial upload the median is over those who
    sent the value.
    """

    references: ClassVar[tuple[str, ...]] = ("1803.01498",)
    title: ClassVar[str] = "median"

    def merge(self, before: Tensor, updates: Updates, state: State) -> Merged:
        return self.middle(before, updates, lambda counts: (counts - 1).clamp(min=0) // 2, state)
