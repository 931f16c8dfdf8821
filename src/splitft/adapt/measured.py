"""Shared by the policies that plan with the cost model and correct it by what rounds really took (`resource`, `search`, `combined`).

They keep the fleet, a factor of slowness per client, and what the latest planning was made for. Planning anew costs a little and makes
cuts move, so it waits until the company has changed, a device is clearly slower or faster than it was planned with, or long
enough has passed for the small differences.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitft.adapt.balance import measured_slowness
from splitft.adapt.base import Policy, State, check_number
from splitft.adapt.cost import CostModel
from splitft.adapt.state import Fleet, list_of, remember
from splitft.types import Observation, Profile


@dataclass(frozen=True)
class Measured(Policy, ABC):
    """The fields these policies have in common.

    `smoothing` (0..1): weight of the newest round in the moving average of a device's slowness, observed over predicted seconds;
    0 trusts the descriptions of the devices for ever. `tolerance`: relative change of a participant's slowness that makes the policy plan
    anew at once. `every_rounds`: after so many rounds it plans anew for any smaller change.
    """

    smoothing: float = 0.5
    tolerance: float = 0.15
    every_rounds: int = 10

    def __post_init__(self) -> None:
        check_number("smoothing", self.smoothing, 0.0, 1.0)
        check_number("tolerance", self.tolerance, 0.0)
        check_number("every_rounds", self.every_rounds, 1, whole=True)

    def first_state(self, profiles: Sequence[Profile], costs: Sequence[CostModel], cuts: Sequence[int]) -> dict[str, Any]:
        """What all of them keep; `planned` is what the latest planning was made for and what came out, empty before the first."""
        return {
            "cuts": list(cuts),
            "slowness": [1.0] * len(profiles),
            "taken_part": [False] * len(profiles),
            "fleet": remember(profiles, costs),
            "planned": {},
        }

    def slowness(self, state: State, fleet: Fleet, observations: Sequence[Observation]) -> list[float]:
        """The factors after these observations, which were made at the cuts in `state`."""
        before, cuts = list_of(state, "slowness"), list_of(state, "cuts")
        if not self.smoothing:
            return before
        return measured_slowness(before, observations, cuts, fleet.costs, fleet.profiles, self.smoothing)

    def is_due(self, round_index: int, company: Sequence[int], slowness: Sequence[float], planned: Mapping[str, Any]) -> bool:
        """Whether to plan anew for `company`, sorted client numbers; `slowness` is of the whole fleet."""
        if not planned or planned["company"] != list(company):
            return True
        pairs = [(slowness[client], then) for client, then in zip(company, planned["slowness"], strict=True)]
        if any(abs(now - then) > self.tolerance * then for now, then in pairs):
            return True
        return round_index - planned["round"] >= self.every_rounds and any(now != then for now, then in pairs)


def planning(round_index: int, company: Sequence[int], slowness: Sequence[float]) -> dict[str, Any]:
    """The part of `planned` that `is_due` reads."""
    return {"round": round_index, "company": list(company), "slowness": [slowness[client] for client in company]}


def one_block(cut: int, want: int) -> int:
    """The cut one block nearer to `want`."""
    return cut + (want > cut) - (want < cut)
