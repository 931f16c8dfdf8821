"""What FedAvgM, FedAdam and FedYogi have in common: the inner rule's change is a gradient, and the server takes a step along it.

Axes: p adapter parameters.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from splitft.aggregate.base import Merged, State, Updates
from splitft.aggregate.wrapper import Wrapper, require_number, with_metrics
from splitft.errors import ConfigError
from splitft.lora import Layout


@dataclass(frozen=True)
class ServerOptimizer(Wrapper):
    """The pseudo-gradient of a round is the adapter before it less what the rule inside makes of the updates, factor by factor.

    Refuses a rule that folds into the frozen weights: it starts the adapter afresh, which is no gradient.
    """

    hands_on_whole: ClassVar[bool] = True
    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(
            "learning_rate", self.learning_rate, "a number above 0", lambda value: value > 0, "Choose 1.0 for FedAvg's own step."
        )
        object.__setattr__(self, "linear", self.rule.linear)  # it looks at nothing but the inner rule's adapter
        if self.folds:
            raise ConfigError(
                "a server optimizer needs a rule that keeps the adapter, and the rule inside folds it into the frozen weights.",
                'Set aggregator.rule to "average" or "product".',
            )

    @abstractmethod
    def start(self, layout: Layout) -> State:
        """This optimizer's own tensors before the first round, [p] float32 each."""

    @abstractmethod
    def step(self, gradient: Tensor, own: State) -> tuple[Tensor, Mapping[str, Tensor]]:
        """What to take off the adapter [p] float64 for a pseudo-gradient [p] float64, and the next tensors (any float type)."""

    def init(self, layout: Layout) -> State:
        return self.joined(self.start(layout), self.rule.init(layout))

    def merge(self, before: Tensor, updates: Updates, state: State) -> Merged:
        merged = self.inner(before, updates, state)
        gradient = before.double() - merged.adapters.double()
        names = self.start(updates.layout).keys()
        taken, own = self.step(gradient, {name: state[name] for name in names})
        # Written as a correction of the inner rule's adapter, so that a step equal to the gradient is that rule to the last bit.
        adapters = (merged.adapters.double() + (gradient - taken)).float()
        after = {**merged.state, **{name: own[name].float() for name in names}}
        figures = {"server_step": float(torch.linalg.vector_norm(taken)), "pseudo_gradient": float(torch.linalg.vector_norm(gradient))}
        return with_metrics(replace(merged, adapters=adapters, state=after), figures)


def require_decay(name: str, value: object) -> None:
    """ConfigError unless `value` can be the decay of a running mean."""
    require_number(
        name, value, "a number from 0 to below 1", lambda number: 0 <= number < 1, "Choose a value such as 0.9; 0 remembers nothing."
    )
