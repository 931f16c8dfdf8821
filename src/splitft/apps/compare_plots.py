"""Figures of a comparison: final perplexity of every variant, who reached the target when, and the curves.

A variant keeps one hue and one marker on the whole page: thirty pairs, so no two are told apart by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from splitft.apps.compare_record import Comparison, Point, RunFigures, VariantFigures
from splitft.apps.plot_lines import draw_axes
from splitft.apps.plots import (
    HALF_PX,
    HUES,
    WIDE_PX,
    Drawing,
    Figure,
    Scale,
    integer_scale,
    linear_scale,
    spread,
    text_px,
    value_scale,
)
from splitft.apps.report_text import BYTE_UNITS, MISSING, TIME_UNITS, bytes_text, number_text, pick_unit, seconds_text, shorten

MARKERS = 5
CROWDED = 6
LABEL_CHARACTERS = 34
HALF_LABEL_CHARACTERS = 18
ROW_PX = 26
MARKER_GAP_PX = 26


@dataclass(frozen=True)
class Axis:
    """One cost that perplexity is drawn against."""

    key: str
    title: str
    value: Callable[[Point], float]
    text: Callable[[float], str]
    units: tuple[tuple[float, str], ...] = ()


AXES = (
    Axis("rounds", "rounds", lambda point: float(point.round), lambda value: number_text(value, 4)),
    Axis("virtual", "virtual time", lambda point: point.virtual_s, seconds_text, TIME_UNITS),
    Axis("bytes", "bytes sent, both directions", lambda point: point.bytes_both, bytes_text, BYTE_UNITS),
    Axis("compute", "compute of all clients", lambda point: point.client_compute_s, seconds_text, TIME_UNITS),
)


def hue(position: int) -> str:
    """Colour class of the variant at `position`."""
    return f"c{position % HUES}"


def marker(drawing: Drawing, position: int, x: float, y: float, size: float, css: str) -> None:
    """The variant's own shape: circle, square, triangle, diamond, triangle upside down."""
    shape = position % MARKERS
    if shape == 0:
        drawing.circle(x, y, size, css)
        return
    corners = {
        1: ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        2: ((0, -1.2), (1.1, 0.8), (-1.1, 0.8)),
        3: ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
        4: ((0, 1.2), (1.1, -0.8), (-1.1, -0.8)),
    }[shape]
    drawing.area([(x + size * dx, y + size * dy) for dx, dy in corners], [], css)


def compare_figures(comparison: Comparison) -> list[Figure]:
    """All figures that the runs have data for."""
    figures = [final_figure(comparison), target_figure(comparison)]
    figures += [curve_figure(comparison, axis) for axis in AXES]
    if len(comparison.variants) > CROWDED:
        figures.append(panels_figure(comparison, AXES[1]))
    return [figure for figure in figures if figure is not None]


@dataclass
class _Rows:
    """A drawing with a row per variant: names on the left, a scale below."""

    drawing: Drawing
    x: Scale
    left: float
    top: float

    def y(self, index: int) -> float:
        return self.top + (index + 0.5) * ROW_PX


def _rows(variants: Sequence[VariantFigures], x: Callable[[float, float], Scale], title: str) -> _Rows:
    """Room for the names, hairlines between rows, the axis."""
    left = max(text_px(shorten(item.label, 34)) for item in variants) + 44
    top, height = 14, ROW_PX * len(variants)
    drawing = Drawing(WIDE_PX, top + height + 48)
    scale = x(left, WIDE_PX - 190)
    rows = _Rows(drawing, scale, left, top)
    for tick in scale.ticks:
        drawing.line(scale(tick), top, scale(tick), top + height, "grid")
        drawing.text(scale(tick), top + height + 18, scale.tick_text(tick), anchor="middle")
    drawing.line(scale.start_px, top + height, scale.end_px, top + height, "axis")
    drawing.text((scale.start_px + scale.end_px) / 2, top + height + 38, title, "t title", anchor="middle")
    for index, item in enumerate(variants):
        if index:
            drawing.line(0, top + index * ROW_PX, WIDE_PX, top + index * ROW_PX, "rule")
        marker(drawing, index, 12, rows.y(index), 5, f"dot {hue(index)}")
        drawing.text(26, rows.y(index) + 4, shorten(item.label, 34), f"t name {hue(index)}", title=item.label)
    return rows


