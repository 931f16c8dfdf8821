"""From a trained round to the next state: whether to aggregate, the merge, what clients keep, what the journal is told."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from splitft.aggregate.base import LEFT, State, Updates
from splitft.engine import releases
from splitft.engine.checkpoint import Pending, RunState
from splitft.engine.dial import observe
from splitft.engine.exchange import Ownership, put, take
from splitft.engine.merging import Outcome, collect, importance, mean_of, merge, rows_of, updates_of, weight_norms
from splitft.engine.planning import remember_cuts
from splitft.engine.record import Trained, observations_of, round_event
from splitft.engine.secure_round import Unsealed, sealed_updates
from splitft.engine.settings import SHARED_SERVER, ClientState, Federation
from splitft.types import Plan

if TYPE_CHECKING:
    from splitft.engine.rounds import Run


@dataclass
class Closed:
    """A round after its aggregation. `evaluated` [p] is the adapter to measure: the global one, or what it would be if clients that go
    on by themselves were averaged now."""

    outcome: Outcome
    aggregated: bool
    evaluated: Tensor
    clients: dict[int, ClientState]
    synchronisation: dict[str, Any]
    notes: dict[str, Any]
    warnings: list[dict[str, Any]]
    pending: dict[int, Pending]

    def recorded(
        self, run: Run, index: int, trained: Trained, scored: dict[str, Any] | None, wall_s: float
    ) -> tuple[dict[str, Any], RunState]:
        """The event `round`, and the state after it."""
        state, prepared = run.state, trained.prepared
        rate = run.federation.settings.schedule.rate(index * run.rules.local_steps - 1)
        dialled, controller = observe(run, index, trained, self.evaluated, scored, self.clients)
        self.notes = {**self.notes, **controller}
        event = round_event(index, trained, wall_s, rate, self.aggregated, self.outcome.metrics) | dialled
        self.notes["slowness"] = {**self.notes.get("slowness", {}), **slowness_of(event)}
        after = replace(
            state,
            round=index,
            adapters=self.outcome.adapters,
            clients=self.clients,
            policy=dict(prepared.policy),
            ranks=dict(prepared.ranks),
            synchronisation=self.synchronisation,
            aggregator=dict(self.outcome.state),
            observations=observations_of(event, scored, self.notes.get("base_loss", {})),
            virtual_s=event["virtual_end_s"],
            wall_s=state.wall_s + wall_s,
            notes=self.notes,
            pending=self.pending,
            folded=folded_weights(run) if run.aggregator.folds else {},
        )
        return event, after


def slowness_of(event: dict[str, Any]) -> dict[str, float]:
    """How much longer than its described device each client took in the round, for whoever divides the work of the next."""
    busy = {str(one["client"]): (sum(one["busy_s"].values()), one["predicted_s"]) for one in event["clients"] if one["status"] != "lost"}
    return {client: busy_s / predicted_s for client, (busy_s, predicted_s) in busy.items() if predicted_s > 0}


def close_round(run: Run, index: int, trained: Trained) -> Closed:
    """Aggregate what came through, and let clients keep what is theirs."""
    state, federation = run.state, run.federation
    contributes = [plan.client not in trained.attended.lost for plan in trained.result.plans]
    warnings: list[dict[str, Any]] = [{"event": "warning", "round": index, "text": text} for text in trained.result.notices]

    def warn(client: int, cuts: list[int]) -> None:
        text = f"the cut of client {client} goes back and forth: {cuts}; give the policy a wider dead band or a longer cool-down."
        warnings.append({"event": "warning", "round": index, "client": client, "text": text})

    notes = {**state.notes, **trained.notes, "cuts": remember_cuts(state.notes, trained.result.plans, warn)}
    # A client that was lost goes back to what it had before the round.
    clients = {**state.clients, **{client: one for client, one in trained.result.states.items() if client not in trained.attended.lost}}
    if not any(contributes) and SHARED_SERVER in clients:
        clients = {**clients, SHARED_SERVER: state.clients.get(SHARED_SERVER, ClientState())}
    nothing = Closed(_unchanged(run), False, state.adapters, clients, dict(state.synchronisation), notes, warnings, trained.pending)
    if not run.synchronisation.always:
        return _perhaps(run, index, trained, contributes, nothing)
    hidden = _sealed(run, index, trained, contributes, warnings) if run.secrecy is not None else None
    updates = updates_of(federation, trained.result, contributes) if hidden is None else hidden.updates
    if updates is None or _too_few(run, index, updates, warnings):
        return nothing
    outcome = _guarded(run, index, updates) if run.aggregator.guarded else _merged(run, updates)
    if hidden is not None:
        outcome = replace(outcome, metrics={**outcome.metrics, **hidden.metrics})
    if federation.settings.server == "unaveraged":
        clients = _own_models(run, trained, contributes, outcome, clients)
    _note(run, outcome, notes)
    return Closed(outcome, True, outcome.adapters, clients, {}, notes, warnings, trained.pending)


def _merged(run: Run, updates: Updates, aggregator: State | None = None) -> Outcome:
    state = run.state
    return merge(run.aggregator, state.adapters, updates, aggregator or state.aggregator, run.federation.split)


def _guarded(run: Run, index: int, updates: Updates) -> Outcome:
    """The merge of a rule with a budget. Releases of this round that were never committed are counted with it; its noise, and so what is
    released, does not depend on that."""
    outcome = _merged(run, updates)
    left = releases.others(run.folder, index, releases.digest_of(outcome.adapters))
    if not left:
        return outcome
    told = {name: torch.tensor([left]) if name.endswith(LEFT) else tensor for name, tensor in run.state.aggregator.items()}
    return _merged(run, updates, told)


def _sealed(run: Run, index: int, trained: Trained, contributes: list[bool], warnings: list[dict[str, Any]]) -> Unsealed:
    """The updates after secure aggregation: played here, unless it has been with clients elsewhere."""
    assert run.secrecy is not None
    found = trained.unsealed
    if found is None:
        found = sealed_updates(run.federation, trained.result, contributes, run.state.adapters, run.secrecy, run.folder.name, index)
    warnings += [{"event": "warning", "round": index, "text": text} for text in found.notices]
    trained.attended = trained.attended.with_uploads()
    return found


def _too_few(run: Run, index: int, updates: Updates, warnings: list[dict[str, Any]]) -> bool:
    """Whether the rule cannot work with so few updates: then the round changes nothing, and the journal says why."""
    trained, least = sum(count > 0 for count in updates.tokens), run.aggregator.least_participants
    if trained >= least:
        return False
    text = f"{trained} updates came through and the aggregation rule needs {least}: nothing was merged. Raise clients.minimum."
    warnings.append({"event": "warning", "round": index, "text": text})
    return True


def _own_models(
    run: Run, trained: Trained, contributes: list[bool], outcome: Outcome, clients: dict[int, ClientState]
) -> dict[int, ClientState]:
    """Every client's own model where its part is never averaged: its own blocks' adapters, and the server's as they are now."""
    rows = {plan.client: trained.result.values[row] for row, plan in enumerate(trained.result.plans) if contributes[row]}
    plans = {plan.client: plan for plan in trained.result.plans}
    found = dict(clients)
    for client, one in clients.items():
        own = rows.get(client, one.adapter)
        if own is None:
            continue
        cut = plans[client].cut if client in plans else one.cut
        plan = Plan(client, cut, 1, 1, run.rules.exit_on_client, run.rules.tail_blocks)
        columns = Ownership(plan, run.federation.split.blocks).client_columns(run.federation.layout)
        mine = take(own, columns)  # a copy, so the row below may be written where it came from
        row = _kept(run, client, outcome.adapters)
        put(row, columns, mine)
        found[client] = replace(one, adapter=row, cut=cut)
    return found


