"""The loop of a federation: plan, train, aggregate, evaluate, record. Read this file first.

Each round is committed as a whole: its events go to the journal, then its checkpoint is renamed into place. Stopped at any moment, a run
goes on from the last committed round and gives the numbers of the run that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from splitft.adapt.base import Policy
from splitft.adapt.cost import CostModel, schedule
from splitft.aggregate.base import Aggregator, Updates
from splitft.clock import RoundTiming, monotonic_s, simulate_round
from splitft.data.base import TokenRows
from splitft.engine import checkpoint
from splitft.engine.evaluate import evaluate
from splitft.engine.journal import Journal
from splitft.engine.record import evaluation_event, observations_of, round_event
from splitft.engine.settings import ClientState, Federation, OnStep, RoundResult
from splitft.rng import numpy_stream
from splitft.types import Observation, Plan, Profile, RoundPlan


class Executor(Protocol):
    """Whatever can train a round: a batched cohort or real workers."""

    def train(self, plan: RoundPlan, first_step: int, adapters: Tensor, states: dict[int, ClientState], on_step: OnStep) -> RoundResult: ...


@dataclass(frozen=True)
class Rules:
    """How a run goes, beside how a client trains: rounds, who takes part, when to evaluate."""

    rounds: int
    local_steps: int
    rank: int
    exit_on_client: bool
    tail_blocks: int
    participation: float
    minimum: int
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
    aggregator: Aggregator
    costs: tuple[CostModel, ...]
    profiles: tuple[Profile, ...]
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
        scored = score(run, 0, run.state.adapters)
        run.state.identity["evaluated"] = True
        commit(run, [scored])
        yield RoundRecord(0, None, scored)
    while run.state.round < run.rules.rounds:
        yield one_round(run)


def one_round(run: Run) -> RoundRecord:
    """Plan, train, aggregate, evaluate, record."""
    started_s, state, rules = monotonic_s(), run.state, run.rules
    index = state.round + 1

    participants = draw_participants(len(run.federation.clients), rules, index)
    cuts, policy_state = run.policy.plan(index, participants, [Observation(**one) for one in state.observations], state.policy)
    plan = RoundPlan(index, tuple(make_plan(client, cuts[client], rules) for client in participants))

    run.on_stage("train")
    result = run.executor.train(plan, (index - 1) * rules.local_steps, state.adapters, state.clients, run.on_step)

    run.on_stage("aggregate")
    updates = Updates(tuple(one.client for one in result.plans), tuple(result.targets), result.values, run.federation.layout)
    adapters, memory = run.aggregator.merge(state.adapters, updates, state.aggregator)
    timing = virtual_time(run, result.plans, state.virtual_s)

    last = index == rules.rounds
    scored = score(run, index, adapters) if last or index % rules.evaluate_every == 0 else None
    wall_s = monotonic_s() - started_s
    rate = run.federation.settings.schedule.rate(index * rules.local_steps - 1)
    trained = round_event(index, result, timing, wall_s, rate)
    run.state = replace(
        state,
        round=index,
        adapters=adapters,
        clients={**state.clients, **result.states},
        policy=dict(policy_state),
        aggregator=dict(memory),
        observations=observations_of(index, result, timing, scored),
        virtual_s=timing.end_s,
        wall_s=state.wall_s + wall_s,
    )
    commit(run, [trained] + ([scored] if scored is not None else []))
    return RoundRecord(index, trained, scored)


def draw_participants(clients: int, rules: Rules, index: int) -> list[int]:
    """Who takes part in round `index`, ascending: a share of the clients drawn without replacement from the round's own stream."""
    count = min(clients, max(rules.minimum, round(rules.participation * clients)))
    if count == clients:
        return list(range(clients))
    return sorted(int(client) for client in numpy_stream(rules.seed, "participation", index).choice(clients, count, replace=False))


def make_plan(client: int, cut: int, rules: Rules) -> Plan:
    return Plan(client, cut, rules.local_steps, rules.rank, rules.exit_on_client, rules.tail_blocks)


def virtual_time(run: Run, plans: Sequence[Plan], start_s: float) -> RoundTiming:
    """How long the round takes on the clients' devices and links, by the cost model and the event clock; the same on any machine."""
    accumulation = run.federation.settings.gradient_accumulation
    schedules = []
    for plan in plans:
        costs = run.costs[plan.client]
        exchanges = replace(plan, local_steps=plan.local_steps * accumulation)
        schedules.append(schedule(exchanges, costs.cost(plan), run.profiles[plan.client], costs.server))
    return simulate_round(schedules, start_s, timeline_steps=2)


def score(run: Run, index: int, adapters: Tensor) -> dict[str, Any]:
    """Evaluate the joined model on every client's held-out rows and on the common ones; without those, the global score is the clients'."""
    run.on_stage("evaluate")
    federation = run.federation
    *clients, common = evaluate(
        federation.split,
        federation.layout,
        adapters,
        [*(client.held_out for client in federation.clients), run.common_held_out],
        run.rules.evaluate_batch,
        federation.device,
        run.rules.evaluate_rows,
        [*(f"client {client.client} ({client.name})" for client in federation.clients), "the common slice"],
    )
    total = common or reduce(add, (one for one in clients if one is not None))
    return evaluation_event(index, total, clients)


def commit(run: Run, events: list[dict[str, Any]]) -> None:
    """Make the round permanent: journal first, then the checkpoint that points behind it."""
    run.journal.append(*events)
    run.state.journal_bytes = run.journal.bytes
    checkpoint.save(run.folder, run.state, run.rules.keep_checkpoints)
