"""The pictures of docs/privacy.md: leak against perplexity for each model, and held-out loss against epsilon.

python -m experiments.privacy_plots
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.plots import legend, stand_alone
from experiments.utility import CLIP_ONLY, EPSILONS, NO_CLIP, series

from splitft.apps.plot_lines import draw_axes
from splitft.apps.plots import Drawing, linear_scale, log_scale

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
WIDTH_PX, PANEL_PX, LEFT_PX, RIGHT_PX = 960, 360, 70, 30
MODELS = {"stories260K": "260 thousand parameters, 64 channels", "embedded": "embedded, 7.5 million parameters, 256 channels"}
# How a row's name says what it protects with; the first that fits.
GROUPS = (
    ("U-shape", "U-shape", "c4"),
    ("trained", "trained bottleneck", "c3"),
    ("axes kept", "trained bottleneck, kept as it begins", "c2"),
    ("bottleneck", "codec projection", "c1"),
    ("noise", "codec noise", "c5"),
    ("", "cuts and quantisation", "c0"),
)


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return found


def css_of(row: str) -> str:
    return next(css for word, _, css in GROUPS if row.startswith(word))


def worst(found: Mapping[str, Any]) -> float:
    """What who knows the adapter recovers, with gradients that come back where it joins them."""
    return float(max(found["leaks"].get(one, 0.0) for one in ("K", "K+L")))


def leak() -> str:
    """A panel a model: a dot a row of its table."""
    drawing = Drawing(WIDTH_PX, 50 + PANEL_PX * len(MODELS))
    top = legend(drawing, [(name, css) for _, name, css in reversed(GROUPS)], 20, 24)
    for name, heading in MODELS.items():
        _leaks(drawing, heading, read(f"privacy-{name}")["rows"], top)
        top += PANEL_PX
    say = "Dots are runs: perplexity after training against the share of tokens that an attacker with the adapter recovers."
    return stand_alone(drawing, "privacy-leak", "Leak against perplexity", say)


def _leaks(drawing: Drawing, heading: str, rows: Mapping[str, Mapping[str, Any]], top: float) -> None:
    drawing.text(20, top + 22, heading, "t title strong")
    x = log_scale([row["perplexity"] for row in rows.values()], LEFT_PX, WIDTH_PX - RIGHT_PX)
    y = linear_scale([0.0, 1.0], top + PANEL_PX - 60, top + 50)
    draw_axes(drawing, x, y, "held-out perplexity of the exported adapter (log scale)", "share of tokens recovered, adapter known")
    written: list[tuple[float, float]] = []
    for row, found in sorted(rows.items(), key=lambda one: (-worst(one[1]), one[1]["perplexity"])):
        left, height = x(found["perplexity"]), y(worst(found))
        words = f"{row}: {worst(found):.3f} at {found['perplexity']:.1f}"
        drawing.circle(left, height, 5, f"dot {css_of(row)}", words)
        # What most runs give, nearly all, needs no name; the others get one where there is room.
        if worst(found) < 0.95 and all(abs(height - there) > 11 or abs(left - beside) > 7.0 * len(row) for beside, there in written):
            right = left + 7.0 * len(row) > WIDTH_PX - RIGHT_PX
            drawing.text(left + (-8 if right else 8), height + 4, row, "t small", anchor="end" if right else "start")
            written.append((left, height))


def utility() -> str:
    """Epsilon against held-out loss: a dot a seed, a line through their means; what no clip, clip alone and no training give."""
    results = read("utility-embedded")
    found = series(results)
    before = fmean(row["before"] for row in results["rows"])
    drawing = Drawing(WIDTH_PX, PANEL_PX + 30)
    top = legend(drawing, [("rule private", "c0"), ("without noise, untrained", "g-other")], 20, 24)
    losses = [loss for name, rows in found.items() for loss in rows]
    x = log_scale([*EPSILONS], LEFT_PX, WIDTH_PX - 130)
    y = linear_scale([min(losses), max(*losses, before)], top + PANEL_PX - 80, top + 20)
    draw_axes(drawing, x, y, "epsilon for ten rounds, smaller is more private (log scale)", "held-out loss")
    heights = {"untrained": before, **{name: fmean(found[name]) for name in (CLIP_ONLY, NO_CLIP)}}
    for number, (name, height) in enumerate(heights.items()):
        drawing.line(x.start_px, y(height), x.end_px, y(height), "line thin g-other dash")
        # No clip and clip alone are nearly one line: their names stand one above, one below.
        drawing.text(x.end_px + 8, y(height) + (4 if number == 0 else -2 if number == 1 else 13), f"{name} {height:.2f}", "t small")
    drawing.path([(x(epsilon), y(fmean(found[f"{epsilon:g}"]))) for epsilon in EPSILONS], "line bold c0")
    for epsilon in EPSILONS:
        for loss in found[f"{epsilon:g}"]:
            drawing.circle(x(epsilon), y(loss), 4, "dot c0", f"epsilon {epsilon:g}: {loss:.3f}")
    return stand_alone(drawing, "privacy-utility", "Held-out loss against epsilon", "A line chart: less epsilon, more loss.")


PLOTS = {"privacy_leak": leak, "privacy_utility": utility}


def main() -> None:
    for name, draw in PLOTS.items():
        path = IMAGES / f"{name}.svg"
        path.write_text(draw(), encoding="utf-8")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
