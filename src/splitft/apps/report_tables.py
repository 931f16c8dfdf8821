"""The tables of the report: the numbers behind each figure, and one row per client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from splitft.apps.plot_stages import WAITS, client_seconds
from splitft.apps.report_record import ClientRound, RunRecord
from splitft.apps.report_text import MISSING, bytes_text, change_text, escape, number_text, percent_text, plural, seconds_text, shorten

CLIENT_ROWS = 200
CELLS = 5000
COLUMNS = 120
OPEN_ROWS = 24
COLUMN_ORDER = (
    *("client", "device", "documents", "train tokens", "cut", "rank", "done / partial / lost", "refused", "ppl before", "ppl after"),
    *("change", "up", "down", "waited", "predicted", "busy", "ratio", "missed"),
)
MEANINGS = {
    "refused": "refused: rounds in which a deeper cut was planned than the client could hold",
    "predicted": "predicted and busy: seconds a round without waiting, by the cost model and as it happened, where the client was not lost",
    "missed": "missed: merges between an update's beginning and its own",
}


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
    say = [] if len(shown) == len(rows) else [f"The first {CLIENT_ROWS} of {len(rows) - 1:,} clients."]
    say += [f"{text[0].upper()}{text[1:]}." for name, text in MEANINGS.items() if name in columns]
    more = f'<p class="say">{" ".join(say)}</p>' if say else ""
    size = "scroll open" if len(shown) <= OPEN_ROWS else "scroll"
    table = table_html(columns, tuple(shown), left=2, sum_row=True)
    caption = f"<figcaption><h3>Clients in numbers</h3>{more}</figcaption>"
    return f'<figure class="fig wide below" id="client-table">{caption}<div class="{size}">{table}</div></figure>'


@dataclass
class _Sums:
    """One client over all its rounds, or all clients. Seconds and `compared`: of the rounds it was not lost in."""

    cut: str = MISSING
    rank: str = MISSING
    states: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    up: float = 0.0
    down: float = 0.0
    compared: int = 0
    predicted_s: float = 0.0
    busy_s: float = 0.0
    missed: list[float] = field(default_factory=list)

    def add(self, part: ClientRound) -> None:
        """One more round."""
        ranks = sorted({rank for rank in part.ranks if rank > 0}) or [part.rank]
        self.cut = str(part.cut)
        self.rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}\N{EN DASH}{ranks[-1]}"
        self.states[part.status] += 1
        self.refused += part.refused_cut is not None
        self.up += part.traffic("up")
        self.down += part.traffic("down")
        # A lost client never uploads, so its seconds cannot be held against its prediction.
        if part.status != "lost" and part.predicted_s is not None and part.busy_s:
            self.compared += 1
            self.predicted_s += part.predicted_s
            self.busy_s += sum(part.busy_s.values())
        if part.staleness is not None:
            self.missed.append(part.staleness)

    def cells(self) -> dict[str, str]:
        """The columns that come from rounds; predicted and busy seconds are means per round."""
        told = self.compared > 0 and self.predicted_s > 0
        return {
            "done / partial / lost": " / ".join(str(self.states[state]) for state in ("done", "partial", "lost")),
            "refused": str(self.refused),
            "up": bytes_text(self.up),
            "down": bytes_text(self.down),
            "predicted": seconds_text(self.predicted_s / self.compared) if told else MISSING,
            "busy": seconds_text(self.busy_s / self.compared) if told else MISSING,
            "ratio": number_text(self.busy_s / self.predicted_s) if told else MISSING,
            "missed": number_text(sum(self.missed) / len(self.missed)) if self.missed else MISSING,
        }


def client_rows(record: RunRecord) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and one row per client, the cohort last: data, last plan, what became of its rounds, perplexity, bytes, seconds.

    Columns of which the journal does not speak (older ones; synchronous ones) are left out.
    """
    total, sums = _Sums(), {client: _Sums() for client in record.client_ids}
    for item in record.rounds:
        for part in item.clients:
            total.add(part)
            sums[part.client].add(part)
    spent = client_seconds(record)
    rows = [_client_cells(record, client, sums[client], spent.get(client, {})) for client in record.client_ids]
    infos = record.started.clients
    data = {"documents": f"{sum(info.documents for info in infos):,}", "train tokens": f"{sum(info.train_tokens for info in infos):,}"}
    rows.append({"client": "global", **data, **_perplexity(record, None), **total.cells()})
    left_out = set() if total.refused else {"refused"}
    left_out |= set() if total.compared else {"predicted", "busy", "ratio"}
    left_out |= set() if total.missed else {"missed"}
    columns = tuple(name for name in COLUMN_ORDER if name not in left_out)
    return columns, [tuple(row.get(name, "") for name in columns) for row in rows]


def _client_cells(record: RunRecord, client: int, sums: _Sums, spent: Mapping[str, float]) -> dict[str, str]:
    info, whole_s = record.info(client), sum(spent.values())
    return {
        "client": shorten(record.client_name(client), 32),
        "device": shorten(info.profile or MISSING, 24),
        "documents": f"{info.documents:,}",
        "train tokens": f"{info.train_tokens:,}",
        "cut": sums.cut,
        "rank": sums.rank,
        "waited": percent_text(sum(spent.get(group, 0.0) for group in WAITS) / whole_s) if whole_s else MISSING,
        **_perplexity(record, client),
        **sums.cells(),
    }


def _perplexity(record: RunRecord, client: int | None) -> dict[str, str]:
    before, after = record.before_after(client)
    return {"ppl before": number_text(before), "ppl after": number_text(after), "change": change_text(before, after)}
