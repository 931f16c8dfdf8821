"""What crossed the wire: bytes per round by kind, uplink above the axis, downlink below it; and what perplexity they bought."""

from __future__ import annotations

import math

from splitft.apps.plot_lines import LineChart, Series
from splitft.apps.plots import HALF_PX, WIDE_PX, Drawing, Figure, Legend, Point, Scale, integer_scale, linear_scale
from splitft.apps.report_codecs import share_of_16_bit
from splitft.apps.report_record import Round, RunRecord
from splitft.apps.report_text import BYTE_UNITS, bytes_text, number_text, percent_text, pick_unit, plural
from splitft.types import DIRECTIONS, KINDS

DRAWN_BARS = 120
HEIGHT_PX = 330


def kind_css(kind: str) -> str:
    """Colour class of a kind of bytes."""
    return f"k-{kind}" if kind in KINDS else "k-other"


def traffic_figures(record: RunRecord) -> list[Figure]:
    """Bytes per round beside perplexity against bytes; without an evaluation the bytes alone, wide."""
    curve = cost_curve_figure(record)
    return [figure for figure in (traffic_figure(record, wide=curve is None), curve) if figure is not None]


def traffic_figure(record: RunRecord, wide: bool = False) -> Figure | None:
    """Stacked bars per round; None when nothing was sent."""
    total = record.traffic()
    if total <= 0:
        return None
    used = [kind for kind in record.kinds if record.traffic(kind=kind) > 0]
    svg_note = _traffic_note(record, used)
    drawing, per_bar = _draw_bars(record, used, WIDE_PX if wide else HALF_PX)
    if per_bar > 1:
        svg_note += f" Each bar is the mean of {per_bar} rounds."
    columns = ("round", *(f"{direction} {kind}" for direction in DIRECTIONS for kind in used), "total")
    rows = tuple(
        (
            str(item.round),
            *(bytes_text(item.traffic(direction, kind)) for direction in DIRECTIONS for kind in used),
            bytes_text(item.traffic("up") + item.traffic("down")),
        )
        for item in record.rounds
    )
    legend = tuple(Legend(kind, kind_css(kind)) for kind in used)
    svg = drawing.svg("traffic", "Bytes per round by kind, up and down", svg_note)
    return Figure("traffic", "Bytes per round", svg_note, svg, columns, rows, legend, wide)


def _traffic_note(record: RunRecord, used: list[str]) -> str:
    total = record.traffic()
    largest = max(used, key=lambda kind: record.traffic(kind=kind))
    share = percent_text(record.traffic(kind=largest) / total)
    up = percent_text(record.traffic("up") / total)
    return (
        f"{bytes_text(total)} in {plural(len(record.rounds), 'round')}, {up} of it uplink. {largest.capitalize()} are {share} of all bytes."
    )


def _draw_bars(record: RunRecord, used: list[str], width: int) -> tuple[Drawing, int]:
    per_bar = math.ceil(len(record.rounds) / DRAWN_BARS)
    groups = [record.rounds[start : start + per_bar] for start in range(0, len(record.rounds), per_bar)]
    tops = {way: max(_mean(group, way) for group in groups) for way in DIRECTIONS}
    size, unit = pick_unit(max(tops.values()), BYTE_UNITS)
    drawing = Drawing(width, HEIGHT_PX)
    left, right, top, bottom = 60, width - 18, 26, HEIGHT_PX - 44
    y = linear_scale([tops["up"] / size, -tops["down"] / size], bottom, top, count=6, zero=True)
    rounds = record.rounds
    x = integer_scale(rounds[0].round, rounds[-1].round, left, right, count=10)
    slot = (right - left) / max(len(groups), 1)
    bar = min(slot * 0.72 if len(groups) <= 60 else slot, 72)
    for tick in y.ticks:
        drawing.line(left, y(tick), right, y(tick), "axis" if abs(tick) < 1e-9 else "grid")
        drawing.text(left - 8, y(tick) + 4, y.tick_text(abs(tick)), anchor="end")
    for index, group in enumerate(groups):
        _stack(drawing, group, used, y, size, left + slot * (index + 0.5) - bar / 2, bar)
    step = max(1, math.ceil(len(groups) / max(1, len(x.ticks) + 1)))
    for index in range(0, len(groups), step):
        drawing.text(left + slot * (index + 0.5), bottom + 18, str(groups[index][0].round), anchor="middle")
    drawing.text(left - 52, top - 14, f"{unit} per round, all clients", "t title")
    drawing.text((left + right) / 2, bottom + 36, "round", "t title", anchor="middle")
    drawing.text(right, top - 14, "\N{UPWARDS ARROW} uplink, client to server", "t title", anchor="end")
    drawing.text(right, bottom + 36, "\N{DOWNWARDS ARROW} downlink", "t title", anchor="end")
    return drawing, per_bar


