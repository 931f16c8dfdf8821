"""Where the virtual time went: the time line of a round (who waited for whom) and each client's share of work and waiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec

from splitft.apps.plot_stages import GROUPS, IDLE, WAITS, client_seconds, group_of, idle_s
from splitft.apps.plots import WIDE_PX, Drawing, Figure, Legend, Scale, evenly, linear_scale, text_px
from splitft.apps.report_record import ClientRound, Round, RunRecord, Stage
from splitft.apps.report_text import MISSING, TIME_UNITS, number_text, percent_text, pick_unit, plural, seconds_text, shorten

DRAWN_ROWS = 40
SERVER_LANES = 4
CLOSE_UP_STEPS = 2
MERGES = 4
NAME_CHARACTERS = 18
SMALLEST_PX = 0.25
UNDRAWN = Legend("steps not drawn one by one", "gap")


@dataclass(frozen=True)
class Window:
    """The stretch of virtual time a time line shows; `start_s` is what its axis counts from."""

    origin_s: float
    start_s: float
    end_s: float


def time_figures(record: RunRecord) -> list[Figure]:
    """Time line of the last round that has one, a close-up of its first steps, and the shares over all rounds."""
    figures: list[Figure] = []
    last = next((item for item in reversed(record.rounds) if item.timeline and item.duration_s > 0), None)
    if last is not None and record.asynchronous:
        figures.append(_last_merges(record))
    elif last is not None:
        last = _without_lost_waiting(last)
        figures.append(_whole_round(record, last))
        window = _close_up(last)
        if window is not None:
            figures.append(_first_steps(record, last, window))
    shares = shares_figure(record)
    return [*figures, shares] if shares is not None else figures


def _whole_round(record: RunRecord, item: Round) -> Figure:
    window = Window(item.virtual_start_s, item.virtual_start_s, item.virtual_end_s)
    rows = _rows(item)
    note, legend = _waiting_note(record, item), stage_legend(item.timeline)
    if len(rows) < len(item.clients):
        note += f" {len(rows)} of {len(item.clients)} clients are drawn, evenly by the time they finished."
    if _has_gaps(item):
        legend = (*legend, UNDRAWN)
    svg = _draw(record, item, rows, window, notes=True).svg("timeline", f"Time line of round {item.round}", note)
    table = tuple(
        (
            record.client_name(row.client),
            row.status,
            seconds_text(item.duration_s - idle_s(item, row)),
            seconds_text(row.server_wait_s),
            MISSING if row.status == "lost" else seconds_text(idle_s(item, row)),
        )
        for row in item.clients
    )
    columns = ("client", "status", "finished after", "waited for the server", "waited for others")
    return Figure("timeline", f"Time line of round {item.round}", note, svg, columns, table, legend, wide=True)


def _without_lost_waiting(item: Round) -> Round:
    """The same round, where a client that was lost does not wait for others but is away."""
    lost = {client.client for client in item.clients if client.status == "lost"}
    if not lost:
        return item
    told = (stage._replace(kind="away") if stage.client in lost and stage.kind == "barrier_wait" else stage for stage in item.timeline)
    return msgspec.structs.replace(item, timeline=tuple(told))


def _last_merges(record: RunRecord) -> Figure:
    """The last merges of an asynchronous run: everything that went on between them, whichever round it began in."""
    shown = record.rounds[-MERGES:]
    start_s, end_s = shown[0].virtual_start_s, shown[-1].virtual_end_s
    stages = [stage for item in record.rounds for stage in item.timeline if stage.kind != "barrier_wait"]
    for item in record.rounds:
        for client in item.clients:
            if client.finish_s is not None:
                kind = "away" if client.status == "lost" else "barrier_wait"
                stages.append(Stage(client.client, kind, client.finish_s, item.virtual_end_s))
    stages = [stage for stage in stages if stage.end_s > start_s and stage.start_s < end_s]
    present = tuple(ClientRound(client, 0) for client in sorted({stage.client for stage in stages}))
    number = shown[-1].round
    whole = Round(number, present, virtual_start_s=start_s, virtual_end_s=end_s, timeline=tuple(stages))
    merged = sum(client.staleness is not None for item in shown for client in item.clients)
    note = f"{plural(merged, 'update')} merged in {plural(len(shown), 'round')}. A vertical line is a merge: a client whose update is in "
    note += "it goes on from the new adapter, the others from an older one."
    rows = _rows(whole)
    if len(rows) < len(present):
        note += f" {len(rows)} of {len(present)} clients are drawn."
    window = Window(start_s, start_s, end_s)
    merges = tuple(item.virtual_end_s for item in shown)
    title = f"Time line of rounds {shown[0].round} to {number}" if len(shown) > 1 else f"Time line of round {number}"
    svg = _draw(record, whole, rows, window, notes=False, merges=merges).svg("timeline", title, note)
    columns = ("round", "client", "arrived", "merged", "versions missed")
    table = tuple(
        (
            str(item.round),
            record.client_name(client.client),
            seconds_text(client.finish_s),
            "lost" if client.status == "lost" else seconds_text(item.virtual_end_s),
            number_text(client.staleness),
        )
        for item in shown
        for client in item.clients
    )
    legend = stage_legend(stages)
    return Figure("timeline", title, note, svg, columns, table, (*legend, UNDRAWN) if _has_gaps(whole) else legend, wide=True)


def _waiting_note(record: RunRecord, item: Round) -> str:
    there = [client for client in item.clients if client.status != "lost"]
    lost = len(item.clients) - len(there)
    gone = f" Lost: {lost} of {plural(len(item.clients), 'client')}." if lost else ""
    if len(there) < 2:
        wait = sum(client.server_wait_s for client in item.clients)
        return (
            f"One client: nobody to wait for but the server ({seconds_text(wait)}). The round took {seconds_text(item.duration_s)}.{gone}"
        )
    last = min(there, key=lambda client: (idle_s(item, client), client.client))
    waits = [idle_s(item, client) for client in there if client is not last]
    mean = sum(waits) / len(waits)
    name = shorten(record.client_name(last.client), 40)
    others = "the others" if len(waits) > 1 else "the other"
    return (
        f"{name} finished last, after {seconds_text(item.duration_s)}; {others} waited {seconds_text(mean)} for it on average, "
        f"{percent_text(mean / item.duration_s)} of the round.{gone}"
    )


def _rows(item: Round) -> list[int]:
    """Clients to draw: all, or an even choice by finishing time that keeps the first and the last to finish."""
    if len(item.clients) <= DRAWN_ROWS:
        return [client.client for client in item.clients]
    ordered = sorted(item.clients, key=lambda client: (-idle_s(item, client), client.client))
    return [ordered[place].client for place in evenly(len(ordered), DRAWN_ROWS)]


def _by_client(item: Round) -> dict[int, list[Stage]]:
    found: dict[int, list[Stage]] = {}
    for stage in item.timeline:
        found.setdefault(stage.client, []).append(stage)
    return {client: sorted(stages, key=lambda stage: stage.start_s) for client, stages in found.items()}


def _gaps(stages: Sequence[Stage], smallest_s: float) -> list[tuple[float, float]]:
    """Stretches between recorded stages longer than `smallest_s`."""
    return [(a.end_s, b.start_s) for a, b in pairwise(stages) if b.start_s - a.end_s > smallest_s]


def _has_gaps(item: Round) -> bool:
    return any(_gaps(stages, 1e-6 * item.duration_s) for stages in _by_client(item).values())


def _close_up(item: Round) -> Window | None:
    """From the first forward pass until the slowest client is through its first steps; None when that is most of the round."""
    starts, ends = [], []
    for stages in _by_client(item).values():
        begun = [stage.start_s for stage in stages if stage.kind == "front_forward"]
        if not begun:
            continue
        gaps = _gaps(stages, 1e-6 * item.duration_s)
        last_end = next((stage.end_s for stage in reversed(stages) if group_of(stage.kind) not in IDLE), stages[-1].end_s)
        end = begun[CLOSE_UP_STEPS] if len(begun) > CLOSE_UP_STEPS else last_end
        starts.append(begun[0])
        ends.append(min([end] + [start for start, _ in gaps if start > begun[0]]))
    if not starts or max(ends) - min(starts) > 0.6 * item.duration_s:
        return None
    return Window(item.virtual_start_s, min(starts), max(ends))


def _first_steps(record: RunRecord, item: Round, window: Window) -> Figure:
    rows = _rows(item)
    span = window.end_s - window.start_s
    note = f"The first {seconds_text(span)} of training in round {item.round}, stage by stage: each step goes to the server and back."
    if any(stage.kind == "server_wait" and stage.start_s < window.end_s for stage in item.timeline):
        note += " Hatched: a client's packet waits in the server's queue."
    legend = stage_legend([stage for stage in item.timeline if stage.start_s < window.end_s])
    if _has_gaps(item):
        legend = (*legend, UNDRAWN)
    svg = _draw(record, item, rows, window, notes=False).svg("first-steps", f"First steps of round {item.round}", note)
    shown = [stage for stage in item.timeline if stage.start_s < window.end_s and stage.end_s > window.start_s]
    table = tuple(
        (
            record.client_name(stage.client),
            stage.kind.replace("_", " "),
            seconds_text(stage.start_s - window.origin_s),
            seconds_text(stage.end_s - stage.start_s),
        )
        for stage in shown[:200]
    )
    columns = ("client", "stage", "start", "duration")
    return Figure("first-steps", f"First steps of round {item.round}", note, svg, columns, table, legend, wide=True)


def _draw(record: RunRecord, item: Round, rows: Sequence[int], window: Window, notes: bool, merges: Sequence[float] = ()) -> Drawing:
    height = 26 if len(rows) <= 8 else 20 if len(rows) <= 16 else 14
    names = {client: shorten(record.client_name(client), NAME_CHARACTERS) for client in rows}
    left = max(text_px(name) for name in [*names.values(), "server"]) + 20
    remarks = notes and 1 < len(rows) <= 24
    right = WIDE_PX - (20 if not remarks else 170 if any(part.status == "partial" for part in item.clients) else 150)
    lanes = _server_lanes(item.timeline, window)
    lane_px = max(7.0, height / max(len(lanes), 1))
    top = 18
    server_px = lane_px * max(len(lanes), 1)
    bottom = top + server_px + 8 + height * len(rows)
    drawing = Drawing(WIDE_PX, bottom + 46)
    size, unit = pick_unit((window.end_s - window.start_s) / 3, TIME_UNITS)
    x = _time_scale(window, left, right, size)
    for tick in x.ticks:
        drawing.line(x(tick), top - 6, x(tick), bottom, "grid")
        drawing.text(x(tick), bottom + 18, x.tick_text(tick), anchor="middle")
    drawing.line(left, bottom, right, bottom, "axis")
    since = "the first of these rounds" if merges else "the round"
    drawing.text((left + right) / 2, bottom + 36, f"virtual time since {since} began, {unit}", "t title", anchor="middle")
    drawing.text(left - 10, top + server_px / 2 + 4, "server", "t strong", anchor="end")
    place = _Placer(drawing, x, size, window, record)
    for index, lane in enumerate(lanes):
        for stage in lane:
            place.stage(stage, top + index * lane_px + 0.5, lane_px - 1)
    stages = _by_client(item)
    steps = {part.client: part.steps for part in item.clients}
    for index, client in enumerate(rows):
        y = top + server_px + 8 + index * height
        drawing.text(left - 10, y + height / 2 + 4, names[client], "t", anchor="end", title=record.client_name(client))
        place.row(stages.get(client, []), y + 1.5, height - 3, steps.get(client, 0))
        if remarks:
            _remark(drawing, item, client, right + 8, y + height / 2 + 4)
    for moment_s in merges:
        drawing.line(place.at(moment_s), top - 6, place.at(moment_s), bottom, "merge")
    return drawing


def _time_scale(window: Window, left: float, right: float, size: float) -> Scale:
    """Exactly the window, ticks at round numbers inside it."""
    start, end = (window.start_s - window.origin_s) / size, (window.end_s - window.origin_s) / size
    nice = linear_scale([start, end], left, right, count=8)
    return Scale(start, end, left, right, tuple(tick for tick in nice.ticks if start - 1e-9 <= tick <= end + 1e-9))


def _server_lanes(timeline: Sequence[Stage], window: Window) -> list[list[Stage]]:
    """The server's work inside the window, side by side where it overlaps; what needs more than four lanes shares the last."""
    lanes: list[list[Stage]] = []
    work = [
        stage for stage in timeline if group_of(stage.kind) == "server" and stage.end_s > window.start_s and stage.start_s < window.end_s
    ]
    for stage in sorted(work, key=lambda stage: (stage.start_s, stage.client)):
        free = next((lane for lane in lanes if lane[-1].end_s <= stage.start_s + 1e-9), None)
        if free is not None:
            free.append(stage)
        elif len(lanes) < SERVER_LANES:
            lanes.append([stage])
        else:
            lanes[-1].append(stage)
    return lanes


