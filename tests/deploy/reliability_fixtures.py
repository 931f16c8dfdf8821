"""Fixtures of the reliability tests, fast and slow: the nursery, what all federations share, and an undisturbed run to compare with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from .federation_scenes import adapters_of, simulated
from .process_scenes import Federation, Ground, Nursery, adapter_bytes, federation, fingerprint


@dataclass(frozen=True)
class Undisturbed:
    """What a run gives when nothing happens to it."""

    facts: dict[str, Any]
    adapter: str
    seconds: float

    def must_equal(self, made: Federation) -> None:
        """Bit for bit: adapters, moments, clients' snapshots, losses of every step that the journal keeps."""
        found = fingerprint(made)
        for name, value in self.facts.items():
            assert found.get(name) == value, name
        assert found.keys() == self.facts.keys()
        assert adapter_bytes(made) == self.adapter


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
        return Undisturbed(fingerprint(made), adapter_bytes(made), seconds)


__all__ = ["Undisturbed", "ground", "nursery", "undisturbed"]
