"""What the codecs did, drawn: bytes by stage, samples skipped, residual energy, error at the cut, similarity, dial and probe."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from splitft.apps.plot_lines import LineChart, Series
from splitft.apps.plots import HUES, WIDE_PX, Drawing, Figure, Legend, Scale, linear_scale
from splitft.apps.report_codecs import (
    HEADERS,
    PLACES,
    SIMILARITY_BINS,
    CodecSums,
    Stages,
    codec_places,
    codec_sums,
    ratio_text,
    stages_by_place,
)
from splitft.apps.report_record import Round, RunRecord
from splitft.apps.report_text import BYTE_UNITS, bytes_text, is_number, number_text, pick_unit, plural

DRAWN_BARS = 120
HEIGHT_PX = 330
PANEL_PX = 210
OTHERS = "other stages"
THIRDS = ("first third", "middle third", "last third")
# A place is a word of the journal, a key becomes part of the page.
_OTHER_CHARACTERS = re.compile(r"[^a-z0-9]+")
Reading = Callable[[CodecSums], float | None]


def codec_figures(record: RunRecord) -> list[Figure]:
    """All figures the journal has facts for, in reading order; none without codecs' facts."""
    places = codec_places(record)
    found = [
        stage_figure(record),
        place_figure(record, "skipped", "Samples skipped", "% of samples", lambda sums: sums.skip_rate),
        place_figure(record, "residual", "Residual energy", "% of the samples' energy", lambda sums: sums.residual_share),
        place_figure(record, "cut-error", "Error at the cut", "% of the values, root mean square", lambda sums: sums.error),
        *(similarity_figure(record, place) for place in places),
    ]
    figures = [figure for figure in found if figure is not None]
    control = control_figure(record)
    return figures if control is None else [*figures, control]


def place_css(place: str) -> str:
    """Colour class of a place on the wire, the same in every figure."""
    return f"c{PLACES.index(place)}" if place in PLACES else "k-control"


def stage_figure(record: RunRecord) -> Figure | None:
    """Stacked bars of bytes by codec stage per round; None where no codec told of stages."""
    places = codec_places(record)
    whole = stages_by_place(record.rounds, places)
    if whole is None or not whole.made:
        return None
    told = tuple(place for place in places if codec_sums(record.rounds, place).stages() is not None)
    by_round = [(item.round, stages_by_place((item,), told) or Stages({}, 0.0)) for item in record.rounds]
    names = _stage_names(whole)
    colours = {name: "g-other" if name == HEADERS else f"c{index}" for index, name in enumerate(names)}
    bars = [(number, _folded(stages, names)) for number, stages in by_round]
    note, per_bar = _stage_note(record, whole, told), math.ceil(len(bars) / DRAWN_BARS)
    if per_bar > 1:
        note += f" Each bar is the mean of {per_bar} rounds."
    drawing = _draw_stages(bars, colours, per_bar)
    sums = [codec_sums((item,)) for item in record.rounds]
    rows = tuple(
        (str(number), *(bytes_text(stages.made.get(name, 0.0)) for name in names), bytes_text(stages.sent), ratio_text(one.share))
        for (number, stages), one in zip(bars, sums, strict=True)
    )
    legend = tuple(Legend(name, colours[name]) for name in names)
    if _packed(whole):
        legend += (Legend("sent, after the lossless stage", "ink", "bold"),)
    svg = drawing.svg("codec-stages", "Bytes per round by codec stage", note)
    return Figure("codec-stages", "Bytes by codec stage", note, svg, ("round", *names, "sent", "of 16 bit"), rows, legend, wide=True)


def _stage_names(whole: Stages) -> list[str]:
    """Largest first, as many as there are hues and grey for headers, which come last; the others together."""
    order = sorted((name for name in whole.made if name != HEADERS), key=lambda name: (-whole.made[name], name))
    kept = order if len(order) <= HUES else [*order[: HUES - 1], OTHERS]
    return kept + ([HEADERS] if HEADERS in whole.made else [])


def _folded(stages: Stages, names: Sequence[str]) -> Stages:
    """The stages under the names that are drawn."""
    made: dict[str, float] = {}
    for name, value in stages.made.items():
        shown = name if name in names else OTHERS
        made[shown] = made.get(shown, 0.0) + value
    return Stages(made, stages.sent)


def _packed(stages: Stages) -> bool:
    """Whether a lossless stage made less of what the others had made."""
    return sum(stages.made.values()) > stages.sent * (1 + 1e-9)


