"""Runs that the security tests compare with: the honest clients alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .federation_scenes import Scene, adapters_of, scene, wait_for

# Three seats of which two are enough, one cut for all; the third is the offender's.
COMMON: dict[str, Any] = {
    "clients": {"minimum": 2},
    "policy": {"name": "fixed", "cuts": [1, 2, 1]},
    "train": {"local_steps": 2, "batch_size": 2, "moments": "keep", "learning_rate": 5e-3},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Tables of `changes` laid over those of `base`."""
    found = dict(base)
    for name, change in changes.items():
        both = isinstance(change, dict) and isinstance(found.get(name), dict) and "name" not in change
        found[name] = {**found[name], **change} if both else change
    return found


def honest_alone(folder: Path, seats: int = 3, honest: int = 2, **changes: Any) -> torch.Tensor:
    """The joined adapters of a run in which the other seats stay empty."""
    values = merged({**COMMON, "name": "alone"}, merged(changes, {"federation": {"join_s": 0.0}}))
    with scene(folder, seats, **values) as fed:
        for number in range(honest):
            fed.client(number)
            wait_for(lambda number=number: number in fed.house.host.seats)  # type: ignore[misc]
        return adapters_of(fed.end())


def honest_first(fed: Scene, honest: int = 2, **options: Any) -> Scene:
    """Honest clients in the first seats."""
    for number in range(honest):
        fed.client(number, **options)
        wait_for(lambda number=number: number in fed.house.host.seats)  # type: ignore[misc]
    return fed


def unharmed(fed: Scene) -> None:
    """The server's thread has not failed."""
    assert fed.thread.error is None, fed.thread.error
