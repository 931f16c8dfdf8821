"""Fixtures of the reliability tests, fast and slow: the nursery, what all federations share, and an undisturbed run to compare with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from splitft.deploy.conduct import Conductor
from splitft.engine.rounds import Run

from .federation_scenes import adapters_of, events_of, scene, simulated
from .process_scenes import Federation, Ground, Nursery, adapter_bytes, federation, fingerprint


@dataclass(frozen=True)
class Undisturbed:
    """What a run gives when nothing happens to it."""

    facts: dict[str, Any]
    adapter: str
    adapters: torch.Tensor
    seconds: float

    @classmethod
    def of(cls, made: Federation, seconds: float = 0.0) -> Undisturbed:
        return cls(fingerprint(made), adapter_bytes(made), adapters_of(made.run), seconds)

    def must_equal(self, made: Federation) -> None:
        """Bit for bit: adapters, moments, clients' snapshots, losses of every step that the journal keeps."""
        found = fingerprint(made)
        for name, value in self.facts.items():
            assert found.get(name) == value, name
        assert found.keys() == self.facts.keys()
        assert adapter_bytes(made) == self.adapter


def absent_in(run: Path, seats: int = 3) -> dict[int, set[int]]:
    """Who did not count in which round, as the journal says."""
    everyone = set(range(seats))
    return {event["round"]: everyone - {one["client"] for one in event["clients"] if one["status"] != "lost"} for event in events_of(run)}


def without(folder: Path, absent: dict[int, set[int]], monkeypatch: pytest.MonkeyPatch, **changes: Any) -> torch.Tensor:
    """The adapters of an undisturbed run in which certain clients stay away from certain rounds from the beginning."""
    gather = Conductor._gather

    def fewer(self: Conductor, run: Run, index: int) -> list[int]:
        return [client for client in gather(self, run, index) if client not in absent.get(index, set())]

    with monkeypatch.context() as patch:
        patch.setattr(Conductor, "_gather", fewer)
        # All seats are taken before the first round, so that it is the absences that decide and not who came first.
        with scene(folder, **{**changes, "name": "without", "federation": {"join_s": 10.0}}) as fed:
            return adapters_of(fed.all_clients().end())


@dataclass
class Gates:
    """Rounds that do not begin before the test says so."""

    shut: set[int]

    def put_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gather = Conductor._gather

        def held(conductor: Conductor, run: Run, index: int) -> list[int]:
            while index in self.shut:
                conductor.pump(0.02)
            return gather(conductor, run, index)

        monkeypatch.setattr(Conductor, "_gather", held)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground.make(tmp_path_factory.mktemp("ground"))


@pytest.fixture(scope="session")
def undisturbed(nursery: Nursery, ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Three clients, three rounds of three steps; the same bits as the simulation in one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with federation(nursery, ground, folder) as made:
        made.serve()
        made.join_all().finish()
        reference = simulated(folder)
        assert torch.equal(adapters_of(made.run), adapters_of(reference))
        seconds = json.loads((made.run / "summary.json").read_text())["wall_s"] if (made.run / "summary.json").exists() else 2.0
        return Undisturbed.of(made, seconds)


__all__ = ["Gates", "Undisturbed", "absent_in", "ground", "nursery", "undisturbed", "without"]
