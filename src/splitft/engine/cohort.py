"""Train many clients in one batched pass: the simulation's executor.

All clients of a cohort go through the model together; every block multiplies the frozen weights once for all of them, the bank adds each
client's adapters, and behind each client's cut its rows cross a wire of real bytes. Nothing loops over clients between the cuts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from splitft.aggregate.base import Rows
from splitft.engine.attendance import turn_order
from splitft.engine.cohort_round import Cohort
from splitft.engine.exchange import Ownership
from splitft.engine.ledger import Ledger
from splitft.engine.settings import ClientState, Federation, OnStep, RoundResult, Starts
from splitft.engine.shelf import Shelf, settled
from splitft.types import Plan, RoundPlan

# On a CPU passes of 2,000 to 4,000 tokens are the fastest (embedded model): shorter ones pay for more calls, longer ones leave the caches.
CPU_COHORT_TOKENS = 4096
DEVICE_COHORT_TOKENS = 65_536


class CohortExecutor:
    """Trains a round's participants `cohort_size` at a time (0: as many as have CPU_COHORT_TOKENS or DEVICE_COHORT_TOKENS together, and
    `largest` at most; 0: any number)."""

    def __init__(self, federation: Federation, cohort_size: int = 0, largest: int = 0) -> None:
        self.federation = federation
        longest = max(int(client.train.lengths.max()) for client in federation.clients)
        budget = CPU_COHORT_TOKENS if federation.device.type == "cpu" else DEVICE_COHORT_TOKENS
        by_tokens = max(1, budget // (longest * federation.settings.batch_size))
        self.size = cohort_size or min(by_tokens, largest or by_tokens)

    def train(self, plan: RoundPlan, first_step: int, starts: Starts, states: dict[int, ClientState], on_step: OnStep) -> RoundResult:
        """Every participant's local steps from its start; `on_step` is told the client-steps done after each pass."""
        server = self.federation.settings.server
        if server == "sequential":
            return self._one_after_another(plan, first_step, starts, states, on_step)
        if server in ("shared", "alternating"):
            parts = iter([self._cohort(plan.plans, plan, first_step, starts, states).train(on_step)])
        else:
            parts = (self.train_cohort(group, plan, first_step, starts, states, on_step) for group in self.groups(plan.plans))
        return join(parts, plan=plan, shelf=self.federation.shelf)

    def groups(self, plans: Sequence[Plan]) -> list[list[Plan]]:
        """A round's cohorts, each in client order. Clients with the same number of steps go together: towards the end of a cohort few
        would be left in its passes."""
        ordered = sorted(plans, key=lambda one: -one.local_steps)
        count = math.ceil(len(ordered) / self.size)
        edges = [len(ordered) * k // count for k in range(count + 1)] if count else []  # of even size: a small rest costs like a full one
        return [sorted(ordered[start:end], key=lambda one: one.client) for start, end in pairwise(edges)]

    def train_cohort(
        self,
        plans: Sequence[Plan],
        plan: RoundPlan,
        first_step: int,
        starts: Starts,
        states: dict[int, ClientState],
        on_step: OnStep,
    ) -> RoundResult:
        """One of a round's `groups`, by itself: its numbers do not depend on the others."""
        return self._cohort(plans, plan, first_step, starts, states).train(on_step)

    def _cohort(self, plans: Sequence[Plan], plan: RoundPlan, first_step: int, starts: Starts, states: dict[int, ClientState]) -> Cohort:
        return Cohort(self.federation, list(plans), plan, first_step, starts, states, self.size)

    def _one_after_another(
        self, plan: RoundPlan, first_step: int, starts: Starts, states: dict[int, ClientState], on_step: OnStep
    ) -> RoundResult:
        """SplitFed V2: the server's one set of adapters goes from client to client, in an order drawn for the round."""
        by_client = {one.client: one for one in plan.plans}
        before: Cohort | None = None

        def parts() -> Iterator[RoundResult]:
            nonlocal before
            for client in turn_order(self.federation.settings.seed, plan.round, list(by_client)):
                cohort = self._cohort([by_client[client]], plan, first_step, starts, states)
                if before is not None:
                    cohort.take_over(before)
                before = cohort
                yield cohort.train(on_step)

        joined = join(parts(), plan=plan, shelf=self.federation.shelf)  # of the server's states the last one counts
        assert before is not None
        last = before.bank.values[-1].detach().cpu()
        for row, one in enumerate(joined.plans):  # the server's set is one: what the last client left counts for all
            columns = Ownership(one, self.federation.split.blocks).server_columns(self.federation.layout)
            joined.values[row, columns] = last[columns]
        return joined


def join(parts: Iterable[RoundResult], kept: Rows | None = None, plan: RoundPlan | None = None, shelf: Shelf | None = None) -> RoundResult:
    """The results of all cohorts, in client order; `kept` are their adapters where those lie elsewhere.

    With the round's `plan` the parts may come one by one, and each is let go before the next is made: its adapters go into their rows of
    the one matrix, and what its clients keep goes onto the `shelf`.
    """
    parts = parts if plan else list(parts)
    everyone = plan.plans if plan else [one for part in parts for one in part.plans]
    row_of = {client: row for row, client in enumerate(sorted(one.client for one in everyone))}
    plans, count = list(everyone), len(row_of)
    joined = RoundResult((), torch.empty(0, 0), [0] * count, [[] for _ in row_of], Ledger(), {}, [0] * count, kept)
    room: Tensor | None = None
    for part in parts:
        if kept is not None or len(part.plans) == count:
            joined.values = part.values
        else:
            if room is None:
                parameters = part.values.shape[1]
                room = torch.empty(count, parameters) if shelf is None else shelf.matrix(count)
                joined.values = room
            room[[row_of[one.client] for one in part.plans]] = part.values
        for k, one in enumerate(part.plans):
            row = row_of[one.client]
            plans[row], joined.tokens[row], joined.targets[row] = one, part.tokens[k], part.targets[k]
            joined.step_losses[row] = part.step_losses[k]
        joined.ledger.clients.update(part.ledger.clients)
        joined.facts.update(part.facts)
        joined.states.update(settled(part.states, shelf, plan.lost if plan else (), row_of))
        if shelf is not None:
            shelf.rest()
    joined.plans = tuple(plans)
    return joined