def _stack(drawing: Drawing, group: tuple[Round, ...], used: list[str], y: Scale, size: float, x: float, width: float) -> None:
    name = f"round {group[0].round}" if len(group) == 1 else f"rounds {group[0].round} to {group[-1].round}"
    for way, sign in (("up", 1), ("down", -1)):
        base = 0.0
        for kind in used:
            value = _mean(group, way, kind)
            if value <= 0:
                continue
            ends = sorted((y(sign * base / size), y(sign * (base + value) / size)))
            drawing.rect(x, ends[0], width, ends[1] - ends[0], f"bar {kind_css(kind)}", f"{name}, {way}, {kind}: {bytes_text(value)}")
            base += value


def _mean(group: tuple[Round, ...], way: str, kind: str | None = None) -> float:
    return sum(item.traffic(way, kind) for item in group) / len(group)


def cost_curve_figure(record: RunRecord) -> Figure | None:
    """Held-out perplexity against all bytes sent until then: what the link bought."""
    sent_after: dict[int, float] = {0: 0.0}
    total = 0.0
    for item in record.rounds:
        total += item.traffic("up") + item.traffic("down")
        sent_after[item.round] = total
    found = [(at, sent_after[at], value) for at, value in record.perplexities() if value is not None and at in sent_after]
    if not found or total == 0:
        return None
    size, unit = pick_unit(total, BYTE_UNITS)
    points: tuple[Point, ...] = tuple((sent / size, value) for _, sent, value in found)
    names = tuple(f"after round {at} ({bytes_text(sent)})" if at else "before training" for at, sent, _ in found)
    scale = linear_scale((at for at, _ in points), 0, 1, count=6, zero=True)
    marks = tuple(str(at) for at, _, _ in found) if len(found) <= 15 else ()
    series = Series("global", points, "ink", bold=True, label=False, names=names, marks=marks)
    chart = LineChart((series,), f"bytes sent, both directions, {unit}", "perplexity, held out", x_scale=scale)
    svg_note = _cost_note([(sent, value) for _, sent, value in found])
    if (share := share_of_16_bit(record)) is not None:
        svg_note += f" All bytes of the run are {percent_text(share)} of what they would be with 16-bit values in these packets."
    rows = tuple((str(at), bytes_text(sent), number_text(value, 4)) for at, sent, value in found)
    svg = chart.draw().svg("cost-curve", "Perplexity against bytes sent", svg_note)
    legend = (Legend("global, the number is the round" if marks else "global", "ink", "bold"),)
    columns = ("round", "bytes sent", "perplexity")
    return Figure("cost-curve", "What the bytes bought", svg_note, svg, columns, rows, legend)


def _cost_note(points: list[tuple[float, float]]) -> str:
    """How much of the traffic the bulk of the gain took."""
    if len(points) < 3:
        return "Perplexity against the bytes of all clients, both directions, since the start."
    first, best = points[0][1], min(value for _, value in points)
    if best >= first:
        return "More bytes did not lower the perplexity in this run."
    goal = first - 0.9 * (first - best)
    sent = next(sent for sent, value in points if value <= goal)
    share = percent_text(sent / points[-1][0])
    return f"Nine tenths of the gain in perplexity were there after {bytes_text(sent)}, {share} of the traffic."
