"""The report as one HTML page: no script, nothing fetched, every word of the journal escaped."""

from __future__ import annotations

import re
from typing import Any

from splitft.apps.audit_page import NONE_MADE
from splitft.apps.plot_aggregation import aggregation_figures
from splitft.apps.plot_clients import client_figures
from splitft.apps.plot_codecs import codec_figures
from splitft.apps.plot_learning import learning_figures
from splitft.apps.plot_time import time_figures
from splitft.apps.plot_traffic import traffic_figures
from splitft.apps.plots import Figure, Legend
from splitft.apps.report_codecs import codec_table
from splitft.apps.report_record import RunRecord
from splitft.apps.report_style import style_sheet
from splitft.apps.report_tables import client_table, numbers_html
from splitft.apps.report_text import (
    bytes_text,
    change_text,
    clean,
    count_text,
    escape,
    number_text,
    plural,
    seconds_text,
    shorten,
    utc_text,
)
from splitft.privacy.claim import SCOPE, claim_of
from splitft.toml import write_toml

OPEN_WARNINGS = 5
LISTED_WARNINGS = 100
LEAKAGE_NOTE = NONE_MADE
_ARXIV = re.compile(r"\b(?:arXiv[:\s]\s*)?(\d{4}\.\d{4,5})\b", re.IGNORECASE)
# A page that could not fetch or run anything even if some text slipped through unescaped.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_PATTERNS = (
    '<svg class="hidden" aria-hidden="true"><defs>'
    '<pattern id="hatch-queue" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect class="hatch-back" width="6" height="6"/><path class="hatch-queue-line" d="M1.5 0V6"/></pattern>'
    '<pattern id="hatch-barrier" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(-45)">'
    '<rect class="hatch-back" width="7" height="7"/><path class="hatch-barrier-line" d="M1.5 0V7"/></pattern>'
    '<pattern id="hatch-away" width="5" height="5" patternUnits="userSpaceOnUse">'
    '<rect class="hatch-back" width="5" height="5"/><path class="hatch-away-line" d="M2.5 0V5"/></pattern></defs></svg>'
)

NO_CLAIM = "Rule private clipped the updates; no differential privacy is claimed: there was no noise, or its seed is known."


def render_page(record: RunRecord, leakage: str = LEAKAGE_NOTE, leakage_plot: str = "") -> str:
    """The whole document; equal records give equal bytes. `leakage` says what an audit found, or that none was made; `leakage_plot` is the
    name of its plot in the run's folder."""
    sections = [
        ("learning", "Learning", learning_figures(record)),
        ("aggregation", "Aggregation", aggregation_figures(record)),
        ("traffic", "Traffic", traffic_figures(record)),
        ("codecs", "Codecs", codec_figures(record)),
        ("time", "Time", time_figures(record)),
        ("clients", "Clients", client_figures(record)),
    ]
    tables = {"codecs": codec_table(record), "clients": client_table(record)}
    optional = ("aggregation", "codecs")
    sections = [(key, title, figures) for key, title, figures in sections if figures or tables.get(key) or key not in optional]
    keys = [key for key, _, _ in sections]
    plot = f' <a href="{escape(leakage_plot)}">Plot</a>' if leakage_plot else ""
    notes = f'<p class="note" role="note">{escape(leakage)}{plot}</p>{_claim(record)}{_sealed(record)}{_warnings(record)}'
    body = [_PATTERNS, _header(record, [*keys, "configuration"]), f"<main>{_key_figures(record)}", notes]
    for key, title, figures in sections:
        inner = "".join(_figure(figure) for figure in figures)
        table = tables.get(key, "")
        empty = "" if figures or table else f'<p class="facts">{_nothing(record)}</p>'
        heading = f'<h2 id="{key}-h">{title}</h2>'
        body.append(f'<section id="{key}" aria-labelledby="{key}-h">{heading}{empty}<div class="figs">{inner}</div>{table}</section>')
    body.append(_configuration(record))
    version = escape(record.started.version or "(version unknown)")
    clock = "Virtual time is the clock of the simulated devices."
    body.append(f"</main><footer>Recorded by splitft {version}; everything here is from the run's journal. {clock}</footer>")
    title = f"{escape(record.started.name or 'run')} \N{MIDDLE DOT} splitft report"
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{style_sheet()}</style>"
    )
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"
    return _by_real_clock(page) if record.started.clock == "measured" else page


