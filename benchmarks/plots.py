"""The page's plots as SVG files that stand alone: speeds as bars, growth as lines, stages beside their floors as stacked bars.

Drawn with the report's own scales, marks and colours; the same bytes for the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import growth
from benchmarks.floor_counts import STAGES
from benchmarks.floors import floor_s
from benchmarks.setups import MODELS
from benchmarks.throughput_tables import Found, cases
from splitft.apps.plot_lines import draw_axes
from splitft.apps.plots import Drawing, Scale, linear_scale, log_scale, px, text_px
from splitft.apps.report_files import write_atomically
from splitft.apps.report_style import plot_sheet

Rows = list[dict[str, Any]]
IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
WIDTH_PX = 960
FONT = 'svg{font-family:system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}.paper{fill:var(--card)}'
WAYS = {
    "loop": ("PEFT, split loop, better of fp32 and autocast", "c1"),
    "peft": ("PEFT, unsplit, better of fp32 and autocast", "g-other"),
    "bare": ("bare bank, better of fp32 and bf16", "c4"),
    "cohort": ("splitft's cohort, better of fp32 and bf16", "c0"),
}
STAGE_CSS = {
    "frozen forward": "c0",
    "frozen backward": "g-down",
    "attention": "c3",
    "low-rank": "c1",
    "elementwise": "c4",
    "head": "c2",
    "wire": "c5",
    "optimizer": "g-client",
    "rest": "g-other",
}


def stand_alone(drawing: Drawing, key: str, title: str, description: str) -> str:
    """The drawing as a file: with its own size, style and ground."""
    head, body = drawing.svg(key, title, description).split("</desc>", 1)
    size = f'<svg xmlns="http://www.w3.org/2000/svg" width="{px(drawing.width)}" height="{px(drawing.height)}" '
    ground = '<rect class="paper" width="100%" height="100%"/>'
    return f"{size}{head.removeprefix('<svg ')}</desc><style>{plot_sheet()}{FONT}</style>{ground}{body}\n"


def legend(drawing: Drawing, entries: Sequence[tuple[str, str]], left: float, top: float) -> float:
    """Boxes with their names, in as many lines as it takes; the y below them."""
    x, y = left, top
    for name, css in entries:
        if x > left and x + 24 + text_px(name) > drawing.width - 16:
            x, y = left, y + 20
        drawing.rect(x, y - 10, 12, 12, f"flat {css}")
        drawing.text(x + 18, y, name)
        x += 38 + text_px(name)
    return y + 20


def throughput(rows: Rows) -> str:
    """A panel per model, a group of bars per size; above the cohort's bar how many times as fast as the better PEFT it is."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    drawing = Drawing(WIDTH_PX, 50 + 330 * len(models))
    top = legend(drawing, list(WAYS.values()), 56, 24)
    for index, model in enumerate(models):
        _bars(drawing, MODELS[model], list(cases(rows, model)), top + 46 + 330 * index)
    return stand_alone(
        drawing, "throughput", "Training speed in tokens per second", "Groups of bars for numbers of clients and tokens of each client."
    )


def _bars(drawing: Drawing, title: str, found: list[tuple[str, Found]], top: float) -> None:
    speeds = [{way: max(float(row["tokens_per_s"]) for (own, _), row in group.items() if own == way) for way in WAYS} for _, group in found]
    bottom, left, right = top + 222, 76.0, WIDTH_PX - 20.0
    y = linear_scale([speed for group in speeds for speed in group.values()], bottom, top, zero=True)
    for tick in y.ticks:
        drawing.line(left, y(tick), right, y(tick), "grid")
        drawing.text(left - 8, y(tick) + 4, y.tick_text(tick), anchor="end")
    drawing.line(left, bottom, right, bottom, "axis")
    drawing.text(20, top - 22, f"{title} (tokens per second)", "t title strong")
    room = (right - left) / len(found)
    bar = min(30.0, room / (len(WAYS) + 1.2))
    for index, ((size, group), own) in enumerate(zip(found, speeds, strict=True)):
        start = left + room * (index + 0.5) - bar * len(WAYS) / 2
        for place, (way, (name, css)) in enumerate(WAYS.items()):
            drawing.rect(start + bar * place, y(own[way]), bar - 2, bottom - y(own[way]), f"bar {css}", f"{name}, {size}: {own[way]:,.0f}")
        best = max((row for (way, _), row in group.items() if way == "cohort"), key=lambda row: float(row["tokens_per_s"]))
        label = f"{best['speed_to']['best_peft']:.1f}×"
        drawing.text(start + bar * (len(WAYS) - 0.5) - 1, y(own["cohort"]) - 6, label, "t strong", anchor="middle")
        drawing.text(left + room * (index + 0.5), bottom + 18, size, anchor="middle")
    drawing.text(
        (left + right) / 2,
        bottom + 38,
        "clients × tokens of each; the number above a bar: times the speed of the better PEFT",
        "t title",
        "middle",
    )


