"""One process whose memory is measured: it builds, trains a few steps and prints what it held, as JSON.

    python -m benchmarks.memory_child '{"kind": "cohort", "model": "tiny", "dtype": "float32", "clients": 4, "tokens": 16, "steps": 2}'

The baseline is this process with every library imported and nothing built; all figures are resident bytes beyond it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # noqa: F401 - every process imports the same libraries, so that the baselines are alike
import torch

from benchmarks import setups
from benchmarks.setups import Case
from benchmarks.stock import Unsplit, quiet
from splitft.apps.console import keep_memory
from splitft.engine.client import Client, expect
from splitft.engine.cohort import CohortExecutor
from splitft.engine.exchange import encode_vector, round_start_frame, take
from splitft.engine.settings import ClientState, same_start
from splitft.lora import Layout
from splitft.messages import RoundAccepted, Type, round_frame, step_frame
from splitft.models.attention import register
from splitft.models.load import load_model
from splitft.types import Key, Plan

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
Step = Callable[[], object]


def resident_bytes(peak: bool) -> int:
    """Resident memory of this process now, or at its peak. Where there is no /proc, the peak since its start for both."""
    if STATUS.exists():
        field = "VmHWM:" if peak else "VmRSS:"
        return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(field))
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def forget_peak() -> bool:
    """Let the peak start again from what is resident now; False where the system cannot."""
    try:
        FORGET.write_text("5")
    except OSError:
        return False
    return True


def unsplit(case: Case, folder: str) -> Step:
    """Stock PEFT on the whole model, built at random or read from `folder`; bfloat16 means float32 weights under autocast."""
    whole = setups.with_dtype(case, "float32")
    model = load_whole(whole, folder) if folder else setups.build_model(case.model, whole.dtype)
    rival = Unsplit(model, autocast=case.dtype == "bfloat16")
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, int(model.config.vocab_size), (case.clients, case.tokens), generator=draw)
    return lambda: [rival.step(ids) for _ in range(case.steps)]


def load_whole(case: Case, folder: str) -> Any:
    return load_model(folder, setups.model_config(case.model), setups.DTYPES[case.dtype])


def cohort(case: Case, folder: str) -> Step:
    """All clients and the server in one process."""
    split = setups.cohort_model(setups.build_model(case.model, case.dtype))
    federation = setups.federation(case, split, setups.CODECS["cast"])
    executor, start = CohortExecutor(federation), federation.layout.initial_row(0)
    return lambda: executor.train(setups.round_plan(case, split.blocks), 0, same_start(start), {}, lambda count: None)


def client(case: Case, folder: str) -> Step:
    """One real client that has read only the blocks in front of its cut (the exit is the server's); the server's replies are zeros."""
    config, cut = setups.model_config(case.model), 2
    owned = list(range(cut))
    model = load_model(folder, config, setups.DTYPES[case.dtype], register(), owned, needs_exit=False)
    split = setups.split_model(model, owned)
    keys = {Key(block, key.module): width for key, width in split.keys.items() if key.block == 0 for block in range(split.blocks)}
    federation = setups.federation(case, split, setups.CODECS["cast"], Layout.of(keys, setups.RANK, setups.ALPHA / setups.RANK))
    plan = Plan(0, cut, case.steps, setups.RANK)
    start = take(federation.layout.initial_row(0), [federation.layout.columns(0, cut)])

    def train() -> None:
        talk = Client(federation, 0, ClientState()).round(round_start_frame(plan, 1, 0, federation.settings, start).encode())
        message = next(talk)
        for _ in range(case.steps):
            fields = expect(message, Type.STEP_UP).step()
            gradient = encode_vector(torch.zeros(case.tokens, split.embedding_width), federation.settings.downlink)
            message = talk.send(step_frame(Type.STEP_DOWN, fields.with_result(1.0, 0.0), (), (gradient,)).encode())
        expect(message, Type.ROUND_END)
        with contextlib.suppress(StopIteration):
            talk.send(round_frame(Type.ROUND_ACCEPTED, RoundAccepted(round=1, client=0)).encode())

    return train


def weight_bytes() -> int:
    """Bytes of all frozen weights in this process, tied ones once. Not the resident size: pages of a checkpoint come in when first read."""
    found = {id(one): one.nbytes for one in gc.get_objects() if type(one) is torch.nn.Parameter and not one.requires_grad}
    return sum(found.values())


def save(case: Case, folder: str) -> Step:
    """Write the model for others to load; nothing is measured."""
    setups.build_model(case.model, case.dtype).save_pretrained(folder)
    return lambda: None


KINDS: dict[str, Callable[[Case, str], Step]] = {"peft": unsplit, "cohort": cohort, "client": client, "save": save}


def main(given: str) -> dict[str, Any]:
    """Measure what `given` (JSON) names."""
    quiet()
    fields = json.loads(given)
    kind, folder = fields.pop("kind"), fields.pop("folder", "")
    case = Case(**fields)
    if kind in ("cohort", "client"):
        keep_memory()  # as the command does, at the price of what it keeps
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the mathematics library takes its own memory at the first call
    baseline = resident_bytes(peak=False)
    forget_peak()
    step = KINDS[kind](case, folder)
    built, build_peak = resident_bytes(peak=False), resident_bytes(peak=True)
    exact = forget_peak()
    step()
    return case.facts() | {
        "kind": kind,
        "weight_bytes": weight_bytes(),
        "baseline_bytes": baseline,
        "built_bytes": built - baseline,
        "build_peak_bytes": build_peak - baseline,
        "training_peak_bytes": resident_bytes(peak=True) - baseline,
        "peak_starts_after_building": exact,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
