"""The seam of controllers: once a round, from what the round gave, how coarse the codecs may be in the next one.

A controller is a value: `init` makes the first state, `step` takes a state and returns the next. A state is plain JSON data (dicts with
string keys, lists, finite numbers, strings, None), so that a checkpoint holds it as it is and a resumed run goes on exactly. A controller
sees no tensor, no clock and no codec: it sets a dial, and `Codec.scaled` says what that means.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from splitft.errors import ConfigError

State: TypeAlias = Mapping[str, Any]
# A controller's figures for the journal, finite; what a round did not tell is left out.
Facts: TypeAlias = Mapping[str, float]
# What an excess that is not finite, or absurd, counts as: above every budget, and a number that JSON can hold.
LARGEST_EXCESS = 1e6
# Dials of adaptive controllers lie within these: errors a million times as small or as large are no setting but a slip.
LEAST_DIAL, MOST_DIAL = 1e-6, 1e6


@dataclass(frozen=True)
class Signal:
    """What a round gave: `round` is its number, counted from 1, of `rounds`; None stands for what was not measured in it.

    Losses in nats a token: `held_out_loss` after the round's aggregation, `base_loss` the same before training, `train_loss` the round's
    mean. `clean_loss` and `coded_loss`: of a probe slice whose tensors go uncompressed, and of the same slice by the same weights through
    the codecs at the dial the round used. `uncompressed_bytes` is what `uplink_bytes` + `downlink_bytes` would be with 16-bit values.
    `activation_error` and `gradient_error`: root mean square error at the cut over the root mean square of the values. `residual_share`:
    energy of the activations' changes against the caches, over the energy of these activations. `skipped_share`: of the samples.
    """

    round: int
    rounds: int
    uplink_bytes: int
    downlink_bytes: int
    uncompressed_bytes: int
    held_out_loss: float | None = None
    base_loss: float | None = None
    train_loss: float | None = None
    clean_loss: float | None = None
    coded_loss: float | None = None
    activation_error: float | None = None
    gradient_error: float | None = None
    residual_share: float | None = None
    skipped_share: float | None = None

    @property
    def excess(self) -> float | None:
        """What the codecs add to the probe slice's loss, as a share of it, at most LARGEST_EXCESS; None without a usable clean loss.

        A coded loss that is NaN or infinite is the largest excess: the codec has broken the model.
        """
        if self.coded_loss is None or self.clean_loss is None or not math.isfinite(self.clean_loss) or self.clean_loss <= 0.0:
            return None
        excess = self.coded_loss / self.clean_loss - 1.0
        return min(excess, LARGEST_EXCESS) if excess > -LARGEST_EXCESS else LARGEST_EXCESS

    @property
    def bytes_share(self) -> float | None:
        """Bytes sent over those of 16-bit values; None in a round that had nothing to send."""
        return (self.uplink_bytes + self.downlink_bytes) / self.uncompressed_bytes if self.uncompressed_bytes > 0 else None

    @property
    def progress(self) -> float:
        """Share of the run that is over, from 0 to 1."""
        return min(1.0, max(0.0, self.round / max(1, self.rounds)))


@dataclass(frozen=True)
class Dial:
    """How large the errors of a codec may be, 1 as configured, 2 twice as large: for what clients send forward and what comes back."""

    activations: float = 1.0
    gradients: float = 1.0


class Controller(ABC):
    """Turns the codecs' dial from round to round. Final subclasses are frozen dataclasses; fields are their configuration.

    `probes`: it needs a probe slice's clean and coded loss. `fixed`: its dial never moves. The dial of the next round always stands in its
    state under `activations` and `gradients`.
    """

    references: ClassVar[tuple[str, ...]] = ()
    probes: ClassVar[bool] = False
    fixed: ClassVar[bool] = False

    @property
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest dial it ever gives."""

    @abstractmethod
    def init(self, seed: int) -> State:
        """The state before the first round; `seed` is the run's, for controllers that draw."""

    @abstractmethod
    def step(self, signal: Signal, state: State) -> tuple[Dial, State, Facts]:
        """The dial of the round after `signal`'s, the state after it and figures for the journal. Equal arguments give equal answers."""

    def first(self, state: State) -> Dial:
        """The dial of the round that comes next by `state`: the first one, or the one a resumed run goes on with."""
        return Dial(float(state["activations"]), float(state["gradients"]))


def finite(value: float | None) -> float | None:
    """`value` where it is a number to reckon with, else None."""
    return value if value is not None and math.isfinite(value) else None


def within(value: float, bounds: tuple[float, float]) -> float:
    """The number between the bounds, both included, nearest to `value`."""
    return min(max(value, bounds[0]), bounds[1])


def is_number(value: object, least: float, most: float = math.inf) -> bool:
    """Whether a field is a finite number from `least` to `most`, both included; True and False are none."""
    return type(value) in (int, float) and math.isfinite(value) and least <= value <= most  # type: ignore[operator,arg-type]


def is_whole(value: object, least: int) -> bool:
    """Whether a field is a whole number of `least` or more."""
    return type(value) is int and value >= least


def are_dials(least: object, most: object) -> bool:
    """Whether two fields are bounds of a dial: numbers, the first no larger."""
    return is_number(least, LEAST_DIAL, MOST_DIAL) and is_number(most, LEAST_DIAL, MOST_DIAL) and least <= most  # type: ignore[operator]


def refuse(name: str, right: Mapping[str, bool]) -> None:
    """Raise ConfigError that names every field of controller `name` whose condition does not hold: problem -> whether it is right."""
    if found := tuple(problem for problem, is_right in right.items() if not is_right):
        raise ConfigError(f"{name} has {len(found)} wrong field{'s' if len(found) > 1 else ''}.", "see docs/methods.md.", found)
