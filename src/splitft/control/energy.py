"""Controller `energy`: the dial follows the measured error, so that the relative error at the cut stays where it is wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass

from splitft.control.base import (
    LEAST_DIAL,
    MOST_DIAL,
    Controller,
    Dial,
    Facts,
    Signal,
    State,
    are_dials,
    finite,
    is_number,
    refuse,
    within,
)


@dataclass(frozen=True)
class Energy(Controller):
    """Keep the relative error at the cut at a target: `target` for activations, `target_gradients` for gradients (root mean square).

    After every round: dial <- dial x (target / error)^`gain`, by no more than a factor `limit`, within `least` and `most`. Where the
    error grows like dial^a, each round multiplies the distance to the target, in logarithms, by 1 - gain x a: it converges for gain x a
    below 2. As training settles, changes against the caches shrink, the same dial makes smaller errors, and the dial opens.

    Where a codec does not know its error on activations, dial x root of `residual_share` stands for it, as if a codec at dial 1 lost the
    whole change: mostly too careful. For gradients nothing stands in; their dial then stays, as both do in a round that tells nothing.
    `start`: both first dials. Needs neither probe nor evaluation, so it costs nothing, and it says nothing about the loss. Our own rule,
    after no paper: an integral controller in logarithms.
    """

    target: float = 0.1
    target_gradients: float = 0.2
    gain: float = 0.5
    limit: float = 2.0
    least: float = 0.1
    most: float = 10.0
    start: float = 1.0

    def __post_init__(self) -> None:
        ends = are_dials(self.least, self.most)
        refuse(
            "energy",
            {
                f"target is {self.target!r}; allowed are 0.000001 to 1": is_number(self.target, 1e-6, 1.0),
                f"target_gradients is {self.target_gradients!r}; allowed are 0.000001 to 1": is_number(self.target_gradients, 1e-6, 1.0),
                f"gain is {self.gain!r}; allowed are 0.01 to 2": is_number(self.gain, 0.01, 2.0),
                f"limit is {self.limit!r}; allowed is a factor from 1.01 to 100": is_number(self.limit, 1.01, 100.0),
                f"least is {self.least!r} and most {self.most!r}; allowed are {LEAST_DIAL:g} to {MOST_DIAL:g}, most no less": ends,
                f"start is {self.start!r}; allowed is a dial from least to most": is_number(self.start, 0.0)
                and (not ends or self.least <= self.start <= self.most),
            },
        )

    @property
    def bounds(self) -> tuple[float, float]:
        return self.least, self.most

    def init(self, seed: int) -> State:
        return {"activations": float(self.start), "gradients": float(self.start)}

    def step(self, signal: Signal, state: State) -> tuple[Dial, State, Facts]:
        before = self.first(state)
        errors = {"activations": finite(signal.activation_error), "gradients": finite(signal.gradient_error)}
        share = finite(signal.residual_share)
        if errors["activations"] is None and share is not None:
            errors["activations"] = before.activations * math.sqrt(max(0.0, share))
        after = {
            "activations": self._moved(before.activations, errors["activations"], self.target),
            "gradients": self._moved(before.gradients, errors["gradients"], self.target_gradients),
        }
        return self.first(after), after, {f"{name}_error": error for name, error in errors.items() if error is not None}

    def _moved(self, dial: float, error: float | None, target: float) -> float:
        if error is None:
            return dial
        # A lossless round (error 0) opens the dial as far as one step may.
        pull = self.gain * math.log(target / error) if error > 0.0 else math.inf
        return within(dial * math.exp(within(pull, (-math.log(self.limit), math.log(self.limit)))), (float(self.least), float(self.most)))
