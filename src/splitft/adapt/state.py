"""What cut policies keep in their state: the fleet as plain JSON data, and the cuts of all clients.

A policy is told of the devices once, in `init`, and plans from its state alone ever after; so a policy that reckons with the cost model
carries the fleet in its state. A model shape is written once, with equal blocks folded together, and a client as what distinguishes it
from the first; a thousand clients take some ten kilobytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from splitft.adapt.base import State
from splitft.adapt.cost import CostModel
from splitft.clock import Network
from splitft.errors import CheckpointError
from splitft.types import BlockShape, ModelShape, Profile, Projection

# Fields of a cost model that are values of their own, and the same for every client.
_SHARED = ("shape", "server", "network")
_INFINITE = "inf"


@dataclass(frozen=True)
class Fleet:
    """Every client's cost model and device, in client order."""

    costs: tuple[CostModel, ...]
    profiles: tuple[Profile, ...]

    def company(self, clients: Sequence[int]) -> Fleet:
        """Only these clients."""
        return Fleet(tuple(self.costs[client] for client in clients), tuple(self.profiles[client] for client in clients))

    def slower(self, factors: Sequence[float]) -> Fleet:
        """The same clients, each with a device that takes this many times as long for everything."""
        return Fleet(self.costs, tuple(slowed(profile, factor) for profile, factor in zip(self.profiles, factors, strict=True)))


def slowed(profile: Profile, factor: float) -> Profile:
    """The device with all it does, computing and transferring, taking `factor` times as long."""
    if factor == 1.0:
        return profile
    return replace(
        profile,
        flops_per_s=profile.flops_per_s / factor,
        uplink_bytes_per_s=profile.uplink_bytes_per_s / factor,
        downlink_bytes_per_s=profile.downlink_bytes_per_s / factor,
        latency_s=profile.latency_s * factor,
    )


def remember(profiles: Sequence[Profile], costs: Sequence[CostModel]) -> dict[str, Any]:
    """The fleet as JSON data for `recall`. The cost models share shape, server and network, as `Policy.init` promises."""
    if not costs:
        return {"clients": []}
    first = costs[0]
    plain = [field.name for field in fields(CostModel) if field.name not in _SHARED]
    assert all(getattr(cost, name) == getattr(first, name) for cost in costs for name in _SHARED), "cost models of different runs"
    devices = list(dict.fromkeys(profiles))
    number = {device: index for index, device in enumerate(devices)}
    kinds = list(dict.fromkeys(first.shape.blocks))
    return {
        "shape": {**asdict(replace(first.shape, blocks=())), "blocks": [kinds.index(block) for block in first.shape.blocks]},
        "block_kinds": [asdict(kind) for kind in kinds],
        "server": asdict(first.server),
        "network": {name: _INFINITE if value == math.inf else value for name, value in asdict(first.network).items()},
        "cost": {name: _listed(getattr(first, name)) for name in plain},
        "devices": [asdict(device) for device in devices],
        "clients": [
            [
                number[profile],
                {name: _listed(getattr(cost, name)) for name in plain if getattr(cost, name) != getattr(first, name)},
            ]
            for profile, cost in zip(profiles, costs, strict=True)
        ],
    }


def recall(state: State) -> Fleet:
    """The fleet that `remember` wrote as `state["fleet"]`. Raises CheckpointError if it is not one."""
    fleet: Any = state.get("fleet")
    try:
        if not fleet["clients"]:
            return Fleet((), ())
        kinds = [
            BlockShape(kind["parameters"], kind["active_parameters"], tuple(Projection(**one) for one in kind["projections"]))
            for kind in fleet["block_kinds"]
        ]
        shape = ModelShape(**{**fleet["shape"], "blocks": tuple(kinds[index] for index in fleet["shape"]["blocks"])})
        shared: dict[str, Any] = {name: math.inf if value == _INFINITE else value for name, value in fleet["network"].items()}
        first = CostModel(shape=shape, server=Profile(**fleet["server"]), network=Network(**shared), **_tupled(fleet["cost"]))
        devices = [Profile(**device) for device in fleet["devices"]]
        known: dict[tuple[tuple[str, object], ...], CostModel] = {}
        costs = []
        for _, differs in fleet["clients"]:
            name = tuple(_tupled(differs).items())
            if name not in known:
                known[name] = replace(first, **_tupled(differs))
            costs.append(known[name])
        return Fleet(tuple(costs), tuple(devices[index] for index, _ in fleet["clients"]))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as problem:
        raise CheckpointError(
            f"the state of the cut policy holds no fleet that can be read: {type(problem).__name__} {problem}.",
            "The checkpoint belongs to a run with another policy or another version; start a new run.",
        ) from problem


def cuts_of(state: State, participants: Sequence[int]) -> list[int]:
    """A copy of the cuts of all clients. Raises CheckpointError unless every participant has one."""
    cuts = state.get("cuts")
    if not isinstance(cuts, list) or any(not 0 <= client < len(cuts) for client in participants):
        raise CheckpointError(
            f"the state of the cut policy has no cut for every participant of {list(participants)}: cuts are {cuts!r}.",
            "The checkpoint belongs to a run with another policy or other clients; start a new run.",
        )
    return [int(cut) for cut in cuts]


def list_of(state: State, name: str) -> list[Any]:
    """A copy of a list in a state. Raises CheckpointError if it is not there."""
    value = state.get(name)
    if not isinstance(value, list):
        raise CheckpointError(
            f"the state of the cut policy has no list {name!r}.", "The checkpoint belongs to a run with another policy; start a new run."
        )
    return list(value)


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _tupled(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