def _claim(record: RunRecord) -> str:
    """What a private run may say of itself: all of it or nothing."""
    metrics = record.rounds[-1].metrics if record.rounds else {}
    claim = claim_of(metrics)
    if claim is not None:
        return f'<p class="note" role="note">{escape(claim[:1].upper() + claim[1:])}. {escape(SCOPE)}</p>'
    return f'<p class="note" role="note">{NO_CLAIM}</p>' if "privacy_clip" in metrics else ""


def _sealed(record: RunRecord) -> str:
    """What secure aggregation hid, and from whom it did not."""
    merged = next((item.metrics for item in reversed(record.rounds) if item.metrics.get("sealed_clients")), None)
    if merged is None:
        return ""
    clients, share = merged["sealed_clients"] or 0.0, merged.get("sealed_values") or 0.0
    text = (
        f"Secure aggregation: at the last merge the server had the sum of {clients:.0f} clients' own adapters, {100 * share:.3g} % of the "
        "adapter's values, and no single one of them; the other values are of blocks that it trains itself. It does not hide what "
        "activations, labels and gradients tell the same server (docs/privacy.md)."
    )
    return f'<p class="note" role="note">{escape(text)}</p>'


def _by_real_clock(page: str) -> str:
    """The page of a real federation: what a simulation takes from its virtual clock was measured there."""
    for virtual, measured in (
        ("Virtual time is the clock of the simulated devices.", "Times are those of the server's clock."),
        ("virtual time and bytes do not depend on the machine, wall time does.", "bytes do not depend on the machines, times do."),
        ("splitft run config.toml", "splitft server config.toml"),
        ("simulated devices", "the server's clock"),
        ("virtual time", "time"),
        ("Virtual time", "Time"),
        ("virtual seconds", "seconds"),
    ):
        page = page.replace(virtual, measured)
    return page


def _nothing(record: RunRecord) -> str:
    return "Nothing recorded." if record.status == "finished" else "Nothing recorded yet: no round has been finished."


def _warnings(record: RunRecord) -> str:
    """What the run noticed, in the order it did; a long list is folded."""
    if not record.warnings:
        return ""
    items = [f"<li>Round {warning.round}: {escape(warning.text)}</li>" for warning in record.warnings[:LISTED_WARNINGS]]
    shown, hidden = "".join(items[:OPEN_WARNINGS]), "".join(items[OPEN_WARNINGS:])
    more = plural(len(record.warnings) - OPEN_WARNINGS, "more warning") if hidden else ""
    fold = f"<details><summary>{more}</summary><ul>{hidden}</ul></details>" if hidden else ""
    left = len(record.warnings) - len(items)
    rest = f'<p class="say">{left:,} further in the journal.</p>' if left else ""
    count = plural(len(record.warnings), "warning")
    return f'<div class="note warnings" role="note"><strong>{count} during the run</strong><ul>{shown}</ul>{fold}{rest}</div>'


def _header(record: RunRecord, keys: list[str]) -> str:
    started, model = record.started, record.started.model
    blocks = f"{model.blocks} blocks" if model.blocks else ""
    size = f"{count_text(model.parameters)} parameters" if model.parameters else ""
    clients = plural(len(started.clients) or len(record.client_ids), "client")
    partition = f"partition {clean(started.partition)}" if started.partition else ""
    facts = [
        clean(model.name),
        model.architecture,
        size,
        blocks,
        clients,
        partition,
        f"started {utc_text(started.utc)}" if started.utc else "",
    ]
    line = " \N{MIDDLE DOT} ".join(escape(fact) for fact in facts if fact)
    resumed = ", ".join(f"{item.round}" for item in record.resumed)
    again = f'<p class="facts">Resumed after round {escape(resumed)}.</p>' if resumed else ""
    links = "".join(f'<a href="#{key}">{key.capitalize()}</a>' for key in keys)
    pill = f'<span class="pill {record.status}">{record.status}</span>'
    name = escape(started.name or "run")
    return (
        f'<header><p class="over">splitft report</p><h1>{name} {pill}</h1><p class="facts">{line}</p>{again}'
        f'<nav aria-label="Sections">{links}</nav></header>'
    )


