"""Server momentum over any rule that keeps the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from splitft.aggregate.base import State
from splitft.aggregate.server_optimizer import ServerOptimizer, require_decay
from splitft.lora import Layout


@dataclass(frozen=True)
class FedAvgM(ServerOptimizer):
    """FedAvgM (Hsu, Qi and Brown 2019): v = momentum v + (before - rule's adapter); the next adapter is before - learning_rate v.

    The velocity smooths what differs from round to round, so it helps when few of many clients take part or their data are skewed. The
    steady step is 1 / (1 - momentum) times the single one: the clients' learning rate must shrink with it. learning_rate 1 and
    momentum 0 is the rule inside, exactly. It acts on the factors, not on their product (our reading; the paper has no LoRA), and
    does not take a rule that folds.
    """

    references: ClassVar[tuple[str, ...]] = ("1909.06335",)
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        require_decay("momentum", self.momentum)

    def start(self, layout: Layout) -> State:
        return {"velocity": torch.zeros(layout.parameters)}

    def step(self, gradient: Tensor, own: State) -> tuple[Tensor, Mapping[str, Tensor]]:
        velocity = self.momentum * own["velocity"].double() + gradient
        return self.learning_rate * velocity, {"velocity": velocity}
