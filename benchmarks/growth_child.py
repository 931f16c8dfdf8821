"""One run whose growth is measured, through the public interface; prints what it took and held, as JSON.

    python -m benchmarks.growth_child '{"clients": 10, "rounds": 2, "sequence_tokens": 64, "steps": 2, "documents": 8000}'

Engine, precision and codecs are the defaults. Peak memory is that of the whole process, interpreter included, while its rounds go on.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from splitft.apps.console import prepare_process


def overrides(given: dict[str, Any], folder: str) -> list[str]:
    """The run: every projection adapted as in the other benchmarks, moments kept, evaluation on a row of each client, first and last."""
    return [
        f"run.folder={folder}",
        "run.keep_checkpoints=1",
        f"rounds={given['rounds']}",
        f"clients.count={given['clients']}",
        f"data.max_documents={given['documents']}",
        "partition.name=iid",
        f"tokens.block_tokens={given['sequence_tokens']}",
        "lora.targets=all",
        f"train.local_steps={given['steps']}",
        "train.batch_size=1",
        "train.moments=keep",
        "evaluate.max_rows=1",
        f"evaluate.every_rounds={given['rounds']}",
    ]


class Stages:
    """Seconds of every stage of every round, as the run announces them."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []
        self.begin()

    def begin(self) -> None:
        """A round begins; what comes before its first announcement is planning."""
        self.seconds: dict[str, float] = {}
        self.name, self.since = "plan", time.perf_counter()
        self.started = self.since

    def hear(self, event: str, facts: dict[str, Any]) -> None:
        if event == "stage":
            self._turn(str(facts["name"]))

    def end(self, index: int) -> None:
        """A round is on the disk. Round 0, the base model's evaluation, is told in the middle of the first and belongs to it."""
        if index > 0:
            self._turn("")
            self.rounds.append({**self.seconds, "whole": time.perf_counter() - self.started})
            self.begin()

    def _turn(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + now - self.since
        self.name, self.since = name, now


def main(given: dict[str, Any]) -> dict[str, Any]:
    """The run that `given` names, in a process prepared as the command prepares it."""
    prepare_process()
    import torch

    import splitft
    from benchmarks.memory_child import forget_peak, resident_bytes, weight_bytes

    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the mathematics library takes its own memory at the first call
    baseline = resident_bytes(peak=False)
    with tempfile.TemporaryDirectory() as folder:
        run = splitft.open_run(None, overrides(given, folder))
        forget_peak()
        stages = Stages()
        run.listen = stages.hear
        for record in run.rounds():
            stages.end(record.round)
        peak = resident_bytes(peak=True)
        found = {name: value for name, value in given.items() if name != "rounds"} | {
            "dtype": str(run.assembly.base.dtype).removeprefix("torch."),
            "stages": stages.rounds,
            "peak_bytes": peak,
            "baseline_bytes": baseline,
            "weight_bytes": weight_bytes(),
            "adapter_bytes": run.assembly.federation.layout.parameters * 4,
            "checkpoint_bytes": sum(path.stat().st_size for path in (Path(folder) / run.folder.name / "checkpoints").rglob("*.*")),
        }
        run.finish()
        run.close()
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