def _remark(drawing: Drawing, item: Round, client: int, x: float, y: float) -> None:
    """Right of a row: how long this client waited for the slowest, or that it is the slowest."""
    found = next(row for row in item.clients if row.client == client)
    idle, partial = idle_s(item, found), found.status == "partial"
    if found.status == "lost":
        drawing.text(x, y, "lost", "t lost strong")
    elif len(item.clients) > 1 and idle <= 1e-6 * item.duration_s:
        drawing.text(x, y, "cut short" if partial else "last to finish", "t strong")
    elif idle > 0:
        drawing.text(x, y, f"waited {seconds_text(idle)}{', partial' if partial else ''}")


@dataclass(frozen=True)
class _Placer:
    """Puts stages of absolute virtual time on the drawing, clipped to the window."""

    drawing: Drawing
    x: Scale
    size: float
    window: Window
    record: RunRecord

    def at(self, moment_s: float) -> float:
        clipped = min(max(moment_s, self.window.start_s), self.window.end_s)
        return self.x((clipped - self.window.origin_s) / self.size)

    def row(self, stages: Sequence[Stage], y: float, height: float, steps: int) -> None:
        """All of one client; where steps were not drawn one by one, a pale stretch that says how many."""
        hidden = steps - sum(stage.kind == "front_forward" for stage in stages)
        for start, end in _gaps(stages, 1e-6 * (self.window.end_s - self.window.start_s)):
            width = self.at(end) - self.at(start)
            if width > 0.5:
                self.drawing.rect(self.at(start), y, width, height, "gap", "steps not drawn one by one")
            if width > 110 and height >= 16 and hidden > 0 and end <= self.window.end_s:
                middle = self.at(start) + width / 2
                self.drawing.text(middle, y + height / 2 + 4, f"{plural(hidden, 'more step')}", "t small", anchor="middle")
        for stage in stages:
            self.stage(stage, y, height)

    def stage(self, stage: Stage, y: float, height: float) -> None:
        start, end = self.at(stage.start_s), self.at(stage.end_s)
        if end - start < SMALLEST_PX:
            return
        name = f"{self.record.client_name(stage.client)}: {stage.kind.replace('_', ' ')}, {seconds_text(stage.end_s - stage.start_s)}"
        css = "bar" if end - start > 3 else "flat"
        self.drawing.rect(start, y, end - start, height, f"{css} g-{group_of(stage.kind)}", name)


