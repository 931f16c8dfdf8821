"""Document lengths of the clients, and the figures of the report's section on clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from splitft.apps.plot_cells import shade
from splitft.apps.plot_cuts import cuts_figure
from splitft.apps.plot_ranks import ranks_figure
from splitft.apps.plots import HALF_PX, WIDE_PX, Drawing, Figure, Legend, evenly, text_px
from splitft.apps.report_record import RunRecord
from splitft.apps.report_text import clean, count_text, number_text, percent_text, shorten

GRID_ROWS = 40
PANELS = 12
NAME_CHARACTERS = 18
Buckets = tuple[list[str], list[str]]  # names of the buckets, names of their edges


def client_figures(record: RunRecord) -> list[Figure]:
    """Cuts, ranks where they differ, document lengths; two small ones side by side, no small one alone in its row."""
    makers = [maker for maker in (cuts_figure, ranks_figure, lengths_figure) if maker(record) is not None]
    small = [figure is not None and not figure.wide for figure in (maker(record) for maker in makers)]
    wide = [True] * len(makers)
    for place in range(len(makers) - 1):
        if wide[place] and small[place] and small[place + 1]:
            wide[place] = wide[place + 1] = False
    figures = [maker(record, wide=over) for maker, over in zip(makers, wide, strict=True)]
    return [figure for figure in figures if figure is not None]


def edge_names(edges: Sequence[float]) -> list[str]:
    """The edges as axis numbers."""
    return [number_text(edge, 6) if edge % 1 else count_text(edge) for edge in edges]


def bucket_names(edges: Sequence[float], buckets: int) -> list[str]:
    """Names of histogram buckets from their edges: all edges, inner edges only, or none that fit (then plain numbers)."""
    text = edge_names(edges)
    if len(edges) == buckets + 1:
        return [f"{a}\N{EN DASH}{b}" for a, b in pairwise(text)]
    if len(edges) == buckets - 1 and edges:
        return [
            f"< {text[0]}",
            *(f"{a}\N{EN DASH}{b}" for a, b in pairwise(text)),
            f"\N{GREATER-THAN OR EQUAL TO} {text[-1]}",
        ]
    return [f"bucket {index + 1}" for index in range(buckets)]


def lengths_figure(record: RunRecord, wide: bool = False) -> Figure | None:
    """Small multiples of each client's length histogram against the cohort's; a grid of shares beyond twelve clients."""
    found = [(info.client, info.length_histogram) for info in record.started.clients if sum(info.length_histogram) > 0]
    if not found:
        return None
    buckets = max(len(histogram) for _, histogram in found)
    shares = {client: [value / sum(histogram) for value in histogram] + [0.0] * (buckets - len(histogram)) for client, histogram in found}
    sums = [sum(histogram[index] for _, histogram in found if index < len(histogram)) for index in range(buckets)]
    cohort = [value / sum(sums) for value in sums]
    names = bucket_names(record.started.length_edges, buckets)
    note = _lengths_note(record)
    wide = wide or len(found) > 6
    if len(found) <= PANELS:
        drawing = _panels(record, shares, cohort, (names, edge_names(record.started.length_edges)), WIDE_PX if wide else HALF_PX)
        legend = [Legend("client", "c0"), Legend("all clients", "outline", "line")][: len(found)]
    else:
        drawing = _length_grid(record, shares, cohort, names)
        legend = [Legend("0 %", "q0"), Legend(f"{percent_text(max(max(row) for row in shares.values()))} of the client's documents", "q6")]
    rows = [(record.client_name(client), *(percent_text(value) for value in row)) for client, row in shares.items()]
    if len(found) > 1:
        rows.append(("all clients", *(percent_text(value) for value in cohort)))
    svg = drawing.svg("lengths", "Document lengths of each client", note)
    columns = ("client", *names)
    return Figure("lengths", "Document lengths", note, svg, columns, tuple(rows), tuple(legend), wide=wide)


def _lengths_note(record: RunRecord) -> str:
    parts = ["Share of a client's documents in each bucket of length in tokens."]
    if record.started.partition:
        parts.append(f"Partition: {clean(record.started.partition)}.")
    if record.started.skew_index is not None:
        parts.append(f"Skew index: {number_text(record.started.skew_index, 2)} (0: clients alike, near 1: nothing in common).")
    return " ".join(parts)


def _panels(record: RunRecord, shares: dict[int, list[float]], cohort: list[float], buckets: Buckets, width: int) -> Drawing:
    top_share = max(max(row) for row in [*shares.values(), cohort]) or 1.0
    columns = min(len(shares), 4 if width == WIDE_PX else 2 if len(shares) <= 4 else 3)
    panel_rows = math.ceil(len(shares) / columns)
    left, gap, panel_px = 40, 22, 96 if panel_rows > 1 else 200
    panel_width = (width - left - 8 - gap * (columns - 1)) / columns
    drawing = Drawing(width, panel_rows * (panel_px + 44) + 26)
    drawing.text(0, drawing.height - 6, f"height: share of documents, up to {percent_text(top_share)}", "t title")
    for place, (client, row) in enumerate(shares.items()):
        x, y = left + (place % columns) * (panel_width + gap), 22 + (place // columns) * (panel_px + 44)
        name = record.client_name(client)
        drawing.text(x, y - 6, shorten(name, int(panel_width / 7.8)), "t strong", title=name)
        if place % columns == 0:
            drawing.text(x - 6, y + 9, percent_text(top_share), "t small", anchor="end")
            drawing.text(x - 6, y + panel_px, "0", "t small", anchor="end")
        _bars(drawing, row, cohort if len(shares) > 1 else [], buckets, (x, y, panel_width, panel_px), top_share, name)
    drawing.text(width - 8, drawing.height - 6, "across: document length, tokens", "t title", anchor="end")
    return drawing


def _bars(
    drawing: Drawing, row: list[float], cohort: list[float], buckets: Buckets, box: tuple[float, float, float, float], top: float, name: str
) -> None:
    (x, y, width, height), (names, edges) = box, buckets
    slot = width / len(row)
    drawing.line(x, y + height, x + width, y + height, "axis")
    for index, share in enumerate(row):
        tall = share / top * height
        drawing.rect(
            x + index * slot + 1, y + height - tall, slot - 2, tall, "c0 fill", f"{name}, {names[index]} tokens: {percent_text(share)}"
        )
    steps = [(x + (index + side) * slot, y + height - share / top * height) for index, share in enumerate(cohort) for side in (0, 1)]
    drawing.path(steps, "line thin outline")
    marks = names if len(edges) != len(row) + 1 else edges
    shift = 0.0 if marks is edges else 0.5
    widest = max(text_px(text) for text in marks) * 0.92 + 4
    every = max(1, math.ceil(widest / slot))
    last = len(marks) - 1
    for index in [*(place for place in range(0, last, every) if (last - place) * slot > 1.5 * widest), last]:
        anchor = "start" if marks is edges and index == 0 else "end" if marks is edges and index == len(row) else "middle"
        drawing.text(x + (index + shift) * slot, y + height + 14, marks[index], "t small", anchor=anchor)


def _length_grid(record: RunRecord, shares: dict[int, list[float]], cohort: list[float], names: list[str]) -> Drawing:
    clients = list(shares)
    shown = [clients[place] for place in evenly(len(clients), GRID_ROWS)]
    texts = {client: shorten(record.client_name(client), NAME_CHARACTERS) for client in shown}
    left, top, height = max(text_px(text) for text in [*texts.values(), "all clients"]) + 20, 8, 15
    cell = (WIDE_PX - left - 16) / len(names)
    bottom = top + height * (len(shown) + 1) + 8
    drawing = Drawing(WIDE_PX, bottom + 46)
    high = max(max(shares[client]) for client in clients)
    lines: list[tuple[str, list[float], float]] = [("all clients", cohort, top)]
    lines += [(texts[client], shares[client], top + 8 + height * (place + 1)) for place, client in enumerate(shown)]
    for text, row, y in lines:
        drawing.text(left - 10, y + height / 2 + 4, text, "t strong" if row is cohort else "t", anchor="end")
        for index, share in enumerate(row):
            step = shade(share, 0, high)
            drawing.rect(
                left + index * cell + 0.5, y + 0.5, cell - 1, height - 1, f"q{step}", f"{text}, {names[index]}: {percent_text(share)}"
            )
    for index, name in enumerate(names):
        if index % max(1, math.ceil(text_px(name) / cell)) == 0:
            drawing.text(left + (index + 0.5) * cell, bottom + 17, name, anchor="middle")
    drawing.text((left + WIDE_PX) / 2, bottom + 36, "document length, tokens", "t title", anchor="middle")
    return drawing
