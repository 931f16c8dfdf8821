"""Time several ways of doing the same work so that a busy machine hits all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Samples:
    """Wall and processor seconds of each repeat."""

    wall_s: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)

    def add(self, run: Callable[[], object]) -> None:
        gc.collect()
        processor, wall = time.process_time(), time.perf_counter()
        run()
        self.wall_s.append(time.perf_counter() - wall)
        self.processor_s.append(time.process_time() - processor)


def interleave(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Samples]:
    """`repeats` timings of each way. One run of each after the other, and every repeat starts with another one."""
    names, samples = list(ways), {name: Samples() for name in ways}
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            samples[name].add(ways[name])
    return samples


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over repeats of the ratio within a repeat: slow drift of the machine cancels."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median: how far to trust a median."""
    return (max(values) - min(values)) / statistics.median(values)