def final_figure(comparison: Comparison) -> Figure | None:
    """Final perplexity: every run a mark, the mean a stroke, the range a bar."""
    variants = comparison.variants
    finals = [[run.last.perplexity for run in item.finished if run.last and run.last.perplexity is not None] for item in variants]
    known = [value for values in finals for value in values]
    if not known:
        return None
    target = comparison.target.perplexity
    marks = [*known, target] if target is not None and min(known) * 0.5 < target < max(known) * 2 else known
    rows = _rows(variants, lambda low, high: value_scale(marks, low, high, 8), "final perplexity, held out (lower is better)")
    drawing, x = rows.drawing, rows.x
    if len(marks) > len(known) and target is not None:
        drawing.line(x(target), rows.top, x(target), rows.y(len(variants) - 1) + ROW_PX / 2, "target")
    for index, (item, values) in enumerate(zip(variants, finals, strict=True)):
        y, css = rows.y(index), hue(index)
        if not values:
            drawing.text(rows.left + 6, y + 4, _absence(item), "t")
            continue
        if len(values) > 1:
            drawing.rect(x(min(values)), y - 4, x(max(values)) - x(min(values)), 8, f"span {css}", round_px=4)
        for value in values:
            marker(drawing, index, x(value), y, 4, f"dot {css}")
        mean = fmean(values)
        drawing.line(x(mean), y - 9, x(mean), y + 9, f"line bold {css}")
        failed = sum(run.status == "failed" for run in item.runs)
        drawing.text(x.end_px + 12, y + 4, number_text(mean, 4) + (f", {failed} failed" if failed else ""), "t strong")
    note = "Every run a mark, the stroke their mean, the bar from the lowest to the highest; the mean in numbers on the right."
    note += " The dashed line is the target." if len(marks) > len(known) else ""
    table = tuple(
        (item.label, *(number_text(value, 5) for value in (min(values), fmean(values), max(values))))
        for item, values in zip(variants, finals, strict=True)
        if values
    )
    svg = drawing.svg("final", "Final perplexity by variant", note)
    return Figure("final", "Final perplexity", note, svg, ("variant", "lowest", "mean", "highest"), table, wide=True)


def _absence(item: VariantFigures) -> str:
    errors = [run.error for run in item.runs if run.status == "failed"]
    return f"failed ({len(errors)} of {len(item.runs)} runs): {shorten(errors[0], 80)}" if errors else "no finished run"


def target_figure(comparison: Comparison) -> Figure | None:
    """Virtual time to the target: a mark per run that reached it; the others are counted in words."""
    target, variants = comparison.target.perplexity, comparison.variants
    if target is None:
        return None
    hits = [[point.virtual_s for point in item.hits(target)] for item in variants]
    known = [value for values in hits for value in values]
    size, unit = pick_unit(max(known, default=1.0), TIME_UNITS)
    rows = _rows(
        variants,
        lambda low, high: linear_scale([value / size for value in known], low, high, 8, zero=True),
        f"virtual time to the target, {unit}",
    )
    drawing, x = rows.drawing, rows.x
    for index, (item, values) in enumerate(zip(variants, hits, strict=True)):
        y, css, runs = rows.y(index), hue(index), len(item.finished)
        if not values:
            final = item.final
            ended = f" (ended at {number_text(final.mean, 4)})" if final else ""
            drawing.text(rows.left + 6, y + 4, f"not reached{ended}" if runs else _absence(item), "t")
            continue
        mean = fmean(values) / size
        drawing.line(x(0), y, x(mean), y, f"line stem {css}")
        for value in values:
            marker(drawing, index, x(value / size), y, 4, f"dot {css}")
        drawing.line(x(mean), y - 9, x(mean), y + 9, f"line bold {css}")
        words = seconds_text(mean * size) + ("" if len(values) == runs else f", {len(values)} of {runs} runs")
        drawing.text(x.end_px + 12, y + 4, words, "t strong")
    note = f"Target: perplexity {number_text(target, 4)}, {comparison.target.rule}. "
    note += "Every run a mark at the first evaluation at or below it, the stroke the mean of the runs that reached it."
    table = tuple(
        (item.label, f"{len(values)} of {len(item.finished)}", seconds_text(fmean(values)) if values else "not reached")
        for item, values in zip(variants, hits, strict=True)
    )
    svg = drawing.svg("target", "Virtual time to the target by variant", note)
    return Figure("target", "Who reached the target when", note, svg, ("variant", "runs", "virtual time, mean"), table, wide=True)


