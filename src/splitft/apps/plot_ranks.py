"""Which rank each client's adapters had in the last round, where they were not all alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splitft.apps.plot_cells import GRID_ROWS, NAME_CHARACTERS, SIDE_BY_SIDE, number_axis, ramp_legend, row_height, shade
from splitft.apps.plots import HALF_PX, WIDE_PX, Drawing, Figure, evenly, text_px
from splitft.apps.report_record import ClientRound, RunRecord
from splitft.apps.report_text import number_text, plural, shorten

HALF_COLUMNS = 14


def ranks_figure(record: RunRecord, wide: bool = False) -> Figure | None:
    """Clients by blocks, of the last round with ranks; None when every adapter of every client had the same."""
    item = next((item for item in reversed(record.rounds) if any(part.ranks for part in item.clients)), None)
    if item is None:
        return None
    parts = [part for part in item.clients if part.ranks]
    if len({rank for part in parts for rank in part.ranks}) < 2:
        return None
    entries = max(len(part.ranks) for part in parts)
    blocks = record.started.model.blocks
    whole = blocks > 0 and all(len(part.ranks) == entries and entries % blocks == 0 for part in parts)
    columns = blocks if whole else entries
    wide = wide or columns > HALF_COLUMNS or len(parts) > SIDE_BY_SIDE
    cells = {part.client: by_column(part.ranks, columns) for part in parts}
    note = _note(parts, cells, whole)
    drawing = _grid(record, parts, cells, columns, whole, WIDE_PX if wide else HALF_PX)
    svg = drawing.svg("ranks", f"Ranks of each client in round {item.round}", note)
    rows = tuple(
        (record.client_name(part.client), str(part.cut), *(_span(ranks) for ranks in cells[part.client]), str(sum(part.ranks)))
        for part in parts
    )
    names = ("client", "cut", *(f"{'block' if whole else 'adapter'} {index}" for index in range(columns)), "sum of ranks")
    legend = ramp_legend([rank for part in parts for rank in part.ranks], "rank")
    return Figure("ranks", f"Ranks in round {item.round}", note, svg, names, rows, legend, wide=wide)


def by_column(ranks: Sequence[int], columns: int) -> list[tuple[int, ...]]:
    """One client's ranks, block by block (or one by one): the journal lists them by block, then by module."""
    size = max(1, -(-len(ranks) // columns))
    return [tuple(ranks[index * size : (index + 1) * size]) for index in range(columns)]


def _span(ranks: Sequence[int]) -> str:
    if not ranks:
        return ""
    return str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)}\N{EN DASH}{max(ranks)}"


def _note(parts: Sequence[ClientRound], cells: Mapping[int, list[tuple[int, ...]]], whole: bool) -> str:
    told = [rank for part in parts for rank in part.ranks]
    sentences = [f"Adapter ranks from {min(told)} to {max(told)}."]
    if whole:
        sentences.append("The upright bar is the cut: the blocks to its left are on the client.")
    if any(len(set(ranks)) > 1 for row in cells.values() for ranks in row):
        sentences.append("A range: the block's modules differ, its colour is their mean.")
    if len(parts) > GRID_ROWS:
        sentences.append(f"{GRID_ROWS} of {plural(len(parts), 'client')} are drawn.")
    held = [part.truncated for part in parts if part.truncated is not None]
    if held and max(held) > 0:
        percent = number_text(100 * max(held), 2)
        sentences.append(f"At most {percent} % of the global adapter's energy did not fit into a client's ranks.")
    return " ".join(sentences)


def _grid(
    record: RunRecord, parts: Sequence[ClientRound], cells: Mapping[int, list[tuple[int, ...]]], columns: int, whole: bool, width: int
) -> Drawing:
    shown = [parts[place] for place in evenly(len(parts), GRID_ROWS)]
    names = {part.client: shorten(record.client_name(part.client), NAME_CHARACTERS) for part in shown}
    left, top, height = max(text_px(name) for name in names.values()) + 20, 8, row_height(len(shown))
    cell = min((width - left - 16) / columns, 90)
    bottom = top + height * len(shown)
    drawing = Drawing(width, bottom + 46)
    told = [rank for part in parts for rank in part.ranks]
    for row, part in enumerate(shown):
        y = top + row * height
        name = record.client_name(part.client)
        drawing.text(left - 10, y + height / 2 + 4, names[part.client], "t", anchor="end", title=name)
        for index, ranks in enumerate(cells[part.client]):
            where = f"{name}, {'block' if whole else 'adapter'} {index}"
            x = left + index * cell
            if not ranks or max(ranks) == 0:
                drawing.rect(x + 0.75, y + 0.75, cell - 1.5, height - 1.5, "absent", f"{where}: no adapter")
                continue
            step = shade(sum(ranks) / len(ranks), min(told), max(told))
            listed = ", ".join(str(rank) for rank in ranks) if len(set(ranks)) > 1 else str(ranks[0])
            drawing.rect(x + 0.75, y + 0.75, cell - 1.5, height - 1.5, f"q{step}", f"{where}: rank {listed}", 2)
            text = _span(ranks)
            if cell >= 8 + 7 * len(text):
                drawing.text(x + cell / 2, y + height / 2 + 4, text, f"t on q{step}-ink", anchor="middle")
        if whole and 0 < part.cut < columns:
            drawing.rect(left + part.cut * cell - 2.5, y, 5, height, "cut-mark", f"{name}: cut {part.cut}")
    number_axis(drawing, list(range(columns)), left, cell, bottom, "block" if whole else "adapter, by block, then by module")
    return drawing
