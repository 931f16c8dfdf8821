"""Held-out rows measured where they lie: every client that is there is asked for its slice, the sums become the round's evaluation."""

from __future__ import annotations

import math
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

from torch import Tensor

from splitft.clock import monotonic_s
from splitft.deploy.letters import Letter, Open, Refused, pack, read
from splitft.deploy.letters import Opened as OpenedLetter
from splitft.deploy.round_result import message_limit
from splitft.engine.evaluate import Score, evaluate
from splitft.engine.record import evaluation_event
from splitft.engine.scoring import Scorer
from splitft.errors import CodecError, DataError, ProtocolError
from splitft.messages import Type
from splitft.transport.session import Arrived, Event
from splitft.types import Plan

if TYPE_CHECKING:
    from splitft.deploy.conduct import Conductor
    from splitft.engine.rounds import Run

LOOK_S = 0.25


class Measurement:
    """One measurement of joined adapters [p] after round `index`."""

    def __init__(self, conductor: Conductor, run: Run, index: int, adapters: Tensor) -> None:
        self.conductor, self.run, self.index, self.adapters = conductor, run, index, adapters
        # The ledger is of rounds; what measuring moves is told with its event.
        self.moved = {"up": 0, "down": 0}

    def event(self) -> dict[str, Any]:
        """The event `evaluation`. Clients that came after the first round are measured without adapters too, for what they gained."""
        run, clients = self.run, len(self.run.federation.clients)
        scores = self._scores(self.adapters, set(range(clients)))
        bases = run.state.notes.setdefault("base_loss", {})
        if self.index > 0 and (newcomers := {client for client in scores if str(client) not in bases}):
            first = self._scores(run.federation.start, newcomers)
            bases.update({str(client): one.loss for client, one in first.items()})
        common = self._common()
        while common is None and not scores:
            self._wait_for_rows(clients)
            scores = self._scores(self.adapters, set(range(clients)))
        total = common if common is not None else reduce(add, scores.values())
        return evaluation_event(self.index, total, [scores.get(client) for client in range(clients)]) | {"bytes": self.moved}

    def _wait_for_rows(self, clients: int) -> None:
        """Until somebody is there who has held-out rows. Raises DataError when everyone is and nobody has any."""
        host = self.conductor.host
        while True:
            here = [host.seats[number].ready for number in self.conductor.here(clients)]
            if any(ready is not None and ready.held_out_rows for ready in here):
                return
            if len(here) >= len(self.conductor.awaited(clients)):
                raise DataError(
                    "nobody who is there has held-out rows to measure the model on.", "set federation.held_out, or tokens.held_out above 0."
                )
            host.status.stage("waiting for clients with held-out rows")
            with host.waits.waiting("clients with held-out rows"):
                for event in self.conductor.pump(LOOK_S):
                    self.conductor.idle(event)

    def _common(self) -> Score | None:
        """The model on the server's own public text."""
        run, rules = self.run, self.run.rules
        if not len(run.common_held_out):
            return None
        federation = run.federation
        how = (rules.evaluate_batch, federation.device, rules.evaluate_rows, ["the public text"])
        return evaluate(federation.split, federation.layout, self.adapters, [run.common_held_out], *how)[0]

    def _plan(self, client: int) -> Plan:
        """Where a client's model is cut now."""
        run = self.run
        known = run.state.clients.get(client)
        cut = self.conductor.cuts.get(client) or (0 if known is None else known.cut) or run.costs[client].minimum_cut
        return Plan(client, cut, 1, 1, run.rules.exit_on_client, run.rules.tail_blocks)

    def _scores(self, adapters: Tensor, wanted: set[int]) -> dict[int, Score]:
        host, run = self.conductor.host, self.run
        patience_s = max(2.0 * self.conductor.section.liveness_s, 10.0)
        seats = {number: seat for number, seat in host.seats.items() if seat.here and number in wanted}
        asked = [number for number, seat in seats.items() if seat.ready is not None and seat.ready.held_out_rows]
        plans = [self._plan(number) for number in sorted(asked)]
        rules = run.rules
        self.scorer = Scorer(run.federation, adapters, plans, self.index, rules.evaluate_batch, rules.evaluate_rows)
        self.scorer.rows = {number: seat.ready.held_out_rows for number, seat in seats.items() if seat.ready is not None}
        self.left = {plan.client: monotonic_s() for plan in plans}
        for plan in plans:
            self._ask(plan.client)
        while self.left:
            names = ", ".join(host.seats[client].name for client in self.left)[:200]
            with host.waits.waiting("held-out measurements", names):
                events = self.conductor.pump(LOOK_S)
            for event in events:
                self._hear(event)
            for client, heard_s in list(self.left.items()):
                session = host.seats[client].session
                gone = (session is None or not session.connected) and monotonic_s() - heard_s > patience_s
                limit_s = min(rules.attendance.deadline_s or math.inf, self.conductor.section.absence_s)
                if gone or monotonic_s() - heard_s > limit_s:
                    why = "is gone" if gone else "does not answer"
                    host.status.event("warning", f"{why}: its held-out rows are not measured this time", client)
                    del self.left[client]
        return {client: one.score for client, one in sorted(self.scorer.slices.items()) if one.score is not None and one.score.tokens}

    def _ask(self, client: int) -> None:
        plan = next(one for one in self.scorer.plans if one.client == client)
        session = self.conductor.seat(client).session
        if session is not None:
            session.limit_bytes = message_limit(self.run, plan)
        opened = Open(self.index, self.scorer.opening(client).encode(), "evaluate")
        self._send(client, Letter.OPEN, pack(opened))

    def _send(self, client: int, kind: Letter, data: bytes) -> None:
        self.moved["down"] += len(data)
        self.conductor.send(client, kind, data)

    def _hear(self, event: Event) -> None:
        seat = self.conductor.host.seat_of(event.session)
        if not isinstance(event, Arrived):
            return
        kind, data = event.message.kind, bytes(event.message.payload)
        event.message.release()
        if seat is None or seat.number not in self.left:
            return
        self.moved["up"] += len(data)
        try:
            self._letter(seat.number, kind, data)
        except (ProtocolError, CodecError) as problem:
            self.left.pop(seat.number, None)
            self.conductor.host.strike(seat, self.index, problem)

    def _letter(self, client: int, kind: int, data: bytes) -> None:
        if kind == Letter.READY:
            self._ask(client)
        elif kind == Letter.OPENED:
            read(OpenedLetter, data)
        elif kind == Letter.REFUSED:
            self.conductor.host.status.event("warning", f"declines the measurement: {read(Refused, data).text}", client)
            del self.left[client]
        elif kind == Letter.FRAME and data[4:5] in (bytes([Type.SCORE_UP]), bytes([Type.SCORE_END])):
            reply = self.scorer.answer(client, data)
            self.left[client] = monotonic_s()
            self._send(client, Letter.FRAME, reply)
            if self.scorer.slices[client].score is not None:
                del self.left[client]