def _key_figures(record: RunRecord) -> str:
    before, after = record.before_after()
    tokens = record.tokens
    per_token = {way: record.traffic(way) / tokens if tokens else None for way in ("up", "down")}
    total = (per_token["up"] or 0) + (per_token["down"] or 0) if tokens else None
    if after is None:
        change, note = f"{number_text(before)}", "before training; no round evaluated yet" if before else "not evaluated"
    else:
        change = f'<span class="from">{number_text(before)} \N{RIGHTWARDS ARROW}</span> {number_text(after)}'
        note = f"{change_text(before, after)}, global, held out"
    planned = record.rounds_planned
    done = record.rounds[-1].round if record.rounds else 0
    rounds = f"{done} of {planned}" if planned else str(done)
    keys = (
        ("Perplexity", change, note),
        ("Bytes per trained token", bytes_text(total), f"up {bytes_text(per_token['up'])}, down {bytes_text(per_token['down'])}"),
        ("Trained tokens", count_text(tokens), f"{bytes_text(record.traffic())} sent in all"),
        ("Virtual time", seconds_text(record.virtual_s), "simulated devices"),
        ("Wall time", seconds_text(record.wall_s), "on this machine"),
        ("Rounds", rounds, record.status),
    )
    cells = "".join(
        f'<div class="key"><dt>{name}</dt><dd><div class="big">{value}</div><div class="sub">{escape(sub)}</div></dd></div>'
        for name, value, sub in keys
    )
    return f'<dl class="keys">{cells}</dl>'


def _figure(figure: Figure) -> str:
    legend = "".join(f"<li>{_swatch(entry)}{escape(shorten(entry.label, 40))}</li>" for entry in figure.legend)
    shown = f'<ul class="legend">{legend}</ul>' if legend else ""
    caption = f'<figcaption><h3>{escape(figure.title)}</h3><p class="say">{escape(figure.note)}</p></figcaption>'
    css = "fig wide" if figure.wide else "fig"
    plot = f'<div class="plot">{figure.svg}</div>'
    return f'<figure class="{css}" id="figure-{figure.key}">{caption}{shown}{plot}{numbers_html(figure.columns, figure.rows)}</figure>'


def _swatch(entry: Legend) -> str:
    shapes = {
        "line": f'<path class="line thin {entry.css}" d="M1 6H19"/>',
        "bold": f'<path class="line bold {entry.css}" d="M1.5 6H18.5"/>',
        "open": f'<path class="line bold {entry.css}" d="M1.5 6H18.5"/><circle class="open {entry.css}" cx="10" cy="6" r="4"/>',
        "refused": '<rect class="q3" x="3" width="14" height="12"/><path class="refused" d="M8 0H17V9Z"/>',
        "partial": '<rect class="q3" x="3" width="14" height="12"/><rect class="partial" x="3" y="8.5" width="14" height="3.5"/>',
        "lost": '<rect class="gap" x="3" width="14" height="12"/><path class="cross" d="M6.5 2.5L13.5 9.5M6.5 9.5L13.5 2.5"/>',
        "band": f'<rect class="{entry.css}" x="1" width="18" height="12"/>',
    }
    box = f'<rect class="flat {entry.css}" x="3" width="14" height="12" rx="2"/>'
    return f'<svg viewBox="0 0 20 12" aria-hidden="true">{shapes.get(entry.shape, box)}</svg>'


def _configuration(record: RunRecord) -> str:
    started = record.started
    text = "\n".join(escape(line) for line in write_toml(_writable(started.config)).splitlines())
    version = escape(clean(started.version))
    install = f'pip install "splitft=={version}"' if version else "pip install splitft"
    steps = (
        f'<ol class="steps"><li>Install the same version: <code>{install}</code></li>'
        "<li>Copy <code>config.toml</code> from the run folder, or save the configuration below under that name.</li>"
        "<li>Run it again: <code>splitft run config.toml</code>. The same seed, data and thread count give the same numbers; "
        "virtual time and bytes do not depend on the machine, wall time does.</li></ol>"
    )
    references = "".join(f"<li>{_reference(item)}</li>" for item in started.references)
    cited = f'<div class="card"><h3>Methods used</h3><ul class="refs">{references}</ul></div>' if references else ""
    css = "card" if cited else "card fig wide"
    return (
        '<section id="configuration" aria-labelledby="configuration-h"><h2 id="configuration-h">Configuration</h2><div class="figs">'
        f'<div class="{css}"><h3>How to reproduce this run</h3>{steps}</div>{cited}'
        f'<div class="card config fig wide"><h3>Resolved configuration</h3><pre>{text}</pre></div></div></section>'
    )


def _reference(item: object) -> str:
    """Escaped text; an arXiv number becomes a link that is followed only when clicked."""
    text = escape(item)
    return _ARXIV.sub(r'<a href="https://arxiv.org/abs/\1" rel="noreferrer">arXiv:\1</a>', text, count=1)


def _writable(value: Any) -> Any:
    """The configuration without what TOML has no word for: absent values."""
    if isinstance(value, dict):
        return {str(key): _writable(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_writable(item) for item in value if item is not None]
    return value
