"""Controller `fixed`: the same dial in every round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from splitft.control.base import LEAST_DIAL, MOST_DIAL, Controller, Dial, Facts, Signal, State, is_number, refuse


@dataclass(frozen=True)
class FixedDial(Controller):
    """Leave the codecs as they are configured, or scale their errors once for the whole run: a baseline, and the default.

    `activations`, `gradients`: the dials, 1 as configured.
    """

    fixed: ClassVar[bool] = True
    activations: float = 1.0
    gradients: float = 1.0

    def __post_init__(self) -> None:
        dials = {"activations": self.activations, "gradients": self.gradients}
        allowed = f"allowed are {LEAST_DIAL:g} to {MOST_DIAL:g}"
        refuse("fixed", {f"{name} is {value!r}; {allowed}": is_number(value, LEAST_DIAL, MOST_DIAL) for name, value in dials.items()})

    @property
    def bounds(self) -> tuple[float, float]:
        return min(self.activations, self.gradients), max(self.activations, self.gradients)

    def init(self, seed: int) -> State:
        return {"activations": float(self.activations), "gradients": float(self.gradients)}

    def step(self, signal: Signal, state: State) -> tuple[Dial, State, Facts]:
        return self.first(state), state, {}
