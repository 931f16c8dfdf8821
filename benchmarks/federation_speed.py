"""Many clients against one server, all processes of one machine, beside the same run in one process: speed, and memory of a client more."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import federation_parties as parties
from benchmarks.federation_scenes import Federated, Whole, require_same_work
from benchmarks.timing import median_ratio, spread, take_turns

ROUNDS = 1000
BATCHED = {"engine": {"deterministic": False}}
WAYS = {"federation": "server and clients, a process each", "workers": "one process, `workers`", "cohort": "one process, `cohort`"}


@dataclass(frozen=True)
class Load:
    """Clients of the memory points (the last is timed), rows and tokens of a step, steps of a round, rounds of each contestant."""

    clients: tuple[int, ...] = (4, 8, 16)
    rows: int = 2
    tokens: int = 128
    steps: int = 3
    repeats: int = 5
    threads: int = 2


def values(clients: int, load: Load) -> dict[str, Any]:
    """The embedded model, mixed cuts 1 to 7."""
    return {
        "name": "speed",
        "seed": 5,
        "rounds": ROUNDS,
        "lora": {"rank": 8, "alpha": 16.0},
        "tokens": {"block_tokens": load.tokens, "common_held_out": 0.0},
        "clients": {"count": clients, "minimum": clients},
        "policy": {"name": "fixed", "cuts": [1 + client % 7 for client in range(clients)]},
        "train": {"local_steps": load.steps, "batch_size": load.rows, "moments": "keep", "schedule": "constant"},
        "evaluate": {"max_rows": 1, "every_rounds": ROUNDS},
        "engine": {"device": "cpu"},
        "run": {"keep_checkpoints": 1},
    }


def measure(load: Load, folder: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of speed for both modes at the largest number of clients, and of memory for every number."""
    most = max(load.clients)
    parties.write_texts(folder / "texts", most, 24)
    federated = Federated(folder, values(most, load), most)
    rows: list[dict[str, Any]] = []
    try:
        for clients in sorted(load.clients):
            modes = [({}, "deterministic"), (BATCHED, "batched")] if clients == most else [({}, "deterministic")]
            for changes, mode in modes:
                repeats = load.repeats if clients == most else 1
                rows += contest(federated, clients, mode, changes, load, repeats, say)
                federated.close_server()
    finally:
        federated.close()
    return rows


def contest(
    federated: Federated, clients: int, mode: str, changes: dict[str, Any], load: Load, repeats: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row for each way of doing the same rounds, which took turns; the first round of each is not timed."""
    run = values(clients, load)
    begun = federated.serve(f"{clients}-{mode}", clients=run["clients"], policy=run["policy"], **changes)
    federated.join(range(clients))
    wholes = {
        name: Whole(federated.folder, run, name, clients, load.threads, changes=changes).start()
        for name in ("workers", "cohort")
        if name == "workers" or not changes
    }
    ways = {"federation": federated.round, **{name: one.round for name, one in wholes.items()}}
    try:
        first = {name: way() for name, way in ways.items()}
        found = take_turns(ways, repeats)
        require_same_work(federated.run_folder, wholes["workers"].run_folder, 1 + repeats)
    finally:
        for one in wholes.values():
            one.close()
    tokens = sum(one["tokens"] for one in parties.events_of(federated.run_folder, "round")[-1]["clients"])
    rows = []
    for name, samples in found.items():
        seconds = [one["train_s"] for one in samples]
        processor = [one["processor_s"] for one in samples]
        row: dict[str, Any] = {"group": "speed", "way": name, "mode": mode, "clients": clients, "tokens": tokens, "train_s": seconds}
        row |= {
            "processor_s": processor,
            "whole_s": [one["whole_s"] for one in samples],
            "tokens_per_s": tokens / statistics.median(seconds),
        }
        row |= {"spread": spread(seconds), "peak_bytes": max(one["peak_bytes"] for one in [first[name], *samples])}
        for rival in wholes:
            row[f"speed_to_{rival}"] = median_ratio([one["train_s"] for one in found[rival]], seconds)
            row[f"work_to_{rival}"] = median_ratio(processor, [one["processor_s"] for one in found[rival]])
        rows.append(row)
    rows[0]["idle_bytes"] = begun["resident_bytes"]
    said = ", ".join(f"{row['way']} {row['tokens_per_s']:,.0f} tokens/s, {row['peak_bytes'] / 1e6:,.0f} MB" for row in rows)
    ratios = f"{rows[0]['speed_to_workers']:.2f} of workers' speed, {rows[0]['work_to_workers']:.2f} of their processor time"
    say(f"{clients} clients, {mode}: {said}; {ratios}")
    return rows


def slope_bytes(rows: list[dict[str, Any]], way: str) -> float:
    """Peak memory that one client more costs, between the smallest and the largest number of clients."""
    own = sorted((row for row in rows if row["way"] == way and row["mode"] == "deterministic"), key=lambda row: int(row["clients"]))
    return float((own[-1]["peak_bytes"] - own[0]["peak_bytes"]) / (own[-1]["clients"] - own[0]["clients"]))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: speeds of the largest number of clients, then memory."""
    most = max(int(row["clients"]) for row in rows)
    lines = [
        "| passes | way | tokens/s | against `workers` | processor time against `workers` | whole round, s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in (row for row in rows if row["clients"] == most):
        ratio = f"**{row['speed_to_workers']:.2f}**" if row["way"] == "federation" else f"{row['speed_to_workers']:.2f}"
        cells = [row["mode"], WAYS[row["way"]], f"{row['tokens_per_s']:,.0f}", ratio, f"{row['work_to_workers']:.2f}", _seconds(row)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Peak memory of the process that trains (a federation's: the server), in MB:", ""]
    numbers = sorted({int(row["clients"]) for row in rows})
    lines += [f"| way | {' | '.join(f'{number} clients' for number in numbers)} | a client more |", "|---|" + "---:|" * (len(numbers) + 1)]
    for way in WAYS:
        own = {int(row["clients"]): row for row in rows if row["way"] == way and row["mode"] == "deterministic"}
        cells = [f"{own[number]['peak_bytes'] / 1e6:,.0f}" for number in numbers]
        lines.append(f"| {WAYS[way]} | {' | '.join(cells)} | {slope_bytes(rows, way) / 1e6:.1f} |")
    return lines


def _seconds(row: dict[str, Any]) -> str:
    return f"{statistics.median(row['whole_s']):.1f}"
