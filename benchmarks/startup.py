"""How long until something happens: `splitft --help`, imports, and `splitft run` up to its first optimizer step on the embedded model."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.first_step import FIRST_STEP

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "import splitft": ("-c", "import splitft"),
    "splitft --help": ("-c", "from splitft.apps.cli import main; main()", "--help"),
    "import torch": ("-c", "import torch"),
    "import torch, transformers, peft": ("-c", "import torch; from transformers import AutoModelForCausalLM; import peft"),
}


@dataclass(frozen=True)
class Scope:
    repeats: int = 5
    commands: tuple[str, ...] = tuple(COMMANDS)
    overrides: tuple[str, ...] | None = ()  # None: only the commands


QUICK = Scope(repeats=1, overrides=("data.max_documents=100",))


def command_seconds(arguments: tuple[str, ...]) -> float:
    """Wall seconds of a Python process from its start to its end."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - begin


def first_step_seconds(overrides: tuple[str, ...]) -> dict[str, float]:
    """Seconds from the start of `splitft run` until each of its stages was announced, and until the first step was taken."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.first_step", f"run.folder={folder}", *overrides]
        found: dict[str, float] = {}
        begin = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                found.setdefault(line.strip(), time.perf_counter() - begin)
            problem = process.stderr.read() if process.stderr else ""
    if FIRST_STEP not in found:
        raise RuntimeError(f"splitft run did not get to its first step:\n{problem[-2000:]}")
    return found


def measure(scope: Scope, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Medians; one untimed start of each before, so that files are in the system's cache."""
    rows = []
    for name in scope.commands:
        command_seconds(COMMANDS[name])
        seconds = [command_seconds(COMMANDS[name]) for _ in range(scope.repeats)]
        rows.append({"what": name, "median_s": statistics.median(seconds), "seconds": seconds})
        say(f"{name}: {rows[-1]['median_s']:.2f} s")
    if scope.overrides is None:
        return rows
    first_step_seconds(scope.overrides)
    runs = [first_step_seconds(scope.overrides) for _ in range(scope.repeats)]
    seconds = [run[FIRST_STEP] for run in runs]
    stages = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    rows.append({"what": "splitft run, to the first step", "median_s": statistics.median(seconds), "seconds": seconds, "stages": stages})
    say(f"splitft run, to the first step: {rows[-1]['median_s']:.2f} s")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: seconds of each, and when the stages of a run begin."""
    lines = ["| what | seconds |", "|---|---:|", *(f"| {_code(row['what'])} | {row['median_s']:.2f} |" for row in rows)]
    stages: dict[str, float] = next((row["stages"] for row in rows if "stages" in row), {})
    if stages:
        lines += ["", "Of the last: " + ", ".join(f"{name} at {seconds:.1f} s" for name, seconds in stages.items()) + "."]
    return "\n".join(lines)


def _code(name: str) -> str:
    return f"`{name}`" if "," not in name or name.startswith("import") else name
