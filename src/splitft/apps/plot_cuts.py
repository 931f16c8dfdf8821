"""Which cut each client had in each round, and what came of its part: refused, cut short, lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

from splitft.apps.plot_cells import (
    GRID_ROWS,
    NAME_CHARACTERS,
    SIDE_BY_SIDE,
    equal_stretches,
    number_axis,
    ramp_legend,
    row_height,
    shade,
)
from splitft.apps.plots import HALF_PX, WIDE_PX, Drawing, Figure, Legend, text_px
from splitft.apps.report_record import ClientRound, RunRecord
from splitft.apps.report_text import plural, shorten

NARROW_PX = 9
NUMBERED_PX = 34
MARKS = {
    "refused": Legend("a deeper cut was refused", "refused", "refused"),
    "partial": Legend("cut short, the finished steps count", "partial", "partial"),
    "lost": Legend("lost, nothing counts", "lost", "lost"),
}
Taken = Mapping[tuple[int, int], ClientRound]


def cuts_figure(record: RunRecord, wide: bool = False) -> Figure | None:
    """A grid of clients by rounds; beyond sixty clients, how many clients had each cut in each round."""
    taken = {(part.client, item.round): part for item in record.rounds for part in item.clients}
    if not taken:
        return None
    present = {client for client, _ in taken}
    clients = [client for client in record.client_ids if client in present]
    rounds = [item.round for item in record.rounds]
    wide = wide or len(rounds) > 12 or len(clients) > SIDE_BY_SIDE
    note = _note(record, taken, clients, rounds)
    if len(clients) <= GRID_ROWS:
        drawing = _client_grid(record, taken, clients, rounds, WIDE_PX if wide else HALF_PX)
        occurring = {mark for part in taken.values() for mark in marks_of(part)}
        ramp = ramp_legend([part.cut for part in taken.values()], "cut")
        legend = (*ramp, *(entry for mark, entry in MARKS.items() if mark in occurring))
    else:
        drawing = _distribution(taken, rounds, WIDE_PX)
        note += " The number in a cell counts clients."
        legend = (Legend("few clients", "q1"), Legend("many clients", "q6"))
    rows = tuple((record.client_name(client), *(_cell_text(taken.get((client, at))) for at in rounds)) for client in clients)
    columns = ("client", *(f"round {at}" for at in rounds))
    svg = drawing.svg("cuts", "Cut of each client in each round", note)
    return Figure("cuts", "Cuts", note, svg, columns, rows, legend, wide=wide)


def marks_of(part: ClientRound) -> tuple[str, ...]:
    """What a cell must show beside the cut."""
    return (*(("refused",) if part.refused_cut is not None else ()), *((part.status,) if part.status in MARKS else ()))


def _cell_text(part: ClientRound | None) -> str:
    if part is None:
        return ""
    wanted = f" (refused {part.refused_cut})" if part.refused_cut is not None else ""
    return f"{part.cut}{wanted}{'' if part.status == 'done' else f' {part.status}'}"


def _note(record: RunRecord, taken: Taken, clients: Sequence[int], rounds: Sequence[int]) -> str:
    moves = 0
    for client in clients:
        cuts = [taken[client, at].cut for at in rounds if (client, at) in taken]
        moves += sum(a != b for a, b in pairwise(cuts))
    blocks = record.started.model.blocks
    total = f" of {blocks}" if blocks else ""
    low, high = min(part.cut for part in taken.values()), max(part.cut for part in taken.values())
    span = f"{low}" if low == high else f"{low} to {high}"
    parts = [f"Blocks held by the client: {span}{total}; {plural(moves, 'cut move') if moves else 'no cut moved'}."]
    counts = Counter(mark for part in taken.values() for mark in marks_of(part))
    words = {"refused": "a deeper cut refused", "partial": "cut short", "lost": "lost"}
    if told := [f"{words[mark]} {plural(counts[mark], 'time')}" for mark in MARKS if counts[mark]]:
        parts.append(f"{', '.join(told).capitalize()}.")
    if len(taken) < len(clients) * len(rounds):
        missing = "no update of the client was merged" if record.asynchronous else "the client did not take part"
        parts.append(f"An empty cell: {missing}.")
    return " ".join(parts)


def _client_grid(record: RunRecord, taken: Taken, clients: Sequence[int], rounds: Sequence[int], width: int) -> Drawing:
    names = {client: shorten(record.client_name(client), NAME_CHARACTERS) for client in clients}
    left, top = max(text_px(name) for name in names.values()) + 20, 8
    height = row_height(len(clients))
    cell = min((width - left - 16) / len(rounds), 90)
    bottom = top + height * len(clients)
    drawing = Drawing(width, bottom + 46)
    low, high = min(part.cut for part in taken.values()), max(part.cut for part in taken.values())
    for row, client in enumerate(clients):
        y = top + row * height
        drawing.text(left - 10, y + height / 2 + 4, names[client], "t", anchor="end", title=record.client_name(client))
        cells = [taken.get((client, at)) for at in rounds]
        alike = [None if part is None else (part.cut, part.status, part.refused_cut) for part in cells]
        for first, last in equal_stretches(alike, merge=cell < 14 or len(clients) > SIDE_BY_SIDE):
            part = cells[first]
            when = f"round {rounds[first]}" if first == last else f"rounds {rounds[first]} to {rounds[last]}"
            box = (left + first * cell + 0.75, y + 0.75, cell * (last - first + 1) - 1.5, height - 1.5)
            _draw_cell(drawing, part, box, f"{record.client_name(client)}, {when}", shade(part.cut if part else low, low, high), cell)
    number_axis(drawing, rounds, left, cell, bottom, "round")
    return drawing


def _draw_cell(
    drawing: Drawing, part: ClientRound | None, box: tuple[float, float, float, float], name: str, step: int, cell: float
) -> None:
    """One cell, or a stretch of equal ones: its colour is the cut; a corner, a bar at its foot or a cross say the rest."""
    x, y, width, height = box
    if part is None:
        drawing.rect(x, y, width, height, "absent", f"{name}: no part")
        return
    lost = part.status == "lost"
    detail = f", refused cut {part.refused_cut}" if part.refused_cut is not None else ""
    state = {"done": "", "partial": f", cut short after {plural(part.steps, 'step')}"}.get(part.status, f", {part.status}")
    drawing.rect(x, y, width, height, "gap" if lost else f"q{step}", f"{name}: cut {part.cut}{detail}{state}", 2)
    # A long stretch has its number and its cross where its first cell would have them.
    room = min(width, max(cell, 16) - 1.5)
    crowded = part.status == "partial" and height < 18
    if width >= (NUMBERED_PX if lost else 14.5) and not crowded:
        shift = -7 if lost else 0
        middle = x + max(room, NUMBERED_PX - 2 if lost else 0) / 2
        drawing.text(middle + shift, y + height / 2 + 4, str(part.cut), "t" if lost else f"t on q{step}-ink", anchor="middle")
    if lost:
        numbered = width >= NUMBERED_PX
        centre = x + max(room, NUMBERED_PX - 2) / 2 + 8 if numbered else x + width / 2
        _cross(drawing, centre, y + height / 2, min(4.0, height / 2 - 2.5), width)
    if part.status == "partial":
        drawing.rect(x, y + height - 3.5, width, 3.5, "partial")
    if part.refused_cut is not None:
        size = min(9.0, width, height * 0.6)
        drawing.area([(x + width - size, y), (x + width, y)], [(x + width, y + size)], "refused")


def _cross(drawing: Drawing, x: float, y: float, radius: float, width: float) -> None:
    if width < NARROW_PX:
        drawing.line(x, y - radius - 1, x, y + radius + 1, "cross")
        return
    drawing.line(x - radius, y - radius, x + radius, y + radius, "cross")
    drawing.line(x - radius, y + radius, x + radius, y - radius, "cross")


def _mark_rows_px(rows: int) -> int:
    return 20 * rows + 8 if rows else 0


def _distribution(taken: Taken, rounds: Sequence[int], width: int) -> Drawing:
    counts = Counter((part.cut, at) for (_, at), part in taken.items())
    marks = Counter((mark, at) for (_, at), part in taken.items() for mark in marks_of(part))
    shown = [mark for mark in MARKS if any(key[0] == mark for key in marks)]
    low, high = min(cut for cut, _ in counts), max(cut for cut, _ in counts)
    left, top, height = 60, 26, 24 if high - low < 16 else 12
    cell = min((width - left - 16) / len(rounds), 72)
    bottom = top + height * (high - low + 1)
    drawing = Drawing(width, bottom + 46 + _mark_rows_px(len(shown)))
    drawing.text(8, 14, "cut, blocks held by the client", "t title")
    most = max(counts.values())
    for cut in range(low, high + 1):
        y = bottom - (cut - low + 1) * height
        drawing.text(left - 10, y + height / 2 + 4, str(cut), anchor="end")
        for index, at in enumerate(rounds):
            number = counts.get((cut, at), 0)
            if not number:
                continue
            step = max(1, shade(number, 0, most))
            name = f"round {at}, cut {cut}: {plural(number, 'client')}"
            drawing.rect(left + index * cell + 0.5, y + 0.5, cell - 1, height - 1, f"q{step}", name)
            if cell >= 26 and height >= 20:
                drawing.text(left + (index + 0.5) * cell, y + height / 2 + 4, str(number), f"t on q{step}-ink", anchor="middle")
    for place, mark in enumerate(shown):
        y = bottom + 6 + 20 * place
        drawing.text(left - 10, y + 14, mark, anchor="end")
        for index, at in enumerate(rounds):
            if number := marks.get((mark, at), 0):
                name = f"round {at}, {mark}: {plural(number, 'client')}"
                if cell >= 20:
                    drawing.text(left + (index + 0.5) * cell, y + 14, str(number), "t strong", anchor="middle", title=name)
                else:
                    drawing.rect(left + index * cell + 0.5, y + 4, cell - 1, 12, f"{'gap' if mark == 'lost' else mark}", name)
    number_axis(drawing, rounds, left, cell, bottom + _mark_rows_px(len(shown)), "round")
    return drawing