def _stage_note(record: RunRecord, whole: Stages, told: Sequence[str]) -> str:
    made, largest = sum(whole.made.values()), max(whole.made, key=lambda name: whole.made[name])
    share = CodecSums(tuple(part for place in told for part in codec_sums(record.rounds, place).parts)).share
    of_16_bit = f", {ratio_text(share)} of the same packets as 16-bit values" if share is not None else ""
    note = f"{bytes_text(whole.sent)} in {plural(len(record.rounds), 'round')}{of_16_bit}."
    note += f" Largest stage: {largest}, {ratio_text(whole.made[largest] / made)}."
    if _packed(whole):
        note += f" The stages made {bytes_text(made)}; the lossless stage took {ratio_text(1 - whole.sent / made)} off."
    return note


def _draw_stages(bars: Sequence[tuple[int, Stages]], colours: dict[str, str], per_bar: int) -> Drawing:
    groups = [bars[start : start + per_bar] for start in range(0, len(bars), per_bar)]
    means = [_mean_stages([stages for _, stages in group]) for group in groups]
    top = max(max(sum(mean.made.values()), mean.sent) for mean in means)
    size, unit = pick_unit(top, BYTE_UNITS)
    drawing = Drawing(WIDE_PX, HEIGHT_PX)
    left, right, high, low = 60, WIDE_PX - 18, 26, HEIGHT_PX - 44
    y = linear_scale([top / size], low, high, zero=True)
    for tick in y.ticks:
        drawing.line(left, y(tick), right, y(tick), "axis" if tick == 0 else "grid")
        drawing.text(left - 8, y(tick) + 4, y.tick_text(tick), anchor="end")
    slot = (right - left) / len(groups)
    width = min(slot * 0.72 if len(groups) <= 60 else slot, 72)
    every = math.ceil(len(groups) / 24)
    for index, (group, mean) in enumerate(zip(groups, means, strict=True)):
        middle, first, last = left + slot * (index + 0.5), group[0][0], group[-1][0]
        name = f"round {first}" if first == last else f"rounds {first} to {last}"
        _stack(drawing, mean, colours, y, size, (middle - width / 2, width, name))
        if index % every == 0:
            drawing.text(middle, low + 18, str(first), anchor="middle")
    drawing.text(left - 52, high - 14, f"{unit} per round, all clients, both directions", "t title")
    drawing.text((left + right) / 2, low + 36, "round", "t title", anchor="middle")
    return drawing


def _mean_stages(group: Sequence[Stages]) -> Stages:
    names = dict.fromkeys(name for stages in group for name in stages.made)
    made = {name: sum(stages.made.get(name, 0.0) for stages in group) / len(group) for name in names}
    return Stages(made, sum(stages.sent for stages in group) / len(group))


def _stack(drawing: Drawing, mean: Stages, colours: dict[str, str], y: Scale, size: float, place: tuple[float, float, str]) -> None:
    x, width, name = place
    base = 0.0
    for stage, css in colours.items():
        value = mean.made.get(stage, 0.0)
        if value > 0:
            top, bottom = y((base + value) / size), y(base / size)
            drawing.rect(x, top, width, bottom - top, f"bar {css}", f"{name}, {stage}: {bytes_text(value)}")
            base += value
    if _packed(mean):
        drawing.line(x - 3, y(mean.sent / size), x + width + 3, y(mean.sent / size), "line bold ink")


def place_figure(record: RunRecord, key: str, title: str, y_title: str, reading: Reading) -> Figure | None:
    """A line for each place of a ratio per round, in per cent; None where no round has it."""
    values = {place: [reading(codec_sums((item,), place)) for item in record.rounds] for place in codec_places(record)}
    values = {place: line for place, line in values.items() if any(is_number(value) for value in line)}
    if not values:
        return None
    rounds = [item.round for item in record.rounds]
    series = tuple(
        Series(place, tuple((at, None if value is None else 100 * value) for at, value in zip(rounds, line, strict=True)), place_css(place))
        for place, line in values.items()
    )
    parts = []
    for place, line in values.items():
        known = [(at, value) for at, value in zip(rounds, line, strict=True) if value is not None]
        mean = reading(codec_sums(record.rounds, place))
        last = f", {ratio_text(known[-1][1])} in round {known[-1][0]}" if len(known) > 1 else ""
        parts.append(f"{place} {ratio_text(mean)} over the run{last}")
    note = f"{'; '.join(parts)}."
    note = note[0].upper() + note[1:]
    svg = LineChart(series, "round", y_title, zero=True).draw().svg(key, f"{title} per round", note)
    rows = tuple((str(at), *(ratio_text(line[index]) for line in values.values())) for index, at in enumerate(rounds))
    legend = tuple(Legend(place, place_css(place), "line") for place in values)
    return Figure(key, title, note, svg, ("round", *values), rows, legend)


