"""SVG by hand: scales, ticks, marks, and the figure that carries them. No plot decides a colour value here: marks carry class
names, the page's style sheet gives them their colours in light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from splitft.apps.report_text import escape, is_number

HUES = 6
HALF_PX = 560
WIDE_PX = 1160
CHARACTER_PX = 7.1
# Ticks that would need more are written as powers of ten.
MOST_DECIMALS = 5
Point = tuple[float, float | None]


@dataclass(frozen=True)
class Scale:
    """Data to pixels along one axis; `ticks` lie inside [low, high]."""

    low: float
    high: float
    start_px: float
    end_px: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start_px + share * (self.end_px - self.start_px)

    def tick_text(self, value: float) -> str:
        """The tick's number with the decimals that tell neighbours apart."""
        if self.log:
            return f"{value:,.10g}"
        step = min((b - a for a, b in zip(self.ticks, self.ticks[1:], strict=False)), default=max(abs(value), 1.0))
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        if decimals and not math.isclose(step * 10**decimals, round(step * 10**decimals), rel_tol=1e-6):
            decimals += 1
        elif not decimals and not math.isclose(step, round(step), rel_tol=1e-6):
            decimals = 1
        if decimals > MOST_DECIMALS and max(map(abs, self.ticks)) < 100 * step:  # near zero: three figures tell ticks apart
            return f"{round(value / step) * step:.3g}".replace("-", "\N{MINUS SIGN}")
        return f"{value:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def nice_step(span: float, count: int) -> float:
    """A step of 1, 2, 2.5 or 5 times a power of ten that divides `span` into about `count` parts."""
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if raw <= factor * power * (1 + 1e-9))


