"""How well the run learned: held-out perplexity, training loss by step and by round."""

from __future__ import annotations

import math

from splitft.apps.plot_lines import Band, LineChart, Series, spread_bands
from splitft.apps.plots import HALF_PX, WIDE_PX, Figure, Legend, Point, client_css
from splitft.apps.report_record import RunRecord, finite
from splitft.apps.report_text import change_text, number_text, plural, shorten

MANY_CLIENTS = 12
DRAWN_STEPS = 480
TABLE_ROWS = 200
HELD = Legend("not aggregated", "ink", "open")
BAND_LEGEND = (Legend("10th to 90th percentile", "band", "band"), Legend("full range", "band faint", "band"))


def learning_figures(record: RunRecord) -> list[Figure]:
    """Perplexity, loss per step, loss per round; those the journal has data for. A loss figure without its pair is wide."""
    rounds = round_loss_figure(record)
    steps = step_loss_figure(record, wide=rounds is None)
    if steps is None:
        rounds = round_loss_figure(record, wide=True)
    return [figure for figure in (perplexity_figure(record), steps, rounds) if figure is not None]


def perplexity_figure(record: RunRecord) -> Figure | None:
    """Held-out perplexity of the cohort and of each client, round 0 being the model before training."""
    overall = record.perplexities()
    if not any(value is not None for _, value in overall):
        return None
    whole = Series("global", tuple((float(at), value) for at, value in overall), "ink", bold=True)
    clients = [(record.client_name(client), _as_points(record.perplexities(client))) for client in record.client_ids]
    series, bands, legend = _client_lines([(name, points) for name, points in clients if finite(value for _, value in points)])
    held = not_aggregated(record)
    chart = LineChart((whole, *series), "round", "perplexity, held out", bands, WIDE_PX, 380, held=held, held_name=HELD.label)
    note = _perplexity_note(record)
    if held:
        note += f" {len(held)} of {plural(len(record.rounds), 'round')} {'was' if len(held) == 1 else 'were'} not aggregated."
    rows = tuple(
        (str(at), number_text(value, 4), *(number_text(points[index][1], 4) for _, points in clients))
        for index, (at, value) in enumerate(overall)
    )
    columns = ("round", "global", *(name for name, _ in clients))
    svg = chart.draw().svg("perplexity", "Held-out perplexity by round", note)
    return Figure("perplexity", "Held-out perplexity", note, svg, columns, rows, (*_global_legend(held), *legend), wide=True)


def not_aggregated(record: RunRecord) -> tuple[int, ...]:
    """Rounds after which the global adapter stayed as it was: a synchronisation rule put it off, or no update came through."""
    return tuple(item.round for item in record.rounds if not item.aggregated)


def _global_legend(held: tuple[int, ...]) -> tuple[Legend, ...]:
    line = Legend("global", "ink", "bold")
    return (line, HELD) if held else (line,)


def _width(wide: bool) -> int:
    return WIDE_PX if wide else HALF_PX


def _as_points(series: list[tuple[int, float | None]]) -> tuple[Point, ...]:
    return tuple((float(at), value) for at, value in series)


def _client_lines(clients: list[tuple[str, tuple[Point, ...]]]) -> tuple[tuple[Series, ...], tuple[Band, ...], tuple[Legend, ...]]:
    """A line each for up to twelve clients; beyond that the median and two bands, which stay readable."""
    if len(clients) == 1:
        return (), (), ()  # it would lie on the global line
    if len(clients) <= MANY_CLIENTS:
        lines = tuple(Series(name, points, client_css(place)) for place, (name, points) in enumerate(clients))
        return lines, (), tuple(Legend(line.name, line.css, "line") for line in lines)
    places = sorted({at for _, points in clients for at, _ in points})
    grouped: dict[float, list[float]] = {at: [] for at in places}
    for _, points in clients:
        for at, value in points:
            if value is not None and math.isfinite(value):
                grouped[at].append(value)
    bands, median = spread_bands(list(grouped.items()))
    line = Series("median client", median, "c0")
    return (line,), bands, (Legend(f"median of {len(clients)} clients", "c0", "line"), *BAND_LEGEND)


def _perplexity_note(record: RunRecord) -> str:
    before, after = record.before_after()
    if after is None:
        return f"Before training: {number_text(before)}. No round has been evaluated yet."
    parts = [f"Global perplexity is {number_text(after)} after training."]
    if before is not None:
        verb = "fell" if after < before else "rose"
        parts = [f"Global perplexity {verb} from {number_text(before)} to {number_text(after)} ({change_text(before, after)})."]
    pairs = {client: record.before_after(client) for client in record.client_ids}
    gains = {client: last / first - 1 for client, (first, last) in pairs.items() if first and last}
    if len(gains) > 1:
        best, worst = min(gains, key=lambda client: gains[client]), max(gains, key=lambda client: gains[client])
        parts.append(f"Largest gain {shorten(record.client_name(best), 40)} ({change_text(*pairs[best])}),")
        parts.append(f"smallest {shorten(record.client_name(worst), 40)} ({change_text(*pairs[worst])}).")
    return " ".join(parts)


