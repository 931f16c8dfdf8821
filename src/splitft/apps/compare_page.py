"""A comparison as one HTML page, as a Markdown table and for the terminal. Offline, no script, every word escaped."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from splitft.apps.compare_plots import compare_figures, run_text
from splitft.apps.compare_record import Comparison, Point, RunFigures, Spread, VariantFigures, ratio, verdict
from splitft.apps.plots import Figure
from splitft.apps.report_style import style_sheet
from splitft.apps.report_tables import numbers_html, table_html
from splitft.apps.report_text import MISSING, bytes_text, clean, escape, number_text, plural, seconds_text

if TYPE_CHECKING:
    from rich.table import Table

Text = Callable[[float], str]
Grid = tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
.target{stroke:var(--ink);stroke-width:1.2;stroke-dasharray:5 4;opacity:.75}
.span{fill:var(--c);opacity:.2}
.stem{stroke-width:1.6;opacity:.6}
.lead{stroke-width:.8;opacity:.55}
.faded{--c:var(--grey);opacity:.35}
td.bad{color:var(--warn);font-weight:600}
.wrap td,.wrap th{white-space:normal;vertical-align:top}
.wrap td:first-child{white-space:nowrap}
.notes{margin:0 0 16px;display:grid;gap:8px}
"""


def perplexity_text(value: float) -> str:
    return number_text(value, 4)


def spread_text(value: Spread | None, text: Text) -> str:
    """`41.2 ± 0.3`; a single run is said to be one, not to have no spread."""
    if value is None:
        return MISSING
    if value.deviation is None:
        return f"{text(value.mean)} (one run)"
    return f"{text(value.mean)} ± {text(value.deviation) if value.deviation > 0 else '0'}"


def range_text(value: Spread | None, text: Text) -> str:
    return MISSING if value is None or value.runs < 2 else f"{text(value.low)} to {text(value.high)}"


def times_text(value: float | None) -> str:
    return MISSING if value is None else f"×{number_text(value, 3)}"


def runs_text(item: VariantFigures) -> str:
    failed = sum(run.status == "failed" for run in item.runs)
    words = f"{len(item.finished)} of {len(item.runs)}"
    return words + (f", {failed} failed" if failed else "")


def quality_grid(comparison: Comparison) -> Grid:
    """Perplexity and accuracy of every variant, with spread."""
    columns = ("variant", "runs finished", "final perplexity", "range", "best perplexity", "next-token accuracy", "final against baseline")
    rows = tuple(
        (
            item.label,
            runs_text(item),
            spread_text(item.final, perplexity_text),
            range_text(item.final, perplexity_text),
            spread_text(item.best, perplexity_text),
            spread_text(item.accuracy, percent_accuracy),
            verdict(item, comparison.baseline),
        )
        for item in comparison.variants
    )
    return columns, rows


def percent_accuracy(value: float) -> str:
    return f"{100 * value:.2f} %"


def target_grid(comparison: Comparison) -> Grid:
    """What each variant spent until the target; ratios only where every finished run of both variants reached it."""
    target, base = comparison.target.perplexity, comparison.baseline
    costs: tuple[tuple[str, Callable[[Point], float], Text], ...] = (
        ("rounds", lambda point: float(point.round), lambda value: number_text(value, 3)),
        ("virtual time", lambda point: point.virtual_s, seconds_text),
        ("bytes", lambda point: point.bytes_both, bytes_text),
        ("client compute", lambda point: point.client_compute_s, seconds_text),
    )
    columns = ("variant", "reached by", *(name for name, _, _ in costs), "time ratio", "bytes ratio")
    rows = []
    for item in comparison.variants:
        reached = len(item.hits(target)) if target is not None else 0
        cells = [spread_text(item.to_target(target, value), text) for _, value, text in costs]
        fair = item.always_reached(target) and base.always_reached(target)
        ratios = [ratio(item.to_target(target, costs[at][1]), base.to_target(target, costs[at][1])) if fair else None for at in (1, 2)]
        who = f"{reached} of {len(item.finished)}" if item.finished else MISSING
        if not reached:
            cells = ["not reached" if item.finished else MISSING, *[MISSING] * 3]
        rows.append((item.label, who, *cells, *(times_text(value) for value in ratios)))
    return columns, tuple(rows)


