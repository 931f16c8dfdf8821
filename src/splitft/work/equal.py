"""Work policy `equal`: the same number of local steps for everyone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from splitft.work.base import WorkPolicy


@dataclass(frozen=True)
class Equal(WorkPolicy):
    """Every participant takes `train.local_steps` steps (FedAvg). The default: what is learned does not depend on anyone's speed."""

    references: ClassVar[tuple[str, ...]] = ("1602.05629",)

    def steps(self, step_s: Mapping[int, float], local_steps: int) -> dict[int, int]:
        return dict.fromkeys(step_s, local_steps)
