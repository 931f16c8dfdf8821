"""The seam for cut policies: before every round a policy says how many blocks each participant holds.

Policies are values: `init` makes the first state, `plan` takes a state and returns the next. A state is plain JSON data (dicts with
string keys, lists, numbers, strings, booleans, None), so the engine writes it into checkpoints as it is and a resumed run goes on
exactly. A policy sees no clock, no network and no weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeAlias

from splitft.adapt.cost import CostModel
from splitft.errors import ConfigError
from splitft.types import ModelShape, Observation, Profile

State: TypeAlias = Mapping[str, object]


class Policy(ABC):
    """Decides the cut of every participant, round by round. Final subclasses are frozen dataclasses; fields are their configuration."""

    references: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def init(self, shape: ModelShape, profiles: Sequence[Profile], costs: Sequence[CostModel]) -> State:
        """The state before the first round. `profiles` and `costs` have one entry per client, in client order; the cost models differ
        in the length of the clients' rows only. `state["cuts"]` always lists the latest cut of every client, taking part or not.

        Raises ConfigError for fields that do not suit this model or number of clients, ResourceError for a device no cut fits.
        """

    @abstractmethod
    def plan(
        self, round_index: int, participants: Sequence[int], observations: Sequence[Observation], state: State
    ) -> tuple[dict[int, int], State]:
        """Cut of every participant (by client number) and the next state.

        `observations` are those of the round before, of the clients that took part in it: empty in the first round, and never
        sure to hold a given client. Equal arguments give equal answers.
        """


def check_number(name: str, value: object, minimum: float, maximum: float = math.inf, whole: bool = False) -> None:
    """Raise ConfigError unless field `name` of a cut policy is a (whole) number from `minimum` to `maximum`, both included."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not (minimum <= value <= maximum and math.isfinite(value)):
        bounds = f"from {minimum:g} to {maximum:g}" if maximum < math.inf else f"of {minimum:g} or more"
        raise ConfigError(
            f"policy.{name} is {value!r}; allowed is a {'whole ' if whole else 'finite '}number {bounds}.", f"Correct policy.{name}."
        )


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ConfigError unless field `name` of a cut policy is one of these words."""
    if value not in allowed:
        raise ConfigError(f"policy.{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}.", f"Correct policy.{name}.")
