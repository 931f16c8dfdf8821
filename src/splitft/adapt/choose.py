"""Derive a cut from the cost model when the user names none; shared by the `fixed` policy and `splitft plan`.

The rule: the deepest cut that needs at most `memory_share` of the device and whose step takes at most `slack` times the reference.
The reference is what the median client of the run needs for a step at its own fastest cut. Deeper is preferred because
every block on the client is work taken from the server and makes what crosses the cut harder to read back; the two bounds say how
much that may cost. So clients whose link is the bottleneck, for whom blocks are nearly free, go deep; clients whose processor is,
stay shallow; and a round is hardly longer than with the fastest cuts, since the median is never above the slowest client.
The time a client queues for the server is not in the rule.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from splitft.adapt.cost import CostModel, PlanCost
from splitft.adapt.schedule import step_seconds
from splitft.errors import ResourceError
from splitft.types import Profile

MEMORY_SHARE = 0.5
SLACK = 1.25

Limit = Literal["blocks", "memory", "time"]
T = TypeVar("T")


@dataclass(frozen=True)
class CutChoice:
    """A derived cut and what stopped it from being deeper: no more blocks, the memory budget, or the time limit.

    `step_s` may exceed `limit_s` only for a client that is slower than the limit at every cut that fits; it gets its fastest one.
    """

    cut: int
    limited_by: Limit
    step_s: float
    limit_s: float
    budget_bytes: float


def reference_step_s(costs: Sequence[CostModel], profiles: Sequence[Profile]) -> float:
    """Seconds a step takes the median client (of one or more) at its own fastest cut that fits its memory.

    `costs` and `profiles` have one entry per client. Raises ResourceError naming a device that no cut fits.
    """
    return statistics.median(_each_client(costs, profiles, _fastest_s))


def choose_cut(costs: CostModel, profile: Profile, reference_s: float | None = None) -> CutChoice:
    """The cut for one device by the rule above; without `reference_s` the device is its own median.

    Raises ResourceError if even the shallowest cut allowed does not fit.
    """
    options = costs.every_cut()
    reference_s = _fastest_s(options, costs, profile) if reference_s is None else reference_s
    return _choose(options, costs, profile, reference_s)


def choose_cuts(costs: Sequence[CostModel], profiles: Sequence[Profile]) -> tuple[CutChoice, ...]:
    """The cuts of a whole run, one per client, measured against its median client; equal devices with equal costs get equal cuts."""
    if not profiles:
        return ()
    reference_s = reference_step_s(costs, profiles)
    return tuple(_each_client(costs, profiles, lambda options, cost, profile: _choose(options, cost, profile, reference_s)))


def fitting_cuts(costs: CostModel, profile: Profile) -> list[PlanCost]:
    """The costs of the allowed cuts that fit the device, the shallowest first, without a gap. Raises ResourceError if there is none."""
    return _fitting(costs.every_cut(), costs, profile)


def memory_budget_bytes(profile: Profile) -> float:
    """What a derived cut may take of the device: the rest is for the system, its other programs, and our own inexactness."""
    return MEMORY_SHARE * profile.memory_bytes


def _each_client(
    costs: Sequence[CostModel], profiles: Sequence[Profile], figure: Callable[[Sequence[PlanCost], CostModel, Profile], T]
) -> list[T]:
    """`figure` of every client's (all cuts' costs, cost model, profile), worked out once for clients that are alike."""
    clients = list(zip(costs, profiles, strict=True))
    options = {cost: cost.every_cut() for cost in dict.fromkeys(costs)}
    figures = {(cost, profile): figure(options[cost], cost, profile) for cost, profile in dict.fromkeys(clients)}
    return [figures[client] for client in clients]


def _fastest_s(options: Sequence[PlanCost], costs: CostModel, profile: Profile) -> float:
    return min(step_seconds(option, profile, costs.server).total_s for option in _fitting(options, costs, profile))


def _fitting(options: Sequence[PlanCost], costs: CostModel, profile: Profile) -> list[PlanCost]:
    budget_bytes = memory_budget_bytes(profile)
    fitting = [option for option in options if option.client_memory.total_bytes <= budget_bytes]
    if not fitting:
        need_bytes = min(option.client_memory.total_bytes for option in options)
        raise ResourceError(
            f"no cut of {costs.shape.name} fits the device {profile.name!r}: the smallest needs {need_bytes:.0f} bytes, "
            f"and {budget_bytes:.0f} are allowed ({MEMORY_SHARE:.0%} of its {profile.memory_bytes:.0f}).",
            "Use a smaller batch, shorter sequences, bfloat16 weights or gradient checkpointing; or name the cuts yourself.",
        )
    return fitting


def _choose(options: Sequence[PlanCost], costs: CostModel, profile: Profile, reference_s: float) -> CutChoice:
    limit_s = SLACK * reference_s
    timed = [(option.plan.cut, step_seconds(option, profile, costs.server).total_s) for option in _fitting(options, costs, profile)]
    in_time = [item for item in timed if item[1] <= limit_s]
    cut, step_s = max(in_time) if in_time else min(timed, key=lambda item: (item[1], -item[0]))
    limited_by: Limit = "time"
    if cut == timed[-1][0]:
        limited_by = "blocks" if cut == costs.deepest_cut else "memory"
    return CutChoice(cut, limited_by, step_s, limit_s, memory_budget_bytes(profile))
