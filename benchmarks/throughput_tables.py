"""The page's tables of throughput: speeds of all contestants, what the cohort makes of them, and what a round adds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.setups import MODELS

FLOAT, HALF = "float32", "bfloat16"
WAYS = {"peft": "PEFT, unsplit", "loop": "PEFT, split loop", "bare": "bare bank", "cohort": "cohort"}
WORDS = {("peft", HALF): "autocast", ("loop", HALF): "autocast", ("bare", HALF): "bf16", ("cohort", HALF): "bf16"}
Row = dict[str, Any]
Found = dict[tuple[str, str], Row]


def column(way: str, precision: str) -> str:
    return f"{WAYS[way]} {'fp32' if precision == FLOAT else WORDS[way, precision]}"


def cases(rows: list[Row], model: str) -> Iterator[tuple[str, Found]]:
    """Each setting of a model with its contestants by way and precision."""
    own = [row for row in rows if row["model"] == model]
    for clients, tokens in dict.fromkeys((row["clients"], row["tokens"]) for row in own):
        yield (
            f"{clients:,} × {tokens}",
            {(row["way"], row["precision"]): row for row in own if (row["clients"], row["tokens"]) == (clients, tokens)},
        )


def table(rows: list[Row]) -> str:
    """Markdown: for each model the speeds, then the ratios."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        found = list(cases(rows, model))
        parts += [f"**{MODELS[model][0].upper()}{MODELS[model][1:]}** (tokens per second)", "", *speeds(found), ""]
        parts += ["How many times as fast:", "", *ratios(found), ""]
    return "\n".join(parts).rstrip()


def speeds(found: list[tuple[str, Found]]) -> list[str]:
    names = list(found[0][1])
    lines = ["| clients × tokens | " + " | ".join(column(*name) for name in names) + " |", "|---|" + "---:|" * len(names)]
    for size, ways in found:
        lines.append(f"| {size} | " + " | ".join(f"{ways[name]['tokens_per_s']:,.0f}" for name in names) + " |")
    return lines


def ratios(found: list[tuple[str, Found]]) -> list[str]:
    """The cohort against everyone, what the bare bank reaches against PEFT, and what a round adds per client."""
    head = ["cohort fp32 : PEFT fp32", "cohort fp32 : bare bank fp32", "cohort bf16 : PEFT fp32", "cohort bf16 : bare bank bf16"]
    head += ["bare bank fp32 : PEFT fp32", "bare bank bf16 : PEFT fp32", "best cohort : better PEFT", "best cohort : better split loop"]
    lines = ["| clients × tokens | " + " | ".join([*head, "a round adds, ms a client"]) + " |", "|---|" + "---:|" * (len(head) + 1)]
    for size, ways in found:
        full, half = ways["cohort", FLOAT], ways["cohort", HALF]
        best = max(full, half, key=lambda row: float(row["tokens_per_s"]))
        values = [full["speed_to"]["peft"], full["speed_to"]["bare"], half["speed_to"]["peft"], half["speed_to"]["bare"]]
        values += [ways["bare", kind]["speed_to"]["peft"] for kind in (FLOAT, HALF)]
        values += [best["speed_to"]["best_peft"], best["speed_to"]["best_loop"]]
        added = f"{best['round_s'] / best['clients'] * 1000:.1f}"
        lines.append(f"| {size} | " + " | ".join([*(f"{value:.2f}×" for value in values), added]) + " |")
    return lines
