"""The beginning of a round: who takes part, with which cut and ranks, and from which adapter each participant starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from splitft.adapt.oscillation import oscillates
from splitft.adapt.schedule import step_seconds
from splitft.compress.base import HEADER_BYTES
from splitft.engine.adapters import adapter_packet_bytes
from splitft.engine.attendance import Traffic, accept, draw_participants
from splitft.engine.dial import dial_of
from splitft.engine.exchange import Ownership
from splitft.engine.ledger import Ledger
from splitft.engine.merging import fold_bytes
from splitft.engine.settings import ClientState
from splitft.secure.cohorts import levelled
from splitft.types import Observation, Plan

if TYPE_CHECKING:
    from splitft.engine.rounds import Run

HISTORY = 8


@dataclass
class Prepared:
    """A round about to be trained. `refused`: the cut that was planned for a client that accepted a shallower one."""

    plans: list[Plan]
    policy: Mapping[str, Any]
    ranks: Mapping[str, Any]
    refused: dict[int, int]
    steps: dict[int, int]
    traffic: dict[int, Traffic]
    fetched_bytes: dict[int, int]
    moments: dict[int, tuple[int, int]]
    clients: dict[int, ClientState]


def prepare(run: Run, index: int, busy: frozenset[int] = frozenset(), here: Sequence[int] | None = None) -> Prepared:
    """Plan round `index` for everyone who is drawn (of those who are `here`) and not `busy` with an earlier one."""
    state, rules = run.state, run.rules
    drawn = draw_participants(len(run.federation.clients), rules.attendance, index, run.devices, here)
    participants = [client for client in drawn if client not in busy]
    cuts, policy_state = run.policy.plan(index, participants, [Observation(**one) for one in state.observations], state.policy)
    plans, refused, dial = [], {}, dial_of(run)
    for client in participants:
        wanted = Plan(client, cuts[client], rules.local_steps, rules.rank, rules.exit_on_client, rules.tail_blocks)
        plan = accept(wanted, run.costs[client], run.devices[client].profile)
        if plan.cut != wanted.cut:
            refused[client] = wanted.cut
            policy_state = with_cut(policy_state, client, plan.cut)
        plans.append(with_exchange(run, replace(plan, dial=dial), index))
    if run.secrecy is not None:
        plans = _levelled(plans, refused, run.secrecy.minimum)
    steps = run.work.steps({plan.client: step_s(run, plan) for plan in plans}, rules.local_steps)
    plans = [replace(plan, local_steps=steps[plan.client]) for plan in plans]
    rank_state: Mapping[str, Any] = state.ranks
    if not run.ranks.uniform:
        chosen, rank_state = run.ranks.plan(
            index, {plan.client: plan.cut for plan in plans}, state.notes.get("importance", []), run.federation.layout, state.ranks
        )
        plans = [with_ranks(run, plan, chosen[plan.client]) for plan in plans]
    prepared = Prepared(plans, policy_state, rank_state, refused, steps, {}, {}, {}, {})
    for plan in plans:
        _add_traffic(run, plan, prepared)
    return prepared


def _levelled(plans: Sequence[Plan], refused: dict[int, int], minimum: int) -> list[Plan]:
    """The plans with no cut deeper than others can hide: a block at one client alone would be seen, or not be averaged."""
    cuts = levelled({plan.client: plan.cut for plan in plans}, minimum)
    changed = {plan.client: plan.cut for plan in plans if cuts.get(plan.client, plan.cut) != plan.cut}
    refused.update({client: cut for client, cut in changed.items() if client not in refused})
    return [replace(plan, cut=cuts.get(plan.client, plan.cut)) for plan in plans]


def with_cut(policy: Mapping[str, Any], client: int, cut: int) -> dict[str, Any]:
    """A policy's state that knows the cut a client has accepted in place of the one it refused."""
    cuts = list(policy["cuts"])
    cuts[client] = cut
    return {**policy, "cuts": cuts}


def step_s(run: Run, plan: Plan) -> float:
    """Seconds of one optimizer step of a client at its cut, were it alone, on its device as it was in its last round."""
    costs, device = run.costs[plan.client], run.devices[plan.client]
    alone = step_seconds(costs.cost(plan), device.profile, costs.server).total_s * run.federation.settings.gradient_accumulation
    seen = run.state.notes.get("slowness", {}).get(str(plan.client), 1.0)
    return alone * float(seen)


def with_ranks(run: Run, plan: Plan, ranks: tuple[int, ...]) -> Plan:
    """The plan with these ranks; where all clients share the server's adapters, those keep their full rank."""
    if run.federation.settings.one_server_set:
        held = Ownership(plan, run.federation.split.blocks).held
        ranks = tuple(
            rank if entry.key.block in held else entry.rank for rank, entry in zip(ranks, run.federation.layout.entries, strict=True)
        )
    return replace(plan, ranks=ranks, rank=max(1, *ranks))


def with_exchange(run: Run, plan: Plan, index: int) -> Plan:
    """Which adapters travel: none of the client's own if they are never averaged, later if a synchronisation rule decides, by segments."""
    own = run.state.clients.get(plan.client, ClientState()).adapter is not None
    if run.federation.settings.server == "unaveraged":
        return replace(plan, download=False, upload=False)
    if not run.synchronisation.always:
        return replace(plan, download=not own, upload=False)
    if run.aggregator.resets:
        return replace(plan, download=False)  # fresh adapters follow from the seed
    if run.secrecy is not None:
        return replace(plan, upload=False)  # behind masks, when the round's training is over
    segments = run.aggregator.segments
    return replace(plan, segments=segments, segment=(plan.client + index) % segments) if segments > 1 else plan


