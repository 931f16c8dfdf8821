"""A round with clients elsewhere: who takes part, opening it, serving their steps, ending it; then the engine goes on as in a simulation.

The engine's thread runs this and computes; nothing here blocks for longer than a bounded wait, and every wait is listed. A client that
comes back with its process alive goes on in the middle of its step; one that was restarted is taken back to the beginning of the round,
which concerns nobody else, since sessions share nothing but frozen weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from splitft.clock import monotonic_s
from splitft.config_federation import FederationSection
from splitft.data.base import ClientData, DistantRows
from splitft.deploy.disk import shortage
from splitft.deploy.excluded import Exclusions
from splitft.deploy.host import Host, Seat
from splitft.deploy.letters import Committed, Finished, Letter, Snapshot, pack
from splitft.deploy.measured import attended_of
from splitft.deploy.measuring import Measurement
from splitft.deploy.round import Round
from splitft.deploy.snapshots import HEADER_BYTES
from splitft.engine import checkpoint
from splitft.engine.attendance import UnfitError
from splitft.engine.intake import positions_of
from splitft.engine.ledger import Ledger
from splitft.engine.planning import Prepared, Starting, prepare
from splitft.engine.record import Trained
from splitft.engine.rounds import insist
from splitft.engine.settings import ClientState, RoundResult
from splitft.errors import ResourceError, SplitftError
from splitft.transport.session import Arrived, Event

if TYPE_CHECKING:
    from splitft.engine.rounds import RoundRecord, Run

LOOK_S = 0.25
DISK_PAUSE_S = 2.0
# Messages that a client may leave lying; no honest one is sent half as many between two of its own.
MOST_UNTAKEN = 256
# What the engine remembers of its members between rounds, in the run's notes.
MEMBERS = "members"


class Conductor:
    """Plugs a `Host` into a `Run`. `check` is called at every look and may raise Interrupted. `costs_of` remakes the cost models when it
    is known how much text a client has."""

    def __init__(
        self,
        host: Host,
        section: FederationSection,
        check: Callable[[], None],
        costs_of: Callable[[tuple[ClientData, ...]], Any],
        deterministic: bool,
    ) -> None:
        self.host, self.section, self.check, self.costs_of, self.deterministic = host, section, check, costs_of, deterministic
        self.cuts: dict[int, int] = {}
        self.farewell = b""
        # Clients that fit no cut, with the memory they had.
        self.unfit: dict[int, int] = {}
        self.counted: dict[int, bool] = {}
        self.known: dict[int, tuple[int, int]] = {}

    def plug_into(self, run: Run) -> None:
        run.conduct, run.measure, run.on_refused = self.train, self.measure, self.wait_for_disk
        self.run = run
        run.on_commit = self.host.metrics.checkpoint_took
        self.host.strikes_allowed = self.section.strikes
        self.host.remember(Exclusions.load(run.folder))
        self.host.row_tokens = run.federation.settings.row_tokens or positions_of(run.federation)

    # -- a round ---------------------------------------------------------------------------------------------------------------------

    def train(self, run: Run, index: int) -> Trained:
        """Round `index`, from waiting for clients to their updates."""
        self.host.status.round_begins(index)
        ledger = Ledger()
        while True:
            prepared, played, result, starting = self._attempt(run, index, ledger)
            quorum = max(1, math.ceil(run.rules.attendance.quorum * len(played.plans)))
            if len(played.plans) - len(played.lost) >= quorum:
                break
            # Nothing is made of a round that only a few came through: it would be their model. It is begun again with whoever is there.
            text = f"round {index} has {len(played.plans) - len(played.lost)} updates of at least {quorum}: it begins again"
            self.host.status.event("warning", text)
        self.cuts.update({client: plan.cut for client, plan in played.plans.items()})
        self.counted = {client: client not in played.lost for client in played.plans}
        for client in played.plans:
            result.ledger.add(client, "down", "weights", self._fetched(client))
        attended = attended_of(run, index, prepared, result, played)
        notes = {MEMBERS: self._members_after(run, index, played), "update_norms": played.norms.remembered(played.lost)}
        return Trained(prepared, attended, result, starting.truncated, notes=notes, unsealed=played.unsealed)

    def _attempt(self, run: Run, index: int, ledger: Ledger) -> tuple[Prepared, Round, RoundResult, Starting]:
        """A round from its plan to its updates, of however many come through."""
        prepared = self._prepared(run, index)
        for plan in prepared.plans:  # what travels is counted when it does
            prepared.fetched_bytes[plan.client] = self._fetched(plan.client)
            prepared.moments[plan.client] = (0, 0)
        starting = Starting(run)
        run.on_stage("train")
        states = {**run.state.clients, **prepared.clients}
        for client, fetched_bytes in prepared.fetched_bytes.items():
            ledger.add(client, "down", "weights", fetched_bytes)
        played = Round(self, run, index, prepared, starting, states, ledger)
        return prepared, played, played.play(), starting

    def _prepared(self, run: Run, index: int) -> Prepared:
        """Who takes part in the round, and how. A client that cannot hold any cut is sent away, and not waited for until it says it has
        more memory; the others go on without it."""
        while True:
            here = self._gather(run, index)
            self._meet(run, here)
            try:
                return prepare(run, index, here=here)
            except UnfitError as problem:
                ready = self.host.seats[problem.client].ready
                self.unfit[problem.client] = 0 if ready is None else ready.memory_bytes
                self.host.send_away(problem.client, "unfit", problem)

    def _gather(self, run: Run, index: int) -> list[int]:
        """The seats that can take part, once there are enough: the minimum, and all that are expected or as many as come in time."""
        section, minimum = self.section, run.rules.attendance.minimum
        expected, enough_s, began_s = len(run.federation.clients), None, monotonic_s()
        # Who was in the last committed round and has not said goodbye comes back, as after a restart of the server: waited for like a
        # participant in the midst of a round, so that a disturbed run has the members of the undisturbed one.
        notes = run.state.notes.get(MEMBERS, {})
        recent = {int(client) for client, facts in notes.items() if (facts.get("base") or {}).get("round") == index - 1}
        while True:
            here = self.here(expected)
            now_s = monotonic_s()
            if len(here) >= minimum:
                enough_s = now_s if enough_s is None else enough_s
                missing = set(self.awaited(expected)) - set(here)
                late = now_s - enough_s >= section.join_s
                if not missing or (late and (not missing & recent or now_s - began_s >= section.absence_s)):
                    return here
            else:
                enough_s = None
            self.host.status.stage(f"waiting for clients: {len(here)} of at least {minimum}")
            with self.host.waits.waiting(f"clients for round {index}"):
                for event in self.pump(LOOK_S):
                    self.idle(event)

    def awaited(self, expected: int) -> list[int]:
        """Seats whose clients may come, or are there."""
        host = self.host
        gone = {number for number, seat in host.seats.items() if seat.left or seat.excluded}
        return [seat for seat in range(expected) if host.doorkeeper.listed(seat) and seat not in gone and seat not in self.unfit]

    def here(self, expected: int) -> list[int]:
        for number, short_bytes in list(self.unfit.items()):
            ready = self.host.seats[number].ready
            if ready is not None and ready.memory_bytes > short_bytes:
                del self.unfit[number]
        return sorted(number for number, seat in self.host.seats.items() if seat.here and number < expected and number not in self.unfit)

    def pump(self, timeout_s: float) -> list[Event]:
        """Hear what has come; letters that belong to no round are answered here."""
        self.check()
        return self.host.take(timeout_s)

    def idle(self, event: Event) -> None:
        """A message while nothing of its kind is under way: a late frame, the answer of a round that is over."""
        if isinstance(event, Arrived):
            event.message.release()

    def _meet(self, run: Run, here: list[int]) -> None:
        """Take over what clients have said of themselves: rows and tokens, memory, whether their text is the same as before."""
        clients, devices, changed = list(run.federation.clients), list(run.devices), False
        notes = run.state.notes.setdefault(MEMBERS, {})
        for number in here:
            seat = self.host.seats[number]
            ready = seat.ready
            assert ready is not None
            devices[number] = replace(devices[number], profile=replace(devices[number].profile, memory_bytes=float(ready.memory_bytes)))
            known = notes.setdefault(str(number), {"name": seat.name, "data": ready.data})
            if known["data"] != ready.data:
                self.host.status.event("warning", "its training data is another than before: it begins afresh", number)
                run.state.clients[number] = self.voided(run.state.clients.get(number, ClientState()))
                known.update(data=ready.data, base=None)
            if self.known.get(number) != (ready.rows, ready.tokens):
                self.known[number], changed = (ready.rows, ready.tokens), True
                rows = DistantRows(ready.rows, ready.tokens)
                held_out = DistantRows(ready.held_out_rows, ready.held_out_rows)
                clients[number] = ClientData(number, seat.name, ready.documents, rows, held_out)
                joined = {
                    "event": "joined",
                    "client": number,
                    "name": seat.name,
                    "documents": ready.documents,
                    "train_rows": ready.rows,
                    "train_tokens": ready.tokens,
                }
                insist(run, partial(run.journal.append, joined))
        run.devices = tuple(devices)
        if changed:
            run.federation = replace(run.federation, clients=tuple(clients))
            run.costs = self.costs_of(tuple(clients))

    @staticmethod
    def voided(state: ClientState) -> ClientState:
        """What is left of a client's state when it has lost its own: how many batches it has drawn, so that it goes on in its data."""
        return ClientState(batches=state.batches, deepest=0, folded=state.folded)

    def base_of(self, run: Run, client: int) -> Snapshot | None:
        """The snapshot that a client's state on the server belongs to."""
        found = run.state.notes.get(MEMBERS, {}).get(str(client), {}).get("base")
        return None if not found else Snapshot(int(found["round"]), str(found["digest"]))

    def _members_after(self, run: Run, index: int, played: Round) -> dict[str, Any]:
        """After a round: which snapshot of every client its state here belongs to."""
        notes = {client: dict(facts) for client, facts in run.state.notes.get(MEMBERS, {}).items()}
        for client, digest in played.digests.items():
            if client not in played.lost:
                notes[str(client)]["base"] = {"round": index, "digest": digest}
        return notes

    def _fetched(self, client: int) -> int:
        seat = self.host.seats.get(client)
        if seat is None:
            return 0
        count, seat.fetched_bytes = seat.fetched_bytes, 0
        return count

    def committed(self, record: RoundRecord) -> None:
        """A round is on the disk: the clients may forget what lies before it."""
        if record.training is not None:
            self.host.status.round_done(record.training)
            self.host.metrics.round_took(record.training["wall_s"])
            for client, counted in self.counted.items():
                self.send(client, Letter.COMMITTED, pack(Committed(record.round, counted)))
            self.run.reached("commit_told")
        if record.evaluation is not None:
            self.host.status.round_done(record.evaluation)

    def send(self, client: int, kind: int, payload: bytes) -> bool:
        """Send to a seat; false when nobody is there any more."""
        seat = self.host.seats.get(client)
        if seat is None or seat.session is None:
            return False
        try:
            if seat.session.backlog > MOST_UNTAKEN:
                seat.session.close("protocol", f"{seat.name} does not take what it is sent.", "update the client.")
            seat.session.send(kind, payload)
        except SplitftError:
            return False
        return True

    def seat(self, client: int) -> Seat:
        return self.host.seats[client]

    # -- measuring -------------------------------------------------------------------------------------------------------------------

    def measure(self, run: Run, index: int, adapters: Tensor, stage: str) -> dict[str, Any]:
        """The joined model on the held-out rows of everyone who is there, and on the server's public text, if it has one."""
        self.host.status.stage(stage)
        return Measurement(self, run, index, adapters).event()

    # -- the end, and troubles -------------------------------------------------------------------------------------------------------

    def finish(self, rounds: int, over: bool, text: str) -> None:
        """Tell everyone that the run is over, or that the server goes away for a while."""
        letter = pack(Finished(rounds, over, text, self.host.offers if over else []))
        self.farewell = letter
        for client in list(self.host.seats):
            self.send(client, Letter.FINISHED, letter)

    def linger(self, seconds: float) -> None:
        """Give clients time to hear of the end and to fetch the joined adapter: until all have gone, those included that took part and
        have not been seen since this process began, as after a restart behind the last commit; or nothing has moved for so long."""
        end_s, fetched = monotonic_s() + seconds, -1
        members = {int(number) for number in self.run.state.notes.get(MEMBERS, {})}
        while monotonic_s() < end_s:
            if members <= set(self.host.seats) and not any(seat.session is not None for seat in self.host.seats.values()):
                return
            with self.host.waits.waiting("clients to fetch the adapter"):
                if fetched != (fetched := sum(seat.fetched_bytes for seat in self.host.seats.values())):
                    end_s = monotonic_s() + seconds
                for event in self.pump(LOOK_S):
                    self.idle(event)
                    if isinstance(event, Arrived) and event.message.kind == Letter.READY and (seat := self.host.seat_of(event.session)):
                        self.send(seat.number, Letter.FINISHED, self.farewell)

    def wait_for_disk(self, problem: OSError) -> None:
        """The disk has refused a commit: say so, keep the connections, try again."""
        short = shortage(problem, self.run.folder, self._commit_bytes())
        text = f"storage: {problem.strerror or problem} ({problem.filename or self.run.folder}){short}; the run waits and goes on by itself"
        self.host.status.stage(f"paused: {text}")
        self.host.status.event("error", text)
        if problem.errno is None:
            raise ResourceError(f"the disk refused: {problem}.", "see the message.") from problem
        end_s = monotonic_s() + DISK_PAUSE_S
        with self.host.waits.waiting("the disk"):
            while monotonic_s() < end_s:
                for event in self.pump(LOOK_S):
                    self.idle(event)

    def _commit_bytes(self) -> int:
        """What the checkpoint of the present state takes, the greater part of a commit."""
        tensors, facts = checkpoint.tensors_of(self.run.state), checkpoint.facts_of(self.run.state)
        return sum(one.nbytes + HEADER_BYTES for one in tensors.values()) + len(json.dumps(facts))
