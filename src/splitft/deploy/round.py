"""One round on the network, seat by seat: absent, opening, training, asked to finish, ended, lost."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from splitft.clock import monotonic_s
from splitft.deploy.letters import Finish, Letter, Open, Refused, Report, pack, read
from splitft.deploy.letters import Opened as OpenedLetter
from splitft.deploy.moments import moments_packet, put_moments
from splitft.deploy.norms import UpdateNorms
from splitft.deploy.part import Part
from splitft.deploy.round_result import checked_report, message_limit, result_of
from splitft.deploy.sealed_round import seal_round
from splitft.engine.ledger import Ledger
from splitft.engine.planning import Prepared
from splitft.engine.secure_round import Unsealed
from splitft.engine.server import Served, Server
from splitft.engine.settings import ClientState, RoundResult, Starts
from splitft.errors import CodecError, ProtocolError, SplitftError
from splitft.messages import PACKET_KINDS, Frame, RoundEnd, Type, decode
from splitft.transport.session import Arrived, Closed, Event, Opened
from splitft.transport.values import Message
from splitft.types import Direction, RoundPlan

if TYPE_CHECKING:
    from splitft.deploy.conduct import Conductor
    from splitft.deploy.host import Seat
    from splitft.engine.rounds import Run

LOOK_S = 0.25
TIMELINE_STEPS = 2
# How often a client that is restarted again and again may begin a round.
MOST_OPENINGS = 50
# Bytes that are progress: signs of life take hours for as many.
PROGRESS_BYTES = 64 << 10


class Round:
    """Round `index` of a run with the clients of a conductor's host."""

    def __init__(
        self,
        conductor: Conductor,
        run: Run,
        index: int,
        prepared: Prepared,
        starts: Starts,
        states: Mapping[int, ClientState],
        ledger: Ledger,
    ) -> None:
        self.conductor, self.run, self.index = conductor, run, index
        self.plans = {plan.client: plan for plan in prepared.plans}
        self.states = {client: states.get(client, ClientState()) for client in self.plans}
        self.before = {client: run.state.clients.get(client, ClientState()) for client in self.plans}
        self.bases = {client: conductor.base_of(run, client) for client in self.plans}
        self.ledger = ledger
        self.digests: dict[int, str] = {}
        self.lost: set[int] = set()
        self.unsealed: Unsealed | None = None
        self.parts = {client: Part(plan) for client, plan in self.plans.items()}
        known = [float(one) for one in run.state.notes.get("update_norms", [])]
        self.norms = UpdateNorms(known, conductor.section.update_norm_factor)
        first_step = (index - 1) * run.rules.local_steps
        plan = RoundPlan(index, tuple(prepared.plans))
        self.server = Server(run.federation, plan, first_step, starts, dict(self.states), conductor.deterministic, self.norms.check)
        self.began_s = monotonic_s()

    @property
    def now_s(self) -> float:
        return monotonic_s() - self.began_s

    # -- the loop --------------------------------------------------------------------------------------------------------------------

    def play(self) -> RoundResult:
        """Until every participant has ended or is lost."""
        for client in self.plans:
            self._begin(client)
        host = self.conductor.host
        host.status.stage("training")
        while any(part.stage not in ("ended", "lost") for part in self.parts.values()):
            with host.waits.waiting("messages of the round", self._missing()):
                events = self.conductor.pump(min(LOOK_S, self._patience_s()))
            for event in events:
                self._hear(event)
            if self._patience_s() <= 0.0:
                self._serve()
            self._look_at_the_clock()
        for client, problem in self.norms.outliers().items():
            if self.parts[client].stage == "ended":
                self.parts[client].stage = "training"  # it was accepted before there was anything to hold it against
                self._refuse(client, problem)
        self.unsealed = None if self.run.secrecy is None else seal_round(self)
        return result_of(self)

    def _missing(self) -> str:
        return ", ".join(self.conductor.seat(client).name for client, part in self.parts.items() if part.stage not in ("ended", "lost"))[
            :200
        ]

    def _patience_s(self) -> float:
        """How long to wait for company before the next pass: not at all where passes are of one client or everyone waits already."""
        training = [part for part in self.parts.values() if part.stage in ("training", "opening")]
        waiting = [part.waiting[0][1] for part in training if part.waiting]
        if not waiting:
            return LOOK_S
        if self.server.deterministic or len(waiting) == len(training):
            return 0.0
        return max(0.0, min(waiting) + self.conductor.section.gather_s - self.now_s)

    def _hear(self, event: Event) -> None:
        seat = self.conductor.host.seat_of(event.session)
        part = None if seat is None else self.parts.get(seat.number)
        if isinstance(event, Opened) and part is not None:
            self._absent(part)  # another process: it begins the round again when it is ready
        elif isinstance(event, Closed):
            for client, one in self.parts.items():
                if self.conductor.seat(client).session is None:
                    self._absent(one)
                    if event.code == "protocol" and self.conductor.host.number_of(event.session) == client:
                        self._lose(client, "broke the protocol")  # whoever lies is not waited for
        if not isinstance(event, Arrived):
            return
        if seat is None or part is None:
            event.message.release()
            return
        try:
            self._letter(seat, part, event.message)
        except (ProtocolError, CodecError, OverflowError) as problem:
            event.message.release()
            self._refuse(seat.number, problem if isinstance(problem, SplitftError) else ProtocolError(str(problem), ""))

    def _absent(self, part: Part) -> None:
        """A participant is gone; when it comes back it begins the round again, so nobody in a pass with it need wait."""
        if part.stage not in ("ended", "lost", "absent"):
            part.stage, part.moved_s = "absent", self.now_s
            self._forget(part)
            self._after(self.server.abandon(part.plan.client))

    def _after(self, served: Served) -> None:
        """Send the answers of a pass, refuse whom it could not serve."""
        self._tell(served.replies)
        for client, problem in served.refused.items():
            self._refuse(client, problem)

    def _letter(self, seat: Seat, part: Part, message: Message) -> None:
        kind = message.kind
        if kind == Letter.FRAME:
            if part.stage == "training" and not self._stale(message):
                part.waiting.append((message, self.now_s))
            else:
                message.release()
            return
        data = bytes(message.payload)
        message.release()
        if kind == Letter.READY:
            if part.stage in ("opening", "training"):
                raise ProtocolError(f"{seat.name} says it is ready in the middle of a round.", "check the client's version.")
            self._begin(seat.number)
        elif kind == Letter.OPENED:
            self._opened(seat.number, part, read(OpenedLetter, data))
        elif kind == Letter.REPORT:
            part.report = checked_report(read(Report, data), part.plan, self.index) or part.report
        elif kind == Letter.REFUSED:
            refused = read(Refused, data)
            if refused.round == self.index:
                self.conductor.host.status.event("warning", f"declines the round: {refused.text}", seat.number)
                self._lose(seat.number, "declined")
        else:
            raise ProtocolError(f"{seat.name} sent letter {kind}, which only a server sends.", "check the client's version.")

    def _stale(self, message: Message) -> bool:
        """Whether a frame belongs to another round than this: it comes late, and nobody needs it."""
        frame = decode(message.payload)
        if frame.kind in (Type.SCORE_UP, Type.SCORE_END):
            return True
        if frame.kind == Type.ROUND_END:
            return bool(frame.read(RoundEnd).round != self.index)
        return frame.kind in (Type.STEP_UP, Type.GRADIENT_UP) and frame.step().round != self.index

    # -- opening ---------------------------------------------------------------------------------------------------------------------

    def _begin(self, client: int) -> None:
        """Open the round for a client, or open it again for one that was restarted."""
        part, seat = self.parts[client], self.conductor.seat(client)
        if part.stage in ("ended", "lost") or not seat.here:
            return
        part.openings += 1
        if part.openings > MOST_OPENINGS:
            self._lose(client, f"began the round {MOST_OPENINGS} times")
            return
        self._after(self.server.reopen(client, self.states[client]))
        part.steps, part.report, part.asked_s, part.moved_s = 0, None, math.inf, self.now_s
        self._forget(part)
        assert seat.session is not None
        seat.session.limit_bytes = message_limit(self.run, part.plan)
        frame = self.server.opening(client)
        before, base = self.before[client], self.bases[client]
        gives, returns, moments = (0, 0), (0, 0), b""
        if base is not None and before.first is not None and before.second is not None and before.cut not in (0, part.plan.cut):
            if part.plan.cut > before.cut:
                gives = (before.cut, part.plan.cut)
                moments = moments_packet(self.run.federation.layout, before.first, before.second, gives)
                self.ledger.add(client, "down", "adapters", len(moments))
            else:
                returns = (part.plan.cut, before.cut)
        opened = Open(self.index, frame.encode(), "train", base, self.states[client].batches, moments, gives, returns)
        part.stage = "opening"
        self._count(client, "down", frame)
        if self.conductor.send(client, Letter.OPEN, pack(opened)):
            self.conductor.host.status.seat(
                client, state="training", cut=part.plan.cut, rank=part.plan.rank, step=0, steps=part.plan.local_steps
            )
        self.run.reached("opening_sent")

    def _opened(self, client: int, part: Part, opened: OpenedLetter) -> None:
        if part.stage != "opening" or opened.round != self.index:
            return
        if not opened.ok:
            if self.bases[client] is None:
                raise ProtocolError(f"client {client} cannot begin afresh.", "check the client's disk.")
            # It has lost what it was to go on from: both sides forget, and it goes on in its data.
            self.conductor.host.status.event("warning", "has lost its state: it begins afresh", client)
            self.bases[client] = None
            self.states[client] = replace(self.conductor.voided(self.states[client]), cut=part.plan.cut, deepest=part.plan.cut)
            self.before[client] = self.states[client]
            self._begin(client)
            return
        before = self.before[client]
        wanted = self.bases[client] is not None and before.first is not None and part.plan.cut < before.cut
        if wanted != bool(opened.moments):
            raise ProtocolError(
                f"client {client} returned {len(opened.moments)} bytes of moments.", "both sides must run the same version."
            )
        if wanted:
            row, moments = self.server.sessions[client].row, self.server.moments
            put_moments(self.run.federation.layout, moments.first[row], moments.second[row], (part.plan.cut, before.cut), opened.moments)
            self.ledger.add(client, "up", "adapters", len(opened.moments))
        part.stage, part.replied_s, part.moved_s = "training", self.now_s, self.now_s

    # -- serving ---------------------------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """One turn: the oldest waiting message of every client, in one pass or in passes of one."""
        turn = {client: part.waiting[0] for client, part in self.parts.items() if part.waiting and part.stage == "training"}
        if not turn:
            return
        started_s = self.now_s
        data = {client: message.payload for client, (message, _) in turn.items()}
        served = self.server.serve(sorted(data.items()))
        ended_s = self.now_s
        # The answers first: clients wait for them, and nobody for the books.
        self._after(served)
        self.conductor.host.metrics.server_pass(len(turn))
        for client, (message, arrived_s) in turn.items():
            part = self.parts[client]
            if not part.waiting or part.waiting[0][0] is not message:
                continue
            part.waiting.popleft()
            if client in served.refused:
                continue
            self._count(client, "up", decode(data[client]))
            self._account(part, arrived_s, started_s, ended_s)
            if data[client][4] == Type.ROUND_END:
                self.digests[client] = hashlib.sha256(data[client]).hexdigest()
        for message, _ in turn.values():  # last: it wakes the event loop, which would compete with the answers
            message.release()

    def _account(self, part: Part, arrived_s: float, started_s: float, ended_s: float) -> None:
        """Where the time of an exchange went: on the way and at the client, in the queue, in the pass."""
        part.queued_s += started_s - arrived_s
        part.served_s += ended_s - started_s
        if part.steps < TIMELINE_STEPS:
            part.spans += [("whole_step", part.replied_s, arrived_s), ("server_wait", arrived_s, started_s), ("back", started_s, ended_s)]
        part.replied_s = part.moved_s = ended_s

    def _tell(self, replies: list[tuple[int, bytes]]) -> None:
        """Send the server's answers."""
        for client, reply in replies:
            sent = self.conductor.send(client, Letter.FRAME, reply)
            part, frame = self.parts[client], decode(reply)
            self._count(client, "down", frame)
            if frame.kind == Type.STEP_DOWN:
                self._count_step(client, part)
            elif frame.kind == Type.ROUND_ACCEPTED:
                part.stage, part.finish_s = "ended", self.now_s
                self.conductor.host.status.seat(client, state="done")
                self.run.reached("update_taken")
            if not sent and part.stage not in ("ended", "lost"):
                part.stage, part.moved_s = "absent", self.now_s

    def _count(self, client: int, direction: Direction, frame: Frame) -> None:
        """Enter a frame where bytes are counted."""
        self.ledger.add_frame(client, direction, frame)
        up_bytes, down_bytes = (frame.size_bytes, 0) if direction == "up" else (0, frame.size_bytes)
        self.conductor.host.status.traffic(client, up_bytes, down_bytes)
        metrics = self.conductor.host.metrics
        metrics.traffic(direction, "control", frame.overhead_bytes)
        for kind, packet in zip(PACKET_KINDS[frame.kind], frame.packets, strict=False):
            metrics.traffic(direction, kind, len(packet))

    def _count_step(self, client: int, part: Part) -> None:
        session, settings = self.server.sessions[client], self.run.federation.settings
        if session.micro == 0 and session.step > part.steps:
            part.steps = session.step
            seconds = self.now_s / max(1, part.steps)
            tokens = settings.batch_size * settings.gradient_accumulation * self.run.costs[client].sequence_tokens
            self.conductor.host.status.step_done(client, part.steps, part.plan.local_steps, tokens, seconds)
            self.conductor.host.metrics.step(seconds)
            self.conductor.host.metrics.tokens(tokens)
            self.run.on_step(1)
        self.run.reached("step_served")

    # -- troubles --------------------------------------------------------------------------------------------------------------------

    def _refuse(self, client: int, problem: SplitftError) -> None:
        """A bad message costs its sender the round, and a strike."""
        self._lose(client, "refused")
        self.conductor.host.strike(self.conductor.seat(client), self.index, problem)

    def _lose(self, client: int, why: str) -> None:
        part = self.parts[client]
        if part.stage in ("ended", "lost"):
            return
        part.stage, part.finish_s = "lost", self.now_s
        self.lost.add(client)
        self._forget(part)
        self.conductor.host.status.seat(client, state="lost")
        self.conductor.host.status.event("warning", f"lost to round {self.index}: {why}", client)
        self._after(self.server.abandon(client))

    def drop(self, client: int, why: str) -> None:
        """A participant that had ended is lost after all."""
        self.parts[client].stage = "training"
        self._lose(client, why)

    def _forget(self, part: Part) -> None:
        for message, _ in part.waiting:
            message.release()
        part.waiting.clear()

    def _look_at_the_clock(self) -> None:
        """The deadline and the patience with who is gone; the quorum holds for both."""
        rules, section, now_s = self.run.rules.attendance, self.conductor.section, self.now_s
        ended = sum(part.stage == "ended" for part in self.parts.values())
        quorum = max(1, math.ceil(rules.quorum * len(self.parts)))
        open_parts = {client: part for client, part in self.parts.items() if part.stage not in ("ended", "lost")}
        if rules.deadline_s > 0 and now_s >= rules.deadline_s and ended >= quorum:
            for client, part in open_parts.items():
                self._late(client, part, now_s)
        idle = {client for client, part in open_parts.items() if now_s - self._moved_s(client, part) >= section.absence_s}
        for client in idle if len(self.parts) - len(self.lost) - len(idle) >= quorum else ():
            self._lose(client, f"gone or idle for {section.absence_s:g} s")
        for client, part in open_parts.items():
            if part.stage == "absent" and self.conductor.seat(client).excluded:
                self._lose(client, "excluded")
            elif part.stage == "absent" and not self.conductor.host.doorkeeper.listed(client):
                self._lose(client, "taken off the roster")

    def _moved_s(self, client: int, part: Part) -> float:
        """When a participant last came forward: a message served, a piece of the model fetched, or bytes of a large message on their way.
        Signs of life alone are none, so that one that hangs does not hold the others for ever."""
        session = self.conductor.seat(client).session
        if session is not None and part.stage != "absent":
            moved_bytes = session.counts.bytes_received + session.counts.bytes_sent
            if abs(moved_bytes - part.moved_bytes) >= PROGRESS_BYTES:
                part.moved_bytes, part.moved_s = moved_bytes, self.now_s
        return part.moved_s

    def _late(self, client: int, part: Part, now_s: float) -> None:
        """A straggler at the deadline: asked for what it has done, if that counts, and given up after a while."""
        session = self.server.sessions[client]
        if self.run.rules.attendance.partial and part.stage == "training" and (part.steps or session.step):
            if part.asked_s == math.inf:
                part.asked_s, session.short = now_s, True
                self.conductor.send(client, Letter.FINISH, pack(Finish(self.index)))
                self.conductor.host.status.seat(client, state="late")
            elif now_s - part.asked_s >= self.conductor.section.grace_s:
                self._lose(client, "late")
        else:
            self._lose(client, "late")
