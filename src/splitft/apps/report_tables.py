"""The tables of the report: the numbers behind each figure, and one row per client."""

from __future__ import annotations

from splitft.apps.report_record import RunRecord
from splitft.apps.report_text import MISSING, bytes_text, change_text, escape, number_text, percent_text, plural, shorten

CLIENT_ROWS = 200
CELLS = 5000
COLUMNS = 120
OPEN_ROWS = 24


def table_html(columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...], left: int = 1, sum_row: bool = False) -> str:
    """A plain table, everything escaped; the first `left` columns are words, the last row is emphasised with `sum_row`."""
    sides = [' class="left"' if index < left else "" for index in range(len(columns))]
    head = "".join(f'<th scope="col"{side}>{escape(shorten(name, 32))}</th>' for name, side in zip(columns, sides, strict=True))
    lines = []
    for index, row in enumerate(rows):
        css = ' class="sum"' if sum_row and index == len(rows) - 1 else ""
        cells = "".join(f"<td{side}>{escape(cell)}</td>" for cell, side in zip(row, sides, strict=True))
        lines.append(f"<tr{css}>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def numbers_html(columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> str:
    """A closed fold with the numbers behind a figure; a very large table is cut short and says so."""
    if not rows:
        return ""
    wide, long = min(len(columns), COLUMNS), max(1, CELLS // min(len(columns), COLUMNS))
    table = table_html(columns[:wide], tuple(row[:wide] for row in rows[:long]))
    cut = []
    if long < len(rows):
        cut.append(f"{long:,} of {plural(len(rows), 'row')}")
    if wide < len(columns):
        cut.append(f"{wide:,} of {plural(len(columns), 'column')}")
    more = f'<p class="say">The first {" and ".join(cut)}; the journal has all.</p>' if cut else ""
    return f'<details class="data"><summary>Show the numbers</summary>{more}<div class="scroll">{table}</div></details>'


def client_table(record: RunRecord) -> str:
    """One row per client and one for the cohort; empty without clients."""
    if not record.client_ids:
        return ""
    columns, rows = client_rows(record)
    shown = rows if len(rows) <= CLIENT_ROWS + 1 else [*rows[:CLIENT_ROWS], rows[-1]]
    more = "" if len(shown) == len(rows) else f'<p class="say">The first {CLIENT_ROWS} of {len(rows) - 1:,} clients.</p>'
    size = "scroll open" if len(shown) <= OPEN_ROWS else "scroll"
    table = table_html(columns, tuple(shown), left=2, sum_row=True)
    caption = f"<figcaption><h3>Clients in numbers</h3>{more}</figcaption>"
    return f'<figure class="fig wide below" id="client-table">{caption}<div class="{size}">{table}</div></figure>'


def client_rows(record: RunRecord) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and one row per client, the cohort last: data, last plan, perplexity, bytes, waiting."""
    columns = ("client", "device", "documents", "train tokens", "cut", "rank", "ppl before", "ppl after", "change", "up", "down", "waited")
    plans, sums = _sums(record)
    rows: list[tuple[str, ...]] = []
    for client in record.client_ids:
        info = record.info(client)
        up, down, wait, duration = sums.get(client, (0.0, 0.0, 0.0, 0.0))
        who = (
            shorten(record.client_name(client), 32),
            shorten(info.profile or MISSING, 24),
            f"{info.documents:,}",
            f"{info.train_tokens:,}",
        )
        sent = (bytes_text(up), bytes_text(down), percent_text(wait / duration) if duration else MISSING)
        rows.append((*who, *plans.get(client, (MISSING, MISSING)), *_perplexity(record, client), *sent))
    infos = record.started.clients
    data = (f"{sum(info.documents for info in infos):,}", f"{sum(info.train_tokens for info in infos):,}")
    sent = (bytes_text(record.traffic("up")), bytes_text(record.traffic("down")), "")
    return columns, [*rows, ("global", "", *data, "", "", *_perplexity(record, None), *sent)]


def _perplexity(record: RunRecord, client: int | None) -> tuple[str, str, str]:
    before, after = record.before_after(client)
    return number_text(before), number_text(after), change_text(before, after)


def _sums(record: RunRecord) -> tuple[dict[int, tuple[str, str]], dict[int, tuple[float, float, float, float]]]:
    """Per client: last cut and rank; bytes up, bytes down, seconds waited, seconds in all over its rounds."""
    plans: dict[int, tuple[str, str]] = {}
    sums: dict[int, tuple[float, float, float, float]] = {}
    for item in record.rounds:
        for part in item.clients:
            plans[part.client] = (str(part.cut), str(part.rank))
            up, down, wait, duration = sums.get(part.client, (0.0, 0.0, 0.0, 0.0))
            wait += part.server_wait_s + part.barrier_wait_s
            sums[part.client] = (up + part.traffic("up"), down + part.traffic("down"), wait, duration + item.duration_s)
    return plans, sums
