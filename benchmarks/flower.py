"""Flower's simulation engine beside the cohort engine, on equal work: federated LoRA of one model, whole rounds in wall seconds.

Both begin with the same adapter, train the same tokens in the same order with the same rank, optimizer and clipping, and average once a
round; so the clients' mean losses must agree round by round, which is required. Flower runs under a Python of its own, since it holds
back libraries that splitft needs newer: one with flwr[simulation], torch, transformers and peft, given as `--flower-python PATH`. Its
clients train whole models, two at a time with a thread each, and keep their model between rounds; splitft's also split, and send bytes
at every cut.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import setups
from benchmarks.setups import Case
from splitft.engine.cohort import CohortExecutor
from splitft.engine.settings import ClientState, Federation, same_start
from splitft.models.load import resolve
from splitft.peft_format import write_adapter
from splitft.types import Plan, RoundPlan

ROOT = Path(__file__).resolve().parents[1]
MODEL = "embedded"
NO_PYTHON = "flower is left out: name a Python that has flwr[simulation], torch, transformers and peft with --flower-python PATH."
TOLERANCE = {"float32": 2e-3, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Scope:
    """The first round of `rounds` warms up; `flower_python` is the Python to run Flower with."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    clients: int = 8
    sequence_tokens: int = 128
    steps: int = 8
    rounds: int = 6
    flower_python: str = ""


QUICK = Scope(dtypes=("float32",), clients=2, sequence_tokens=16, steps=2, rounds=3)


def run_cohort(base: Federation, case: Case, rounds: int) -> dict[str, Any]:
    """Seconds of each round: its training and the average of its adapters. Totals begin with a federation that is built."""
    executor, row = CohortExecutor(base), base.layout.initial_row(0)
    states: dict[int, ClientState] = {}
    taken, losses, begin = [], [], time.perf_counter()
    for index in range(1, rounds + 1):
        since = time.perf_counter()
        cuts = setups.cuts(case.clients, base.split.blocks)
        plan = RoundPlan(index, tuple(Plan(k, cut, case.steps, setups.RANK) for k, cut in enumerate(cuts)))
        result = executor.train(plan, (index - 1) * case.steps, same_start(row), states, lambda count: None)
        row, states = result.values.mean(0), result.states
        taken.append(time.perf_counter() - since)
        losses.append(statistics.fmean(one[0] for one in result.step_losses))
    return {"round_s": taken, "total_s": time.perf_counter() - begin, "losses": losses}


def run_flower(python: str, base: Federation, case: Case, batches: list[Tensor], rounds: int) -> dict[str, Any]:
    """The same in Flower's simulation engine; what its process prints."""
    with tempfile.TemporaryDirectory() as folder:
        save_file({"ids": torch.stack(batches, 1).contiguous()}, Path(folder) / "tokens.safetensors")
        start = base.layout.initial_row(0)
        write_adapter(Path(folder) / "adapter", base.layout, start, base.split.anatomy.blocks_path, resolve(MODEL), True)
        work = {
            "folder": folder,
            "model": resolve(MODEL),
            "clients": case.clients,
            "rounds": rounds,
            "steps": case.steps,
            "autocast": case.dtype == "bfloat16",
            "learning_rate": setups.LEARNING_RATE,
            "weight_decay": setups.WEIGHT_DECAY,
            "clip_norm": setups.CLIP_NORM,
        }
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1", "FLWR_HOME": folder}
        environment = {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [python, "-m", "benchmarks.flower_app.simulate", json.dumps(work)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"Flower's simulation failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def require_same_losses(dtype: str, ours: list[float], theirs: list[float]) -> None:
    """Equal work has equal losses, round by round."""
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        if not abs(one - other) <= TOLERANCE[dtype] * other:
            raise RuntimeError(f"round {index} in {dtype} starts from loss {one:.5f} here and {other:.5f} in Flower: unequal work.")


def measure(scope: Scope, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row per precision and engine; nothing, with a reason said, where there is no Python for Flower."""
    if not scope.flower_python:
        say(NO_PYTHON)
        return []
    rows = []
    for dtype in scope.dtypes:
        case = Case(MODEL, dtype, scope.clients, scope.sequence_tokens, scope.steps)
        split = setups.cohort_model(setups.build_model(MODEL, dtype))
        # The data of all rounds; a round takes `steps` of them.
        base = setups.federation(setups.with_steps(case, scope.rounds * scope.steps), split, setups.CODECS["cast"])
        ours = run_cohort(base, case, scope.rounds)
        theirs = run_flower(scope.flower_python, base, case, setups.step_batches(base, scope.rounds * scope.steps), scope.rounds)
        require_same_losses(dtype, ours["losses"], theirs["losses"])
        for engine, found in (("flower", theirs), ("cohort", ours)):
            median = statistics.median(found["round_s"][1:])
            rows.append({"engine": engine, "rounds": scope.rounds, **case.facts(), "median_round_s": median, **found})
            say(f"{engine} {dtype}: {median:.2f} s a round, {found['total_s']:.1f} s in all")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: both engines per precision; Flower's total with its start."""
    if not rows:
        return NO_PYTHON
    first, number = rows[0], next(row["version"] for row in rows if row["engine"] == "flower")
    lines = [
        f"{first['clients']} clients, {first['steps']} local steps of one sequence of {first['tokens']} tokens a round, "
        f"{first['rounds']} rounds; Flower {number}. The losses of both agree round by round.",
        "",
        "| precision | Flower, s a round | cohort, s a round | ratio | Flower, s in all | cohort, s in all |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        theirs, ours = (next(row for row in rows if (row["engine"], row["dtype"]) == (engine, dtype)) for engine in ("flower", "cohort"))
        ratio = theirs["median_round_s"] / ours["median_round_s"]
        cells = [dtype, f"{theirs['median_round_s']:.2f}", f"{ours['median_round_s']:.2f}", f"**{ratio:.1f}×**"]
        cells += [f"{one['total_s']:.1f}" for one in (theirs, ours)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
