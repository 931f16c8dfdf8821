"""Work policy `balanced`: more local steps where they are fast, fewer where they are slow, as many in all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from splitft.errors import ConfigError
from splitft.work.base import WorkPolicy


@dataclass(frozen=True)
class Balanced(WorkPolicy):
    """The round's steps, participants x `train.local_steps`, are divided so that its slowest participant is done as early as possible.

    Everyone takes at least `least` and at most `most` times `train.local_steps` (rounded, one step at the least), and the sum stays what
    it was. A round waits for its slowest client, and the best cut only shortens that client's step; this shortens its share. Updates
    count by the tokens behind them, so the data of fast clients weigh more: with very uneven data keep the bounds narrow, or use
    `equal`. The same idea with other rules: FedNova (Wang et al. 2020, arXiv 2007.07481) allows any number of local steps and
    rescales the updates, which we do not; this division is ours.
    """

    least: float = 0.5
    most: float = 2.0

    references: ClassVar[tuple[str, ...]] = ("2007.07481",)

    def __post_init__(self) -> None:
        for name, value, low, high in (("least", self.least, 0.0, 1.0), ("most", self.most, 1.0, 1e6)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ConfigError(f"work.{name} is {value!r}; allowed is a number from {low:g} to {high:g}.", f"Correct work.{name}.")

    def steps(self, step_s: Mapping[int, float], local_steps: int) -> dict[int, int]:
        if not step_s:
            return {}
        fewest, largest = max(1, round(self.least * local_steps)), max(1, math.ceil(self.most * local_steps))
        total = local_steps * len(step_s)

        def within(limit_s: float) -> dict[int, int]:
            """As many steps as each gets done in this time, within its bounds."""
            return {
                client: largest if own_s * largest <= limit_s else min(largest, max(fewest, math.floor(limit_s / own_s + 1e-9)))
                for client, own_s in step_s.items()
            }

        # The time to find is one at which somebody finishes a step: bisect over those.
        moments = sorted({own_s * count for own_s in step_s.values() for count in range(fewest, largest + 1)})
        low, high = 0, len(moments) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if sum(within(moments[middle]).values()) >= total else (middle + 1, high)
        found = within(moments[low])
        for _ in range(sum(found.values()) - total):  # the last step of whoever would finish last; ties: the highest client number
            client = max((one for one in found if found[one] > fewest), key=lambda one: (found[one] * step_s[one], one))
            found[client] -= 1
        return found
