"""The loop of a federation: plan, train, aggregate, evaluate, record. Read this file first.

Each round is committed as a whole: its events go to the journal, then its checkpoint is renamed into place. Stopped at any moment, a run
goes on from the last committed round and gives the numbers of the run that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from splitft.adapt.base import Policy
from splitft.adapt.cost import CostModel
from splitft.adapt.fleets import Device
from splitft.aggregate.base import Aggregator
from splitft.clock import monotonic_s
from splitft.control.base import Controller
from splitft.data.base import TokenRows
from splitft.engine import checkpoint, releases
from splitft.engine.asynchronous import asynchronous_round
from splitft.engine.attendance import Attendance, attend, retimed
from splitft.engine.closing import close_round, restore_weights
from splitft.engine.evaluate import evaluate, evaluate_own
from splitft.engine.journal import Journal
from splitft.engine.planning import Starting, count_moves, prepare
from splitft.engine.points import Reached, nothing
from splitft.engine.record import Trained, evaluation_event
from splitft.engine.secure_round import Secrecy
from splitft.engine.settings import ClientState, Federation, OnStep, RoundResult, Starts
from splitft.ranks.base import RankPolicy
from splitft.sync.base import Synchronisation
from splitft.types import RoundPlan
from splitft.work.base import WorkPolicy


class Executor(Protocol):
    """Whatever can train a round: a batched cohort or real workers."""

    def train(self, plan: RoundPlan, first_step: int, starts: Starts, states: dict[int, ClientState], on_step: OnStep) -> RoundResult: ...


@dataclass(frozen=True)
class Rules:
    """How a run goes, beside how a client trains: rounds, who takes part, when to evaluate. `buffer` 0: rounds are synchronous."""

    rounds: int
    local_steps: int
    rank: int
    exit_on_client: bool
    tail_blocks: int
    attendance: Attendance
    fetch_blocks: bool
    buffer: int
    staleness: float
    evaluate_every: int
    evaluate_batch: int
    evaluate_rows: int
    probe_rows: int
    keep_checkpoints: int
    seed: int


@dataclass
class Run:
    """A federation about to run or in the middle: fixed parts, and `state`, which every round replaces.

    `torn`: a round has begun and is not committed, so what clients keep may be half the old and half the new.
    """

    federation: Federation
    executor: Executor
    policy: Policy
    ranks: RankPolicy
    work: WorkPolicy
    aggregator: Aggregator
    synchronisation: Synchronisation
    controller: Controller
    costs: tuple[CostModel, ...]
    devices: tuple[Device, ...]
    common_held_out: TokenRows
    rules: Rules
    folder: Path
    journal: Journal
    state: checkpoint.RunState
    torn: bool = False
    on_step: OnStep = field(default=lambda count: None)
    on_stage: Callable[[str], None] = field(default=lambda name: None)
    # Told of the seconds every commit takes.
    on_commit: Callable[[float], None] = field(default=lambda seconds: None)
    # Of a federation whose clients are elsewhere: how a round is trained with them, and how their held-out rows are measured.
    conduct: Callable[[Run, int], Trained] | None = None
    measure: Callable[[Run, int, Tensor, str], dict[str, Any]] | None = None
    # The disk has refused a commit: wait for it and return to have it tried again, or raise.
    on_refused: Callable[[OSError], None] | None = None
    reached: Reached = nothing
    # Clients' own blocks are aggregated securely.
    secrecy: Secrecy | None = None


@dataclass(frozen=True)
class RoundRecord:
    """What a round gave, as the journal has it: the events `round` and `evaluation` (None when it was not a round to evaluate)."""

    round: int
    training: dict[str, Any] | None
    evaluation: dict[str, Any] | None


def run_rounds(run: Run) -> Iterator[RoundRecord]:
    """All rounds that are left, one record each; a fresh run first yields round 0, the evaluation before training."""
    if run.torn:
        recover(run)
    if run.state.round == 0 and run.rules.rounds > 0 and run.state.identity.get("evaluated") is not True:
        yield from first_rounds(run)
    while run.state.round < run.rules.rounds:
        index = run.state.round + 1
        yield finish_round(run, index, *train_round(run, index))


def recover(run: Run) -> None:
    """Go back to the last committed round, as a resumed run does: the one after it has failed half-way."""
    run.state = checkpoint.load(checkpoint.newest(run.folder), run.federation.shelf)
    restore_weights(run.federation, run.state.folded)
    run.journal = Journal(run.folder, run.state.journal_bytes)
    run.torn = False


def first_rounds(run: Run) -> Iterator[RoundRecord]:
    """Rounds 0 and 1. The base is evaluated when round 1 is trained: that changes nothing it is made of, a merge may (folding rules), and
    so the first step does not wait for it. Its record is committed and yielded first all the same."""
    trained, training_s = train_round(run, 1)
    scored = score(run, 0, run.state.adapters, run.state.clients, "evaluate the base")
    run.state.identity["evaluated"] = True
    run.state.notes["base_loss"] = {str(one["client"]): one["loss"] for one in scored["clients"]}
    commit(run, [scored])
    yield RoundRecord(0, None, scored)
    yield finish_round(run, 1, trained, training_s)


def train_round(run: Run, index: int) -> tuple[Trained, float]:
    """Plan and train; the state stays as it is. Also the wall seconds that took."""
    started_s, run.torn = monotonic_s(), True
    conduct = run.conduct or (asynchronous_round if run.rules.buffer else synchronous_round)
    trained = conduct(run, index)
    return trained, monotonic_s() - started_s


def finish_round(run: Run, index: int, trained: Trained, training_s: float) -> RoundRecord:
    """Aggregate, evaluate, record."""
    started_s = monotonic_s()
    run.on_stage("aggregate")
    closed = close_round(run, index, trained)
    if run.aggregator.guarded and closed.aggregated:  # measuring shows it to clients, before the round is committed
        insist(run, lambda: releases.note(run.folder, index, releases.digest_of(closed.evaluated)))
    run.reached("aggregated")
    last = index == run.rules.rounds
    scored = score(run, index, closed.evaluated, closed.clients) if last or index % run.rules.evaluate_every == 0 else None
    event, state = closed.recorded(run, index, trained, scored, training_s + monotonic_s() - started_s)
    run.state = state
    commit(run, [*closed.warnings, event, *([scored] if scored is not None else [])])
    run.torn = False
    return RoundRecord(index, event, scored)


def synchronous_round(run: Run, index: int) -> Trained:
    """All participants train from the same global adapter, and the round ends when it has waited for them."""
    state, rules, settings = run.state, run.rules, run.federation.settings
    prepared = prepare(run, index)
    attended = attend(
        prepared.plans, index, run.devices, run.costs, prepared.traffic, rules.attendance, settings.gradient_accumulation, state.virtual_s
    )
    starting = Starting(run)
    run.on_stage("train")
    plan = RoundPlan(index, attended.plans, attended.turns, attended.lost)
    result = run.executor.train(plan, (index - 1) * rules.local_steps, starting, {**state.clients, **prepared.clients}, run.on_step)
    if settings.variable_rate:
        counted = {one.client: result.ledger.of(one.client) for one in attended.plans}
        micro = settings.gradient_accumulation
        attended = retimed(attended, counted, index, run.devices, run.costs, prepared.traffic, rules.attendance, micro, state.virtual_s)
    count_moves(prepared, result.ledger)
    return Trained(prepared, attended, result, starting.truncated)


def score(run: Run, index: int, adapters: Tensor, clients: dict[int, ClientState], stage: str = "evaluate") -> dict[str, Any]:
    """Evaluate the joined model on every client's held-out rows and on the common ones; without those, the global score is the clients'.

    Where clients' own parts are never averaged there is no joined model: each client's rows are scored with its own, and the common
    rows with every client's in turn.
    """
    run.on_stage(stage)
    if run.measure is not None:
        return run.measure(run, index, adapters, stage)
    federation, rules, common = run.federation, run.rules, run.common_held_out
    own = [clients.get(one.client, ClientState()).adapter for one in federation.clients]
    sets = [client.held_out for client in federation.clients]
    names = [f"client {client.client} ({client.name})" for client in federation.clients]
    how = (rules.evaluate_batch, federation.device, rules.evaluate_rows)
    if federation.settings.server == "unaveraged" and any(row is not None for row in own):
        rows = [adapters if row is None else row for row in own]
        scores, shared = evaluate_own(federation.split, federation.layout, rows, sets, common, *how, names)
    else:
        *scores, last = evaluate(federation.split, federation.layout, adapters, [*sets, common], *how, [*names, "the common slice"])
        shared = [last]
    total = reduce(add, [one for one in shared if one is not None] or [one for one in scores if one is not None])
    return evaluation_event(index, total, scores)


def commit(run: Run, events: list[dict[str, Any]]) -> None:
    """Make the round permanent: journal first, then the checkpoint that points behind it."""
    started_s = monotonic_s()
    insist(run, lambda: run.journal.append(*events))
    run.reached("journal_written")
    run.state.journal_bytes = run.journal.bytes
    insist(run, lambda: checkpoint.save(run.folder, run.state, run.rules.keep_checkpoints, run.federation.shelf, run.reached))
    run.on_commit(monotonic_s() - started_s)


def insist(run: Run, write: Callable[[], object]) -> None:
    """Write, again and again if whoever runs the federation would rather wait for the disk than lose a round."""
    while True:
        try:
            write()
            return
        except OSError as problem:
            if run.on_refused is None:
                raise
            run.on_refused(problem)