def step_loss_figure(record: RunRecord, wide: bool = False) -> Figure | None:
    """Mean training loss of each local step, rounds end to end."""
    losses: list[float | None] = []
    starts: list[float] = []
    for item in record.rounds:
        starts.append(len(losses) + 0.5)
        losses.extend(item.step_losses)
    known = finite(losses)
    if not known:
        return None
    points, band, per_point = _condense(losses)
    means = _round_means(record)
    series = (
        Series("each step", points, "c0", label=False, markers=len(points) == 1),
        Series("round mean", means, "ink", bold=True, label=False, markers=False),
    )
    rules = tuple(starts[1:]) if len(starts) <= 20 else ()
    chart = LineChart(series, "local step, all rounds", "training loss, nats per token", band, _width(wide), rules=rules)
    note = f"Mean over the participants at each of {plural(len(losses), 'local step')}: "
    note += f"{number_text(known[0])} at first, {number_text(known[-1])} at last."
    if per_point > 1:
        note += f" Each point is the mean of {per_point} steps, shaded from the least to the largest."
    elif len(rules) > 0:
        note += " Vertical lines separate rounds."
    rows = tuple((str(at + 1), number_text(value, 4)) for at, value in enumerate(losses[:TABLE_ROWS]))
    legend = (Legend("each step" if per_point == 1 else f"mean of {per_point} steps", "c0", "line"), Legend("round mean", "ink", "bold"))
    svg = chart.draw().svg("step-loss", "Training loss by local step", note)
    return Figure("step-loss", "Training loss, step by step", note, svg, ("step", "loss"), rows, legend, wide)


def _round_means(record: RunRecord) -> tuple[Point, ...]:
    """A level stretch per round, broken between rounds by a point without a value only when a round has no loss."""
    points: list[Point] = []
    at = 0
    for item in record.rounds:
        known = finite(item.step_losses)
        mean = sum(known) / len(known) if known else None
        if item.step_losses:
            points += [(at + 0.5 if at else 1.0, mean), (at + len(item.step_losses) + 0.5, mean)]
        at += len(item.step_losses)
    if points:
        points[-1] = (float(at), points[-1][1])
    return tuple(points)


def _condense(losses: list[float | None]) -> tuple[tuple[Point, ...], tuple[Band, ...], int]:
    """All steps when they fit, else means of equal groups with the range as a band."""
    size = math.ceil(len(losses) / DRAWN_STEPS)
    if size == 1:
        return tuple((float(at), value) for at, value in enumerate(losses, start=1)), (), 1
    points: list[Point] = []
    ranges: list[tuple[float, float, float]] = []
    for start in range(0, len(losses), size):
        group = finite(losses[start : start + size])
        at = start + (min(size, len(losses) - start) + 1) / 2
        points.append((at, sum(group) / len(group) if group else None))
        if group:
            ranges.append((at, min(group), max(group)))
    return tuple(points), (Band(tuple(ranges), "band"),), size


def round_loss_figure(record: RunRecord, wide: bool = False) -> Figure | None:
    """Mean training loss of each round: cohort (token-weighted) and clients. None also for a single number, which the steps show better."""
    overall = tuple((float(item.round), item.loss) for item in record.rounds)
    if not finite(value for _, value in overall) or len(overall) == len(record.client_ids) == 1:
        return None
    by_round = [{client.client: client.loss_mean for client in item.clients} for item in record.rounds]
    clients: list[tuple[str, tuple[Point, ...]]] = []
    for client in record.client_ids:
        points = tuple((float(item.round), losses.get(client)) for item, losses in zip(record.rounds, by_round, strict=True))
        if finite(value for _, value in points):
            clients.append((record.client_name(client), points))
    series, bands, legend = _client_lines(clients)
    held = not_aggregated(record)
    lines = (Series("global", overall, "ink", bold=True), *series)
    chart = LineChart(lines, "round", "training loss, nats per token", bands, _width(wide), held=held, held_name=HELD.label)
    known = finite(value for _, value in overall)
    note = f"Token-weighted mean over the participants: {number_text(known[0])} in the first round"
    note += f", {number_text(known[-1])} in the last." if len(known) > 1 else "."
    rows = tuple(
        (f"{at:.0f}", number_text(value, 4), *(number_text(points[index][1], 4) for _, points in clients))
        for index, (at, value) in enumerate(overall)
    )
    svg = chart.draw().svg("round-loss", "Training loss by round", note)
    columns = ("round", "global", *(name for name, _ in clients))
    return Figure("round-loss", "Training loss, round by round", note, svg, columns, rows, (*_global_legend(held), *legend), wide)
