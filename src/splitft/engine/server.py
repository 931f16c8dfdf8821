"""The server of the federation: the blocks behind the clients' cuts, one session of adapters per client over one frozen base.

`handle` takes the messages that are waiting and answers them. Sessions that wait together go through one pass, each entering at its own
cut, so that no block computes rows that have not entered; in deterministic mode every session has a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from splitft.engine import intake
from splitft.engine.adapters import AdapterStreams, Facts, carry_changes, facts_of
from splitft.engine.batches import length_mask
from splitft.engine.exchange import Ownership, packet_bytes, put, round_start_frame, take
from splitft.engine.intake import Arrival, Ending, Returned, Session
from splitft.engine.labels import known_labels, with_labels
from splitft.engine.narrow import encode
from splitft.engine.passes import entering, tokens_of, widen, widen_labels
from splitft.engine.settings import ClientState, Federation, Starts, load_moments
from splitft.engine.streams import StreamStates, open_step_streams, states_after
from splitft.errors import CodecError, ProtocolError
from splitft.lora import AdapterBank, wide
from splitft.loss import Targets, training_loss
from splitft.messages import Buffer, Frame, RoundAccepted, Type, decode, round_frame, step_frame
from splitft.optimizer import clip_factor
from splitft.split import Route
from splitft.types import Plan, RoundPlan

# Asked of every update [p], whole, and the adapters it began from, before it is accepted; raises ProtocolError to refuse it.
Guard = Callable[[int, Tensor, Tensor], None]


@dataclass
class OpenPass:
    """A U-shaped pass between its forward and its backward: who is in it, where each entered, what each was sent."""

    arrivals: list[Arrival]
    leaves: list[Tensor]
    final: Tensor
    gradients: dict[int, Tensor]


@dataclass
class Served:
    """Answers to the messages of a turn, and what was wrong with those that are refused, by client."""

    replies: list[tuple[int, bytes]] = field(default_factory=list)
    refused: dict[int, ProtocolError | CodecError] = field(default_factory=dict)


class Server:
    """Serves one round. `deterministic` runs every session alone, so results do not depend on who else is waiting."""

    def __init__(
        self,
        federation: Federation,
        plan: RoundPlan,
        first_step: int,
        starts: Starts,
        states: dict[int, ClientState],
        deterministic: bool,
        guard: Guard = lambda client, update, start: None,
    ) -> None:
        self.federation = federation
        self.plan = plan
        self.first_step = first_step
        self.deterministic = deterministic or not federation.split.anatomy.ragged
        settings, count = federation.settings, len(plan.plans)
        self.bank = AdapterBank(federation.layout, count, federation.device, trained=federation.trained)
        self.guard = guard
        self.before = {one.client: states.get(one.client, ClientState()) for one in plan.plans}
        self.starts = {one.client: starts(one) for one in plan.plans}
        self.moments = load_moments(list(self.before.values()), federation.layout, settings, federation.device, plan.plans)
        self.sessions = {one.client: self._begin(row, one) for row, one in enumerate(plan.plans)}
        self.open: list[OpenPass] = []

    def _begin(self, row: int, one: Plan) -> Session:
        """A session at the beginning of the round, on this row of the bank."""
        state, federation = self.before[one.client], self.federation
        with torch.no_grad():
            self.bank.values[row] = self.starts[one.client].to(federation.device)
        return Session(
            Ownership(one, federation.split.blocks),
            row,
            *open_step_streams(federation.settings, one, self.plan.round, state.streams),
            labels=known_labels(state.streams, receiver=True),
            adapters=AdapterStreams.open(federation.settings, one, self.plan.round, state.streams, federation.start),
        )

    def reopen(self, client: int, state: ClientState | None = None) -> Served:
        """Take a client back to the beginning of the round, as if it had sent nothing: it was restarted. `state` replaces what it began
        with. Answers whom it has kept waiting in a pass."""
        served = self.abandon(client)
        row, plan = self.sessions[client].row, self.sessions[client].ownership.plan
        self.before[client] = self.before[client] if state is None else state
        fresh = load_moments([self.before[client]], self.federation.layout, self.federation.settings, self.federation.device, [plan])
        self.moments.first[row], self.moments.second[row] = fresh.first[0], fresh.second[0]
        self.moments.steps[row] = fresh.steps[0]
        self.bank.gradients[row].zero_()
        self.sessions[client] = self._begin(row, plan)
        return served

    def abandon(self, client: int) -> Served:
        """Expect nothing more of a client. Others in its open pass no longer wait for it: their answers."""
        session = self.sessions[client]
        session.finished = session.gone = True
        for waiting in [one for one in self.open if any(arrival.session is session for arrival in one.arrivals)]:
            position = next(k for k, arrival in enumerate(waiting.arrivals) if arrival.session is session)
            if position not in waiting.gradients:
                waiting.gradients[position] = torch.zeros_like(torch.split(waiting.final.detach(), _rows(waiting))[position])
                return self._complete(waiting)
        return Served()

    def opening(self, client: int) -> Frame:
        """The message that opens the round for a client; to be asked for once each time its session begins."""
        session, row, federation = self.sessions[client], self.starts[client], self.federation
        plan, adapters = session.ownership.plan, session.adapters
        columns = session.ownership.client_columns(federation.layout, federation.trained)
        data: Tensor | bytes = take(row, columns)
        if plan.download and adapters.down is not None and adapters.known is not None:
            before = take(adapters.known, columns)
            # The server follows the client's end too: what it has is what it decodes.
            [change], [data] = carry_changes([adapters.down], [take(row, columns).cpu() - before], [0])
            adapters.known = adapters.known.clone()
            put(adapters.known, columns, before + change)
            adapters.missing = take(row, columns).cpu() - (before + change)
            with torch.no_grad():
                put(self.bank.values[session.row], columns, (before + change).to(federation.device))
        if adapters.up is not None:
            session.begun = take(
                self.bank.values[session.row].cpu(), session.ownership.upload_columns(federation.layout, federation.trained)
            )
        return round_start_frame(plan, self.plan.round, self.first_step, federation.settings, data)

    def remembered(self, client: int) -> StreamStates:
        """What this end of a client's streams keeps for its next round."""
        session, settings = self.sessions[client], self.federation.settings
        streams = session.uplink, session.downlink, session.exit_down, session.exit_up
        states = with_labels(states_after(settings, session.ownership.plan, streams), session.labels)
        return session.adapters.remembered(settings, states)

    def facts(self, client: int) -> Facts:
        """What the codecs that send from this end say of the round."""
        session = self.sessions[client]
        return facts_of((session.uplink, session.downlink, session.exit_down, session.exit_up), session.adapters)

    def handle(self, messages: Sequence[tuple[int, Buffer]]) -> list[tuple[int, bytes]]:
        """Answer the (client, message) pairs that are waiting, in client order.

        Raises ProtocolError or CodecError naming the client of the first bad message; none of the messages has been applied then."""
        checked = _Turn()
        for client, data in _one_each(messages):
            self._check(client, data, checked)
        served = self._apply(checked)
        for problem in served.refused.values():
            raise problem
        return served.replies

    def serve(self, messages: Sequence[tuple[int, Buffer]]) -> Served:
        """As `handle`, but a bad message is its sender's affair: it is refused, the others are answered. Whoever was refused is to be
        abandoned or taken back to the beginning of the round."""
        checked, refused = _Turn(), {}
        for client, data in _one_each(messages):
            try:
                self._check(client, data, checked)
            except (ProtocolError, CodecError) as problem:
                refused[client] = problem
        served = self._apply(checked)
        served.refused.update(refused)
        return served

    def _check(self, client: int, data: Buffer, turn: _Turn) -> None:
        """A message checked and decoded; nothing changes yet."""
        frame, session = decode(data), self._session(client)
        if frame.kind == Type.STEP_UP:
            turn.arrivals.append(intake.step_up(session, frame, self.federation, self.plan.round))
        elif frame.kind == Type.GRADIENT_UP:
            turn.returned.append(intake.gradient_up(session, frame, self._arrival_of(session), self.plan.round))
        elif frame.kind == Type.ROUND_END:
            turn.endings.append(intake.round_end(session, frame, self.federation, self.plan.round))
        else:
            raise ProtocolError(f"client {client} sent {frame.kind.name}, which only a server sends.", "check the client's version.")

    def _apply(self, turn: _Turn) -> Served:
        """Do what the checked messages of a turn ask for."""
        served = Served()
        for group in self._groups(turn.arrivals):
            served = _both(served, self._forward(group))
        for one in turn.returned:
            served = _both(served, self._gradient(one))
        for ending in turn.endings:
            try:
                served.replies.append(self._finish(ending))
            except ProtocolError as problem:
                served.refused[ending.session.client] = problem
        served.replies.sort(key=lambda pair: pair[0])
        return served

    def _session(self, client: int) -> Session:
        session = self.sessions.get(client)
        if session is None or session.finished:
            state = "is not in" if session is None else "has finished"
            raise ProtocolError(f"client {client} {state} round {self.plan.round}.", "wait for the next round's plan.")
        return session

    def _arrival_of(self, session: Session) -> Arrival | None:
        """The arrival of a session whose U-shaped pass is open."""
        return next((one for waiting in self.open for one in waiting.arrivals if one.session is session), None)

    def _take(self, arrival: Arrival) -> None:
        """Apply an arrival: the step it closes, its codec's state."""
        session = arrival.session
        session.uplink.receiver = arrival.receiver
        session.labels = arrival.known
        if arrival.fields.micro == 0:
            self._close_step(session, arrival.fields.squared_norm)
            self.bank.gradients[session.row].zero_()
            session.targets += arrival.fields.normaliser
            session.normaliser, session.counted = arrival.fields.normaliser, 0
        session.counted += arrival.fields.targets

    def _groups(self, arrivals: list[Arrival]) -> list[list[Arrival]]:
        """Which sessions share a pass: those with the same exit; alone in deterministic mode. Within a pass: by cut, then client."""
        if self.deterministic:
            return [[arrival] for arrival in arrivals]
        groups: dict[tuple[bool, int], list[Arrival]] = {}
        for arrival in arrivals:
            plan = arrival.session.ownership.plan
            groups.setdefault((plan.exit_on_client, plan.tail_blocks), []).append(arrival)
        return [sorted(group, key=lambda one: (one.session.ownership.plan.cut, one.session.client)) for group in groups.values()]

    def _forward(self, group: list[Arrival]) -> Served:
        """One ragged pass. With the exit here also its backward; else it stays open until the clients' gradients are in."""
        for arrival in group:
            self._take(arrival)
        width = max(arrival.hidden.shape[1] for arrival in group)
        leaves = [widen(arrival.hidden, width).requires_grad_(True) for arrival in group]
        entries = entering(self.bank, group, leaves, self.federation.device)
        split, first = self.federation.split, group[0].session.ownership
        mask = length_mask(torch.stack([arrival.lengths for arrival in group]), width)
        rows = torch.tensor([arrival.session.row for arrival in group], device=self.federation.device)
        last = first.server_end - 1 if first.plan.exit_on_client else None
        route = Route(sum(leaf.shape[0] for leaf in leaves), last, entries, bank=self.bank, bank_rows=rows, sessions=len(group))
        needed = split.needed_mask(mask)
        final = split.run(route, None, None if needed is None else needed.to(self.federation.device))
        if first.plan.exit_on_client:
            final = encode(self.bank, "exit", first.server_end, final, rows, len(group))
            self.open.append(OpenPass(group, leaves, final, {}))
            for arrival in group:
                arrival.session.in_pass = True
            return self._send_hidden(group, final)
        labels = torch.cat([widen_labels(arrival.labels, width) for arrival in group])
        sequences = group[0].lengths.shape[0]
        weight = torch.tensor([1.0 / arrival.fields.normaliser for arrival in group]).repeat_interleave(sequences).to(final.device)
        loss, sums = training_loss(final, Targets.of(labels, final.device), weight, split.head, split.anatomy)
        loss.backward()  # type: ignore[no-untyped-call]
        return self._answer(group, leaves, sums.cpu().reshape(-1, sequences).sum(1))

    def _send_hidden(self, group: list[Arrival], final: Tensor) -> Served:
        served = Served()
        for arrival, part in zip(group, torch.split(final.detach(), [arrival.lengths.shape[0] for arrival in group]), strict=True):
            session = arrival.session
            try:
                packet = session.exit_down.send(tokens_of(part, arrival), arrival.samples)
            except CodecError as problem:
                served.refused[session.client] = _named(session, problem)
                continue
            served.replies.append((session.client, step_frame(Type.HIDDEN_DOWN, arrival.fields, (), (packet_bytes(packet),)).encode()))
        return served

    def _gradient(self, returned: Returned) -> Served:
        """A U-shaped client's gradient; when the last of its pass is in, the backward runs and all are answered."""
        session = returned.session
        session.exit_up.receiver = returned.receiver
        session.in_pass = False
        waiting = next(one for one in self.open if any(arrival.session is session for arrival in one.arrivals))
        position = next(k for k, arrival in enumerate(waiting.arrivals) if arrival.session is session)
        waiting.gradients[position] = widen(returned.gradient, waiting.final.shape[1])
        return self._complete(waiting)

    def _complete(self, waiting: OpenPass) -> Served:
        """The backward of a U-shaped pass, if all its gradients are in."""
        if len(waiting.gradients) < len(waiting.arrivals):
            return Served()
        self.open.remove(waiting)
        gradient = torch.cat([waiting.gradients[k] for k in range(len(waiting.arrivals))])
        waiting.final.backward(gradient)  # type: ignore[no-untyped-call]
        return self._answer(waiting.arrivals, waiting.leaves, torch.zeros(len(waiting.arrivals)))

    def _answer(self, group: list[Arrival], leaves: list[Tensor], sums: Tensor) -> Served:
        """STEP_DOWN for everyone in the pass, with the squared norm of the gradients the server holds for it so far."""
        served = Served()
        for arrival, leaf, loss_sum in zip(group, leaves, sums.tolist(), strict=True):
            session = arrival.session
            if session.gone:
                continue
            assert leaf.grad is not None
            try:
                packet = session.downlink.send(tokens_of(leaf.grad, arrival), arrival.samples)
            except CodecError as problem:
                served.refused[session.client] = _named(session, problem)
                continue
            columns = session.ownership.server_columns(self.federation.layout)
            session.squared_norm = float(self.bank.gradients[session.row, columns].square().sum(dtype=wide(self.bank.gradients.device)))
            session.due = True
            session.advance(self.federation.settings.gradient_accumulation)
            fields = arrival.fields.with_result(loss_sum, session.squared_norm)
            served.replies.append((session.client, step_frame(Type.STEP_DOWN, fields, (), (packet_bytes(packet),)).encode()))
        return served

    def _close_step(self, session: Session, client_squared: float) -> None:
        """The optimizer step that waited for the client's part of the gradient norm."""
        if not session.due:
            return
        session.due = False
        settings, columns = self.federation.settings, session.ownership.server_columns(self.federation.layout)
        one = slice(session.row, session.row + 1)
        gradients = self.bank.gradients[one, columns]
        if settings.clip_norm > 0:
            squared = torch.tensor([client_squared + session.squared_norm], dtype=torch.float64)
            gradients.mul_(clip_factor(squared, settings.clip_norm).to(gradients.dtype).to(gradients.device)[:, None])
        rate = settings.rate(self.first_step, session.step - 1, session.ownership.plan.local_steps)
        trained = None if self.bank.trained is None else self.bank.trained[columns]
        settings.optimizer.step(self.bank.values[one, columns], gradients, self.moments.select(one, columns), rate, trained)

    def _finish(self, ending: Ending) -> tuple[int, bytes]:
        """Take a participant's own adapters beside its session's."""
        session = ending.session
        self._close_step(session, ending.squared_norm)
        if ending.vector is not None:
            columns = session.ownership.upload_columns(self.federation.layout, self.federation.trained)
            with torch.no_grad():
                put(self.bank.values[session.row], columns, ending.vector.to(self.federation.device))
            if session.adapters.up is not None:
                session.adapters.up.receiver = ending.receiver
        if session.adapters.missing is not None:
            own = session.ownership.client_columns(self.federation.layout, self.federation.trained)
            with torch.no_grad():
                missing = session.adapters.missing.to(self.federation.device)
                put(self.bank.values[session.row], own, take(self.bank.values[session.row], own) + missing)
        session.targets = ending.targets
        self.guard(session.client, self.bank.values[session.row].detach(), self.starts[session.client])
        session.finished = True
        accepted = RoundAccepted(round=self.plan.round, client=session.client)
        return session.client, round_frame(Type.ROUND_ACCEPTED, accepted).encode()


@dataclass
class _Turn:
    """The checked messages of a turn, by what they ask for."""

    arrivals: list[Arrival] = field(default_factory=list)
    returned: list[Returned] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)


def _one_each(messages: Sequence[tuple[int, Buffer]]) -> list[tuple[int, Buffer]]:
    """The messages in client order. Raises ProtocolError for a client that sent two at once."""
    if len({client for client, _ in messages}) < len(messages):
        raise ProtocolError(f"a client sent two messages at once: {sorted(client for client, _ in messages)}.", intake.IN_ORDER)
    return sorted(messages, key=lambda pair: pair[0])


def _both(one: Served, other: Served) -> Served:
    return Served(one.replies + other.replies, one.refused | other.refused)


def _rows(waiting: OpenPass) -> list[int]:
    """Rows of each arrival in a pass."""
    return [arrival.lengths.shape[0] for arrival in waiting.arrivals]


def _named(session: Session, problem: CodecError) -> CodecError:
    """What went wrong with a tensor for a client, said with its number: its own numbers made it so."""
    return CodecError(f"client {session.client}: {problem.message}", problem.remedy)
