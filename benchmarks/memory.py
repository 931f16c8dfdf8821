"""Peak memory: federated split training and unsplit stock PEFT, and a client that holds only its own blocks.

Every figure comes from a process of its own (memory_child.py): the peak of its resident memory while it trains, less what it held with
the libraries imported and nothing built. Building is left out of the peak where the system can reset it (Linux).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CLIENT_MODEL = "gpt2-small"
WORDS = {"peft": "PEFT, unsplit, whole model", "client": "a client, cut 2"}


@dataclass(frozen=True)
class Scope:
    models: tuple[str, ...] = ("embedded", "gpt2-small")
    dtypes: tuple[str, ...] = ("float32",)
    clients: tuple[int, ...] = (4, 16)
    sequence_tokens: int = 128
    steps: int = 2
    client_model: str = CLIENT_MODEL


QUICK = Scope(models=("embedded",), clients=(1, 4), sequence_tokens=64, steps=1, client_model="tiny")


def child(kind: str, model: str, dtype: str, clients: int, scope: Scope, folder: str = "") -> dict[str, Any]:
    """What one process held."""
    case = {"model": model, "dtype": dtype, "clients": clients, "tokens": scope.sequence_tokens, "steps": scope.steps}
    given = case | {"kind": kind, "folder": folder}
    command = [sys.executable, "-m", "benchmarks.memory_child", json.dumps(given)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{kind} on {model} with {clients} clients failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(scope: Scope, say: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = []
    for model in scope.models:
        for dtype in scope.dtypes:
            for clients in scope.clients:
                for kind in ("peft", "cohort"):
                    rows.append(child(kind, model, dtype, clients, scope) | {"group": "training"})
                    say(f"{model} {dtype}, {clients} x {scope.sequence_tokens}, {kind}: {_megabytes(rows[-1]['training_peak_bytes'])} MB")
    for dtype in scope.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            child("save", scope.client_model, dtype, 1, scope, folder)
            for kind in ("peft", "client"):
                rows.append(child(kind, scope.client_model, dtype, 1, scope, folder) | {"group": "client"})
                say(f"{scope.client_model} {dtype}, {WORDS[kind]}: {_megabytes(rows[-1]['training_peak_bytes'])} MB")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: peaks in training, then the client against the whole model."""
    lines = ["Peak resident memory in training beyond interpreter and libraries, in MB:", ""]
    lines += ["| model | weights | clients × tokens | PEFT, unsplit | cohort | ratio |", "|---|---|---|---:|---:|---:|"]
    training = [row for row in rows if row["group"] == "training"]
    for row in (row for row in training if row["kind"] == "peft"):
        other = next(one for one in training if one["kind"] == "cohort" and _same(one, row))
        peaks = row["training_peak_bytes"], other["training_peak_bytes"]
        cells = [
            row["model"],
            row["dtype"],
            f"{row['clients']} × {row['tokens']}",
            *map(_megabytes, peaks),
            f"**{peaks[1] / peaks[0]:.2f}**",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *_devices([row for row in rows if row["group"] == "client"])])


def _devices(rows: list[dict[str, Any]]) -> list[str]:
    """A client's process against one with the whole model, and what was taken off both."""
    lines = ["", "One device's process, weights read from a checkpoint, one sequence a step, in MB:", ""]
    lines += ["| process | model | type | weights | peak in training | against the whole model |", "|---|---|---|---:|---:|---:|"]
    for row in rows:
        whole = next(one for one in rows if one["kind"] == "peft" and _same(one, row))
        share = "" if row is whole else f"**{row['training_peak_bytes'] / whole['training_peak_bytes']:.2f}**"
        cells = [WORDS[row["kind"]], row["model"], row["dtype"], _megabytes(row["weight_bytes"]), _megabytes(row["training_peak_bytes"])]
        lines.append(f"| {' | '.join([*cells, share])} |")
    taken = " and ".join(dict.fromkeys(_megabytes(row["baseline_bytes"]) for row in rows))
    return [*lines, "", f"Taken off as interpreter and libraries: {taken} MB."]


def _same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(first[name] == second[name] for name in ("model", "dtype", "clients", "tokens"))


def _megabytes(value: int) -> str:
    return f"{value / 1e6:,.0f}"
