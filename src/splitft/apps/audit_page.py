"""What an audit leaves behind: `audit.json`, a plot, a table for the terminal, and the line in a run's report. None of them holds text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitft.apps.plot_lines import LineChart, Series
from splitft.apps.plots import Scale
from splitft.apps.report_files import write_atomically
from splitft.apps.report_style import plot_sheet
from splitft.apps.report_text import MISSING, percent_text, seconds_text
from splitft.config import RunConfig, load_config
from splitft.errors import SplitftError

if TYPE_CHECKING:
    from rich.table import Table

    from splitft.audit.base import Attack, Audit, CutAudit, Finding

RECORD_NAME, PLOT_NAME = "audit.json", "audit.svg"
FORMAT = 1
STRETCH_TOKENS = 8
HEADING = 28
NOT_REACHED = "not reached in the time given"
NONE_MADE = "No leakage audit was made for this run: a cut reduces what is sent, it does not hide the text."
SHORT: Mapping[str, str] = {
    "K": "K adapter known",
    "B": "B base only",
    "L": "L labels",
    "L base": "L labels, base only",
    "K+L": "K+L together",
}
LONG: Mapping[str, str] = {
    "K": "K (knows the adapter)",
    "B": "B (knows only the base model)",
    "L": "L (reads labels from gradients)",
    "L base": "L base (the same without the tail's adapter)",
    "K+L": "K+L (both together)",
}
COLOURS: Mapping[str, str] = {"K": "c0", "B": "c1", "L": "c2", "L base": "c3", "K+L": "c4"}


def config_digest(config: RunConfig) -> str:
    """What an audit belongs to: the configuration, whatever folder its results lie in."""
    values = config.model_dump(mode="json", exclude={"run"})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def record_of(audit: Audit, facts: Mapping[str, Any]) -> dict[str, Any]:
    """An audit as `audit.json` has it; `facts` say of what: configuration, round, client, model."""
    return {
        "format": FORMAT,
        **facts,
        "sequences": audit.sequences,
        "tokens": audit.tokens,
        "visits": audit.visits,
        "labels_sent": audit.labels_sent,
        "label_leak": 1.0 if audit.labels_sent else None,
        "verdict": asdict(audit.verdict),
        "floors": asdict(audit.floors),
        "cuts": [_cut(one) for one in audit.cuts],
        "notes": list(audit.notes),
        "seconds": round(audit.seconds, 3),
    }


def _cut(made: CutAudit) -> dict[str, Any]:
    return {
        "cut": made.cut,
        "verdict": asdict(made.verdict),
        "wire_error": made.wire_error,
        "public_sequences": made.public_sequences,
        "seconds": round(made.seconds, 3),
        "findings": [_finding(one) for one in made.findings],
    }


def _finding(one: Finding) -> dict[str, Any]:
    return {**asdict(one), "seconds": round(one.seconds, 3)}


def write_record(folder: Path, audit: Audit, facts: Mapping[str, Any]) -> Path:
    """Write `audit.json` and `audit.svg` into a folder; returns the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / PLOT_NAME, plot(audit).encode())
    return write_atomically(folder / RECORD_NAME, (json.dumps(record_of(audit, facts), indent=1) + "\n").encode())


