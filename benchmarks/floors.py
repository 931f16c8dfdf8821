"""Every stage of the cohort's step beside its floor: the least time this machine could need for that arithmetic and those bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import setups
from benchmarks.floor_counts import STAGES, count, probe
from benchmarks.floor_stages import stage_seconds
from benchmarks.setups import Case
from benchmarks.throughput import Timing, cohort_way


@dataclass(frozen=True)
class Scope:
    models: tuple[str, ...] = ("embedded", "gpt2-small")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    clients: int = 8
    tokens: int = 128
    steps: int = 2
    repeats: int = 5


QUICK = Scope(models=("embedded",), dtypes=("float32",), steps=1, repeats=1)


def measure_case(case: Case, repeats: int) -> dict[str, Any]:
    """A row: the step, the machine's rates, and the stages.

    Profiling takes time of its own, so stages are shares of the profiled steps, taken from the time of steps that were not profiled.
    """
    split = setups.cohort_model(setups.build_model(case.model, case.dtype))
    base = setups.federation(case, split, setups.CODECS["cast"])
    train = cohort_way(base, case)
    train()
    step_s = statistics.median(train().step_s for _ in range(repeats))
    profiled: list[Timing] = []
    shapes = {(i, o) for i, o in split.keys.values()}
    parts = stage_seconds(lambda: profiled.append(train()), shapes)
    factor = step_s / (profiled[0].step_s * case.steps)
    machine, work = probe(case, split, base.layout), count(case, split, base.layout)
    stages: list[dict[str, Any]] = []
    for name in STAGES:
        own = parts.get(name, 0.0) * factor
        if name == "rest":
            own = step_s - sum(float(one["seconds"]) for one in stages)
        needed = work.get(name)
        stages.append(
            {
                "stage": name,
                "seconds": own,
                "flops": needed.flops if needed else 0.0,
                "bytes": needed.moved_bytes if needed else 0.0,
                "floor_s": machine.floor_s(needed, case.dtype) if needed else 0.0,
            }
        )
    return case.facts() | {
        "step_s": step_s,
        "profiled_step_s": profiled[0].step_s,
        "flops_per_s": machine.flops_per_s,
        "activation_bytes_per_s": machine.activation_bytes_per_s,
        "adapter_bytes_per_s": machine.adapter_bytes_per_s,
        "stages": stages,
    }


def measure(scope: Scope, say: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = []
    for model in scope.models:
        for dtype in scope.dtypes:
            row = measure_case(Case(model, dtype, scope.clients, scope.tokens, scope.steps), scope.repeats)
            rows.append(row)
            say(f"{model} {dtype}: step {row['step_s'] * 1000:.0f} ms, floor {floor_s(row) * 1000:.0f} ms")
    return rows


def floor_s(row: dict[str, Any]) -> float:
    """The sum of the stages' floors."""
    return sum(float(one["floor_s"]) for one in row["stages"])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a table per model and precision."""
    parts = []
    for row in rows:
        rates = ", ".join(f"{rate / 1e9:,.0f} Gflop/s in {name}" for name, rate in row["flops_per_s"].items())
        parts += [
            f"**{row['model']}, {row['dtype']}, {row['clients']} × {row['tokens']}**; the machine at its best: {rates}, copies of an "
            f"activation {row['activation_bytes_per_s'] / 1e9:.0f} GB/s, of the adapters {row['adapter_bytes_per_s'] / 1e9:.0f} GB/s",
            "",
            "| stage | ms | share | Gflop | MB | floor, ms | time : floor |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *(_line(STAGES[one["stage"]], one, row["step_s"]) for one in row["stages"]),
        ]
        whole = {name: sum(one[name] for one in row["stages"]) for name in ("seconds", "flops", "bytes", "floor_s")}
        parts += [_line("**a step**", whole, row["step_s"]), ""]
    return "\n".join(parts).rstrip()


def _line(name: str, one: dict[str, Any], step_s: float) -> str:
    cells = [f"{one['seconds'] * 1000:.1f}", f"{one['seconds'] / step_s:.0%}"]
    floor = [f"{one['flops'] / 1e9:.2f}", f"{one['bytes'] / 1e6:.1f}", f"{one['floor_s'] * 1000:.2f}"]
    ratio = f"{one['seconds'] / one['floor_s']:.1f}" if one["floor_s"] else ""
    return f"| {' | '.join([name, *cells, *(floor if one['floor_s'] else ['', '', '']), ratio])} |"