def similarity_figure(record: RunRecord, place: str) -> Figure | None:
    """How similar samples were to what the caches held: all rounds together, in thirds from six rounds on; None where none compared."""
    compared = [item for item in record.rounds if codec_sums((item,), place).similarity()]
    if not compared:
        return None
    lines = {name: codec_sums(rounds, place).similarity() for name, rounds in _thirds(compared).items()}
    centres = [(index + 0.5) / SIMILARITY_BINS for index in range(SIMILARITY_BINS)]
    series = tuple(
        Series(
            name,
            tuple((at, 100 * count / sum(counts)) for at, count in zip(centres, counts, strict=True)),
            f"c{index}",
            names=tuple(_bin_text(position) for position in range(SIMILARITY_BINS)),
        )
        for index, (name, counts) in enumerate(lines.items())
    )
    everything = codec_sums(compared, place).similarity()
    total = sum(everything)
    near = ratio_text(sum(everything[-2:]) / total)
    note = f"{total:,.0f} samples were compared; {near} of them were at 0.9 or above."
    if len(lines) > 1:
        early, late = (sum(lines[name][-2:]) / sum(lines[name]) for name in (THIRDS[0], THIRDS[-1]))
        note += f" In the first third of the rounds {ratio_text(early)}, in the last {ratio_text(late)}."
    key = f"similarity-{_OTHER_CHARACTERS.sub('-', place)}"
    chart = LineChart(series, "cosine similarity to the cached sample", "% of samples", x_scale=linear_scale((0.0, 1.0), 0, 1), zero=True)
    svg = chart.draw().svg(key, f"Similarity of samples, {place}", note)
    rows = tuple((_bin_text(index), *(f"{counts[index]:,.0f}" for counts in lines.values())) for index in range(SIMILARITY_BINS))
    legend = tuple(Legend(name, f"c{index}", "line") for index, name in enumerate(lines))
    return Figure(key, f"Similarity, {place}", note, svg, ("similarity", *lines), rows, legend)


def _bin_text(index: int) -> str:
    return f"{index / SIMILARITY_BINS:.2f} to {(index + 1) / SIMILARITY_BINS:.2f}"


def _thirds(rounds: Sequence[Round]) -> dict[str, Sequence[Round]]:
    if len(rounds) < 6:
        return {"all rounds": rounds}
    edges = [round(len(rounds) * part / 3) for part in range(4)]
    return {name: rounds[low:high] for name, low, high in zip(THIRDS, edges, edges[1:], strict=False)}


def control_figure(record: RunRecord) -> Figure | None:
    """Loss of the probe with and without codecs, the excess, and the dial below; None where nothing was probed and no dial turned."""
    rounds = [item for item in record.rounds if item.dial or item.probe]
    dials = tuple(dict.fromkeys(name for item in rounds for name in item.dial))
    turned = any(is_number(value) and value != 1.0 for item in rounds for value in item.dial.values())
    probed = any(_excess(item) is not None for item in rounds)
    if not (turned or probed):
        return None
    budget = _budget(record)
    panels = _control_panels(rounds, dials if turned else (), probed, budget)
    drawing = Drawing(WIDE_PX, PANEL_PX * len(panels))
    for index, panel in enumerate(panels):
        drawing.marks.append(f'<g transform="translate(0 {PANEL_PX * index})">{"".join(panel.draw().marks)}</g>')
    note = _control_note(rounds, dials if turned else (), probed, budget)
    columns = ("round", *(("clean loss", "coded loss", "excess") if probed else ()), *(f"dial {name}" for name in dials))
    rows = tuple(
        (
            str(item.round),
            *(_probe_cells(item) if probed else ()),
            *(number_text(item.dial.get(name), 4) for name in dials),
        )
        for item in rounds
    )
    legend = _control_legend(rounds, dials if turned else (), probed, budget)
    svg = drawing.svg("codec-control", "Loss of the probe with and without codecs, and the dial", note)
    return Figure("codec-control", "Quality and the dial", note, svg, columns, rows, legend, wide=True)


