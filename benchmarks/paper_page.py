"""docs/paper_tables.md, written from the recorded counts: both tables of the SplitFT paper beside ours, and what the figures say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.paper_bytes import (
    MIB,
    PUBLISHED_CUTS,
    PUBLISHED_RANKS,
    TOTAL_STEPS,
    TURN_STEPS,
    UPLOADS,
    Setting,
    published_mib,
    schedule_turns,
    split_run,
    step_counts,
    total_bytes,
)
from benchmarks.record import ROOT
from splitft.apps.report_files import write_atomically
from splitft.engine.ledger import Counts

PAGE = ROOT / "docs" / "paper_tables.md"
UNCHANGED, SELDOMER, NARROWER = "nothing: rank 16 everywhere", "an upload every 40 steps", "bfloat16 at the cut, both ways"


def multiplied(setting: Setting, row: Mapping[str, Any]) -> tuple[Counts, Counts]:
    """A counted row multiplied to the paper's schedule, in the two parts of `paper_bytes.split_run`.

    Tensors and labels are the row's own bytes; of control bytes, which lie together in a row, the closed form says which are a step's.
    """
    step = step_counts(setting)
    for direction, kind in (("up", "activations"), ("up", "labels"), ("down", "gradients")):
        step[direction][kind] = row["counted"][direction][kind] // row["steps"]
    same, others = split_run(setting, schedule_turns(row["cut"], row["cut_rank"]), step)
    same["up"]["adapters"] = UPLOADS * row["counted"]["up"]["adapters"]
    others["down"]["adapters"] = (UPLOADS + 1) * row["counted"]["down"]["adapters"]
    return same, others


def _mib(count: float) -> str:
    return f"{count / MIB:,.1f}"


def _rows_of(rows: list[dict[str, Any]], run: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["run"] == run]


def _setting(rows: list[dict[str, Any]]) -> Setting:
    (found,) = _rows_of(rows, "setting")
    return Setting(**{name: value for name, value in found.items() if name != "run"})


def _markdown(*rows: tuple[object, ...]) -> str:
    """A table from its head and rows; all columns but the first are numbers."""
    head, *body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([head, "|---|" + "---:|" * (len(rows[0]) - 1), *body])


def _published_table(rows: list[dict[str, Any]], run: str, name: str, published: Mapping[int, float]) -> str:
    """One of the paper's tables with the rows of `run` beside it; `name` is the field of the first column."""
    setting = _setting(rows)
    found: list[tuple[object, ...]] = [
        (
            "r_cut" if name == "cut_rank" else "cut",
            "published",
            "formula",
            "splitft, same traffic",
            "difference",
            "splitft, all",
            "up",
            "down",
        )
    ]
    for row in _rows_of(rows, run):
        same, others = multiplied(setting, row)
        figure, ours, every = published[row[name]], total_bytes(same), total_bytes(same) + total_bytes(others)
        up, down = (sum(same[direction].values()) + sum(others[direction].values()) for direction in ("up", "down"))
        formula = f"{published_mib(row['cut'], row['cut_rank']):,.1f}"
        shown = (f"{figure:,.1f}", formula, _mib(ours), f"{100 * (ours / MIB / figure - 1):+.3f} %", *map(_mib, (every, up, down)))
        found.append((row[name], *shown))
    return _markdown(*found)


