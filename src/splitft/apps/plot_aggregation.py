"""What the aggregation and the synchronisation rule report of themselves: energy lost in truncation, drift, versions missed, and so on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from splitft.apps.plot_lines import LineChart, Series
from splitft.apps.plots import HALF_PX, WIDE_PX, Figure, Legend, Point, client_css
from splitft.apps.report_record import Round, RunRecord, finite
from splitft.apps.report_text import clean, number_text, shorten

HEIGHT_PX = 230
Reader = Callable[[Round], float | None]


@dataclass(frozen=True)
class Panel:
    """One figure: `lines` are (name, its value in a round)."""

    key: str
    title: str
    unit: str
    note: str
    lines: tuple[tuple[str, Reader], ...]


def metric(name: str, factor: float = 1.0) -> Reader:
    """A figure of the event `round`'s `metrics`."""

    def read(item: Round) -> float | None:
        value = item.metrics.get(name)
        return None if value is None else factor * value

    return read


def _truncated(item: Round) -> float | None:
    found = finite(client.truncated for client in item.clients)
    return 100 * max(found) if found else None


def _missed(choose: Callable[[list[float]], float]) -> Reader:
    def read(item: Round) -> float | None:
        found = finite(client.staleness for client in item.clients)
        return choose(found) if found else None

    return read


PANELS = (
    Panel(
        "truncation",
        "What truncation lost",
        "% of the adapter's energy",
        "Share of the squared norm that found no room: of the exact mean in the server's ranks, and of the server's adapter in a client's.",
        (("server", metric("discarded_energy", 100)), ("client that lost most", _truncated)),
    ),
    Panel(
        "drift",
        "Drift of the clients",
        "variance of the changes",
        "How far the clients' changes since the last synchronisation lie apart; above the threshold they are averaged.",
        (("drift", metric("drift_variance")), ("threshold", metric("drift_threshold"))),
    ),
    Panel(
        "staleness",
        "Versions missed",
        "merges since the update began",
        "An update that began before other merges counts for less.",
        (("mean", _missed(lambda found: sum(found) / len(found))), ("most", _missed(max))),
    ),
    Panel(
        "privacy",
        "Privacy spent",
        "epsilon so far",
        "What all merges up to a round have spent together; less is more private. The sentence at the top of the page says of what.",
        (("epsilon", metric("privacy_epsilon")),),
    ),
    Panel(
        "noise",
        "Clip and noise of private merges",
        "length of an update",
        "Updates are shortened to the clip; noise of that length is added to their mean.",
        (("clip", metric("privacy_clip")), ("noise on the mean", metric("privacy_noise_norm"))),
    ),
    Panel(
        "sealed",
        "Updates in a sum behind masks",
        "clients",
        "How many clients' own adapters the server got as one sum.",
        (("clients", metric("sealed_clients")),),
    ),
)
# Shown in these panels, or the same in every round and said in a sentence at the top of the page.
_TOLD = {
    "discarded_energy",
    "drift_variance",
    "drift_threshold",
    "rounds_since_aggregation",
    "sealed_clients",
    "sealed_values",
    "sealed_step",
}
_PRIVACY = "privacy_"


def aggregation_figures(record: RunRecord) -> list[Figure]:
    """A small chart for each figure the rules report, related ones together; those that were never more than zero are left out."""
    names = sorted(name for name in {name for item in record.rounds for name in item.metrics} - _TOLD if not name.startswith(_PRIVACY))
    others = tuple(Panel(f"metric-{place}", _title(name), "", "", ((_title(name), metric(name)),)) for place, name in enumerate(names))
    found = [panel for panel in (_known(record, panel) for panel in (*PANELS, *others)) if panel is not None]
    odd = len(found) % 2 == 1
    return [_figure(record, panel, odd and place == len(found) - 1) for place, panel in enumerate(found)]


def _title(name: str) -> str:
    return shorten(clean(name).replace("_", " ").capitalize(), 48)


def _known(record: RunRecord, panel: Panel) -> Panel | None:
    """The panel with the lines the journal has; None when there are none, or nothing but zeros."""
    values = {name: finite(read(item) for item in record.rounds) for name, read in panel.lines}
    lines = tuple((name, read) for name, read in panel.lines if values[name])
    return replace(panel, lines=lines) if any(any(found) for found in values.values()) else None


def _figure(record: RunRecord, panel: Panel, wide: bool) -> Figure:
    columns = [(name, [read(item) for item in record.rounds]) for name, read in panel.lines]
    series = []
    for place, (name, values) in enumerate(columns):
        points: tuple[Point, ...] = tuple((float(item.round), value) for item, value in zip(record.rounds, values, strict=True))
        series.append(Series(name, points, client_css(place), label=False))
    last = [(name, number_text(known[-1])) for name, values in columns if (known := finite(values))]
    told = ", ".join(f"{name} {value}" for name, value in last) if len(last) > 1 else last[0][1]
    note = f"{panel.note} At last: {told}.".strip()
    chart = LineChart(tuple(series), "round", panel.unit, width=WIDE_PX if wide else HALF_PX, height=HEIGHT_PX)
    rows = tuple((str(item.round), *(number_text(values[place], 4) for _, values in columns)) for place, item in enumerate(record.rounds))
    legend = tuple(Legend(line.name, line.css, "line") for line in series) if len(series) > 1 else ()
    svg = chart.draw().svg(panel.key, panel.title, note)
    return Figure(panel.key, panel.title, note, svg, ("round", *(name for name, _ in columns)), rows, legend, wide)