def growth_lines(rows: Rows) -> str:
    """Seconds of a client's step and peak memory over the number of clients."""
    drawing, half = Drawing(WIDTH_PX, 340), WIDTH_PX / 2
    clients = [float(row["clients"]) for row in rows]
    steps = [growth.client_step_s(row) * 1000 for row in rows]
    peaks = [float(row["peak_bytes"]) / 1e9 for row in rows]
    expected = [growth.expected_bytes(rows, row) / 1e9 for row in rows]
    _lines(drawing, 70, half - 30, clients, "ms of one client's step", {"c0": steps})
    _lines(drawing, half + 70, WIDTH_PX - 30, clients, "peak memory of the process, GB", {"c0": peaks, "c4 dash": expected})
    legend(drawing, [("measured", "c0"), ("the smallest run + adapters and moments of each further client", "c4")], 70, 24)
    return stand_alone(drawing, "growth", "Cost over the number of clients", "Two line charts over 10, 100 and 1,000 clients.")


def _lines(drawing: Drawing, left: float, right: float, at: Sequence[float], title: str, lines: dict[str, Sequence[float]]) -> None:
    x: Scale = log_scale(at, left, right)
    y = linear_scale([value for values in lines.values() for value in values], 290, 76, zero=True)
    draw_axes(drawing, x, y, "clients, log scale", title)
    for css, values in reversed(lines.items()):
        places = [(x(one), y(value)) for one, value in zip(at, values, strict=True)]
        drawing.path(places, f"line bold {css}")
        for (px_x, px_y), value in zip(places, values, strict=True):
            drawing.circle(px_x, px_y, 4, f"dot {css}", f"{value:,.2f}")
    for one, value in zip(at, lines["c0"], strict=True):
        start = one == min(at)
        drawing.text(x(one) + (6 if start else -6), y(value) - 10, f"{value:,.2f}", "t strong", "start" if start else "end")


def floors(rows: Rows) -> str:
    """For each model and precision a bar of the step's stages, and one of their floors."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    drawing = Drawing(WIDTH_PX, 110 + sum(96 + 62 * sum(row["model"] == model for row in rows) for model in models))
    y = legend(drawing, [(STAGES[stage], css) for stage, css in STAGE_CSS.items()], 24, 24) + 20
    for model in models:
        y = _stacks(drawing, [row for row in rows if row["model"] == model], y)
    return stand_alone(
        drawing, "floors", "Time of a step by stage beside its floor", "Stacked horizontal bars, measured and least possible time."
    )


def _stacks(drawing: Drawing, rows: Rows, top: float) -> float:
    """The panel of one model; the y below it."""
    left, right = 110.0, WIDTH_PX - 200.0
    x = linear_scale([row["step_s"] * 1000 for row in rows], left, right, count=7, zero=True)
    bottom = top + 14 + 62 * len(rows)
    first = rows[0]
    drawing.text(24, top, f"{MODELS[first['model']]}; {first['clients']} clients × {first['tokens']} tokens", "t title strong")
    for tick in x.ticks:
        drawing.line(x(tick), top + 12, x(tick), bottom, "grid")
        drawing.text(x(tick), bottom + 17, x.tick_text(tick), anchor="middle")
    drawing.line(left, bottom, right, bottom, "axis")
    drawing.text((left + right) / 2, bottom + 36, "ms of a step of all clients", "t title", anchor="middle")
    for index, row in enumerate(rows):
        y, times = top + 18 + 62 * index, row["step_s"] / floor_s(row)
        _stack(drawing, x, y, row, "seconds", row["dtype"], f"{row['step_s'] * 1000:,.0f} ms, {times:.1f}× the floor")
        _stack(drawing, x, y + 25, row, "floor_s", "its floor", f"{floor_s(row) * 1000:,.0f} ms")
    return bottom + 74


def _stack(drawing: Drawing, x: Scale, y: float, row: dict[str, Any], field: str, name: str, label: str) -> None:
    at = 0.0
    drawing.text(x.start_px - 10, y + 15, name, "t strong" if field == "seconds" else "t", "end")
    for one in row["stages"]:
        length = max(0.0, one[field] * 1000)
        drawing.rect(x(at), y, x(at + length) - x(at), 21, f"bar {STAGE_CSS[one['stage']]}", f"{STAGES[one['stage']]}: {length:.1f} ms")
        at += length
    drawing.text(x(at) + 8, y + 15, label, "t strong" if field == "seconds" else "t")


PLOTS: dict[str, tuple[Callable[[Rows], str], str]] = {
    "throughput": (throughput, "Tokens per second of every way of training"),
    "growth": (growth_lines, "Time of a client's step and memory over the number of clients"),
    "floors": (floors, "Stages of a step beside their floors"),
}


def file_name(name: str) -> str:
    return f"benchmarks_{name}.svg"


def write_plots(sections: dict[str, Any], folder: Path = IMAGES) -> list[Path]:
    """Draw every plot whose benchmark has results; the files written."""
    return [
        write_atomically(folder / file_name(name), draw(sections[name]["rows"]).encode())
        for name, (draw, _) in PLOTS.items()
        if name in sections
    ]