def _kept(run: Run, client: int, row: Tensor) -> Tensor:
    """A copy of an adapter [p] that a client keeps for longer than a round."""
    shelf = run.federation.shelf
    return row.clone() if shelf is None else shelf.keep("adapter", client, row)


def _unchanged(run: Run) -> Outcome:
    return Outcome(run.state.adapters, run.state.aggregator, {}, {}, {})


def _note(run: Run, outcome: Outcome, notes: dict[str, Any]) -> None:
    """What later rounds need to know of this one: sizes of what was folded, the importance of every projection."""
    if run.aggregator.folds:
        notes["folds"] = [*notes.get("folds", []), {str(block): size for block, size in sorted(outcome.folded.items())}]
    if not run.ranks.uniform:
        norms = notes.setdefault("weight_norms", weight_norms(run.federation.split, run.federation.layout))
        notes["importance"] = importance(run.federation.layout, run.state.adapters, outcome.adapters, norms, outcome.factors)


def _perhaps(run: Run, index: int, trained: Trained, contributes: list[bool], closed: Closed) -> Closed:
    """Ask the synchronisation rule. Until it says so, every client goes on from its own adapters, its session from its own as well."""
    state, federation, result = run.state, run.federation, trained.result
    tokens = {int(client): int(count) for client, count in state.notes.get("tokens", {}).items()}
    for row, plan in enumerate(result.plans):
        if contributes[row]:
            tokens[plan.client] = tokens.get(plan.client, 0) + result.targets[row]
            result.ledger.add(plan.client, "up", "control", run.synchronisation.report_bytes)
    updates = updates_of(federation, result, contributes, tokens)
    if updates is None or _too_few(run, index, updates, closed.warnings):
        return closed
    decision = run.synchronisation.decide(updates.values - state.adapters, updates.weights(), state.synchronisation)
    closed.synchronisation = dict(decision.state)
    if decision.aggregate or index == run.rules.rounds:
        for row, plan in enumerate(result.plans):
            if contributes[row]:
                collect(federation, replace(plan, upload=True), result.values[row], result)
        received = replace(updates, values=rows_of(result.values, [row for row, counts in enumerate(contributes) if counts]), sent=None)
        outcome = merge(run.aggregator, state.adapters, received, state.aggregator, federation.split)
        closed.outcome = replace(outcome, metrics={**outcome.metrics, **decision.metrics})
        closed.aggregated, closed.evaluated = True, outcome.adapters
        trained.attended = trained.attended.with_uploads()
        closed.clients = {client: replace(one, adapter=None) for client, one in closed.clients.items()}
        closed.notes["tokens"] = {}
        _note(run, outcome, closed.notes)
        return closed
    closed.outcome = replace(closed.outcome, metrics=dict(decision.metrics))
    closed.notes["tokens"] = {str(client): count for client, count in sorted(tokens.items())}
    closed.evaluated = mean_of(updates)
    for row, plan in enumerate(result.plans):
        if contributes[row]:
            closed.clients[plan.client] = replace(closed.clients[plan.client], adapter=_kept(run, plan.client, result.values[row]))
    return closed


def folded_weights(run: Run) -> dict[str, Tensor]:
    """The frozen weights that a folding rule has changed, as they are now."""
    return {str(entry.key): run.federation.split.weight(entry.key).detach() for entry in run.federation.layout.entries}


def restore_weights(federation: Federation, weights: dict[str, Tensor]) -> None:
    """Put back the frozen weights of a checkpoint."""
    for entry in federation.layout.entries:
        if (stored := weights.get(str(entry.key))) is not None:
            with torch.no_grad():
                federation.split.weight(entry.key).copy_(stored)