def _add_traffic(run: Run, plan: Plan, prepared: Prepared) -> None:
    """What the client's round moves beside its steps: blocks and folded weights it lacks, adapters down and up."""
    federation, before = run.federation, run.state.clients.get(plan.client, ClientState())
    ownership = Ownership(plan, federation.split.blocks)
    fetched = 0.0
    if run.rules.fetch_blocks and 0 < before.deepest < plan.cut:
        fetched = sum(run.costs[plan.client].block_bytes(block) for block in range(before.deepest, plan.cut))
    folds: Sequence[Mapping[str, int]] = run.state.notes.get("folds", [])
    # Changes of the frozen weights reach a client for every block it has ever had; a block fetched now comes with them.
    had = max(before.deepest, 0 if run.rules.fetch_blocks and before.deepest else plan.cut)
    tail = [block for block in ownership.client_blocks() if block >= plan.cut]
    fetched_bytes = int(fetched) + fold_bytes(folds, before.folded, [*range(had), *tail])
    down = ownership.client_size(federation.layout, federation.trained)
    up = ownership.upload_size(federation.layout, federation.trained)
    later, word_bytes = not run.synchronisation.always or run.secrecy is not None, 4 if run.secrecy is None else 8
    down_moments, up_moments = _moved_moments(run, plan, before)
    prepared.moments[plan.client] = (down_moments, up_moments)
    prepared.traffic[plan.client] = Traffic(
        fetch_bytes=fetched_bytes + down_moments,
        download_bytes=adapter_packet_bytes(federation.settings, down, up=False) if plan.download else 0,
        upload_bytes=adapter_packet_bytes(federation.settings, up, up=True) if plan.upload else 0,
        report_bytes=run.synchronisation.report_bytes + up_moments,
        decided_later_bytes=HEADER_BYTES + word_bytes * up if later else 0,
    )
    prepared.fetched_bytes[plan.client] = fetched_bytes
    prepared.clients[plan.client] = replace(before, deepest=max(before.deepest, plan.cut), folded=len(folds), cut=plan.cut)


def _moved_moments(run: Run, plan: Plan, before: ClientState) -> tuple[int, int]:
    """Bytes of optimizer moments that change hosts with the blocks a moved cut hands over: to the client, to the server. Two float32
    values a parameter; none where every round begins with fresh ones."""
    if before.first is None or before.cut in (0, plan.cut):
        return 0, 0
    columns = run.federation.layout.columns(min(before.cut, plan.cut), max(before.cut, plan.cut))
    moved_bytes = HEADER_BYTES + 8 * (columns.stop - columns.start)
    return (moved_bytes, 0) if plan.cut > before.cut else (0, moved_bytes)


def count_moves(prepared: Prepared, ledger: Ledger) -> None:
    """Enter what reached clients beside adapters and tensors: weights they lacked, moments that moved with a block."""
    for client, fetched_bytes in prepared.fetched_bytes.items():
        ledger.add(client, "down", "weights", fetched_bytes)
    for client, (down_bytes, up_bytes) in prepared.moments.items():
        ledger.add(client, "down", "adapters", down_bytes)
        ledger.add(client, "up", "adapters", up_bytes)


@dataclass
class Starting:
    """What each participant begins with. `truncated`: the share of the global adapter's energy that its ranks cannot hold."""

    run: Run
    truncated: dict[int, float] = field(default_factory=dict)
    by_ranks: dict[tuple[int, ...], tuple[Tensor, float]] = field(default_factory=dict)

    def __call__(self, plan: Plan) -> Tensor:
        run, own = self.run, self.run.state.clients.get(plan.client, ClientState()).adapter
        if own is not None and run.federation.settings.server == "unaveraged":
            columns = Ownership(plan, run.federation.split.blocks).client_columns(run.federation.layout)
            row = run.state.adapters.clone()
            for part in columns if isinstance(columns, list) else [columns]:
                row[part] = own[part]
            return row
        if own is not None and not plan.download:
            return own
        if not plan.ranks:
            return run.state.adapters
        if plan.ranks not in self.by_ranks:
            ranks = torch.tensor(plan.ranks, dtype=torch.int64)
            self.by_ranks[plan.ranks] = run.aggregator.distribute(run.federation.layout, run.state.adapters, ranks)
        row, self.truncated[plan.client] = self.by_ranks[plan.ranks]
        return row


def remember_cuts(notes: dict[str, Any], plans: Sequence[Plan], warn: Callable[[int, list[int]], None]) -> dict[str, list[int]]:
    """The last cuts of every client with this round's; `warn` is told of a client whose cut has begun to go back and forth."""
    history: dict[str, list[int]] = {client: list(cuts) for client, cuts in notes.get("cuts", {}).items()}
    for plan in plans:
        cuts = history.setdefault(str(plan.client), [])
        before = oscillates(cuts)
        cuts.append(plan.cut)
        del cuts[:-HISTORY]
        if not before and oscillates(cuts):
            warn(plan.client, cuts)
    return history