@dataclass(frozen=True)
class _Curve:
    """Mean and range of perplexity over runs, at the mean cost of each round."""

    position: int
    label: str
    points: tuple[tuple[float, float, float, float], ...]  # cost, mean, lowest, highest


def _curves(comparison: Comparison, axis: Axis) -> list[_Curve]:
    curves = []
    for position, item in enumerate(comparison.variants):
        points = []
        for group in item.curve():
            values = [point.perplexity for point in group if point.perplexity is not None]
            points.append((fmean(axis.value(point) for point in group), fmean(values), min(values), max(values)))
        if points:
            curves.append(_Curve(position, item.label, tuple(points)))
    return curves


def _scales(curves: Sequence[_Curve], axis: Axis, box: tuple[float, float, float, float], ticks: int) -> tuple[Scale, Scale, float, str]:
    """Scales for a box (left, right, top, bottom); the unit of x, its size and name."""
    left, right, top, bottom = box
    largest = max(point[0] for curve in curves for point in curve.points)
    size, unit = pick_unit(largest, axis.units) if axis.units else (1.0, "")
    if axis.units:
        x = linear_scale([0.0, largest / size], left, right, ticks, zero=True)
    else:
        x = integer_scale(0, round(largest), left, right, ticks * 2)
    return x, value_scale([value for curve in curves for point in curve.points for value in point[1:]], bottom, top), size, unit


def curve_figure(comparison: Comparison, axis: Axis) -> Figure | None:
    """Held-out perplexity against one cost: a line per variant, the range over its runs behind it, its name at the end."""
    curves = _curves(comparison, axis)
    if not curves:
        return None
    crowded = len(curves) > CROWDED
    wide = crowded or max(len(curve.label) for curve in curves) > HALF_LABEL_CHARACTERS
    width, height = (WIDE_PX, 480 if crowded else 400) if wide else (HALF_PX, 360)
    drawing = Drawing(width, height)
    right = width - max(text_px(shorten(curve.label, LABEL_CHARACTERS)) for curve in curves) - 40
    x, y, size, unit = _scales(curves, axis, (52, right, 26, height - 44), 8 if wide else 5)
    draw_axes(drawing, x, y, f"{axis.title}, {unit}" if unit else axis.title, "perplexity, held out" + (", log scale" if y.log else ""))
    target = comparison.target.perplexity
    if target is not None and y.low <= target <= y.high:
        drawing.line(x.start_px, y(target), x.end_px, y(target), "target")
    for curve in curves:
        _draw(drawing, curve, x, y, size, hue(curve.position), band=not crowded)
    _label(drawing, curves, x, y, size)
    note = "Mean over the finished runs of each variant, at the mean cost of each evaluated round; no line goes beyond its runs."
    note += "" if crowded else " Shaded: from the lowest to the highest run."
    columns = ("variant", "round", axis.title, "perplexity, mean", "lowest", "highest")
    svg = drawing.svg(f"curve-{axis.key}", f"Perplexity against {axis.title}", note)
    return Figure(f"curve-{axis.key}", f"Perplexity against {axis.title}", note, svg, columns, _table(comparison, axis), wide=wide)


