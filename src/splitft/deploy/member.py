"""A client of a real federation: comes in, gets ready, trains the rounds it is asked to, and comes back by itself after any break.

The engine's client is the one of the simulation; here its messages travel, its state is put on the disk before its update leaves, and
what the server asks is held against the client's own policy first.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from splitft.clock import monotonic_s
from splitft.deploy.disk import shortage
from splitft.deploy.letters import (
    MAX_LETTER_BYTES,
    PART_BYTES,
    Committed,
    Fetch,
    Finished,
    Letter,
    Open,
    Opened,
    Part,
    Refused,
    Report,
    Welcome,
    pack,
    read,
    refusal,
)
from splitft.deploy.moments import given, moments_packet
from splitft.deploy.openings import OneRun, Openings, folder_of
from splitft.deploy.sealing import FROM_SERVER, Pledges, SealingMember
from splitft.deploy.snapshots import Snapshots
from splitft.deploy.workshop import Workshop
from splitft.engine.client import Client
from splitft.engine.scoring import measure
from splitft.engine.secure_round import own_ranges
from splitft.engine.settings import ClientState
from splitft.errors import CheckpointError, ExcludedError, Interrupted, PolicyError, ProtocolError, SplitftError, UnreachableError
from splitft.messages import RoundStart, ScoreStart, Type, decode
from splitft.transport.base import NEXT, NOTHING, Posted, Talk
from splitft.transport.link import Link
from splitft.transport.values import Message, SessionClosed, SessionLost
from splitft.transport.values import Refused as TransportRefused
from splitft.waits import Waits

Listen = Callable[[str, dict[str, Any]], None]

LOOK_S = 0.5
DISK_PAUSE_S = 2.0
# Letters that may come in between while a piece of the model is waited for.
MOST_STASHED = 256
OPEN_S = 5.0
KNOCK_S = 30.0


class _Another(Exception):  # noqa: N818 - a turn of events, not a fault
    """The server has opened another round: the present one is over for this client."""

    def __init__(self, opened: Open) -> None:
        super().__init__()
        self.opened = opened


class _Dropped(Exception):  # noqa: N818 - as above
    """The server has refused this client's message: the present round is over for it."""


