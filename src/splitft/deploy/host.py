"""The server's house: the door, the seats, what lies in the letter box. It knows who is there; what they do in a round is conduct.py's.

Everything a client sends ends in one queue that the engine's thread empties; only pieces of the model are handed out beside it, by
threads of their own, so that a client that arrives never waits for a round and a round never for it.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from splitft import __version__
from splitft.clock import monotonic_s
from splitft.deploy.excluded import Excluded, Exclusions
from splitft.deploy.letters import (
    MAX_LETTER_BYTES,
    PROTOCOL_MAJOR,
    PROTOCOL_MINOR,
    Fetch,
    Hello,
    Letter,
    Part,
    Ready,
    Refused,
    Welcome,
    pack,
    read,
)
from splitft.deploy.metrics import Metrics
from splitft.deploy.status import ServerStatus
from splitft.errors import CodecError, ProtocolError, SplitftError
from splitft.transport.listener import Listener
from splitft.transport.session import Arrived, Broken, Closed, Event, Opened, Resumed, Session
from splitft.transport.values import Admitted, Message, Peer, Refusal
from splitft.waits import Waits

if TYPE_CHECKING:
    from splitft.deploy.letters import PartInfo

ROSTER_LOOK_S = 1.0
MOST_ROWS = 1 << 31
DIGEST_LETTERS = 64
MOST_SNAPSHOTS = 1000
# Messages that may be on their way to a client that asks for pieces of the model; an honest one asks for one at a time.
PIECES_AHEAD = 16
FETCHERS = 2


class Doorkeeper(Protocol):
    """Who may come in: by certificate, or by name where there is none (loopback without TLS)."""

    def find(self, peer: Peer, hello: Hello) -> tuple[int, str] | Refusal:
        """Seat and name, or why not."""

    def listed(self, seat: int) -> bool:
        """Whether somebody has this seat."""

    def still(self, peer: Peer) -> str:
        """Why a client that is in has to go (revoked, replaced, expired); nothing if it may stay. Asked every second."""


class Parts(Protocol):
    """The pieces of the base model."""

    def read(self, sha256: str, offset: int, count: int) -> bytes: ...


@dataclass
class Seat:
    """One client as the server knows it while it runs."""

    number: int
    name: str
    session: Session | None = None
    ready: Ready | None = None
    strikes: int = 0
    excluded: bool = False
    # It has said goodbye: nobody need wait for it as for one whose line broke.
    left: bool = False
    # Bytes outside of rounds that the next round's ledger takes over: pieces of the model.
    fetched_bytes: int = 0

    @property
    def here(self) -> bool:
        """Whether it can be sent to, now or when its connection is back."""
        return self.session is not None and self.ready is not None and not self.excluded


@dataclass
class Host:
    """Seats by number, events in the order they came. `greet` makes the welcome of a seat."""

    doorkeeper: Doorkeeper
    parts: Parts
    greet: Callable[[int, str], Welcome]
    status: ServerStatus
    metrics: Metrics
    waits: Waits
    run: str
    offers: list[PartInfo] = field(default_factory=list)
    seats: dict[int, Seat] = field(default_factory=dict)
    inbox: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)
    draining: bool = False
    listener: Listener | None = None
    looked_s: float = 0.0
    each_second: Callable[[], None] = lambda: None
    strikes_allowed: int = 3
    row_tokens: int = 1 << 20

    def __post_init__(self) -> None:
        self.pool = ThreadPoolExecutor(FETCHERS, thread_name_prefix="splitft-parts")
        self.by_key: dict[str, int] = {}
        self.exclusions: Exclusions | None = None

    def remember(self, exclusions: Exclusions) -> None:
        """Keep out whom the run has excluded before, and note there whom it excludes from now on."""
        self.exclusions = exclusions
        for name, one in exclusions.clients.items():
            self.seats[one.seat] = Seat(one.seat, name, strikes=one.strikes, excluded=True)
            self.by_key[name] = one.seat
            self.status.seat(one.seat, state="excluded", name=name)
            self.status.event("warning", f"stays excluded; take it out of {exclusions.path} and start anew to let it in", one.seat)

    def admit(self, peer: Peer, greeting: bytes) -> Admitted | Refusal:
        """What the door says to a client; called in a thread of its own."""
        try:
            hello = read(Hello, greeting)
        except ProtocolError as problem:
            self.metrics.refused("protocol")
            return Refusal("protocol", problem.message, problem.remedy)
        answer = self._examine(peer, hello)
        if isinstance(answer, Refusal):
            self.metrics.refused(answer.code)
            self.status.event("warning", f"a client at {peer.address} was refused: {answer.text}")
            return answer
        number, name = answer
        self.by_key[name] = number
        return Admitted(name, pack(self.greet(number, name)), MAX_LETTER_BYTES, hello.takeover)

    def _examine(self, peer: Peer, hello: Hello) -> tuple[int, str] | Refusal:
        if hello.major != PROTOCOL_MAJOR:
            ours = f"this server {PROTOCOL_MAJOR}.{PROTOCOL_MINOR}"
            text = f"the client speaks protocol {hello.major}.{hello.minor} (splitft {hello.version[:40]}), {ours} (splitft {__version__})."
            return Refusal("version", text, "install the same splitft release on both sides.")
        if missing := sorted(set(hello.needs) - set(OFFERED)):
            return Refusal("version", f"the client needs {', '.join(missing)[:80]}, which this server has not.", "update the server.")
        if self.draining:
            return Refusal("draining", "the server is shutting down.", "it lets clients in again when it is back.")
        answer = self.doorkeeper.find(peer, hello)
        if not isinstance(answer, Refusal) and (seat := self.seats.get(answer[0])) is not None and seat.excluded:
            return Refusal(
                "excluded", f"{answer[1]} was excluded after {seat.strikes} refused messages.", "talk to the federation's operator."
            )
        return answer

    def deliver(self, event: Event) -> None:
        """From the loop's thread: pieces of the model are served aside, everything else is queued."""
        if isinstance(event, Arrived) and event.message.kind == Letter.FETCH:
            self.pool.submit(self._serve_piece, event.session, event.message)
            return
        self.inbox.put(event)

    def _serve_piece(self, session: Session, message: Message) -> None:
        from splitft.deploy.letters import PART_BYTES

        try:
            wanted = read(Fetch, message.payload)
            if session.backlog > PIECES_AHEAD:
                self.metrics.refused("part")
                session.close("protocol", f"{session.key} asks for pieces of the model and does not take them.", "update the client.")
                return
            data = self.parts.read(wanted.sha256, wanted.offset, PART_BYTES)
            session.send(Letter.PART, pack(Part(wanted.sha256, wanted.offset, data)))
            if (seat := self.seats.get(self.by_key.get(session.key, -1))) is not None:
                seat.fetched_bytes += len(data)
        except SplitftError as problem:
            self._refuse_piece(session, problem.message, problem.remedy)
        except OSError as problem:
            self.status.event("error", f"the base model cannot be read: {problem}")
            self._refuse_piece(
                session, "the server cannot read its base model.", "its operator has to mend it; then start the client again."
            )
        finally:
            message.release()

    def _refuse_piece(self, session: Session, text: str, remedy: str) -> None:
        self.metrics.refused("part")
        with suppress(SplitftError):  # a client that is gone needs no answer
            session.send(Letter.REFUSED, pack(Refused(0, text[:2000], remedy[:2000])))

    def take(self, timeout_s: float) -> list[Event]:
        """The next events: those that wait, or the first that comes within the time. Seats are up to date with them."""
        found: list[Event] = []
        try:
            found.append(self.inbox.get(timeout=timeout_s) if timeout_s > 0 else self.inbox.get_nowait())
            while True:
                found.append(self.inbox.get_nowait())
        except queue.Empty:
            pass
        self.metrics.queue(len(found))
        for event in found:
            self._note(event)
        self._look_at_roster()
        return found

    def _note(self, event: Event) -> None:
        """What an event says of its seat."""
        number = self.by_key.get(event.session.key)
        if number is None:
            return
        seat = self.seats.setdefault(number, Seat(number, event.session.key))
        if isinstance(event, Opened):
            seat.session, seat.ready, seat.left = event.session, None, False
            self.status.seat(number, state="connecting", name=seat.name)
            self.status.event("info", "connected", number)
        elif event.session is not seat.session:
            return
        elif isinstance(event, Broken):
            self.status.seat(number, state="absent")
            self.status.event("warning", "connection lost, waiting for it to come back", number)
        elif isinstance(event, Resumed):
            self.metrics.reconnected()
            self.status.seat(number, state="ready")
            self.status.event("info", "connection is back", number)
        elif isinstance(event, Closed):
            seat.session, seat.ready, seat.left = None, None, event.code == "closed"
            self.status.seat(number, state="excluded" if seat.excluded else "absent")
            self.status.event("warning", f"gone: {event.text or event.code}", number)
            if event.code == "protocol":
                self.strike(seat, 0, ProtocolError(event.text, "run the same splitft version on both sides."))
        elif isinstance(event, Arrived) and event.message.kind == Letter.READY:
            self._settle(seat, event.message)
        elif isinstance(event, Arrived) and event.message.kind == Letter.REFUSED and seat.ready is None:
            self._declined(seat, event.message)

    def _settle(self, seat: Seat, message: Message) -> None:
        """A client says it can take part."""
        try:
            ready = read(Ready, message.payload)
            if problem := self._impossible(ready):
                raise ProtocolError(f"{seat.name} says it has {problem}.", "check the client's data.")
            seat.ready = ready
            self.status.seat(seat.number, state="ready", memory_bytes=ready.memory_bytes)
            self.status.event("info", f"ready with {ready.rows} rows of training data", seat.number)
        except ProtocolError as problem:
            self.strike(seat, 0, problem)
        finally:
            message.release()

    def _declined(self, seat: Seat, message: Message) -> None:
        """A client has read what the run is about, and says why it does not take part."""
        try:
            self.status.event("warning", f"does not take part: {read(Refused, message.payload).text}", seat.number)
        except ProtocolError as problem:
            self.strike(seat, 0, problem)
        finally:
            message.release()

    def _impossible(self, ready: Ready) -> str:
        """What a client cannot have. Cost models, limits and the run's notes are made of these."""
        rows, most = 1 <= ready.rows <= MOST_ROWS and 0 <= ready.held_out_rows <= MOST_ROWS, ready.rows * self.row_tokens
        if not (rows and ready.rows <= ready.tokens <= most):
            return f"{ready.rows} rows of {ready.tokens} tokens and {ready.held_out_rows} held out; a row has at most {self.row_tokens}"
        if not (0 <= ready.documents <= MOST_ROWS and 0 <= ready.memory_bytes < 1 << 60):
            return f"{ready.documents} documents and {ready.memory_bytes} bytes of memory"
        if len(ready.data) > DIGEST_LETTERS or len(ready.snapshots) > MOST_SNAPSHOTS:
            return f"data with a digest of {len(ready.data)} letters and {len(ready.snapshots)} snapshots"
        return ""

    def number_of(self, session: Session) -> int:
        """The seat that a session came in for."""
        return self.by_key.get(session.key, -1)

    def seat_of(self, session: Session) -> Seat | None:
        """The seat a session belongs to, if it is still that seat's."""
        seat = self.seats.get(self.by_key.get(session.key, -1))
        return seat if seat is not None and seat.session is session else None

    def send_away(self, number: int, code: str, problem: SplitftError) -> None:
        """End a client's session: it cannot do what is asked of it, and nobody else is to suffer."""
        seat = self.seats[number]
        self.metrics.refused(code)
        self.status.event("warning", f"sent away: {problem.message}", number)
        seat.ready = None
        if seat.session is not None:
            seat.session.close(code, problem.message[:2000], problem.remedy[:2000])

    def excluded(self, number: int) -> bool:
        """Whether nothing more is expected of a seat."""
        return number in self.seats and self.seats[number].excluded

    def strike(self, seat: Seat, round_index: int, problem: SplitftError) -> None:
        """Tell a client that its message was refused; at the last of the `strikes_allowed` it is excluded."""
        seat.strikes += 1
        self.metrics.refused("codec" if isinstance(problem, CodecError) else "protocol")
        self.status.event("error", f"refused ({seat.strikes}): {problem.message}", seat.number)
        if seat.strikes >= self.strikes_allowed and not seat.excluded:
            seat.excluded = True
            self._note_exclusion(seat, problem)
        with suppress(SplitftError):  # its session may be over by now, and there is nobody to tell
            self._tell_strike(seat, round_index, problem)

    def _note_exclusion(self, seat: Seat, problem: SplitftError) -> None:
        """On the disk before the client hears of it: it must not come back after a crash."""
        try:
            if self.exclusions is not None:
                self.exclusions.add(seat.name, Excluded(seat.number, seat.strikes, problem.message[:500]))
        except SplitftError as trouble:
            self.status.event("error", f"excluded until the server ends only: {trouble.message}", seat.number)

    def _tell_strike(self, seat: Seat, round_index: int, problem: SplitftError) -> None:
        if seat.session is not None:
            refused = Refused(round_index, problem.message[:2000], problem.remedy[:2000], seat.strikes, seat.excluded)
            seat.session.send(Letter.REFUSED, pack(refused))
            if seat.excluded:
                self.status.seat(seat.number, state="excluded")
                seat.session.close("excluded", f"{seat.name} was excluded after {seat.strikes} refused messages.", "talk to the operator.")

    def _look_at_roster(self) -> None:
        """Close the sessions of clients that were revoked, and show a renewed certificate."""
        if monotonic_s() - self.looked_s < ROSTER_LOOK_S:
            return
        self.looked_s = monotonic_s()
        self.each_second()
        for seat in self.seats.values():
            if seat.session is not None and (why := self.doorkeeper.still(seat.session.peer)):
                self.status.event("warning", f"put out: {why}", seat.number)
                self.metrics.refused("roster")
                seat.session.close("roster", why, "talk to the federation's operator.")

    def close(self, grace_s: float) -> None:
        """Let nobody in any more and hang up."""
        self.draining = True
        if self.listener is not None:
            self.listener.stop(grace_s)
        self.pool.shutdown(wait=False, cancel_futures=True)


# What a client may ask for by name in its HELLO; a server without it refuses at the door.
OFFERED = ("frames-1", "parts-1", "score-1")