def _excess(item: Round) -> float | None:
    """How far the coded loss is above the clean one, as a share of it."""
    clean, coded = item.probe.get("clean_loss"), item.probe.get("coded_loss")
    if clean is None or coded is None or not (math.isfinite(clean) and math.isfinite(coded)) or clean <= 0:
        return None
    return coded / clean - 1.0


def _budget(record: RunRecord) -> float | None:
    """The excess the controller was told to keep to, where it says."""
    configured = record.started.config.get("controller")
    told = configured.get("budget") if isinstance(configured, dict) else None
    told = next((value for item in record.rounds if is_number(value := item.controller.get("budget"))), told)
    return float(told) if isinstance(told, int | float) and is_number(told) else None


def _signed(value: float | None) -> str:
    """A percentage with two decimals and its sign: what is looked at here is small."""
    if value is None:
        return ratio_text(None)
    return f"{100 * value:+.2f} %".replace("-", "\N{MINUS SIGN}")


def _probe_cells(item: Round) -> tuple[str, str, str]:
    return number_text(item.probe.get("clean_loss"), 5), number_text(item.probe.get("coded_loss"), 5), _signed(_excess(item))


def _control_panels(rounds: Sequence[Round], dials: Sequence[str], probed: bool, budget: float | None) -> list[LineChart]:
    """Loss, excess, dial, one below the other over the same rounds."""
    ends = (float(rounds[0].round), float(rounds[-1].round))
    panels: list[LineChart] = []

    def chart(series: Sequence[Series], title: str) -> None:
        panels.append(LineChart(tuple(series), "round", title, width=WIDE_PX, height=PANEL_PX))

    if probed:
        losses = (("without codecs", "clean_loss", "c1"), ("with codecs", "coded_loss", "c0"))
        chart(
            [Series(name, tuple((item.round, item.probe.get(key)) for item in rounds), css, label=False) for name, key, css in losses],
            "loss on the probe",
        )
        points = tuple((float(item.round), None if (one := _excess(item)) is None else 100 * one) for item in rounds)
        excess = [Series("excess", points, "ink", label=False)]
        if budget is not None and ends[0] < ends[1]:
            excess.append(Series("budget", tuple((at, 100 * budget) for at in ends), "k-control dash", label=False, markers=False))
        chart(excess, "loss with codecs above that without, %")
    if dials:
        chart(
            [
                Series(name, tuple((item.round, item.dial.get(name)) for item in rounds), _dial_css(name, index), label=False)
                for index, name in enumerate(dials)
            ],
            "dial: factor of the codecs' errors",
        )
    return panels


def _dial_css(name: str, index: int) -> str:
    return {"activations": "c2", "gradients": "c3"}.get(name, f"c{(index + 4) % HUES}")


def _control_legend(rounds: Sequence[Round], dials: Sequence[str], probed: bool, budget: float | None) -> tuple[Legend, ...]:
    entries: list[Legend] = []
    if probed:
        entries += [Legend("without codecs", "c1", "line"), Legend("with codecs", "c0", "line"), Legend("excess", "ink", "line")]
        entries += [Legend("budget", "k-control dash", "line")] if budget is not None and len(rounds) > 1 else []
    return (*entries, *(Legend(f"dial, {name}", _dial_css(name, index), "line") for index, name in enumerate(dials)))


def _control_note(rounds: Sequence[Round], dials: Sequence[str], probed: bool, budget: float | None) -> str:
    parts = []
    if probed:
        found = [(one, item.round) for item in rounds if (one := _excess(item)) is not None]
        worst, at = max(found)
        where = "above" if found[-1][0] >= 0 else "below"
        parts.append(
            f"At the end the loss with codecs is {abs(100 * found[-1][0]):.2f} % {where} the one without; the largest excess was "
            f"{_signed(worst)}, in round {at}."
        )
        if budget is not None:
            kept = sum(one <= budget + 1e-9 for one, _ in found)
            parts.append(f"The budget of {ratio_text(budget)} was kept in {kept} of {plural(len(found), 'probe')}.")
    for name in dials:
        known = [value for item in rounds if (value := item.dial.get(name)) is not None and math.isfinite(value)]
        if known and min(known) == max(known):
            parts.append(f"The dial of {name} stayed at {number_text(known[0])}.")
        elif known:
            lowest, highest, last = (number_text(value) for value in (min(known), max(known), known[-1]))
            parts.append(f"The dial of {name} ran from {lowest} to {highest}, at last {last}.")
    return " ".join(parts)
