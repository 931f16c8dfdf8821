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

import torch
from torch import Tensor

from splitft.adapt.base import Policy
from splitft.adapt.cost import CostModel
from splitft.adapt.fleets import Device
from splitft.aggregate.base import Aggregator
from splitft.clock import monotonic_s
from splitft.data.base import TokenRows
from splitft.engine import checkpoint
from splitft.engine.asynchronous import asynchronous_round
from splitft.engine.attendance import Attendance, attend
from splitft.engine.closing import close_round
from splitft.engine.evaluate import evaluate
from splitft.engine.journal import Journal
from splitft.engine.planning import Starting, count_moves, prepare
from splitft.engine.record import Trained, evaluation_event
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
    keep_checkpoints: int
    seed: int


@dataclass
class Run:
    """A federation about to run or in the middle: fixed parts, and `state`, which every round replaces."""

    federation: Federation
    executor: Executor
    policy: Policy
    ranks: RankPolicy
    work: WorkPolicy
    aggregator: Aggregator
    synchronisation: Synchronisation
    costs: tuple[CostModel, ...]
    devices: tuple[Device, ...]
    common_held_out: TokenRows
    rules: Rules
    folder: Path
    journal: Journal
    state: checkpoint.RunState
    on_step: OnStep = field(default=lambda count: None)
    on_stage: Callable[[str], None] = field(default=lambda name: None)


@dataclass(frozen=True)
class RoundRecord:
    """What a round gave, as the journal has it: the events `round` and `evaluation` (None when it was not a round to evaluate)."""

    round: int
    training: dict[str, Any] | None
    evaluation: dict[str, Any] | None


def run_rounds(run: Run) -> Iterator[RoundRecord]:
    """All rounds that are left, one record each; a fresh run first yields round 0, the evaluation before training."""
    if run.state.round == 0 and run.state.identity.get("evaluated") is not True:
        scored = score(run, 0, run.state.adapters, run.state.clients)
        run.state.identity["evaluated"] = True
        run.state.notes["base_loss"] = {str(one["client"]): one["loss"] for one in scored["clients"]}
        commit(run, [scored])
        yield RoundRecord(0, None, scored)
    while run.state.round < run.rules.rounds:
        yield one_round(run)


def one_round(run: Run) -> RoundRecord:
    """Plan, train, aggregate, evaluate, record."""
    started_s, index = monotonic_s(), run.state.round + 1
    trained = asynchronous_round(run, index) if run.rules.buffer else synchronous_round(run, index)
    run.on_stage("aggregate")
    closed = close_round(run, index, trained)
    last = index == run.rules.rounds
    scored = score(run, index, closed.evaluated, closed.clients) if last or index % run.rules.evaluate_every == 0 else None
    event, state = closed.recorded(run, index, trained, scored, monotonic_s() - started_s)
    run.state = state
    commit(run, [*closed.warnings, event, *([scored] if scored is not None else [])])
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
    plan = RoundPlan(index, attended.plans, attended.turns)
    result = run.executor.train(plan, (index - 1) * rules.local_steps, starting, {**state.clients, **prepared.clients}, run.on_step)
    count_moves(prepared, result.ledger)
    return Trained(prepared, attended, result, starting.truncated)


def score(run: Run, index: int, adapters: Tensor, clients: dict[int, ClientState]) -> dict[str, Any]:
    """Evaluate the joined model on every client's held-out rows and on the common ones; without those, the global score is the clients'.

    Where clients' own parts are never averaged there is no joined model: each client's rows are scored with its own, and the common
    rows with every client's in turn.
    """
    run.on_stage("evaluate")
    federation, rules = run.federation, run.rules
    own = [clients.get(one.client, ClientState()).adapter for one in federation.clients]
    personal = federation.settings.server == "unaveraged" and any(row is not None for row in own)
    sets = [client.held_out for client in federation.clients]
    names = [f"client {client.client} ({client.name})" for client in federation.clients]
    rows = torch.stack([adapters if row is None else row for row in own]) if personal else adapters[None]
    commons = len(rows) if personal else 1
    scores = evaluate(
        federation.split,
        federation.layout,
        rows,
        [*sets, *[run.common_held_out] * commons],
        rules.evaluate_batch,
        federation.device,
        rules.evaluate_rows,
        [*names, *["the common slice"] * commons],
        [*range(len(rows)), *range(len(rows))] if personal else (),
    )
    own_scores, common = scores[: len(sets)], [one for one in scores[len(sets) :] if one is not None]
    total = reduce(add, common or [one for one in own_scores if one is not None])
    return evaluation_event(index, total, own_scores)


def commit(run: Run, events: list[dict[str, Any]]) -> None:
    """Make the round permanent: journal first, then the checkpoint that points behind it."""
    run.journal.append(*events)
    run.state.journal_bytes = run.journal.bytes
    checkpoint.save(run.folder, run.state, run.rules.keep_checkpoints)
