"""The line chart all curves share: axes, solid and interrupted lines, bands, direct labels at the right end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitft.apps.plots import HALF_PX, Drawing, Point, Scale, integer_scale, linear_scale, quantile, spread, text_px, value_scale
from splitft.apps.report_text import is_number, number_text, shorten

LABEL_CHARACTERS = 16
MARKER_GAP_PX = 18
LEFT_PX = 52.0


@dataclass(frozen=True)
class Series:
    """A line. A point without a value interrupts it; the gap is bridged with dots. `css`: colour class; `label`: at its right end;
    `names`: of the points, shown on hover; `marks`: written beside them."""

    name: str
    points: tuple[Point, ...]
    css: str
    bold: bool = False
    label: bool = True
    markers: bool = True
    names: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Band:
    """A shaded range: (x, low, high)."""

    points: tuple[tuple[float, float, float], ...]
    css: str


@dataclass(frozen=True)
class LineChart:
    """What to draw. `whole_x`: the x axis counts things (rounds, steps). `rules`: x of faint vertical lines. `held`: x, whole numbers,
    where bold lines have open dots and the axis a bar; `held_name` says why. `zero`: the y axis is linear and begins at zero."""

    series: tuple[Series, ...]
    x_title: str
    y_title: str
    bands: tuple[Band, ...] = ()
    width: int = HALF_PX
    height: int = 330
    whole_x: bool = True
    rules: tuple[float, ...] = ()
    x_scale: Scale | None = None
    held: tuple[int, ...] = ()
    held_name: str = ""
    zero: bool = False

    def draw(self) -> Drawing:
        """The chart as marks; call `.svg(...)` on it."""
        drawing = Drawing(self.width, self.height)
        labels = [item for item in self.series if item.label and _last(item)]
        right = max([text_px(shorten(item.name, LABEL_CHARACTERS)) + 16 for item in labels], default=18)
        _, y = self._scales(LEFT_PX, self.width - right, 26, self.height - 44)
        left = max(LEFT_PX, 12 + max((text_px(y.tick_text(tick)) for tick in y.ticks), default=0.0))
        x, y = self._scales(left, self.width - right, 26, self.height - 44)
        draw_axes(drawing, x, y, self.x_title, self.y_title + (", log scale" if y.log else ""))
        for rule in self.rules:
            drawing.line(x(rule), y.end_px, x(rule), y.start_px, "rule")
        self._draw_held(drawing, x, y)
        for band in self.bands:
            if len(band.points) == 1:
                at, low, high = band.points[0]
                drawing.area([(x(at) - 7, y(high)), (x(at) + 7, y(high))], [(x(at) - 7, y(low)), (x(at) + 7, y(low))], band.css)
            elif band.points:
                drawing.area([(x(at), y(high)) for at, _, high in band.points], [(x(at), y(low)) for at, low, _ in band.points], band.css)
        for item in sorted(self.series, key=lambda item: item.bold):
            self._draw_series(drawing, item, x, y)
        self._draw_labels(drawing, labels, x, y)
        return drawing

    def _scales(self, left: float, right: float, top: float, bottom: float) -> tuple[Scale, Scale]:
        values = [value for item in self.series for _, value in item.points if value is not None]
        values += [edge for band in self.bands for _, low, high in band.points for edge in (low, high)]
        places = [at for item in self.series for at, _ in item.points] or [0]
        if self.x_scale is not None:
            base = self.x_scale
            x = Scale(base.low, base.high, left, right, base.ticks, base.log)
        else:
            x = integer_scale(round(min(places)), round(max(places)), left, right, count=max(4, int((right - left) / 45)))
        return x, linear_scale(values, bottom, top, zero=True) if self.zero else value_scale(values, bottom, top, count=5)

    def _draw_series(self, drawing: Drawing, item: Series, x: Scale, y: Scale) -> None:
        weight = "bold" if item.bold else "thin"
        known = [index for index, (_, value) in enumerate(item.points) if is_number(value)]
        runs: list[list[tuple[float, float]]] = []
        previous: int | None = None
        for index in known:
            at, value = item.points[index]
            assert value is not None
            place = (x(at), y(value))
            if previous is None or index != previous + 1:
                if runs:
                    drawing.line(*runs[-1][-1], *place, f"line bridge {item.css}")
                runs.append([])
            runs[-1].append(place)
            previous = index
        for run in runs:
            drawing.path(run, f"line {weight} {item.css}")
        if not item.markers:
            return
        radius = 4.2 if item.bold else 3.0
        roomy = len(known) * MARKER_GAP_PX <= x.end_px - x.start_px + MARKER_GAP_PX
        present = set(known)
        for index in known:
            if not roomy and (index - 1 in present or index + 1 in present):
                continue
            at, value = item.points[index]
            assert value is not None
            where = item.names[index] if item.names else f"{self.x_title} {number_text(at, 6)}"
            kind, why = ("open", f", {self.held_name}") if item.bold and at in self.held else ("dot", "")
            drawing.circle(x(at), y(value), radius, f"{kind} {item.css}", f"{item.name}, {where}: {number_text(value, 4)}{why}")
            if item.marks:
                drawing.text(x(at) + 7, y(value) - 7, item.marks[index], "t small")

    def _draw_held(self, drawing: Drawing, x: Scale, y: Scale) -> None:
        """Bars on the x axis, one for a stretch of neighbours."""
        inside = [at for at in self.held if x.low <= at <= x.high]
        stretches: list[list[int]] = []
        for at in inside:
            if stretches and at == stretches[-1][-1] + 1:
                stretches[-1].append(at)
            else:
                stretches.append([at])
        for stretch in stretches:
            start, end = (max(x(stretch[0] - 0.3), x.start_px), min(x(stretch[-1] + 0.3), x.end_px))
            name = f"{self.x_title} {stretch[0]}" + (f" to {stretch[-1]}" if len(stretch) > 1 else "")
            drawing.rect(start, y.start_px - 2, end - start, 4, "held", f"{name}: {self.held_name}")

    def _draw_labels(self, drawing: Drawing, labels: Sequence[Series], x: Scale, y: Scale) -> None:
        ends = [_last(item) for item in labels]
        wanted = [y(end[1]) + 4 for end in ends if end]
        for item, place in zip(labels, spread(wanted, 14, y.end_px + 4, y.start_px + 4), strict=True):
            text = shorten(item.name, LABEL_CHARACTERS)
            drawing.text(x.end_px + 9, place, text, f"t name {item.css}" + (" strong" if item.bold else ""), title=item.name)


def _last(item: Series) -> tuple[float, float] | None:
    for at, value in reversed(item.points):
        if value is not None and is_number(value):
            return at, value
    return None


def draw_axes(drawing: Drawing, x: Scale, y: Scale, x_title: str, y_title: str) -> None:
    """Hairlines at the y ticks, numbers on both axes, titles: y above its axis where it reads without turning the head."""
    for tick in y.ticks:
        drawing.line(x.start_px, y(tick), x.end_px, y(tick), "grid")
        drawing.text(x.start_px - 8, y(tick) + 4, y.tick_text(tick), anchor="end")
    drawing.line(x.start_px, y.start_px, x.end_px, y.start_px, "axis")
    for tick in x.ticks:
        drawing.line(x(tick), y.start_px, x(tick), y.start_px + 4, "axis")
        drawing.text(x(tick), y.start_px + 18, x.tick_text(tick), anchor="middle")
    drawing.text(x.start_px - 44, y.end_px - 14, y_title, "t title")
    drawing.text((x.start_px + x.end_px) / 2, y.start_px + 36, x_title, "t title", anchor="middle")


def spread_bands(groups: Sequence[tuple[float, Sequence[float]]]) -> tuple[tuple[Band, ...], tuple[Point, ...]]:
    """For many clients: the full range and the middle 80 % as bands, and the median line. `groups`: x and the clients' values there."""
    filled = [(at, values) for at, values in groups if values]
    full = Band(tuple((at, min(values), max(values)) for at, values in filled), "band faint")
    middle = Band(tuple((at, quantile(values, 0.1), quantile(values, 0.9)) for at, values in filled), "band")
    return (full, middle), tuple((at, quantile(values, 0.5)) for at, values in filled)
