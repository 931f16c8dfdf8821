"""The page's pictures: bytes against quality with the front, the course over epochs, the controllers beside their budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.plots import legend, stand_alone
from experiments.codecs.measures import WITHIN, Against, Place, front, load, places
from experiments.codecs.runs import LONG, MEDIUM, PARETO, ROOT
from experiments.codecs.settings import LENGTHS, SETTINGS
from experiments.codecs.stacks import RECOMMENDED
from experiments.codecs.tables import title

from splitft.apps.plot_lines import LineChart, Series, draw_axes
from splitft.apps.plots import HUES, Drawing, Scale, linear_scale, log_scale

IMAGES = ROOT / "docs" / "images"
WIDTH_PX, PANEL_PX, NAMES_PX = 960, 420, 18
HIGHEST = 6.0  # per cent of excess; what lies above is drawn at the edge
CONTROLLERS = (("recommended", "c0"), ("recommended_bang_bang", "c1"), ("recommended_ddpg", "c3"), ("recommended_energy", "c2"))


def pareto() -> str:
    """A panel a setting: a dot a stack, numbered as in the table; the front as a line, its stacks by name."""
    panels = [(SETTINGS[name].heading, found) for name in PARETO if (found := places(load(name, MEDIUM)))]
    heights = [PANEL_PX + NAMES_PX * -(-len(front(found)) // 2) for _, found in panels]
    drawing = Drawing(WIDTH_PX, sum(heights) or PANEL_PX)
    for index, (heading, found) in enumerate(panels):
        _panel(drawing, heading, found, sum(heights[:index]))
    say = "Dots are stacks of codecs after ten epochs: share of the bytes of 16-bit values, against perplexity above the uncompressed."
    return stand_alone(drawing, "codecs-pareto", "Bytes against perplexity", say)


def _panel(drawing: Drawing, heading: str, found: Sequence[Place], top: float) -> None:
    best, excesses = front(found), [100 * place.excess for place in found]
    drawing.text(20, top + 26, f"{heading}, {MEDIUM} epochs; the front:", "t title strong")
    for index, place in enumerate(best):
        name = f"{found.index(place) + 1} {title(place.stack)}: {100 * place.share:.1f} %, {100 * place.excess:+.2f} %"
        drawing.text(20 + WIDTH_PX / 2 * (index % 2), top + 48 + NAMES_PX * (index // 2), name, "t small c1")
    upper = top + 84 + NAMES_PX * -(-len(best) // 2)
    x = log_scale([100 * place.share for place in found], 70, WIDTH_PX - 30)
    y = linear_scale([min(0.0, *excesses), min(HIGHEST, max(excesses)), 1.0], upper + PANEL_PX - 150, upper)
    draw_axes(drawing, x, y, "bytes of the whole run, both directions, % of 16 bit (log scale)", "perplexity above the uncompressed, %")
    drawing.line(x.start_px, y(100 * WITHIN), x.end_px, y(100 * WITHIN), "line thin g-other dash")
    drawing.text(x.end_px, y(100 * WITHIN) - 5, "within 1 %", "t small", anchor="end")
    drawing.path([_spot(place, x, y) for place in best], "line bold c1")
    written: list[tuple[float, float]] = []
    for number, place in enumerate(found, 1):
        left, height = _spot(place, x, y)
        on_front = place in best
        drawing.circle(left, height, 5 if on_front else 4, f"dot {'c1' if on_front else 'c0'}", _hover(place))
        above = 100 * place.excess > HIGHEST
        words = f"{number}" + (f" ({100 * place.excess:.0f} % ↑)" if above else "")
        # Above its dot, and higher yet, where another number stands already.
        line, room = height + 4, 9.0 * len(words)
        while any(abs(line - there) < 11 and abs(left - beside) < room for beside, there in written):
            line -= 12
        written.append((left, line))
        drawing.text(left + 7, line, words, "t small")


def _spot(place: Place, x: Scale, y: Scale) -> tuple[float, float]:
    return x(100 * place.share), y(min(max(100 * place.excess, y.low), min(HIGHEST, y.high)))


def _hover(place: Place) -> str:
    return f"{title(place.stack)}: {100 * place.share:.2f} % of the bytes, perplexity {100 * place.excess:+.2f} %"


def course() -> str:
    """Bytes and excess of the recommended stack in its longest runs, mean over seeds, a line a setting."""
    known = [(name, runs) for name in SETTINGS if (runs := load(name, LONG).get(RECOMMENDED))]
    drawing = Drawing(WIDTH_PX, 40 + 20 * -(-max(1, len(known)) // 2) + 320)
    names = [(SETTINGS[name].heading, f"c{place % HUES}") for place, (name, _) in enumerate(known)]
    top = legend(drawing, [*names, ("1 %", "g-other")], 20, 24)
    charts: tuple[tuple[str, Callable[[Against, int], float]], ...] = (
        ("bytes so far, % of 16 bit", lambda run, index: 100 * run.total(index)),
        ("perplexity above the uncompressed, %", lambda run, index: 100 * run.excess(index)),
    )
    rounds, step = LENGTHS[LONG].rounds, LENGTHS[LONG].epochs_a_round
    for side, (words, value) in enumerate(charts):
        series = []
        for place, (name, runs) in enumerate(known):
            points = tuple((float(step * index), fmean(value(run, index) for run in runs)) for index in range(1, rounds + 1))
            series.append(Series(SETTINGS[name].heading, points, f"c{place % HUES}", label=False, markers=False))
        if side == 1:
            ends = tuple((float(epoch), 100 * WITHIN) for epoch in (step, LONG))
            series.append(Series("1 %", ends, "g-other dash", label=False, markers=False))
        chart = LineChart(tuple(series), "epochs", words, width=WIDTH_PX // 2, height=320, zero=side == 0).draw()
        drawing.marks.append(f'<g transform="translate({WIDTH_PX // 2 * side} {top})">{"".join(chart.marks)}</g>')
    return stand_alone(drawing, "codecs-course", "The recommended stack over the epochs", "Two line charts: bytes and perplexity.")


def controlled() -> str:
    """A panel a run's length: the loss above the uncompressed run's, a line a seed, and the budget."""
    known = [(name, epochs, load(name, epochs)) for name in PARETO for epochs in (MEDIUM, LONG)]
    panels = [one for one in known if any(stack in one[2] for stack, _ in CONTROLLERS[1:])]
    drawing = Drawing(WIDTH_PX, 70 + 300 * -(-max(1, len(panels)) // 2))
    named = [(title(stack).replace(" (medium)", ""), css) for stack, css in CONTROLLERS]
    top = legend(drawing, [*named, ("budget", "g-other")], 20, 24)
    for index, (name, epochs, grouped) in enumerate(panels):
        step = LENGTHS[epochs].epochs_a_round
        series = [_loss_line(stack, run, css, step) for stack, css in CONTROLLERS for run in grouped.get(stack, [])]
        series.append(Series("budget", ((step, 100 * WITHIN), (epochs, 100 * WITHIN)), "g-other dash", label=False, markers=False))
        chart = LineChart(tuple(series), "epochs", f"loss above, %: {SETTINGS[name].title}", width=WIDTH_PX // 2, height=300).draw()
        at = f"translate({WIDTH_PX // 2 * (index % 2)} {top + 300 * (index // 2)})"
        drawing.marks.append(f'<g transform="{at}">{"".join(chart.marks)}</g>')
    return stand_alone(drawing, "codecs-controllers", "Controllers and their budget", "Line charts: loss above the uncompressed run's.")


def _loss_line(stack: str, run: Against, css: str, step: int) -> Series:
    points = tuple((float(step * index), 100 * run.loss_excess(index)) for index in range(1, run.run.rounds + 1))
    return Series(f"{title(stack)}, seed {run.run.seed}", points, css, label=False, markers=False)


def write() -> list[Path]:
    """The images as files."""
    found = []
    for name, drawn in (("pareto", pareto()), ("course", course()), ("controllers", controlled())):
        path = IMAGES / f"codecs_{name}.svg"
        path.write_text(drawn, encoding="utf-8")
        found.append(path)
    return found