def _table(comparison: Comparison, axis: Axis) -> tuple[tuple[str, ...], ...]:
    rows = []
    for item in comparison.variants:
        for group in item.curve():
            values = [point.perplexity for point in group if point.perplexity is not None]
            cost = axis.text(fmean(axis.value(point) for point in group))
            rows.append(
                (item.label, str(group[0].round), cost, *(number_text(value, 5) for value in (fmean(values), min(values), max(values))))
            )
    return tuple(rows)


def _draw(drawing: Drawing, curve: _Curve, x: Scale, y: Scale, size: float, css: str, band: bool, markers: bool = True) -> None:
    if band and len(curve.points) > 1 and any(high > low for _, _, low, high in curve.points):
        upper = [(x(at / size), y(high)) for at, _, _, high in curve.points]
        drawing.area(upper, [(x(at / size), y(low)) for at, _, low, _ in curve.points], f"span {css}")
    line = [(x(at / size), y(mean)) for at, mean, _, _ in curve.points]
    drawing.path(line, f"line thin {css}")
    last = -math.inf
    for place in line if markers else ():
        if place[0] - last >= MARKER_GAP_PX or place is line[-1]:
            marker(drawing, curve.position, *place, 3.6, f"dot {css}")
            last = place[0]


def _label(drawing: Drawing, curves: Sequence[_Curve], x: Scale, y: Scale, size: float) -> None:
    """Names at the right, in the order of the lines' ends, each tied to its end by a hairline."""
    ends = [(x(curve.points[-1][0] / size), y(curve.points[-1][1])) for curve in curves]
    places = spread([end[1] for end in ends], 15, y.end_px, y.start_px)
    for curve, end, place in zip(curves, ends, places, strict=True):
        css = hue(curve.position)
        drawing.path([end, (x.end_px + 4, end[1]), (x.end_px + 16, place)], f"line lead {css}")
        marker(drawing, curve.position, x.end_px + 22, place, 3.6, f"dot {css}")
        drawing.text(x.end_px + 31, place + 4, shorten(curve.label, LABEL_CHARACTERS), f"t name {css}", title=curve.label)


def panels_figure(comparison: Comparison, axis: Axis) -> Figure | None:
    """A small panel per variant on common scales: its curve in colour, all others in grey."""
    curves = _curves(comparison, axis)
    if not curves:
        return None
    columns, wide, high = 4, WIDE_PX / 4, 186
    drawing = Drawing(WIDE_PX, math.ceil(len(curves) / columns) * high)
    for place, curve in enumerate(curves):
        left, top = (place % columns) * wide, (place // columns) * high
        x, y, size, unit = _scales(curves, axis, (left + 40, left + wide - 28, top + 34, top + high - 34), 3)
        for tick in y.ticks if len(y.ticks) < 6 else y.ticks[:: math.ceil(len(y.ticks) / 5)]:
            drawing.line(x.start_px, y(tick), x.end_px, y(tick), "grid")
            drawing.text(x.start_px - 6, y(tick) + 4, y.tick_text(tick), "t small", "end")
        drawing.line(x.start_px, y.start_px, x.end_px, y.start_px, "axis")
        for tick in x.ticks:
            drawing.text(x(tick), y.start_px + 15, x.tick_text(tick) + (f" {unit}" if tick == x.ticks[-1] else ""), "t small", "middle")
        for other in curves:
            if other is not curve:
                _draw(drawing, other, x, y, size, "faded", band=False, markers=False)
        _draw(drawing, curve, x, y, size, hue(curve.position), band=True)
        drawing.text(left + 40, top + 20, shorten(curve.label, 30), f"t name strong {hue(curve.position)}", title=curve.label)
    note = f"Perplexity against {axis.title}, one panel per variant on common scales; the other variants in grey. "
    note += "Shaded: lowest to highest run."
    svg = drawing.svg("panels", "Each variant among the others", note)
    return Figure("panels", "Each variant among the others", note, svg, wide=True)


def run_text(run: RunFigures) -> str:
    """Final perplexity of one run, or a dash."""
    return number_text(run.last.perplexity, 4) if run.last else MISSING
