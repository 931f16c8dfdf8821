"""Adam on the server, over any rule that keeps the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from splitft.aggregate.base import State
from splitft.aggregate.server_optimizer import ServerOptimizer, require_decay
from splitft.aggregate.wrapper import require_number
from splitft.lora import Layout


@dataclass(frozen=True)
class FedAdam(ServerOptimizer):
    """FedAdam (Reddi et al. 2020, algorithm 2): running means m of the pseudo-gradient g (`beta1`) and v of its square (`beta2`); the
    next adapter is before - learning_rate m / (sqrt(v) + tau).

    Without bias correction, as in the paper; v starts at tau squared, its smallest start allowed there. `tau` bounds the adaptivity:
    changes well below it are scaled alike, by learning_rate / tau. The paper searches learning_rate and tau over powers of ten; the
    defaults here are our choice for LoRA factors, which move by about 1e-3 a round. Prefer it when rows of the adapter learn at very
    different paces (rare words). It acts on the factors, not on their product (our reading), and does not take a rule that folds.
    """

    references: ClassVar[tuple[str, ...]] = ("2003.00295",)
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_decay("beta1", self.beta1)
        require_decay("beta2", self.beta2)
        require_number(
            "tau", self.tau, "a number above 0", lambda value: value > 0, "Choose about the size of a round's change, such as 1e-3."
        )

    def start(self, layout: Layout) -> State:
        return {"mean": torch.zeros(layout.parameters), "square": torch.full((layout.parameters,), self.tau**2)}

    def next_square(self, square: Tensor, gradient: Tensor) -> Tensor:
        """The running mean of squares [p] after this pseudo-gradient."""
        return self.beta2 * square + (1 - self.beta2) * gradient.square()

    def step(self, gradient: Tensor, own: State) -> tuple[Tensor, Mapping[str, Tensor]]:
        mean = self.beta1 * own["mean"].double() + (1 - self.beta1) * gradient
        square = self.next_square(own["square"].double(), gradient)
        return self.learning_rate * mean / (square.sqrt() + self.tau), {"mean": mean, "square": square}
