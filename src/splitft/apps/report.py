"""`splitft report`: a journal becomes one HTML page, a table for the terminal, or plain rows for a program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitft.apps.audit_page import PLOT_NAME, leakage_line, plot_counts
from splitft.apps.report_codecs import codec_rows
from splitft.apps.report_files import write_atomically
from splitft.apps.report_page import LEAKAGE_NOTE, render_page
from splitft.apps.report_record import RunRecord, load_record, read_journal
from splitft.apps.report_text import MISSING, bytes_text, change_text, clean, number_text, plural, seconds_text, shorten
from splitft.types import DIRECTIONS

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LEAKAGE_NOTE", "RunRecord", "load_record", "metrics_table", "read_journal", "summary_table", "write_report"]

REPORT_NAME = "report.html"
PRINTED_CLIENTS = 20


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run folder and return its path. Works on a run that is still going. Raises `CheckpointError`."""
    record = load_record(run_dir)
    last_round = record.rounds[-1].round if record.rounds else 0
    leakage = leakage_line(Path(run_dir), last_round)
    page = render_page(record, leakage, PLOT_NAME if plot_counts(Path(run_dir), leakage) else "")
    return write_atomically(Path(run_dir) / REPORT_NAME, page.encode("utf-8"))


def metrics_table(record: RunRecord) -> list[dict[str, Any]]:
    """One row per round, round 0 (before training) first when it was evaluated; None where nothing was measured.

    Columns: round, participants, train_loss, loss, perplexity, accuracy, tokens, bytes_up, bytes_down, one per direction and
    kind (`up_activations_bytes`), virtual_s and wall_s of the round, virtual_end_s, learning_rate, partial and lost (participants cut
    short and lost), aggregated, and the figures of the aggregation rule under their own names (`metric_discarded_energy`).
    """
    rounds = {item.round: item for item in record.rounds}
    scores = {item.round: item.overall for item in record.evaluations}
    metrics = sorted({name for item in record.rounds for name in item.metrics})
    rows: list[dict[str, Any]] = []
    for number in sorted(rounds.keys() | scores.keys()):
        item, score = rounds.get(number), scores.get(number)
        row: dict[str, Any] = {"round": number, "participants": len(item.clients) if item else 0}
        row["train_loss"] = item.loss if item else None
        row |= {name: getattr(score, name, None) for name in ("loss", "perplexity", "accuracy")}
        row["tokens"] = item.tokens if item else 0
        for way in DIRECTIONS:
            row[f"bytes_{way}"] = item.traffic(way) if item else 0.0
        for way in DIRECTIONS:
            row |= {f"{way}_{kind}_bytes": item.traffic(way, kind) if item else 0.0 for kind in record.kinds}
        row |= {"virtual_s": item.duration_s if item else 0.0, "wall_s": item.wall_s if item else 0.0}
        row |= {"virtual_end_s": item.virtual_end_s if item else 0.0, "learning_rate": item.learning_rate if item else None}
        row |= {state: item.states[state] if item else 0 for state in ("partial", "lost")}
        row |= {"aggregated": item.aggregated if item else None}
        row |= {f"metric_{name}": item.metrics.get(name) if item else None for name in metrics}
        rows.append(row)
    return rows


def summary_table(record: RunRecord) -> list[Table]:
    """What a run ends with in the terminal: perplexity before and after per client, bytes by kind and direction, codecs, times."""
    codecs = [_codec_table(record)] if codec_rows(record)[1] else []
    return [_quality_table(record), _bytes_table(record), *codecs, _time_table(record)]


def _quality_table(record: RunRecord) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Held-out perplexity", title_justify="left")
    table.add_column("client")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    clients = record.client_ids
    for client in clients[:PRINTED_CLIENTS]:
        before, after = record.before_after(client)
        label = Text(shorten(record.client_name(client), 32))
        table.add_row(label, number_text(before, 4), number_text(after, 4), change_text(before, after))
    if len(clients) > PRINTED_CLIENTS:
        table.add_row(f"and {len(clients) - PRINTED_CLIENTS} more", MISSING, MISSING, MISSING)
    table.add_section()
    before, after = record.before_after()
    table.add_row("global", number_text(before, 4), number_text(after, 4), change_text(before, after), style="bold")
    return table


def _bytes_table(record: RunRecord) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Bytes sent", title_justify="left")
    table.add_column("kind")
    for name in ("up", "down", "both"):
        table.add_column(name, justify="right")
    for kind in record.kinds:
        up, down = record.traffic("up", kind), record.traffic("down", kind)
        if up or down:
            table.add_row(Text(clean(kind)), bytes_text(up), bytes_text(down), bytes_text(up + down))
    table.add_section()
    sums = (record.traffic("up"), record.traffic("down"), record.traffic())
    table.add_row("all", *(bytes_text(value) for value in sums), style="bold")
    if record.tokens:
        table.add_row("per trained token", *(bytes_text(value / record.tokens) for value in sums))
    return table


def _codec_table(record: RunRecord) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    columns, rows = codec_rows(record)
    # As many columns as fit beside each other in a terminal of 80; the page has all.
    kept = [index for index, name in enumerate(columns) if name not in ("as 16 bit", "mean rank")]
    table = Table(title="Codecs", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for index in kept:
        table.add_column(columns[index], justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(clean(row[index])) for index in kept), style="bold" if row is rows[-1] else "")
    return table


def _time_table(record: RunRecord) -> Table:
    from rich.table import Table

    table = Table(title="Rounds and time", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("rounds", plural(len(record.rounds), "round"))
    held = sum(not item.aggregated for item in record.rounds)
    if held:
        table.add_row("of them not aggregated", f"{held}")
    for state, words in (("partial", "parts cut short"), ("lost", "parts lost")):
        if count := sum(item.states[state] for item in record.rounds):
            table.add_row(words, f"{count}")
    if record.warnings:
        table.add_row("warnings, in the report", f"{len(record.warnings)}", style="yellow")
    measured = record.started.clock == "measured"
    table.add_row("rounds, by the server's clock" if measured else "virtual, on the simulated devices", seconds_text(record.virtual_s))
    table.add_row("wall, on this machine", seconds_text(record.wall_s))
    return table
