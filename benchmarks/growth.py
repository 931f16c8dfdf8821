"""Ten, a hundred and a thousand clients of the embedded model: seconds of one client's step, memory of the process, a whole round.

Every point is a run through the public interface in a process of its own (growth_child.py): plan, train, aggregate, evaluate, checkpoint.
All read the same documents, dealt to more or fewer clients, so that what grows is clients.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Adapters, and AdamW's two moments of each.
ROWS_A_CLIENT = 3


@dataclass(frozen=True)
class Scope:
    """`points`: clients and rounds; few clients get more rounds, for a round of theirs is short."""

    points: tuple[tuple[int, int], ...] = ((10, 8), (100, 3), (1000, 2))
    sequence_tokens: int = 64
    steps: int = 2
    documents: int = 8000


QUICK = Scope(points=((2, 1), (4, 1)), sequence_tokens=32, steps=1, documents=60)


def point(clients: int, rounds: int, scope: Scope) -> dict[str, Any]:
    """What a run with this many clients took and held."""
    given = {name: value for name, value in asdict(scope).items() if name != "points"} | {"clients": clients, "rounds": rounds}
    command = [sys.executable, "-m", "benchmarks.growth_child", json.dumps(given)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the run with {clients} clients failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(scope: Scope, say: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = []
    for clients, rounds in scope.points:
        rows.append(point(clients, rounds, scope))
        say(f"{clients} clients: {client_step_s(rows[-1]) * 1000:.1f} ms a client's step, {rows[-1]['peak_bytes'] / 1e6:,.0f} MB")
    return rows


def client_step_s(row: dict[str, Any]) -> float:
    """Wall seconds of one optimizer step of one client: the median round's training, its opening and closing included, divided."""
    return float(statistics.median(one["train"] for one in row["stages"]) / (row["clients"] * row["steps"]))


def slope_bytes(rows: list[dict[str, Any]]) -> float:
    """Bytes of peak memory that one client more costs, between the two largest points."""
    smaller, larger = sorted(rows, key=lambda row: int(row["clients"]))[-2:]
    return float((larger["peak_bytes"] - smaller["peak_bytes"]) / (larger["clients"] - smaller["clients"]))


def expected_bytes(rows: list[dict[str, Any]], row: dict[str, Any]) -> float:
    """Peak memory if a client more than in the smallest run cost its adapters and moments and nothing else."""
    smallest = min(rows, key=lambda one: int(one["clients"]))
    return float(smallest["peak_bytes"] + (row["clients"] - smallest["clients"]) * ROWS_A_CLIENT * row["adapter_bytes"])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the points, the slope, and the parts of the largest run's last round."""
    lines = ["| clients | ms of a client's step | against the first | peak memory, MB | first + adapters and moments, MB |"]
    lines += ["|---:|---:|---:|---:|---:|"]
    first = client_step_s(rows[0])
    for row in rows:
        cells = [f"{client_step_s(row) * 1000:.1f}", f"{client_step_s(row) / first:.2f}"]
        cells += [f"{row['peak_bytes'] / 1e6:,.0f}", f"{expected_bytes(rows, row) / 1e6:,.0f}"]
        lines.append(f"| {row['clients']:,} | {' | '.join(cells)} |")
    largest = max(rows, key=lambda row: int(row["clients"]))
    own = ROWS_A_CLIENT * largest["adapter_bytes"]
    slope = slope_bytes(rows)
    lines += [
        "",
        f"A client more costs {slope / 1e6:.2f} MB of peak memory between the two largest runs; its adapters and moments are "
        f"{own / 1e6:.2f} MB: **{slope / own:.2f}** times. Of every peak, {largest['baseline_bytes'] / 1e6:,.0f} MB are interpreter and "
        f"libraries and {largest['weight_bytes'] / 1e6:,.0f} MB the one base model ({largest['dtype']}).",
        "",
        f"A whole round of {largest['clients']:,} clients, {largest['steps']} steps each: {_round(largest)}. "
        f"Its checkpoint has {largest['checkpoint_bytes'] / 1e9:.2f} GB.",
    ]
    return "\n".join(lines)


def _round(row: dict[str, Any]) -> str:
    last = row["stages"][-1]
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in last.items() if name != "whole")
    return f"{last['whole']:.1f} s ({parts})"