def leakage_line(run_dir: Path, last_round: int) -> str:
    """What a run's report says of leaks: the audit's verdict if there is one of this configuration and round, else that none was made.

    The newest audit is the one that counts, however little it tried: so the line says on how much text, for how long and over how many
    visits it was made, and what it has to say of itself.
    """
    try:
        record = json.loads((run_dir / RECORD_NAME).read_text(encoding="utf-8"))
        same = record["format"] == FORMAT and record["round"] == last_round
        if not same or record["config"] != config_digest(load_config(run_dir / "config.toml")):
            return NONE_MADE
        findings = [one for cut in record["cuts"] for one in cut["findings"]]
        shares = ", ".join(
            f"{LONG.get(attacker, attacker)} {_best_share([one for one in findings if one['attacker'] == attacker])}"
            for attacker in dict.fromkeys(one["attacker"] for one in findings)
        )
        sample = f"{int(record['sequences'])} sequences of {int(record['tokens'])} tokens of client {int(record['client'])}"
        visits, spent = int(record.get("visits", 1)), seconds_text(float(record["seconds"]))
        made = f"in {spent}, over {visits} visit{'s' if visits > 1 else ''} of the text"
        notes = "".join(f" Note: {note}." for note in map(str, record["notes"]))
        cuts = " to ".join(str(int(cut)) for cut in dict.fromkeys((record["cuts"][0]["cut"], record["cuts"][-1]["cut"])))
        text = str(record["verdict"]["text"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, SplitftError):
        return NONE_MADE
    return f"Leakage audit after round {last_round}, cut {cuts}: {text}. Share of tokens recovered: {shares}, from {sample}, {made}.{notes}"


def plot_counts(run_dir: Path, line: str) -> bool:
    """Whether `audit.svg` belongs to what `leakage_line` said."""
    return line != NONE_MADE and (run_dir / PLOT_NAME).is_file()


def _best_share(findings: Sequence[Mapping[str, Any]]) -> str:
    """An attacker's best figure of its findings as a record has them; where it reached no token there is none."""
    reached = [float(one["figures"]["accuracy"]) for one in findings if int(one["figures"]["tokens"]) > 0]
    return f"{max(reached):.3f}" if reached else NOT_REACHED


def audit_table(audit: Audit) -> Table:
    """One row per cut, attacker and visit."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    later = len({one.visit for made in audit.cuts for one in made.findings}) > 1
    table = Table(
        title="Tokens recovered from what crosses the cut",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
        caption="whole: sequences without a fault; rare: of the rare tokens; open: places where no candidate came near.",
        caption_justify="left",
    )
    columns = ("cut", "attacker", *(("visit",) if later else ()), "tokens", "95 %", "whole", "ROUGE-L", "rare", "open", "seconds")
    for name in columns:
        words = name in ("attacker", "visit")
        table.add_column(name, justify="left" if words else "right", no_wrap=not words)
    for made in audit.cuts:
        for one in made.findings:
            table.add_row(*_cells(one, later), end_section=one is made.findings[-1])
    return table


def _cells(one: Finding, later: bool) -> list[str]:
    figures = one.figures
    reached = (
        f"{figures.accuracy:.3f}",
        f"{figures.low:.2f}\N{EN DASH}{figures.high:.2f}",
        percent_text(figures.exact),
        f"{figures.rouge_l:.3f}",
    )
    return [
        str(one.cut),
        SHORT[one.attacker],
        *((one.visit.removeprefix("mean "),) if later else ()),
        *(reached if figures.tokens else (MISSING,) * len(reached)),
        MISSING if figures.rare_recall is None else f"{figures.rare_recall:.3f}",
        percent_text(one.unresolved),
        seconds_text(one.seconds),
    ]


def summary_lines(audit: Audit) -> list[str]:
    """The verdict, the floors, and what the figures do not say."""
    floors = audit.floors
    lines = [f"Verdict: {audit.verdict.text}."]
    if audit.labels_sent:
        lines[0] = f"Verdict: {audit.verdict.text}. The label leak is 1.000; above is what the hidden states alone give away."
    lines.append(
        f"By chance: {floors.uniform:.4f} (one token in the vocabulary), {floors.common:.3f} (the most common token), "
        f"{floors.language_model:.3f} (the base model's first choice with the true text before it)."
    )
    return lines + [f"Note: {note}." for note in audit.notes]


def plot(audit: Audit) -> str:
    """Accuracy of every attacker as a drawing of its own: by cut where there are several, else by position in the text."""
    attackers: list[Attack] = list(dict.fromkeys(one.attacker for made in audit.cuts for one in made.findings))
    several = len(audit.cuts) > 1
    series = [_series(audit, attacker, several) for attacker in attackers]
    places = [at for one in series for at, _ in one.points] or [0.0]
    floor = tuple((at, audit.floors.language_model) for at in dict.fromkeys((min(places), max(places))))
    series.append(Series("model alone", floor, "ink dash", markers=False))
    axis = "cut" if several else "position in the text"
    chart = LineChart(tuple(series), axis, "share of tokens recovered", whole_x=True, zero=True, x_scale=None if several else _span(places))
    said = f"{audit.verdict.text}. Model alone: the base model's first choice with the true text before it."
    drawing, title = chart.draw(), f"Tokens recovered by {axis.split()[0]} (K: adapter known, B: base only)"
    head, body = drawing.svg("audit", title, said).split("</desc>", 1)
    size = f"{drawing.width:g} {drawing.height:g}"
    # The drawing has no heading of its own: in a report that stands in the page.
    assert f'viewBox="0 0 {size}"' in head
    head = head.replace(f'viewBox="0 0 {size}"', f'viewBox="0 {-HEADING} {drawing.width:g} {drawing.height + HEADING:g}"')
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    ground = f'<rect y="{-HEADING}" width="100%" height="100%" style="fill:var(--card)"/>'
    style = "fill:var(--ink);font-size:13px;font-weight:600"
    heading = f'<text x="8" y="{5 - HEADING / 2:g}" style="{style}">{title}</text>'
    font = "svg{font-family:system-ui,sans-serif}"
    return f"{head}</desc><style>{plot_sheet()}{font}</style>{ground}{heading}{body}\n"


def _series(audit: Audit, attacker: Attack, several: bool) -> Series:
    if several:
        found = [(made.cut, made.best(attacker)) for made in audit.cuts]
        points: Sequence[tuple[float, float]] = [(float(cut), one.figures.accuracy) for cut, one in found if one is not None]
    else:
        one = audit.cuts[0].best(attacker)
        assert one is not None
        points = stretches(one.figures.by_position)
    return Series(attacker, tuple(points), COLOURS[attacker], bold=attacker == "K")


def stretches(by_position: Sequence[float]) -> list[tuple[float, float]]:
    """Means over neighbouring positions, each at the first of them: of few sequences a single position says little."""
    parts = [(start, by_position[start : start + STRETCH_TOKENS]) for start in range(0, len(by_position), STRETCH_TOKENS)]
    return [(float(start), sum(part) / len(part)) for start, part in parts]


def _span(places: Sequence[float]) -> Scale:
    high = max(places) or 1.0
    step = max(STRETCH_TOKENS, round(high / 8 / STRETCH_TOKENS) * STRETCH_TOKENS)
    return Scale(0.0, high, 0.0, 1.0, tuple(float(at) for at in range(0, int(high) + 1, step)))
