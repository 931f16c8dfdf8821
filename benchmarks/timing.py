"""Time several ways of doing the same work so that a busy machine hits all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Result = TypeVar("Result")


def take_turns(ways: Mapping[str, Callable[[], Result]], repeats: int) -> dict[str, list[Result]]:
    """`repeats` results of each way. One run of each after the other, and every repeat starts with another one."""
    names = list(ways)
    found: dict[str, list[Result]] = {name: [] for name in ways}
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            found[name].append(ways[name]())
    return found


def seconds(run: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over repeats of the ratio within a repeat: slow drift of the machine cancels."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median: how far to trust a median."""
    return (max(values) - min(values)) / statistics.median(values)