def stage_legend(timeline: Sequence[Stage]) -> tuple[Legend, ...]:
    """The groups that occur, in the order a step passes them."""
    seen = {group_of(stage.kind) for stage in timeline}
    return tuple(Legend(label, f"g-{group}") for group, label in GROUPS.items() if group in seen)


def shares_figure(record: RunRecord) -> Figure | None:
    """Stacked bars: how each client's virtual time divides over all its rounds."""
    seconds = {client: parts for client, parts in client_seconds(record).items() if sum(parts.values()) > 0}
    if not seconds:
        return None
    groups = [group for group in GROUPS if any(parts.get(group, 0.0) > 0 for parts in seconds.values())]
    clients = list(seconds)
    shown = [clients[place] for place in evenly(len(clients), DRAWN_ROWS)]
    drawing = _draw_shares(record, seconds, shown, groups)
    waiting = {client: sum(parts.get(group, 0.0) for group in WAITS) / sum(parts.values()) for client, parts in seconds.items()}
    mean = percent_text(sum(waiting.values()) / len(waiting))
    note = f"Over {plural(len(record.rounds), 'round')}, a client waited {mean} of its time on average"
    if len(waiting) > 1:
        worst = max(waiting, key=lambda client: waiting[client])
        note += f"; most: {shorten(record.client_name(worst), 40)}, {percent_text(waiting[worst])}"
    note += "." if len(shown) == len(clients) else f". {len(shown)} of {len(clients)} clients are drawn."
    legend = tuple(Legend(GROUPS[group], f"g-{group}") for group in groups)
    rows = tuple(
        (record.client_name(client), *(seconds_text(parts.get(group, 0.0)) for group in groups), seconds_text(sum(parts.values())))
        for client, parts in seconds.items()
    )
    columns = ("client", *(GROUPS[group] for group in groups), "total")
    svg = drawing.svg("shares", "Share of each client's time", note)
    return Figure("shares", "Where each client's time went", note, svg, columns, rows, legend, wide=True)