def cost_grid(comparison: Comparison) -> Grid:
    """What the whole runs cost."""
    totals: tuple[tuple[str, Callable[[RunFigures], float | None], Text], ...] = (
        ("virtual time", lambda run: run.total.virtual_s, seconds_text),
        ("uplink", lambda run: run.total.bytes_up, bytes_text),
        ("downlink", lambda run: run.total.bytes_down, bytes_text),
        ("client compute", lambda run: run.total.client_compute_s, seconds_text),
        ("wall time", lambda run: run.wall_s, seconds_text),
    )

    def both(run: RunFigures) -> float:
        return run.total.bytes_both

    columns = ("variant", *(name for name, _, _ in totals), "time ratio", "bytes ratio")
    base = comparison.baseline
    rows = []
    for item in comparison.variants:
        pairs = ((item.over(value), base.over(value)) for value in (totals[0][1], both))
        ratios = [times_text(ratio(mine, other)) for mine, other in pairs]
        rows.append((item.label, *(spread_text(item.over(value), text) for _, value, text in totals), *ratios))
    return columns, tuple(rows)


def tables(comparison: Comparison) -> tuple[tuple[str, str, Grid], ...]:
    """Title, what to know, and the grid of each table."""
    goal, base = comparison.target, comparison.baseline.label
    value = f"perplexity {number_text(goal.perplexity, 4)}, {goal.rule}" if goal.perplexity is not None else goal.rule
    return (
        (
            "Quality",
            "Mean over finished runs ± sample standard deviation. Perplexity is token-weighted, on held-out text.",
            quality_grid(comparison),
        ),
        (
            "To the target",
            f"Target: {value}. Costs up to the end of the first evaluated round at or below it, bytes in both directions; means are "
            f"over the runs that reached it. Ratios to {base} only where all finished runs of both reached it.",
            target_grid(comparison),
        ),
        ("In all", f"Whole runs, every round and every byte, the first included. Ratios of means to {base}.", cost_grid(comparison)),
    )


def render_markdown(comparison: Comparison) -> str:
    """The tables as Markdown, with the notes a reader needs."""
    lines = [f"# {_cell(comparison.name)}", ""]
    for title, note, (columns, rows) in tables(comparison):
        lines += [f"## {title}", "", _cell(note), "", _row(columns), _row(["---"] * len(columns)), *(_row(row) for row in rows), ""]
    lines += [f"- {_cell(note)}" for note in comparison.notes]
    failed = [(run.name, run.error) for item in comparison.variants for run in item.runs if run.status == "failed"]
    lines += [f"- {_cell(name)} failed: {_cell(error)}" for name, error in failed]
    return "\n".join(lines).rstrip() + "\n"


def _row(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    return clean(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def terminal_table(comparison: Comparison) -> Table:
    """What the command ends with: one row per variant."""
    from rich.table import Table
    from rich.text import Text as RichText

    goal = comparison.target.perplexity
    table = Table(title=f"{clean(comparison.name)}: target perplexity {number_text(goal, 4)}", title_justify="left")
    table.add_column("variant", overflow="fold", min_width=14)
    for name in ("runs", "final perplexity", "time to target", "bytes to target"):
        table.add_column(name, justify="right")
    for item in comparison.variants:
        reached = len(item.hits(goal)) if goal is not None else 0
        part = "" if reached == len(item.finished) else f" ({reached} of {len(item.finished)})"
        elapsed = item.to_target(goal, lambda point: point.virtual_s)
        sent = item.to_target(goal, lambda point: point.bytes_both)
        failed = any(run.status == "failed" for run in item.runs)
        cells = (
            spread_text(item.final, perplexity_text).replace("one run", "1 run"),
            f"{seconds_text(elapsed.mean)}{part}" if elapsed else "not reached" if item.finished else MISSING,
            bytes_text(sent.mean) if sent else MISSING,
        )
        row = [
            RichText(clean(item.label)),
            RichText(f"{len(item.finished)}/{len(item.runs)}" + (" failed" if failed else ""), "red" if failed else ""),
            *(RichText(cell) for cell in cells),
        ]
        table.add_row(*row)
    return table


def render_page(comparison: Comparison, version: str, command: str) -> str:
    """The whole document; equal figures give equal bytes."""
    runs = [run for item in comparison.variants for run in item.runs]
    finished = sum(run.status == "finished" for run in runs)
    facts = [plural(len(comparison.variants), "variant"), plural(len(runs), "run"), f"{finished} finished"]
    facts += [f"{comparison.failed} failed"] if comparison.failed else []
    pill = "finished" if finished == len(runs) else "unfinished"
    word = "complete" if pill == "finished" else "incomplete"
    keys = {"results": "Results", "figures": "Curves", "runs": "Runs", "variants": "Variants"}
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name in keys.items())
    line = " \N{MIDDLE DOT} ".join(escape(fact) for fact in facts)
    header = (
        f'<header><p class="over">splitft comparison</p><h1>{escape(comparison.name)} <span class="pill {pill}">{word}</span></h1>'
        f'<p class="facts">{line}</p><nav aria-label="Sections">{links}</nav></header>'
    )
    notes = "".join(f'<p class="note" role="note">{escape(note)}</p>' for note in comparison.notes)
    figures = compare_figures(comparison)
    summary = "".join(_figure(figure) for figure in figures[:2] if figure.key in ("final", "target"))
    curves = "".join(_figure(figure) for figure in figures if figure.key not in ("final", "target"))
    nothing = "" if figures else '<p class="facts">No run has been evaluated yet.</p>'
    body = [
        header,
        f'<main><div class="notes">{notes}</div>' if notes else "<main>",
        _section("results", "Results", f'<div class="figs">{summary}</div>' + "".join(_table(*table) for table in tables(comparison))),
        _section("figures", "Curves", f'{nothing}<div class="figs">{curves}</div>'),
        _section("runs", "Runs", _run_table(comparison)),
        _section("variants", "Variants", _variant_table(comparison, command)),
    ]
    clock = "Virtual time is the clock of the simulated devices. A cut reduces what is sent, it does not hide the text."
    body.append(f"</main><footer>Recorded by splitft {escape(version)}; all figures are from the runs' journals. {clock}</footer>")
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(comparison.name)} \N{MIDDLE DOT} splitft comparison</title><style>{style_sheet()}{_STYLE}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _section(key: str, title: str, inner: str) -> str:
    return f'<section id="{key}" aria-labelledby="{key}-h"><h2 id="{key}-h">{title}</h2>{inner}</section>'


