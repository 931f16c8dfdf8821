"""Synchronisation `every_round`: aggregate after every round's local steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from splitft.sync.base import Decision, State, Synchronisation


@dataclass(frozen=True)
class EveryRound(Synchronisation):
    """Aggregate after every round (FedAvg): `train.local_steps` is the fixed distance between two aggregations."""

    references: ClassVar[tuple[str, ...]] = ("1602.05629",)
    always: ClassVar[bool] = True

    def decide(self, drifts: Tensor, weights: Tensor, state: State) -> Decision:
        return Decision(True, state, {})
