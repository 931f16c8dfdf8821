"""Shares of bytes and of quality, from the kept figures: every run against the uncompressed one of the same setting and seed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.codecs.runs import RESULTS, results_path
from experiments.codecs.settings import SETTINGS
from experiments.codecs.stacks import UNCOMPRESSED, stacks

WITHIN = 0.01  # of the uncompressed run's perplexity
Line = Mapping[str, float]


@dataclass(frozen=True)
class Kept:
    """A kept run of so many epochs: its lines, one a round, the first before training."""

    stack: str
    epochs: int
    seed: int
    lines: Sequence[Line]

    @property
    def rounds(self) -> int:
        return len(self.lines) - 1

    def perplexity(self, index: int = -1) -> float:
        """After a round; after the last one if none is named, as everywhere here."""
        return math.exp(self.lines[index]["loss"])

    def sent(self, *starts: str, index: int = -1) -> float:
        """Bytes so far of the columns that begin like this."""
        return math.fsum(value for name, value in self.lines[index].items() if name.startswith(starts))


@dataclass(frozen=True)
class Against:
    """A run beside the uncompressed one of its length and seed."""

    run: Kept
    reference: Kept

    def excess(self, index: int = -1) -> float:
        """Perplexity above the uncompressed run's after the same round, as a share of it."""
        return self.run.perplexity(index) / self.reference.perplexity(index) - 1.0

    def loss_excess(self, index: int = -1) -> float:
        """The same of the loss: what controllers keep a budget of."""
        return self.run.lines[index]["loss"] / self.reference.lines[index]["loss"] - 1.0

    def share(self, *starts: str, index: int = -1) -> float:
        """Bytes so far of columns that begin like this, over those of 16-bit values."""
        return self.run.sent(*starts, index=index) / plain_bytes(self.reference, *starts, index=index)

    def total(self, index: int = -1) -> float:
        return self.share("up_", "down_", index=index)

    def part(self, *starts: str) -> float:
        """Bytes of some columns over all bytes of 16-bit values."""
        return self.run.sent(*starts) / plain_bytes(self.reference, "up_", "down_")

    def seconds(self, link: str, within: float = WITHIN) -> float | None:
        """Virtual seconds until the perplexity is first within `within` of the uncompressed run's last; None if never."""
        target = (1.0 + within) * self.reference.perplexity()
        reached = [index for index in range(1, self.run.rounds + 1) if self.run.perplexity(index) <= target]
        return self.run.lines[reached[0]][f"virtual_s {link}"] if reached else None


def plain_bytes(reference: Kept, *starts: str, index: int = -1) -> float:
    """What 16-bit values would have taken: the uncompressed run's bytes with its 32-bit adapters halved, headers too."""
    adapters = [name for name in reference.lines[index] if name.endswith("_adapters") and name.startswith(starts)]
    return reference.sent(*starts, index=index) - (reference.sent(*adapters, index=index) / 2 if adapters else 0.0)


def load(setting: str, epochs: int, results: Path = RESULTS) -> dict[str, list[Against]]:
    """The kept runs of a setting and a length by stack, those whose uncompressed run is kept. Runs of a stack that has other codecs now
    are left out: their figures are another stack's."""
    path = results_path(setting, results)
    if not path.is_file():
        return {}
    found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    names, known, side = found["columns"], stacks(epochs), SETTINGS[setting].exit
    runs = [
        Kept(run["stack"], epochs, run["seed"], [dict(zip(names, line, strict=True)) for line in run["points"]])
        for run in found["runs"]
        if run["epochs"] == epochs and run["stack"] in known and known[run["stack"]].is_kept_as(run["codecs"], side)
    ]
    references = {run.seed: run for run in runs if run.stack == UNCOMPRESSED}
    grouped: dict[str, list[Against]] = {}
    for run in sorted(runs, key=lambda one: one.seed):
        if run.seed in references:
            grouped.setdefault(run.stack, []).append(Against(run, references[run.seed]))
    return grouped


@dataclass(frozen=True)
class Place:
    """A stack in the picture: its seeds' mean share of bytes and excess of perplexity at the end."""

    stack: str
    runs: Sequence[Against]

    @property
    def share(self) -> float:
        return fmean(run.total() for run in self.runs)

    @property
    def excess(self) -> float:
        return fmean(run.excess() for run in self.runs)

    @property
    def within(self) -> int:
        """How many seeds are within the tolerance."""
        return sum(run.excess() <= WITHIN for run in self.runs)


def places(grouped: Mapping[str, Sequence[Against]]) -> list[Place]:
    """Every stack, fewest bytes first."""
    found = [Place(stack, runs) for stack, runs in grouped.items()]
    return sorted(found, key=lambda place: (place.share, place.excess, place.stack))


def front(found: Sequence[Place]) -> list[Place]:
    """Those to which no other has both fewer bytes and less excess; fewest bytes first."""
    kept: list[Place] = []
    for place in found:  # sorted by bytes
        if not kept or place.excess < kept[-1].excess:
            kept.append(place)
    return kept


def cheapest_within(found: Sequence[Place], within: float = WITHIN) -> Place | None:
    """The stack with the fewest bytes whose mean excess is tolerable."""
    return next((place for place in found if place.excess <= within), None)