def _terms_table(rows: list[dict[str, Any]]) -> str:
    """Term by term, for the shallowest and the deepest cut of table I."""
    setting, chosen = _setting(rows), [_rows_of(rows, "cuts")[0], _rows_of(rows, "cuts")[-1]]
    head = [f"cut {row['cut']}, {who}" for row in chosen for who in ("paper", "splitft")]
    values = setting.batch_size * setting.sequence_tokens * setting.hidden_size
    tensors = TOTAL_STEPS * 2 * 4 * values
    terms: dict[str, list[str]] = {}

    def term(name: str, theirs: float | None, ours: float) -> None:
        terms.setdefault(name, []).extend(["not counted" if theirs is None else f"{theirs / MIB:,.2f}", f"{ours / MIB:,.2f}"])

    for row in chosen:
        same, others = multiplied(setting, row)
        payload = setting.adapter_bytes(row["cut"], row["cut_rank"])
        beside = total_bytes(same) - tensors - UPLOADS * payload
        per_step = total_bytes(step_counts(setting)) - 2 * 4 * values
        term("activations up and gradients down, float32", tensors, tensors)
        term("labels, headers, serialisation of steps", TOTAL_STEPS * 1900, TOTAL_STEPS * per_step)
        term("adapters up, float32", UPLOADS * payload, UPLOADS * payload)
        term("headers and reports, serialisation of uploads", UPLOADS * 2000 * row["cut"], beside - TOTAL_STEPS * per_step)
        term("**the same traffic**", published_mib(row["cut"], row["cut_rank"]) * MIB, total_bytes(same))
        term("adapters down, with their headers", None, others["down"]["adapters"])
        term("opening and accepting messages", None, others["down"]["control"])
    return _markdown(("MiB of the whole run", *head), *((name, *cells) for name, cells in terms.items()))


def savings(rows: list[dict[str, Any]]) -> list[tuple[str, str, Counts, Counts]]:
    """(what is changed, how the figure was got, same traffic, other traffic), the unchanged run first."""
    setting = _setting(rows)
    by_rank = {row["cut_rank"]: row for row in _rows_of(rows, "ranks")}
    (cast,) = _rows_of(rows, "cast")
    cut, rank = by_rank[16]["cut"], 16

    def arithmetic(step: Counts, turn_steps: int = TURN_STEPS) -> tuple[Counts, Counts]:
        return split_run(setting, schedule_turns(cut, rank, turn_steps), step)

    narrow = multiplied(setting, cast)
    for part, whole in zip(narrow, multiplied(setting, by_rank[16]), strict=True):  # the run had r_cut 8: only the cut is to change
        for direction in part:
            part[direction]["adapters"], part[direction]["control"] = whole[direction]["adapters"], whole[direction]["control"]
    return [
        (UNCHANGED, "counted", *multiplied(setting, by_rank[16])),
        ("r_cut 8", "counted", *multiplied(setting, by_rank[8])),
        ("r_cut 1", "counted", *multiplied(setting, by_rank[1])),
        (SELDOMER, "closed form", *arithmetic(step_counts(setting), 40)),
        (NARROWER, "counted", *narrow),
        ("int8 at the cut", "arithmetic, not run", *arithmetic(step_counts(setting, 1.0, 4.0))),
        ("int4 at the cut", "arithmetic, not run", *arithmetic(step_counts(setting, 0.5, 4.0))),
    ]


def _savings_table(rows: list[dict[str, Any]]) -> str:
    found: list[tuple[object, ...]] = [("changed", "figure", "same traffic, MiB", "saved", "all traffic, MiB", "saved")]
    every = savings(rows)
    _, _, first, second = every[0]
    bases = total_bytes(first), total_bytes(first) + total_bytes(second)
    for name, how, same, others in every:
        sums = total_bytes(same), total_bytes(same) + total_bytes(others)
        cells = [cell for count, base in zip(sums, bases, strict=True) for cell in (_mib(count), f"{100 * (1 - count / base):.2f} %")]
        found.append((name, how, *cells))
    return _markdown(*found)


def _time_table(rows: list[dict[str, Any]]) -> str:
    """Ratios to the first cut."""
    first = PUBLISHED_CUTS[2][0]
    found: list[tuple[object, ...]] = [("time, cut 2 = 1", *(f"cut {cut}" for cut in PUBLISHED_CUTS))]
    found.append(("published", *(f"{seconds / first:.2f}" for seconds, _ in PUBLISHED_CUTS.values())))
    times = _rows_of(rows, "time")
    for twice, slowdown, fitted in dict.fromkeys((row["front_twice"], row["slowdown"], row["fitted"]) for row in times):
        own = [row["turn_s"] for row in times if (row["front_twice"], row["slowdown"]) == (twice, slowdown)]
        pace = "clients as fast as the server" if slowdown == 1 else f"clients {slowdown:.3g} times slower"
        name = f"model: {pace}{' (fitted)' if fitted else ''}{', front computed twice' if twice else ''}"
        found.append((name, *(f"{seconds / own[0]:.2f}" for seconds in own)))
    return _markdown(*found)


