"""Controller `bang_bang`: coarser while the loss is inside its budget, finer when it is not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

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
class BangBang(Controller):
    """Keep the loss through the codecs within a budget above the uncompressed one, by a two-sided switch (SplitCom).

    The excess is coded loss / clean loss - 1 on the probe slice. Above `budget`: finer. Below `budget` x `hysteresis`: coarser. Between:
    the dial stays, so that it does not chatter. Finer divides the dial by `move`, coarser multiplies it by the root of `move` only: an
    excess that grows like the square of the errors then grows by `move`, less than the band is wide. `move` = 0: finer is `fine`,
    coarser is `coarse`, the two-valued law of the paper. The excess is smoothed (`smoothing`: weight of the past), anew after a move,
    since it belongs to the dial it was measured at.

    The probe shows what errors do to the loss of given weights, not what they do to the training. So there is a guard: a held-out loss
    more than `budget` above the best so far (or above the base model's) makes finer, and nothing is made coarser until an evaluation
    is inside again. Nor is the dial opened beyond `coarse`, by default 1, the errors as configured: allowed four times those, runs of
    fifty epochs left their budget, for training loses more than the probe sees. It cannot tell harm by the codec from overfitting. A
    round without a probe and without an evaluation changes nothing.

    `start`: the first dial, 0 for `fine`. `gradients`: whether their dial moves along, else it stays at 1; a forward probe does not see
    their errors. SplitCom drives a threshold of similarity by the validation perplexity and publishes no constants: budget as a share
    of the loss, probe, band, steps, guard and all defaults are our reconstruction. The safe choice where quality is stated in advance.
    """

    references: ClassVar[tuple[str, ...]] = ("2602.10564",)
    probes: ClassVar[bool] = True
    budget: float = 0.01
    hysteresis: float = 0.5
    smoothing: float = 0.5
    fine: float = 0.25
    coarse: float = 1.0
    move: float = 1.5
    start: float = 0.5
    gradients: bool = True

    def __post_init__(self) -> None:
        ends = are_dials(self.fine, self.coarse)
        refuse(
            "bang_bang",
            {
                f"budget is {self.budget!r}; allowed is a share of the loss from 0.000001 to 1": is_number(self.budget, 1e-6, 1.0),
                f"hysteresis is {self.hysteresis!r}; allowed is a share of the budget from 0 to 1": is_number(self.hysteresis, 0.0, 1.0),
                f"smoothing is {self.smoothing!r}; allowed are 0 to 0.99": is_number(self.smoothing, 0.0, 0.99),
                f"fine is {self.fine!r} and coarse {self.coarse!r}; allowed are {LEAST_DIAL:g} to {MOST_DIAL:g}, coarse no less": ends,
                f"move is {self.move!r}; allowed are 0, or a factor above 1 up to 100": is_number(self.move, 0.0, 100.0)
                and (self.move == 0.0 or self.move > 1.0),
                f"start is {self.start!r}; allowed are 0, or a dial from fine to coarse": is_number(self.start, 0.0)
                and (self.start == 0.0 or not ends or self.fine <= self.start <= self.coarse),
                f"gradients is {self.gradients!r}; allowed are true and false": type(self.gradients) is bool,
            },
        )

    @property
    def bounds(self) -> tuple[float, float]:
        return (self.fine, self.coarse) if self.gradients else (min(self.fine, 1.0), max(self.coarse, 1.0))

    def init(self, seed: int) -> State:
        return {**self._dials(float(self.start or self.fine)), "excess": None, "best_loss": None, "guarded": False}

    def step(self, signal: Signal, state: State) -> tuple[Dial, State, Facts]:
        excess, past = signal.excess, state["excess"]
        smoothed = past if excess is None else excess if past is None else self.smoothing * past + (1.0 - self.smoothing) * excess
        best, guarded = self._guard(signal, state)
        evaluated = signal.held_out_loss is not None
        dial = before = float(state["activations"])
        if (guarded and evaluated) or (excess is not None and smoothed > self.budget):
            dial = self._moved(before, finer=True)
        elif excess is not None and smoothed < self.budget * self.hysteresis and not guarded:
            dial = self._moved(before, finer=False)
        after = {**self._dials(dial), "excess": smoothed if dial == before else None, "best_loss": best, "guarded": guarded}
        known = {"excess": excess, "excess_smoothed": smoothed}
        facts = {name: value for name, value in known.items() if value is not None} | {"guarded": float(guarded)}
        return self.first(after), after, facts

    def _dials(self, dial: float) -> dict[str, float]:
        return {"activations": dial, "gradients": dial if self.gradients else 1.0}

    def _moved(self, dial: float, finer: bool) -> float:
        if not self.move:
            return float(self.fine if finer else self.coarse)
        return within(dial / self.move if finer else dial * math.sqrt(self.move), (float(self.fine), float(self.coarse)))

    def _guard(self, signal: Signal, state: State) -> tuple[float | None, bool]:
        """The best held-out loss so far, and whether the latest one is too far above it."""
        loss = signal.held_out_loss
        seen = [one for one in (state["best_loss"], finite(signal.base_loss)) if one is not None]
        if loss is None:
            return min(seen, default=None), bool(state["guarded"])
        guarded = not math.isfinite(loss) or any(loss > (1.0 + self.budget) * one for one in seen)
        return min([*seen, *([loss] if math.isfinite(loss) else [])], default=None), guarded