def _draw_shares(record: RunRecord, seconds: dict[int, dict[str, float]], shown: list[int], groups: list[str]) -> Drawing:
    height = 26 if len(shown) <= 8 else 20 if len(shown) <= 16 else 14
    names = {client: shorten(record.client_name(client), NAME_CHARACTERS) for client in shown}
    left, right, top = max(text_px(name) for name in names.values()) + 20, WIDE_PX - 90, 10
    bottom = top + height * len(shown)
    drawing = Drawing(WIDE_PX, bottom + 46)
    x = Scale(0.0, 1.0, left, right, (0.0, 0.25, 0.5, 0.75, 1.0))
    for tick in x.ticks:
        drawing.line(x(tick), top - 4, x(tick), bottom, "grid")
        drawing.text(x(tick), bottom + 18, percent_text(tick), anchor="middle")
    drawing.text((left + right) / 2, bottom + 36, "share of the client's virtual time", "t title", anchor="middle")
    for index, client in enumerate(shown):
        y, total, before = top + index * height, sum(seconds[client].values()), 0.0
        drawing.text(left - 10, y + height / 2 + 4, names[client], "t", anchor="end", title=record.client_name(client))
        for group in groups:
            share = seconds[client].get(group, 0.0) / total
            width = x(before + share) - x(before)
            label = f"{record.client_name(client)}: {GROUPS[group]} {percent_text(share)}, {seconds_text(share * total)}"
            if width >= SMALLEST_PX:
                drawing.rect(x(before), y + 1.5, width, height - 3, f"bar g-{group}", label)
            if width > 44 and height >= 20:
                ink = "t on halo" if group in IDLE else f"t on g-{group}-ink"
                drawing.text(x(before) + width / 2, y + height / 2 + 4, percent_text(share), ink, anchor="middle")
            before += share
        if height >= 14:
            drawing.text(right + 8, y + height / 2 + 4, seconds_text(total))
    return drawing