def page(section: Mapping[str, Any]) -> str:
    """The whole page from a section of the results."""
    rows: list[dict[str, Any]] = section["rows"]
    return "\n\n".join([*_opening(section), *_traffic(rows), *_causes(rows), *_time(rows)]) + "\n"


def write_page(section: Mapping[str, Any], path: Path = PAGE) -> Path:
    return write_atomically(path, page(section).encode())


def _opening(section: Mapping[str, Any]) -> list[str]:
    setting, (turn,) = _setting(section["rows"]), _rows_of(section["rows"], "turn")
    clients, versions = len(_rows_of(section["rows"], "alike")), section["versions"]
    return [
        "<!-- Written by python -m benchmarks paper_tables from benchmarks/results; change benchmarks/paper_page.py. -->",
        "# The SplitFT paper's tables, counted",
        """\
SplitFT (arXiv 2604.26388) reports the megabytes of its runs for five cuts (table I) and for several ranks at the cut (table II).
Here the same shapes run in splitft, and the bytes of its ledger stand beside the published ones.""",
        f"""\
**Setting.** GPT-2 small's shapes ({setting.blocks} blocks × {setting.hidden_size}, vocabulary {setting.vocabulary:,}) with random
weights, float32, {clients} clients, {setting.batch_size} × {setting.sequence_tokens} tokens a step, LoRA rank {setting.rank} on
`attn.c_attn`, `attn.c_proj` and `mlp.c_proj` of every block, `r_cut` in the client's last block, nothing compressed at the cut.""",
        f"""\
**How.** Bytes depend on shapes, not on values. So the cohort executor trained one step of every configuration (the five cuts as five
clients of one round, the five ranks as another; what a client sends does not depend on who else takes part), two steps of {clients}
clients alike, and one whole turn of {turn["steps"]} steps of one client. In all of them every kind of bytes in both directions was, to
the byte, what a closed form says that is written from the message format alone. Then the counts were multiplied to the paper's
schedule: {TOTAL_STEPS:,} steps in turns of {TURN_STEPS}, one client at a time; {UPLOADS} turns are complete and end with an upload.
No quality is measured here.""",
        """\
**The published figures** are taken from two independent summaries of the paper that give them alike, not from its own pages. The
schedule and the formula below are our reconstruction from the figures. They fit the defaults of a public split-learning example
(Plato, github.com/TL-System/plato). The unit is reconstructed too: the published "MB" come out as 2^20 bytes, here called MiB.""",
        """\
```
MiB(cut, r_cut) = [ 1143 (2·4·128·768·4 + 1900) + 57 (8448·4·(16·(cut − 1) + r_cut) + 2000·cut) ] / 2^20
```""",
        """\
8448 is LoRA's parameters per rank in one block; 1900 and 2000 bytes are the only fitted constants. "No Cut" in table I is no cut in
rank, that is rank 16 everywhere at cut 2: it stands in table II here.""",
        f"""\
<sub>Counted {section["date"]} by `{section["command"]}` with torch {versions["torch"].partition("+")[0]}, transformers
{versions["transformers"]}. No wall-clock time enters this page.</sub>""",
    ]


def _traffic(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "## Traffic",
        """\
MiB of a whole run. *Same traffic*: what the published figures count, that is tensors and labels of the steps and the uploads of
adapters, each with what our format adds. *All*: every byte between clients and server, and by direction.""",
        f"Table I, r_cut {_rows_of(rows, 'cuts')[0]['cut_rank']}:",
        _published_table(rows, "cuts", "cut", {cut: figure for cut, (_, figure) in PUBLISHED_CUTS.items()}),
        f"Table II, cut {_rows_of(rows, 'ranks')[0]['cut']}:",
        _published_table(rows, "ranks", "cut_rank", PUBLISHED_RANKS),
        "## The difference, term by term",
        _terms_table(rows),
        f"""\
- The payloads are the same to the byte: a step sends 4 × 128 × 768 float32 values up and as many down.
- Beside them the paper's step has 1,900 bytes, ours {_beside(rows):,}: 512 labels of two bytes, three packet headers of 32 bytes, and
  136 bytes of two frames. What the 1,900 consist of is not published.
- An upload costs the paper 2,000 bytes a block beside its values; ours is one packet with one header and a report.
- The published figures hold no download of averaged adapters. Ours count it, and the messages that open and accept a turn: the whole
  difference between *same traffic* and *all*. The last turn, of 3 steps, is opened and never uploads.""",
    ]


