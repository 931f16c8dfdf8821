"""Tokens per second: splitft's executors against unsplit stock PEFT on the same tokens, and against the usual loop over split clients.

A sample is one round of a few local steps, opening and closing messages included; stock training does the same number of optimizer
steps. All contestants run interleaved in one process and must start from the same loss.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from benchmarks import setups
from benchmarks.setups import Case
from benchmarks.stock import SequentialLoop, Unsplit, quiet
from benchmarks.timing import interleave, median_ratio, spread
from splitft.engine.cohort import CohortExecutor
from splitft.engine.settings import Federation, same_start
from splitft.engine.workers import WorkersExecutor
from splitft.transport.inproc import InProcess

REFERENCE = "peft"
WAYS = {
    "peft": "PEFT, unsplit",
    "cohort-cast": "cohort, bf16 at the cut",
    "cohort-identity": "cohort, exact cut",
    "workers-cast": "workers, bf16 at the cut",
    "sequential": "PEFT, split loop",
}
WORKER_CLIENTS = (4,)
STEPS = {"embedded": 4, "gpt2-small": 2, "tiny": 2}
CLIENTS: dict[str, tuple[int, ...]] = {"embedded": (1, 4, 16), "gpt2-small": (1, 4), "tiny": (1, 4)}

Train = Callable[[], list[float]]


@dataclass(frozen=True)
class Scope:
    """What to measure; empty means the default of the model."""

    models: tuple[str, ...] = ("embedded", "gpt2-small")
    dtypes: tuple[str, ...] = ("float32",)
    clients: tuple[int, ...] = ()
    tokens: tuple[int, ...] = (64, 128, 256)
    repeats: int = 5
    steps: int = 0

    def cases(self) -> Iterator[Case]:
        for model, dtype in product(self.models, self.dtypes):
            for clients, tokens in product(self.clients or CLIENTS[model], self.tokens):
                yield Case(model, dtype, clients, tokens, self.steps or STEPS[model])


QUICK = Scope(models=("embedded",), clients=(1, 4), tokens=(64,), repeats=2, steps=1)


def train_split(executor: CohortExecutor | WorkersExecutor, base: Federation, case: Case) -> Train:
    """A round of the executor from the same start each time; the mean loss of the clients at each step."""
    plan, start = setups.round_plan(case, base.split.blocks), base.layout.initial_row(0)

    def train() -> list[float]:
        result = executor.train(plan, 0, same_start(start), {}, lambda count: None)
        return [statistics.fmean(step) for step in zip(*result.step_losses, strict=True)]

    return train


def train_stock(rival: Unsplit | SequentialLoop, base: Federation, case: Case) -> Train:
    """The same batches, step by step."""
    batches = setups.step_batches(base, case.steps)
    return lambda: [rival.step(ids) for ids in batches]


def contestants(case: Case) -> dict[str, Train]:
    """Every way of training in this case, by its name in WAYS."""
    model = setups.build_model(case.model, case.dtype)
    rivals = {REFERENCE: Unsplit(copy.deepcopy(model), case.dtype)}
    loop = SequentialLoop(model, setups.cuts(case.clients, int(model.config.n_layer)), case.dtype)
    split = setups.split_model(setups.build_model(case.model, case.dtype, setups.split_attention(case.dtype)))
    cast = setups.federation(case, split, setups.CODECS["cast"])
    exact = setups.with_codec(cast, setups.CODECS["identity"])
    ways = {
        REFERENCE: train_stock(rivals[REFERENCE], cast, case),
        "cohort-cast": train_split(CohortExecutor(cast), cast, case),
        "cohort-identity": train_split(CohortExecutor(exact), exact, case),
    }
    if case.clients in WORKER_CLIENTS:
        ways["workers-cast"] = train_split(WorkersExecutor(cast, InProcess(), deterministic=False), cast, case)
    return ways | {"sequential": train_stock(loop, cast, case)}


def require_same_start(case: Case, losses: dict[str, float]) -> None:
    """A comparison of unlike work is worth nothing: the loss before the first step must agree."""
    reference = losses[REFERENCE]
    for name, loss in losses.items():
        exact = case.dtype == "float32" and not name.endswith("cast")
        if not abs(loss - reference) <= (1e-4 if exact else 1e-2) * reference:  # so that NaN fails
            raise RuntimeError(f"{name} starts from loss {loss:.6f}, {REFERENCE} from {reference:.6f}: they do not train the same thing.")


def measure_case(case: Case, repeats: int) -> list[dict[str, Any]]:
    """One row per way of training."""
    quiet()
    ways = contestants(case)
    require_same_start(case, {name: train()[0] for name, train in ways.items()})
    samples = interleave(ways, repeats)
    tokens, reference = case.steps * case.step_tokens, samples[REFERENCE]
    return [
        case.facts()
        | {
            "way": name,
            "repeats": repeats,
            "step_s": statistics.median(one.wall_s) / case.steps,
            "tokens_per_s": tokens / statistics.median(one.wall_s),
            "speed_to_peft": median_ratio(reference.wall_s, one.wall_s),
            "processor_speed_to_peft": median_ratio(reference.processor_s, one.processor_s),
            "spread": spread(one.wall_s),
            "wall_s": one.wall_s,
        }
        for name, one in samples.items()
    ]


def measure(scope: Scope, say: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = []
    for case in scope.cases():
        found = measure_case(case, scope.repeats)
        rows += found
        head = f"{case.model} {case.dtype}, {case.clients} x {case.tokens}: peft {found[0]['tokens_per_s']:,.0f} tokens/s"
        say("; ".join([head, *(f"{row['way']} {row['speed_to_peft']:.2f} x" for row in found[1:])]))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one table per model and type; tokens per second, and how many times as fast as unsplit PEFT."""
    parts = []
    for model, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        ways = [way for way in WAYS if any(row["way"] == way for row in own)]
        parts += [f"**{setups.MODELS[model]}; {dtype} weights** (tokens per second)", ""]
        parts += ["| clients × tokens | " + " | ".join(WAYS[way] for way in ways) + " |", "|---|" + "---:|" * len(ways)]
        for size in dict.fromkeys((row["clients"], row["tokens"]) for row in own):
            found = {row["way"]: row for row in own if (row["clients"], row["tokens"]) == size}
            cells = [_cell(found[way], way == REFERENCE) if way in found else "" for way in ways]
            parts.append(f"| {size[0]} × {size[1]} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts).rstrip()


def _cell(row: dict[str, Any], plain: bool) -> str:
    speed = f"{row['tokens_per_s']:,.0f}"
    return speed if plain else f"{speed} (**{row['speed_to_peft']:.2f}×**)"
