"""Asynchronous aggregation: the server merges as soon as `buffer` updates are in; everyone else goes on from an older adapter.

FedBuff (Nguyen et al. 2022, arXiv 2106.06639) with the polynomial staleness weight of FedAsync (Xie et al. 2019, arXiv 1903.03934): an
update that began s versions ago counts (1 + s)^-a of its change. A round of the journal is one merge. A client trains in the round it
starts in (its result does not depend on when it arrives) and its update waits, with the checkpoint, until its virtual time comes.

With a buffer as large as the federation and equal arrival this is a synchronous round. The virtual clock lets the clients that start
together queue for the server together; their queueing with clients that are already on their way is not modelled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from splitft.engine.attendance import attend
from splitft.engine.checkpoint import Pending
from splitft.engine.ledger import Ledger
from splitft.engine.planning import Starting, count_moves, prepare
from splitft.engine.record import Trained, client_records
from splitft.engine.settings import ClientState, RoundResult
from splitft.types import Plan, RoundPlan

if TYPE_CHECKING:
    from typing import Any

    from splitft.engine.rounds import Run


def asynchronous_round(run: Run, index: int) -> Trained:
    """Start everyone who is idle, then take the `buffer` updates that arrive first."""
    state = run.state
    waiting = dict(state.pending)
    prepared = prepare(run, index, frozenset(waiting))
    attended = attend(
        prepared.plans,
        index,
        run.devices,
        run.costs,
        prepared.traffic,
        run.rules.attendance,
        run.federation.settings.gradient_accumulation,
        state.virtual_s,
    )
    began = Trained(prepared, attended, _nothing(), {})
    lost: list[dict[str, Any]] = []
    if attended.plans:
        began, lost = _start(run, index, began, waiting)
    first = sorted(waiting, key=lambda client: (waiting[client].finish_s, client))[: run.rules.buffer]
    taken = {client: waiting.pop(client) for client in sorted(first)}
    end_s = max([state.virtual_s, *(one.finish_s for one in taken.values())] if taken else [attended.timing.end_s])
    for one in taken.values():
        one.record["barrier_wait_s"] = max(0.0, end_s - one.finish_s)
    result = _arrived(run, index, taken, began.result.states)
    result.notices = began.result.notices
    records = sorted([*(one.record for one in taken.values()), *lost], key=lambda one: int(one["client"]))
    return Trained(prepared, replace(attended, lost=frozenset()), result, {}, records, waiting, (state.virtual_s, end_s))


def _start(run: Run, index: int, began: Trained, waiting: dict[int, Pending]) -> tuple[Trained, list[dict[str, Any]]]:
    """Train those who begin now; their updates join `waiting`. Also the records of those who get lost."""
    prepared, attended, starting = began.prepared, began.attended, Starting(run)
    run.on_stage("train")
    plan, first_step = RoundPlan(index, attended.plans, lost=attended.lost), (index - 1) * run.rules.local_steps
    result = run.executor.train(plan, first_step, starting, {**run.state.clients, **prepared.clients}, run.on_step)
    count_moves(prepared, result.ledger)
    began = replace(began, result=result, truncated=starting.truncated)
    records = [{**record, "start_s": attended.timing.start_s} for record in client_records(began)]
    for row, one in enumerate(result.plans):
        if one.client not in attended.lost:
            change = result.values[row] - starting(one)
            waiting[one.client] = Pending(
                change, index - 1, records[row]["finish_s"], result.targets[row], one.cut, records[row], result.step_losses[row]
            )
    result.states = {client: one for client, one in result.states.items() if client not in attended.lost}
    return began, [record for record in records if record["client"] in attended.lost]


def _arrived(run: Run, index: int, taken: dict[int, Pending], states: dict[int, ClientState]) -> RoundResult:
    """The updates to merge: the global adapter plus each change, weakened by the versions it has missed."""
    adapters, rules = run.state.adapters, run.rules
    plans = tuple(
        Plan(client, one.cut, int(one.record["steps"]), rules.rank, rules.exit_on_client, rules.tail_blocks)
        for client, one in taken.items()
    )
    rows = [adapters + one.change * (1.0 + index - 1 - one.version) ** -rules.staleness for one in taken.values()]
    for one in taken.values():
        one.record["staleness"] = index - 1 - one.version
    return RoundResult(
        plans=plans,
        values=torch.stack(rows) if rows else adapters.new_zeros((0, len(adapters))),
        tokens=[int(one.record["tokens"]) for one in taken.values()],
        targets=[one.targets for one in taken.values()],
        step_losses=[list(one.losses) for one in taken.values()],
        ledger=Ledger(),
        states=states,
    )


def _nothing() -> RoundResult:
    return RoundResult((), torch.zeros(0, 0), [], [], Ledger(), {})