def linear_scale(values: Iterable[float], start_px: float, end_px: float, count: int = 5, zero: bool = False) -> Scale:
    """A scale widened to round numbers around `values`; from zero on request (bars must)."""
    known = [value for value in values if is_number(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        margin = abs(high) * 0.1 or 1.0
        low, high = (low, high + margin) if zero else (low - margin, high + margin)
    step = nice_step(high - low, count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Scale(first * step, last * step, start_px, end_px, tuple(index * step for index in range(first, last + 1)))


def log_scale(values: Iterable[float], start_px: float, end_px: float) -> Scale:
    """Ticks at 1, 2, 5 times powers of ten (powers alone when many); values must be positive."""
    known = [value for value in values if is_number(value) and value > 0]
    low, high = min(known), max(known)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    marks = [factor * 10.0**power for power in powers for factor in factors]
    first = max((mark for mark in marks if mark <= low * 1.001), default=marks[0])
    last = min((mark for mark in marks if mark >= high * 0.999), default=marks[-1])
    return Scale(first, last, start_px, end_px, tuple(mark for mark in marks if first <= mark <= last), log=True)


def value_scale(values: Sequence[float], start_px: float, end_px: float, count: int = 5) -> Scale:
    """Linear, or logarithmic where the largest value is more than twelve times the smallest."""
    positive = [value for value in values if is_number(value)]
    if positive and min(positive) > 0 and max(positive) / min(positive) > 12:
        return log_scale(positive, start_px, end_px)
    return linear_scale(positive, start_px, end_px, count)


def integer_scale(low: int, high: int, start_px: float, end_px: float, count: int = 10) -> Scale:
    """Whole numbers from `low` to `high` without widening: rounds and steps."""
    if high <= low:
        return Scale(low - 0.5, low + 0.5, start_px, end_px, (float(low),))
    step = max(1, round(nice_step(high - low, count)))
    ticks = [value for value in range(low, high + 1) if value % step == 0]
    return Scale(low, high, start_px, end_px, tuple(float(value) for value in ticks))


def px(value: float) -> str:
    """A coordinate with at most two decimals, as short as it goes."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def text_px(text: str) -> float:
    """About how wide a label will be."""
    return CHARACTER_PX * len(text)


@dataclass
class Drawing:
    """Marks in drawing order. All text is escaped here, so a caller cannot forget."""

    width: float
    height: float
    marks: list[str] = field(default_factory=list)

    def path(self, points: Sequence[tuple[float, float]], css: str) -> None:
        if len(points) > 1:
            joined = "L".join(f"{px(x)} {px(y)}" for x, y in points)
            self.marks.append(f'<path class="{css}" d="M{joined}"/>')

    def area(self, upper: Sequence[tuple[float, float]], lower: Sequence[tuple[float, float]], css: str) -> None:
        joined = "L".join(f"{px(x)} {px(y)}" for x, y in [*upper, *reversed(lower)])
        self.marks.append(f'<path class="{css}" d="M{joined}Z"/>')

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        self.marks.append(f'<path class="{css}" d="M{px(x1)} {px(y1)}L{px(x2)} {px(y2)}"/>')

    def rect(self, x: float, y: float, width: float, height: float, css: str, title: str = "", round_px: float = 0) -> None:
        corner = f' rx="{px(round_px)}"' if round_px else ""
        box = f'<rect class="{css}" x="{px(x)}" y="{px(y)}" width="{px(max(width, 0))}" height="{px(max(height, 0))}"{corner}'
        self.marks.append(f"{box}><title>{escape(title)}</title></rect>" if title else f"{box}/>")

    def circle(self, x: float, y: float, radius: float, css: str, title: str = "") -> None:
        dot = f'<circle class="{css}" cx="{px(x)}" cy="{px(y)}" r="{px(radius)}"'
        self.marks.append(f"{dot}><title>{escape(title)}</title></circle>" if title else f"{dot}/>")

    def text(self, x: float, y: float, text: str, css: str = "t", anchor: str = "start", title: str = "") -> None:
        place = "" if anchor == "start" else f' text-anchor="{anchor}"'
        hover = f"<title>{escape(title)}</title>" if title else ""
        self.marks.append(f'<text class="{css}" x="{px(x)}" y="{px(y)}"{place}>{escape(text)}{hover}</text>')

    def svg(self, key: str, title: str, description: str) -> str:
        """The whole element, named and described for screen readers."""
        head = f'<svg viewBox="0 0 {px(self.width)} {px(self.height)}" role="img" aria-labelledby="{key}-t {key}-d">'
        names = f'<title id="{key}-t">{escape(title)}</title><desc id="{key}-d">{escape(description)}</desc>'
        return f"{head}{names}{''.join(self.marks)}</svg>"


@dataclass(frozen=True)
class Legend:
    """One legend entry; `shape` is line, bold, band, box, open (dot) or a cell's mark (refused, partial, lost), `css` the colour class."""

    label: str
    css: str
    shape: str = "box"


@dataclass(frozen=True)
class Figure:
    """A plot ready for the page: `note` says in a sentence what it shows; `columns` and `rows` are the figures behind it."""

    key: str
    title: str
    note: str
    svg: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    legend: tuple[Legend, ...] = ()
    wide: bool = False


def client_css(position: int) -> str:
    """Colour class of the client at `position`: six hues, then the same hues dashed."""
    return f"c{position % HUES}" + (" dash" if position // HUES % 2 else "")


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Label positions near `wanted`, in the same order, at least `gap` apart and inside [low, high] where they fit."""
    order = sorted(range(len(wanted)), key=lambda index: (wanted[index], index))
    placed = [0.0] * len(wanted)
    previous = low - gap
    for index in order:
        previous = placed[index] = max(wanted[index], previous + gap)
    following = high + gap
    for index in reversed(order):
        following = placed[index] = min(placed[index], following - gap)
    return placed


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics; `values` must not be empty."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def evenly(count: int, limit: int) -> list[int]:
    """At most `limit` of 0..count-1, evenly spaced, first and last included."""
    if count <= limit:
        return list(range(count))
    return sorted({round(index * (count - 1) / (limit - 1)) for index in range(limit)})