def _causes(rows: list[dict[str, Any]]) -> list[str]:
    sums = {name: total_bytes(same) for name, _, same, _ in savings(rows)}
    whole = sums[UNCHANGED]
    times = (whole - sums[NARROWER]) / (whole - sums["r_cut 8"])
    setting, row = _setting(rows), next(row for row in _rows_of(rows, "ranks") if row["cut_rank"] == 16)
    adapters = UPLOADS * setting.adapter_bytes(row["cut"], row["cut_rank"])
    return [
        "## What saves traffic",
        f"""\
**A rank of 8 instead of 16 at the cut saves {100 * (1 - sums["r_cut 8"] / whole):.2f} % of the traffic. All adapters together are
{100 * adapters / whole:.1f} % of it**, so at this cut no choice of ranks and no aggregation of adapters can save more than that. The rest
is activations and gradients, whose size no rank changes. With the downloads that we count too, adapters weigh about twice as much.
**What saves more is a codec at the cut: bfloat16 both ways, splitft's default, saves {100 * (1 - sums[NARROWER] / whole):.0f} %**,
{times:.0f} times as much as the rank does. Half as many uploads save {100 * (1 - sums[SELDOMER] / whole):.2f} %.""",
        _savings_table(rows),
        """\
Cut 2; *saved* is against the first row. *Counted*: from a run, multiplied. *Closed form*: the arithmetic that the counts confirm, with
turns of 40 steps (28 uploads for 57). *Arithmetic*: one byte or half a byte a value and a float32 scale a token, the size of common
quantisers; no run is behind these two rows. What any of them does to the quality is another question.""",
    ]


def _time(rows: list[dict[str, Any]]) -> list[str]:
    (device,) = _rows_of(rows, "device")
    fitted = {row["front_twice"]: row["slowdown"] for row in _rows_of(rows, "time") if row["fitted"]}
    (short_s, _), (long_s, _) = PUBLISHED_CUTS[2], PUBLISHED_CUTS[10]
    link = f"{device['uplink_bytes_per_s'] * 8 / 1e9:.0f} Gbit/s each way, {device['latency_s'] * 1000:.0f} ms"
    return [
        "## Time",
        f"""\
Table I's mean elapsed times are {short_s} s at cut 2 and {long_s} s at cut 10: {long_s / short_s:.2f} times as long. (Table II has
1597.7 s for the very configuration that table I has with 810.4 s, so only ratios within one table mean anything.) Below are ratios of
a turn of 20 steps with its download and upload, one client at a time, by splitft's cost model and virtual clock: **the model's figures,
not measurements**.""",
        _time_table(rows),
        f"""\
Device and server: {device["flops_per_s"] / 1e12:.0f} TFLOP/s, a third of an RTX 3090's float32 peak; {link}. Slower clients have the
same link.""",
        f"""\
A cut moves work, it adds none: where client and server are equally fast, only the larger adapters make a deeper cut slower. The
published ratio needs clients {fitted[False]:.3g} times slower than the server in the model, or {fitted[True]:.3g} times if the client
computes its forward twice, as the public example mentioned above does. That is one number fitted to one ratio, not a statement about
the paper's machines; nor has the model a reason for the published times to fall from cut 8 to cut 10.""",
    ]


def _beside(rows: list[dict[str, Any]]) -> int:
    """Bytes of a step beside its activations and gradients."""
    setting = _setting(rows)
    return total_bytes(step_counts(setting)) - 2 * 4 * setting.batch_size * setting.sequence_tokens * setting.hidden_size
