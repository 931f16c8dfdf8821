"""Tokens per second: splitft's cohort against stock PEFT, against the usual loop over split clients, and against a bare bank of adapters.

All contestants of a case run interleaved in one process over shared frozen weights, and must start from the loss of the base model.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import setups
from benchmarks.bare_bank import BareBank
from benchmarks.setups import Case
from benchmarks.stock import SequentialLoop, Unsplit, quiet
from benchmarks.throughput_tables import table
from benchmarks.timing import median_ratio, spread, take_turns
from splitft.engine.cohort import CohortExecutor
from splitft.engine.settings import Federation

__all__ = ["QUICK", "Scope", "measure", "table"]

FLOAT, HALF = "float32", "bfloat16"
# One after the other takes as many times as long for as many times the clients, so that eight are timed for more.
LOOP_CLIENTS = 8
# A rival's batch: the tokens of all clients up to this number, whose logits alone take 130 and 400 MB; of more clients an equal part.
BATCH_TOKENS = {"embedded": 8192, "gpt2-small": 2048, "tiny": 256}
# From here on a sample is long enough to need no run before it.
LONG_TOKENS = 4096
SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "embedded": ((8, 64), (8, 128), (8, 256), (64, 64), (64, 128), (64, 256), (1000, 64)),
    "gpt2-small": ((8, 64), (8, 128), (8, 256), (64, 64)),
    "tiny": ((2, 8), (8, 8)),
}
# Tokens of a sample, so that small batches are timed over several steps.
SAMPLE_TOKENS = {"embedded": 1024, "gpt2-small": 512, "tiny": 64}


@dataclass(frozen=True)
class Timing:
    """One sample: seconds of an optimizer step of all timed clients, of a round beside its steps, and the loss before the first step."""

    step_s: float
    loss: float
    round_s: float = 0.0


@dataclass(frozen=True)
class Contestant:
    """A way of training `clients` of the case's clients."""

    way: str
    precision: str
    clients: int
    run: Callable[[], Timing]

    @property
    def name(self) -> str:
        return f"{self.way} {self.precision}"


