"""Train a round on the actors of a Ray cluster: the same cohorts as in one process, spread over processes and machines.

The base model goes into Ray's object store once, and the actors of a machine map it from there. A cohort's adapters stay in the store of
the machine that trained them: for a rule that needs only their mean they are summed there, and the sum alone comes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import torch

from splitft.engine.cohort import CohortExecutor, join
from splitft.engine.ray_pool import Actor, Job, Pool, Reference
from splitft.engine.ray_rows import KeptRows, SharedStarts
from splitft.engine.ray_weights import store, weights_of
from splitft.engine.ray_worker import Blueprint, CohortWorker, Folded, Task, packed
from splitft.engine.settings import ClientState, Federation, OnStep, RoundResult, Starts
from splitft.types import Plan, RoundPlan


@dataclass(frozen=True)
class Crew:
    """How many actors, how many threads each computes with, what it asks of its machine, and what stands in its environment."""

    actors: int
    threads: int
    cpus: float
    gpus: int = 0
    environment: tuple[tuple[str, str], ...] = ()


class RayExecutor:
    """Trains the cohorts of the in-process engine on a crew of actors. `in_place`: the aggregation rule is linear and nothing else needs
    clients' rows, so they are not fetched; `in_order` says how they are summed. Ray must be connected; `close` ends the actors."""

    def __init__(self, federation: Federation, blueprint: Blueprint, crew: Crew, in_place: bool, in_order: bool) -> None:
        self.federation = federation
        self.crew = crew
        self.in_place, self.in_order = in_place, in_order
        self.grouping = CohortExecutor(federation, blueprint.cohort_size)
        weights = weights_of(federation.split)
        self.base_bytes = weights.size_bytes
        shared, plan = ray.put(weights), ray.put(blueprint)
        options: dict[str, Any] = {"num_cpus": crew.cpus, "num_gpus": crew.gpus, "max_restarts": 0, "max_task_retries": 0}
        if crew.environment:
            options["runtime_env"] = {"env_vars": dict(crew.environment)}
        kind = ray.remote(CohortWorker)
        self.pool = Pool(
            create=lambda: kind.options(**options).remote(),
            build=lambda actor: actor.build.remote(plan, shared, crew.threads),
            size=crew.actors,
        )
        self.folds = blueprint.writable
        self.writes = self._writes()
        self.folded, self.folded_version = ray.put(Folded(0, {})), 0
        self.pool.open()

    def train(self, plan: RoundPlan, first_step: int, starts: Starts, states: dict[int, ClientState], on_step: OnStep) -> RoundResult:
        """Every participant's local steps from its start; `on_step` is told the client-steps of a cohort when it is done, and of none
        several times a second, so that it may stop the round."""
        groups, folded, given = self.grouping.groups(plan.plans), self._folded(), SharedStarts(starts)
        jobs = [self._job(group, plan.round, first_step, given, states, folded) for group in groups]

        def on_wait() -> None:
            on_step(0)

        finished = self.pool.run(jobs, on_wait, lambda one: on_step(sum(len(losses) for losses in one.facts.step_losses)))
        where = {one.client: (number, row) for number, group in enumerate(groups) for row, one in enumerate(group)}
        kept = KeptRows(self.pool, jobs, finished, tuple(where[client] for client in sorted(where)), self.in_order, on_wait)
        nothing = torch.zeros(0, self.federation.layout.parameters)
        result = join([one.facts.result(nothing) for one in finished], kept, plan, self.federation.shelf)
        if not self.in_place:
            result.values, result.kept = kept.fetch(), None
        result.notices = self.pool.take_notices()
        return result

    @property
    def size(self) -> int:
        """Clients of a cohort at most."""
        return self.grouping.size

    @size.setter
    def size(self, clients: int) -> None:
        self.grouping.size = clients

    def close(self) -> None:
        self.pool.close()

    def _job(
        self, group: Sequence[Plan], number: int, first_step: int, given: SharedStarts, states: dict[int, ClientState], folded: Reference
    ) -> Job:
        rows, chosen = given.of(group)
        known = {one.client: packed(states[one.client]) for one in group if one.client in states}
        task = ray.put(Task(number, first_step, tuple(group), chosen, known, self.size))
        names = ", ".join(str(one.client) for one in group[:8]) + (", ..." if len(group) > 8 else "")
        return Job(f"the cohort of client{'s' if len(group) > 1 else ''} {names}", partial(_train, task, rows, folded))

    def _folded(self) -> Reference:
        """The adapted weights as the last aggregation left them; into the store again only when they have changed."""
        if self.folds and (writes := self._writes()) != self.writes:
            self.writes, self.folded_version = writes, self.folded_version + 1
            layout, split = self.federation.layout, self.federation.split
            weights = {str(entry.key): store(split.weight(entry.key)) for entry in layout.entries}
            self.folded = ray.put(Folded(self.folded_version, weights))
        return self.folded

    def _writes(self) -> int:
        """How often the adapted weights have been written to: torch counts it for each."""
        return sum(int(self.federation.split.weight(entry.key)._version) for entry in self.federation.layout.entries)


def _train(task: Reference, rows: Reference, folded: Reference, actor: Actor) -> Sequence[Reference]:
    references: Sequence[Reference] = actor.train.options(num_returns=2).remote(task, rows, folded)
    return references
