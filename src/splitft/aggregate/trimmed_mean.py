"""Coordinate-wise trimmed mean over any rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from splitft.aggregate.base import Merged, State, Updates
from splitft.aggregate.middle import Middle
from splitft.aggregate.wrapper import require_number


@dataclass(frozen=True)
class TrimmedMean(Middle):
    """Coordinate-wise mean of the factors without the largest and the smallest `share` of the values (Yin et al. 2018), handed to the
    rule inside as the update of one client.

    Unweighted. Withstands up to `share` of the participants; `share` times their number is rounded up, so that a small cohort is
    trimmed as well, and at least one value is left. It keeps more of the honest clients' work than the median, and needs a bound on the
    attackers. share 0 is the unweighted mean. Factors are compared, not products (our reading); unequal ranks are refused with
    AdapterError. In a partial upload the values are those that arrived.
    """

    references: ClassVar[tuple[str, ...]] = ("1803.01498",)
    title: ClassVar[str] = "trimmed_mean"
    share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "a number from 0 to below 0.5"
        require_number(
            "share", self.share, allowed, lambda value: 0 <= value < 0.5, "Choose the largest share of hostile clients, such as 0.2."
        )

    def merge(self, before: Tensor, updates: Updates, state: State) -> Merged:
        return self.middle(before, updates, self._ends, state)

    def _ends(self, counts: Tensor) -> Tensor:
        """Values to drop at each end of columns with so many; a product such as 0.07 x 100 is meant to be 7, so a hair is forgiven."""
        ends = torch.ceil(counts.double() * self.share - 1e-9).long()
        return torch.minimum(ends.clamp(min=0), ((counts - 1) // 2).clamp(min=0))