@dataclass(frozen=True)
class Scope:
    """What to measure; empty or 0 means the default of the model."""

    models: tuple[str, ...] = ("embedded", "gpt2-small")
    clients: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    repeats: int = 5
    steps: int = 0

    def cases(self) -> Iterator[Case]:
        for model in self.models:
            sizes: Iterable[tuple[int, int]] = SIZES[model]
            if self.clients or self.tokens:
                sizes = product(self.clients or (8, 64), self.tokens or (64, 128, 256))
            for clients, tokens in sizes:
                yield Case(model, FLOAT, clients, tokens, self.steps or max(1, SAMPLE_TOKENS[model] // (clients * tokens)))


QUICK = Scope(models=("embedded",), clients=(8,), tokens=(64,), repeats=2, steps=1)


def stock_way(rival: Unsplit | SequentialLoop | BareBank, batches: Sequence[Tensor]) -> Callable[[], Timing]:
    """Step after step over the batches [n t]."""

    def run() -> Timing:
        begin = time.perf_counter()
        losses = [rival.step(ids) for ids in batches]
        return Timing((time.perf_counter() - begin) / len(batches), losses[0])

    return run


class StepClock:
    """Adds up the seconds of a round's steps. A cohort's opening ends with the last client's start; what follows until `step` is called
    belongs to a step, what follows the last step closes the cohort."""

    def __init__(self) -> None:
        self.steps_s = 0.0
        self.mark = time.perf_counter()

    def opened(self, start: Tensor) -> Tensor:
        self.mark = time.perf_counter()
        return start

    def step(self, count: int) -> None:
        now = time.perf_counter()
        self.steps_s, self.mark = self.steps_s + now - self.mark, now


def cohort_way(base: Federation, case: Case) -> Callable[[], Timing]:
    """A round of the engine from the same start each time; messages that open and close it are told apart from its steps."""
    executor, start = CohortExecutor(base), base.layout.initial_row(0)
    plan = setups.round_plan(case, base.split.blocks)

    def run() -> Timing:
        clock, begin = StepClock(), time.perf_counter()
        result = executor.train(plan, 0, lambda one: clock.opened(start), {}, clock.step)
        whole_s = time.perf_counter() - begin
        return Timing(clock.steps_s / case.steps, statistics.fmean(one[0] for one in result.step_losses), whole_s - clock.steps_s)

    return run


def timed_clients(case: Case) -> int:
    """How many clients' sequences a rival takes as one batch."""
    return case.clients // math.ceil(case.step_tokens / BATCH_TOKENS[case.model])


def contestants(case: Case, weights: Mapping[str, PreTrainedModel]) -> tuple[list[Contestant], Tensor]:
    """Every way of training in this case, and the tokens [n t] of the first step. All share `weights`, the model in each precision."""
    splits = {kind: setups.cohort_model(model) for kind, model in weights.items()}
    bases = {kind: setups.federation(case, split, setups.CODECS["cast"]) for kind, split in splits.items()}
    batches = setups.step_batches(bases[FLOAT], case.steps)
    few, batch = min(LOOP_CLIENTS, case.clients), timed_clients(case)
    cuts = setups.cuts(case.clients, splits[FLOAT].blocks)[:few]
    found = []
    for kind in (FLOAT, HALF):
        rivals: dict[str, tuple[int, Unsplit | SequentialLoop | BareBank]] = {
            "peft": (batch, Unsplit(weights[FLOAT], kind == HALF)),
            "loop": (few, SequentialLoop(weights[FLOAT], cuts, kind == HALF)),
            "bare": (batch, BareBank(weights[kind], batch)),
        }
        found += [Contestant(way, kind, some, stock_way(rival, [ids[:some] for ids in batches])) for way, (some, rival) in rivals.items()]
        found.append(Contestant("cohort", kind, case.clients, cohort_way(bases[kind], case)))
    return found, batches[0]


def base_losses(model: Any, ids: Tensor) -> list[float]:
    """The loss of the model without adapters on each row of ids [n t]: what every contestant must begin with."""
    found: list[float] = []
    with torch.no_grad():
        for rows in torch.split(ids, 16):
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
            found += F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1).tolist()
    return found


def require_same_start(case: Case, contestant: Contestant, loss: float, expected: float) -> None:
    """A comparison of unlike work is worth nothing: the loss before the first step must be the base model's on the same tokens."""
    exact = contestant.precision == FLOAT and contestant.way in ("peft", "loop")
    if not abs(loss - expected) <= (1e-4 if exact else 1e-2) * expected:  # so that NaN fails
        raise RuntimeError(
            f"{contestant.name} starts from loss {loss:.6f}, the model has {expected:.6f}: they do not train the same thing ({case})."
        )


def measure_case(case: Case, weights: Mapping[str, PreTrainedModel], repeats: int) -> list[dict[str, Any]]:
    """One row per contestant."""
    quiet()
    ways, ids = contestants(case, weights)
    first = {one.name: one.run() for one in ways} if case.step_tokens < LONG_TOKENS else {}
    samples = take_turns({one.name: one.run for one in ways}, repeats)
    losses = base_losses(weights[FLOAT], ids)
    for one in ways:
        begun = first.get(one.name, samples[one.name][0])
        require_same_start(case, one, begun.loss, statistics.fmean(losses[: one.clients]))
    return rows_of(case, ways, samples)


def rows_of(case: Case, ways: Sequence[Contestant], samples: Mapping[str, Sequence[Timing]]) -> list[dict[str, Any]]:
    """Seconds of one client's step in every sample, tokens per second, and the ratios to the rivals within each repeat."""
    seconds = {one.name: [sample.step_s / one.clients for sample in samples[one.name]] for one in ways}

    def better(way: str) -> str:
        return min((f"{way} {kind}" for kind in (FLOAT, HALF)), key=lambda name: statistics.median(seconds[name]))

    rows = []
    for one in ways:
        own = seconds[one.name]
        rivals = {"peft": f"peft {FLOAT}", "best_peft": better("peft"), "best_loop": better("loop"), "bare": f"bare {one.precision}"}
        rows.append(
            {name: value for name, value in case.facts().items() if name != "dtype"}
            | {
                "way": one.way,
                "precision": one.precision,
                "timed_clients": one.clients,
                "tokens_per_s": case.tokens / statistics.median(own),
                "speed_to": {name: median_ratio(seconds[rival], own) for name, rival in rivals.items()},
                "spread": spread(own),
                "round_s": statistics.median(sample.round_s for sample in samples[one.name]),
                "client_step_s": own,
            }
        )
    return rows


def measure(scope: Scope, say: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = []
    for model in scope.models:
        weights = {kind: setups.build_model(model, kind) for kind in (FLOAT, HALF)}
        for case in (one for one in scope.cases() if one.model == model):
            begin = time.perf_counter()
            found = measure_case(case, weights, scope.repeats)
            rows += found
            speeds = ", ".join(f"{row['way']} {row['precision']} {row['tokens_per_s']:,.0f}" for row in found)
            say(f"{model}, {case.clients} x {case.tokens}: tokens/s {speeds} ({time.perf_counter() - begin:.0f} s)")
    return rows
