"""Train many clients in one batched pass: the simulation's executor.

All clients of a cohort go through the model together; every block multiplies the frozen weights once for all of them, the bank adds each
client's adapters, and behind each client's cut its rows cross a wire of real bytes. Nothing loops over clients between the cuts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from splitft.engine.attendance import turn_order
from splitft.engine.cohort_round import Cohort
from splitft.engine.exchange import Ownership
from splitft.engine.ledger import Ledger
from splitft.engine.settings import SHARED_SERVER, ClientState, Federation, OnStep, RoundResult, Starts
from splitft.types import Plan, RoundPlan

CPU_COHORT_TOKENS = 8192
DEVICE_COHORT_TOKENS = 65_536


class CohortExecutor:
    """Trains a round's participants `cohort_size` at a time (0: about 8,000 tokens a pass on a CPU, 65,000 on a GPU)."""

    def __init__(self, federation: Federation, cohort_size: int = 0) -> None:
        self.federation = federation
        longest = max(int(client.train.lengths.max()) for client in federation.clients)
        budget = CPU_COHORT_TOKENS if federation.device.type == "cpu" else DEVICE_COHORT_TOKENS
        self.size = cohort_size or max(1, budget // (longest * federation.settings.batch_size))

    def train(self, plan: RoundPlan, first_step: int, starts: Starts, states: dict[int, ClientState], on_step: OnStep) -> RoundResult:
        """Every participant's local steps from its start; `on_step` is told the client-steps done after each pass."""
        server = self.federation.settings.server
        if server == "sequential":
            return self._one_after_another(plan, first_step, starts, states, on_step)
        if server in ("shared", "alternating"):
            return self._cohort(plan.plans, plan, first_step, starts, states).train(on_step)
        # Clients with the same number of steps together: towards the end of a cohort few would be left in its passes.
        ordered = sorted(plan.plans, key=lambda one: -one.local_steps)
        groups = [sorted(ordered[start : start + self.size], key=lambda one: one.client) for start in range(0, len(ordered), self.size)]
        return _join([self._cohort(group, plan, first_step, starts, states).train(on_step) for group in groups])

    def _cohort(self, plans: Sequence[Plan], plan: RoundPlan, first_step: int, starts: Starts, states: dict[int, ClientState]) -> Cohort:
        return Cohort(self.federation, list(plans), plan, first_step, starts, states, self.size)

    def _one_after_another(
        self, plan: RoundPlan, first_step: int, starts: Starts, states: dict[int, ClientState], on_step: OnStep
    ) -> RoundResult:
        """SplitFed V2: the server's one set of adapters goes from client to client, in an order drawn for the round."""
        by_client = {one.client: one for one in plan.plans}
        parts: list[RoundResult] = []
        before: Cohort | None = None
        for client in turn_order(self.federation.settings.seed, plan.round, list(by_client)):
            cohort = self._cohort([by_client[client]], plan, first_step, starts, states)
            if before is not None:
                cohort.take_over(before)
            parts.append(cohort.train(on_step))
            before = cohort
        joined = _join(parts)
        assert before is not None
        joined.states[SHARED_SERVER] = before.shared_state()
        last = before.bank.values[-1].detach().cpu()
        for row, one in enumerate(joined.plans):  # the server's set is one: what the last client left counts for all
            columns = Ownership(one, self.federation.split.blocks).server_columns(self.federation.layout)
            joined.values[row, columns] = last[columns]
        return joined


def _join(parts: list[RoundResult]) -> RoundResult:
    """The results of all cohorts, in client order."""
    pairs = sorted(((one.client, p, k) for p, part in enumerate(parts) for k, one in enumerate(part.plans)), key=lambda item: item[0])
    ledger = Ledger()
    states: dict[int, ClientState] = {}
    for part in parts:
        ledger.clients.update(part.ledger.clients)
        states.update(part.states)
    return RoundResult(
        plans=tuple(parts[p].plans[k] for _, p, k in pairs),
        values=torch.stack([parts[p].values[k] for _, p, k in pairs]),
        tokens=[parts[p].tokens[k] for _, p, k in pairs],
        targets=[parts[p].targets[k] for _, p, k in pairs],
        step_losses=[parts[p].step_losses[k] for _, p, k in pairs],
        ledger=ledger,
        states=states,
    )