def _table(title: str, note: str, grid: Grid, wrap: bool = False) -> str:
    caption = f'<figcaption><h3>{escape(title)}</h3><p class="say">{escape(note)}</p></figcaption>'
    css = "scroll open wrap" if wrap else "scroll open"
    table = table_html(*grid, left=len(grid[0]) if wrap else 1)
    return f'<figure class="fig wide below">{caption}<div class="{css}">{table}</div></figure>'


def _figure(figure: Figure) -> str:
    caption = f'<figcaption><h3>{escape(figure.title)}</h3><p class="say">{escape(figure.note)}</p></figcaption>'
    plot = f'<div class="plot">{figure.svg}</div>'
    css = "fig wide" if figure.wide else "fig"
    return f'<figure class="{css}" id="figure-{figure.key}">{caption}{plot}{numbers_html(figure.columns, figure.rows)}</figure>'


def _run_table(comparison: Comparison) -> str:
    """Every run with its end; a failed one with the first line of its error."""
    lines = []
    for item in comparison.variants:
        for run in item.runs:
            name = escape(run.name)
            link = f'<a href="runs/{name}/report.html">{name}</a>' if run.status == "finished" else name
            state = f'<td class="left{" bad" if run.status == "failed" else ""}">{run.status}</td>'
            figures = (str(run.seed), run_text(run), str(run.total.round), seconds_text(run.wall_s or None))
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in figures)
            lines.append(f'<tr><td class="left">{link}</td>{state}{cells}<td class="left">{escape(run.error)}</td></tr>')
    names = ("run", "status", "seed", "last perplexity", "rounds", "wall time", "error")
    words = {"run", "status", "error"}
    heads = [(name, ' class="left"' if name in words else "") for name in names]
    head = "".join(f'<th scope="col"{side}>{name}</th>' for name, side in heads)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    size = "scroll open wrap" if len(lines) <= 100 else "scroll wrap"
    return f'<figure class="fig wide below"><div class="{size}">{table}</div></figure>'


def _variant_table(comparison: Comparison, command: str) -> str:
    """What sets every variant apart, the papers behind it, and the command that made the page."""
    rows = []
    for item in comparison.variants:
        references = sorted({reference for run in item.runs for reference in run.references})
        rows.append((item.label, ", ".join(item.settings) or "as configured", ", ".join(references) or MISSING))
    grid: Grid = (("variant", "set over the configuration", "arXiv"), tuple(rows))
    again = f'<div class="card below"><h3>How to make this page again</h3><pre>{escape(command)}</pre></div>'
    note = "Everything else is in the configuration underneath; each run folder holds its resolved config.toml."
    return _table("What sets the variants apart", note, grid, wrap=True) + again
