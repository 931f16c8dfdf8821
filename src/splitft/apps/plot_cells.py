"""Grids of coloured cells: the ramp, names on the left, rounds below, equal neighbours joined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from splitft.apps.plots import Drawing, Legend, evenly

SHADES = 7
GRID_ROWS = 60
SIDE_BY_SIDE = 12
NAME_CHARACTERS = 18
T = TypeVar("T")


def shade(value: float, low: float, high: float) -> int:
    """Step of the sequential ramp, 0 to 6, for `value` in [low, high]."""
    if high <= low:
        return SHADES // 2
    return min(SHADES - 1, max(0, round((value - low) / (high - low) * (SHADES - 1))))


def ramp_legend(values: Sequence[int], word: str) -> tuple[Legend, ...]:
    """The values that occur with their colours, an even choice of seven where there are more."""
    known = sorted(set(values))
    shown = [known[place] for place in evenly(len(known), SHADES)]
    return tuple(Legend(f"{word} {value}", f"ramp q{shade(value, known[0], known[-1])}") for value in shown)


def row_height(rows: int) -> int:
    """Pixels of a row: fewer the more rows there are."""
    return 30 if rows <= 6 else 22 if rows <= 12 else 15 if rows <= 40 else 13


def equal_stretches(values: Sequence[T], merge: bool) -> list[tuple[int, int]]:
    """(first, last) of runs of equal neighbours; every cell on its own unless `merge`."""
    stretches: list[tuple[int, int]] = []
    for index, value in enumerate(values):
        if merge and stretches and values[stretches[-1][0]] == value:
            stretches[-1] = (stretches[-1][0], index)
        else:
            stretches.append((index, index))
    return stretches


def number_axis(drawing: Drawing, numbers: Sequence[int], left: float, cell: float, bottom: float, title: str) -> None:
    """A number under every cell, or under as many as have room, and what they count."""
    every = max(1, math.ceil(34 / cell))
    for index in range(0, len(numbers), every):
        drawing.text(left + cell * (index + 0.5), bottom + 17, str(numbers[index]), anchor="middle")
    drawing.text(left + cell * len(numbers) / 2, bottom + 36, title, "t title", anchor="middle")