class Member:
    """Takes part in one federation over `link`. `folder` holds what it remembers; `stop` says whether it was asked to leave; at most
    `window` micro-batches of a step are on their way at a time. `knock` is called when the server has been out of reach for a while: it
    raises what is worth giving up for (a certificate refused, say), and returns while it is worth waiting."""

    def __init__(
        self,
        link: Link,
        workshop: Workshop,
        folder: Path,
        listen: Listen,
        stop: Callable[[], bool],
        waits: Waits,
        window: int = 1,
        knock: Callable[[], None] = lambda: None,
        patience_s: float = 0.0,
    ) -> None:
        self.link, self.workshop, self.folder = link, workshop, folder
        self.listen, self.stop, self.waits, self.window = listen, stop, waits, window
        self.knock, self.patience_s, self.seat, self.waiting_s = knock, patience_s, -1, 0.0
        link.look = self._look_at_stop
        self.one_run, self.openings = OneRun(folder), Openings(folder)
        self.connected_s = monotonic_s()
        self.stash: deque[Message] = deque()
        self.answer: Message | None = None
        self.round, self.ended = 0, False  # `ended`: all its steps are done
        self.sealing: SealingMember | None = None

    def run(self) -> Finished:
        """Until the run is over. Raises Interrupted when asked to stop, ExcludedError, PolicyError, and what a refused door raises."""
        while True:
            self.stash.clear()
            try:
                self._enter(read(Welcome, self._open()))
                return self._serve()
            except SessionLost:
                self.listen("rejoining", {})

    def _open(self) -> bytes:
        """Come in, however long the server is out of reach, or `patience_s` where that is not 0. Raises UnreachableError then."""
        began_s = monotonic_s()
        while True:
            try:
                return self.link.open(OPEN_S)
            except UnreachableError:
                self._look_at_stop()
                if self.patience_s and monotonic_s() - began_s >= self.patience_s:
                    raise
                self.knock()

    def _enter(self, welcome: Welcome) -> None:
        self.seat, self.run_name, self.sealing = welcome.seat, welcome.run, None
        self.listen("welcome", {"welcome": welcome})
        self.link.limit_bytes = PART_BYTES + MAX_LETTER_BYTES
        try:
            self.one_run.hold(welcome)
            ready = self.workshop.settle(welcome, self.fetch)
        except (Interrupted, SessionLost, SessionClosed, TransportRefused):
            raise
        except SplitftError as problem:
            self._decline(welcome.round, problem)
            raise
        self.link.limit_bytes = max(self.link.limit_bytes, self.workshop.limit_bytes())
        self.kept = folder_of(self.folder, welcome, ready.data)
        self.snapshots = Snapshots(self.kept, ready.data)
        self.openings = self.openings if self.openings.folder == self.kept else Openings(self.kept, self.one_run)
        self.link.send(Letter.READY, pack(msgspec.structs.replace(ready, snapshots=self.snapshots.list())))
        self.listen("ready", {"rounds": welcome.rounds, "round": welcome.round})

    def _serve(self) -> Finished:
        while True:
            message = self._next("the next round")
            if message.kind == Letter.OPEN:
                self._work(read(Open, message.payload))
            elif message.kind in FROM_SERVER:
                self._seal(message)
            elif message.kind == Letter.FINISHED:
                finished = read(Finished, message.payload)
                if finished.over:
                    self.one_run.over()
                    self.listen("finished", {"rounds": finished.rounds, "adapter": self.workshop.keep_adapter(finished, self.fetch)})
                    return finished
                self.listen("away", {"text": finished.text})
            else:
                with suppress(_Dropped):  # of a round that is over for this client anyway
                    self._aside(message)

    def _work(self, opened: Open) -> None:
        """The round that was opened, and whatever is opened in its midst."""
        following: Open | None = opened
        while following is not None:
            present, following = following, None
            try:
                if present.purpose == "evaluate":
                    self._measure(present)
                else:
                    self._train(present)
            except _Another as other:
                following = other.opened
            except _Dropped:
                self.listen("dropped", {"round": present.round})
            except (Interrupted, ExcludedError, SessionLost, SessionClosed, TransportRefused):
                raise
            except SplitftError as problem:  # the server need not wait for this client
                self._decline(present.round, problem)
                raise

    def _measure(self, opened: Open) -> None:
        start = decode(opened.frame).read(ScoreStart)
        self.workshop.check_score(start)
        federation = self.workshop.federation(self.seat, start.cut, start.tail_blocks, start.exit_on_client, self.fetch)
        self.openings.count(start.round, opened.purpose, federation.settings, self._disk_refused)
        self.round = opened.round
        self.link.send(Letter.OPENED, pack(Opened(opened.round)))
        self._drive(measure(federation, self.seat, opened.frame, self.workshop.check_adapters), None)
        self.listen("measured", {"round": opened.round})

    def _train(self, opened: Open) -> None:
        start = decode(opened.frame).read(RoundStart)
        self.workshop.check_round(start)
        self.round = opened.round
        self.listen("round", {"round": opened.round, "cut": start.cut, "steps": start.local_steps})
        federation = self.workshop.federation(self.seat, start.cut, start.tail_blocks, start.exit_on_client, self.fetch)
        try:
            state = self._state_for(opened)
        except CheckpointError as problem:
            self.listen("warning", {"text": str(problem)})
            self.link.send(Letter.OPENED, pack(Opened(opened.round, ok=False)))
            return
        each, moments = federation.settings.gradient_accumulation, b""
        batches = range(state.batches, state.batches + start.local_steps * each)
        self.openings.count(start.round, opened.purpose, federation.settings, self._disk_refused, batches)
        if opened.returns[0] < opened.returns[1] and state.first is not None and state.second is not None:
            moments = moments_packet(federation.layout, state.first, state.second, opened.returns)
        if opened.moments and state.first is not None and state.second is not None:
            state = given(federation.layout, state, opened.moments, opened.gives)
        client = Client(federation, self.seat, state)
        client.window = self.window
        client.inspect_gradient, client.inspect_adapters = self.workshop.check_gradient, self.workshop.check_adapters
        self.link.send(Letter.OPENED, pack(Opened(opened.round, moments=moments)))
        insider = self.workshop.insider(self.seat)
        if insider is not None and opened.returns[0] < opened.returns[1]:
            raise PolicyError("the server asks for moments of blocks that secure aggregation hides.", "talk to its operator.")
        try:
            self._drive(client.round(opened.frame), client)
        finally:  # of a step that is not done, batches may have left
            self.openings.unsent(batches[(len(client.step_losses) + (not self.ended)) * each :])
        if insider is not None:
            self.one_run.keep()
            row = client.bank.values[0].detach().cpu().numpy()
            columns = own_ranges(federation, client.plan)
            self.sealing = SealingMember(insider, self.run_name, opened.round, columns, row, client.targets, Pledges(self.kept / "sealed"))
        self.listen("done", {"round": opened.round, "loss": client.step_losses[-1] if client.step_losses else None})

    def _seal(self, message: Message) -> None:
        """Answer a letter of secure aggregation. What is wrong with it ends this client: nobody honest sends such letters."""
        try:
            if self.sealing is None:
                raise ProtocolError(f"letter {message.kind} of a sealing this client is not in.", "check the server's version.")
            self.link.send(*self.sealing.answer(message.kind, bytes(message.payload)))
        except SplitftError as problem:
            self._decline(self.round, problem)
            raise

    def _decline(self, index: int, problem: SplitftError) -> None:
        """Tell the server, before this client leaves, that it will not or cannot go on."""
        with suppress(SessionLost, SessionClosed, TransportRefused):  # the client's own operator is told in any case
            self.link.send(Letter.REFUSED, pack(refusal(index, problem)))

    def _state_for(self, opened: Open) -> ClientState:
        """What the server says to begin from. Raises CheckpointError when it is not there."""
        if opened.base is None:
            return ClientState(batches=opened.batches)
        state = self.snapshots.load(opened.base)
        if state.batches != opened.batches:
            raise CheckpointError(f"the snapshot has {state.batches} batches, the server counts {opened.batches}.", "it begins afresh.")
        return state

    def _drive(self, talk: Talk, client: Client | None) -> None:
        """Carry a talk over the link. Before the update leaves, the state behind it is on the disk."""
        self.waiting_s, self.ended, reply = 0.0, False, None
        while True:
            try:
                message = next(talk) if reply is None else talk.send(reply)
            except StopIteration:
                self._let_go()
                return
            if message is not NEXT:
                if client is not None and message[4] == Type.ROUND_END:
                    self._close(client, message)
                self.link.send(Letter.FRAME, message)
                self._let_go()
                if client is not None:
                    self.listen("sent", {"steps": len(client.step_losses), "loss": client.step_losses[-1] if client.step_losses else None})
            reply = NOTHING if isinstance(message, Posted) and message is not NEXT else self._reply(client)

    def _close(self, client: Client, end: bytes) -> None:
        """Before a ROUND_END leaves: snapshot, then the report."""
        digest, state, self.ended = hashlib.sha256(end).hexdigest(), client.state, True
        while True:
            try:
                self.snapshots.save(self.round, digest, state)
                break
            except OSError as problem:
                short = shortage(problem, self.kept.parent, self.snapshots.needed_bytes(state))
                self.listen("warning", {"text": f"the snapshot of round {self.round} cannot be written: {problem}{short}; trying again."})
                self._pause()
                if opened := next((one for one in self.stash if one.kind == Letter.OPEN), None):
                    self.stash.remove(opened)
                    raise _Another(read(Open, opened.payload)) from problem
        seconds, facts = {**client.seconds, "waiting": self.waiting_s}, {place: dict(sums) for place, sums in client.facts().items()}
        self.link.send(Letter.REPORT, pack(Report(self.round, client.step_losses, client.tokens, seconds, facts)))

    def _disk_refused(self, problem: SplitftError) -> None:
        self.listen("warning", {"text": f"{problem} Trying again."})
        self._pause()

    def _pause(self) -> None:
        """Wait for the disk, and hear in the meantime that the server wants something else."""
        with self.waits.waiting("the disk"):
            message = self.link.receive(DISK_PAUSE_S)
        self._look_at_stop()
        if message is not None:
            message.release()
            self._keep(message)

    def _let_go(self) -> None:
        """Release the last answer. That wakes the event loop, so it waits until the next message is on its way."""
        if self.answer is not None:
            self.answer.release()
            self.answer = None

    def _reply(self, client: Client | None) -> bytes:
        """The next frame of the server; what else it says meanwhile is followed."""
        began_s = monotonic_s()
        while True:
            message = self._next("the server's answer")
            if message.kind == Letter.FRAME:
                self.waiting_s += monotonic_s() - began_s
                self._let_go()
                self.answer = message
                return bytes(message.payload)
            if message.kind == Letter.OPEN:
                raise _Another(read(Open, message.payload))
            if message.kind == Letter.FINISH and client is not None:
                client.stop_early = True
            elif message.kind == Letter.FINISHED:
                finished = read(Finished, message.payload)
                self.listen("away", {"text": finished.text})
                if finished.over:
                    self.stash.append(message)
                    raise _Dropped
            else:
                self._aside(message)

    def _aside(self, message: Message) -> None:
        """Letters that may come at any time."""
        if message.kind == Letter.COMMITTED:
            committed = read(Committed, message.payload)
            if committed.counted:
                self.snapshots.prune(committed.round)
            self.listen("committed", {"round": committed.round, "counted": committed.counted})
        elif message.kind == Letter.REFUSED:
            refused = read(Refused, message.payload)
            self.listen("refused", {"round": refused.round, "text": refused.text, "remedy": refused.remedy, "strikes": refused.strikes})
            if refused.final:
                raise ExcludedError(refused.text, refused.remedy)
            if refused.round == self.round:
                raise _Dropped
        elif message.kind == Letter.FRAME:
            message.release()  # of a round that is over
        elif message.kind not in (Letter.PART, Letter.FINISH):
            raise ProtocolError(f"the server sent letter {message.kind}, which only a client sends.", "check the server's version.")

    def _next(self, what: str) -> Message:
        if self.stash:
            return self.stash.popleft()
        return self._receive(what)

    def _receive(self, what: str) -> Message:
        """The next message, however long it takes: silence is the link's affair. Raises Interrupted when asked to stop."""
        with self.waits.waiting(what, "server"):
            while True:
                message = self.link.receive(LOOK_S)
                self._look_at_stop()
                self._look_at_link()
                if message is not None:
                    if message.kind != Letter.FRAME:
                        message.release()
                    return message

    def _look_at_link(self) -> None:
        if self.link.connected:
            self.connected_s = monotonic_s()
        elif monotonic_s() - self.connected_s > KNOCK_S:
            self.connected_s = monotonic_s()
            self.knock()

    def _look_at_stop(self) -> None:
        if self.stop():
            raise Interrupted("Stopped; what the server has committed is on this disk.", "start the same command again to go on.")

    def _keep(self, message: Message) -> None:
        """Lay a letter aside for later."""
        if len(self.stash) >= MOST_STASHED:
            raise ProtocolError(f"the server sent {len(self.stash)} letters while it was asked for something else.", "check its version.")
        self.stash.append(message)

    def fetch(self, sha256: str, offset: int) -> bytes:
        """Bytes of a part of the model from the server."""
        self.link.send(Letter.FETCH, pack(Fetch(sha256, offset)))
        while True:
            message = self._receive("a piece of the model")
            if message.kind == Letter.PART:
                part = read(Part, message.payload)
                if (part.sha256, part.offset) == (sha256, offset):
                    return part.data
            elif message.kind == Letter.REFUSED:
                refused = read(Refused, message.payload)
                if refused.round == 0 and not refused.final:  # of no round: it was the piece that was refused, and none will come
                    raise ProtocolError(f"the server does not give a piece of the model: {refused.text}", refused.remedy)
                self._aside(message)
            else:
                self._keep(message)
