"""Reliable, ordered messages over streams that come and go: the part that both ends of a session share. Lives in the event loop.

Each side numbers its messages from 1 and keeps one until the other has it whole. Every chunk acknowledges: what was received (it need
not be sent again) and what was released (there is room for more). A new stream begins where the handshake says the other stands, in the
middle of a message if need be. A piece that is already there is passed over; one that is missing ends the stream, not the session.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from splitft.errors import ProtocolError
from splitft.transport.budget import Budget
from splitft.transport.framing import Close, Damaged, Form, decode, encode, read_note
from splitft.transport.inbox import Inbox
from splitft.transport.loop import Mailbox
from splitft.transport.outbox import Outbox
from splitft.transport.pipe import Pipe
from splitft.transport.values import Counts, Limits, Message, Timing

# What a server may ask of a client, and how many beats of it a client waits for.
SHORTEST_HEARTBEAT_S, LONGEST_HEARTBEAT_S, SILENT_BEATS = 0.005, 600.0, 3.0
LEAST_BYTES_PER_S = 1 << 10
LONGEST_ACKNOWLEDGE_S = 0.1
FAREWELL_S = 5.0
# The other side may be told to beat, and to lose patience, sooner than this one: it hears something for every so many of its beats.
BEATS_TO_ANSWER = 3
SHORTEST_TICK_S = 0.005
# Sessions of one server beat together, at so many moments of a heartbeat; the other side waits so much longer before it beats unasked.
BEATS_PER_HEARTBEAT = 2
FOLLOW = 1.5

What: TypeAlias = Literal["broken", "left", "closed", "lie"]


@dataclass(frozen=True)
class Ending:
    """How a stream ended: "broken" (the session may go on), "left" or "closed" (it is over), "lie" (the other side broke the protocol)."""

    what: What
    text: str
    close: Close | None = None


class _Release:
    """Releases one message, once, from any thread."""

    def __init__(self, flow: Flow, total: int) -> None:
        self._flow, self._total, self._tickets = flow, total, [1]

    def __call__(self) -> None:
        try:
            self._tickets.pop()
        except IndexError:
            return
        self._flow.mail.post(lambda: self._flow.release(self._total))


class Flow:
    """One session's messages, both ways. `deliver` is called in the loop with each message; `moved` whenever the other side has taken any.
    `leads`: this side gives the signs of life, all its sessions together, and the other answers: that wakes a server of many least often.

    Public methods are for the loop thread; other threads go through `mail`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        limits: Limits,
        timing: Timing,
        budget: Budget,
        deliver: Callable[[Message], None],
        moved: Callable[[], None] = lambda: None,
        leads: bool = True,
    ) -> None:
        self.loop, self.mail = loop, Mailbox(loop)
        self._limits, self._timing, self._budget = limits, timing, budget
        self._deliver, self._moved = deliver, moved
        self._heartbeat_s = timing.heartbeat_s if leads else min(FOLLOW * timing.heartbeat_s, timing.liveness_s / 2)
        self._grid_s = timing.heartbeat_s / BEATS_PER_HEARTBEAT if leads else 0.0
        self.outbox = Outbox(limits.chunk_bytes, limits.window)
        self.inbox = Inbox(limits.window, limits.buffer_bytes, budget, self._arrived)
        self._past = Counts()
        self._told = (0, 0)
        self.pipe: Pipe | None = None
        self.ended: asyncio.Future[Ending] = loop.create_future()
        self._tasks: list[asyncio.Task[None]] = []
        self._wake = asyncio.Event()
        self._tick_handle: asyncio.TimerHandle | None = None
        self._acknowledge_handle: asyncio.TimerHandle | None = None
        self._beat = self._waiting = self._over = False
        self._unanswered = 0
        self._farewell: tuple[bytes, Ending] | None = None
        self.heard_s = self._spoke_s = loop.time()
        self._mark = (0.0, 0)

    def follow(self, heartbeat_s: float) -> None:
        """Give signs of life as often as the server does, and wait for its own long enough. Raises ProtocolError for a mad pace."""
        if not SHORTEST_HEARTBEAT_S <= heartbeat_s <= LONGEST_HEARTBEAT_S:
            raise ProtocolError(f"the server asks for a sign of life every {heartbeat_s} s.", "Talk to its operator.")
        beat_s = min(self._timing.heartbeat_s, heartbeat_s)
        self._timing = replace(self._timing, heartbeat_s=beat_s, liveness_s=max(self._timing.liveness_s, SILENT_BEATS * heartbeat_s))
        self._heartbeat_s = min(FOLLOW * beat_s, self._timing.liveness_s / 2)

    @property
    def progress(self) -> int:
        """Grows with every message that came through either way."""
        return self.outbox.acknowledged + self.inbox.received

    def counts(self) -> Counts:
        """The counts so far, the stream of the moment included; from any thread."""
        past, pipe = self._past, self.pipe
        now = pipe.counts if pipe is not None else Counts()
        return replace(
            past,
            bytes_sent=past.bytes_sent + now.bytes_sent,
            bytes_received=past.bytes_received + now.bytes_received,
            messages_sent=self.outbox.written,
            messages_received=self.inbox.received,
            duplicates=self.inbox.duplicates,
        )

    # Streams

    def attach(self, pipe: Pipe, received: int, filled: int, first: Sequence[bytes] = ()) -> None:
        """Go on over `pipe`; the other side has messages up to `received` and `filled` bytes of the next (see `Outbox.can_resume`).

        `first`: chunks that go before everything else.
        """
        self.outbox.resume(received, filled)
        self.pipe, self.ended, self._wake = pipe, self.loop.create_future(), asyncio.Event()
        self.heard_s = self._spoke_s = self.loop.time()
        self._told, self._beat, self._mark = (self.inbox.received, 0), False, (self.heard_s, self.inbox.filled)
        self._tasks = [self.loop.create_task(self._read(pipe)), self.loop.create_task(self._write(pipe, first))]
        self._tick()
        self._acknowledge_soon()
        self._moved()

    def resumed(self) -> None:
        """Count one more connection of the same session."""
        self._past = replace(self._past, reconnects=self._past.reconnects + 1)

    def detach(self) -> None:
        """Let go of the stream; unsent and unacknowledged messages are kept for the next."""
        if self.pipe is None:
            return
        counts = self.counts()
        self._past, self.pipe = counts, None
        for task in self._tasks:
            task.cancel()
        for handle in (self._tick_handle, self._acknowledge_handle):
            if handle is not None:
                handle.cancel()
        self._tick_handle = self._acknowledge_handle = None
        self.outbox.pause()
        self.inbox.pause()

    def abandon(self, text: str) -> None:
        """End the stream from this side and let go of it."""
        self._end("broken", text)
        self.detach()

    def dispose(self) -> None:
        """The session is over: forget everything and give all memory back."""
        self.detach()
        if not self._over:
            self._over = True
            self.outbox.clear()
            self.inbox.dispose()

    def say_farewell(self, note: bytes, ending: Ending) -> None:
        """End the stream with `note`, after the messages that may still go; with patience for a few seconds."""
        if self.ended.done():
            self.ended = self.loop.create_future()
        self._farewell = (note, ending)
        self._wake.set()
        self.loop.call_later(min(FAREWELL_S, self._timing.liveness_s), self._settle, self.ended, ending)

    def _end(self, what: What, text: str, close: Close | None = None) -> None:
        self._settle(self.ended, Ending(what, text, close))

    @staticmethod
    def _settle(ended: asyncio.Future[Ending], ending: Ending) -> None:
        if not ended.done():
            ended.set_result(ending)

    # Sending

    def push(self, kind: int, payload: bytes | bytearray | memoryview) -> None:
        """Queue a message."""
        if not self._over:
            self.outbox.push(kind, payload)
            self._wake.set()

    async def _write(self, pipe: Pipe, first: Sequence[bytes]) -> None:
        for chunk in first:
            if not await pipe.write(chunk):
                self._end("broken", pipe.why)
                return
        while True:
            following = self._next_chunk()
            if following is not None:
                if not await pipe.write(following):
                    self._end("broken", pipe.why)
                    return
                self._spoke_s = self.loop.time()
            elif self._farewell is not None:
                note, ending = self._farewell
                if not await pipe.write(note) or ending.what != "left":
                    self._settle(self.ended, ending)
                return  # who leaves waits for the server to end the stream, so that the last word is not cut off
            else:
                self._wake.clear()
                await self._wake.wait()

    def _next_chunk(self) -> bytes | None:
        piece, received, released = self.outbox.next(), self.inbox.received, self.inbox.released
        if piece is None and not self._beat:
            return None
        self._beat, self._told, self._unanswered = False, (received, released), 0
        if piece is None:
            return encode(Form.BEAT, sequence=self.outbox.before, received=received, released=released)
        return encode(
            Form.DATA,
            piece.bytes,
            kind=piece.kind,
            total=piece.total,
            offset=piece.offset,
            sequence=piece.sequence,
            received=received,
            released=released,
            sealed=self.pipe is not None and self.pipe.sealed,
        )

    # Receiving

    async def _read(self, pipe: Pipe) -> None:
        try:
            while (data := await pipe.read()) is not None:
                self.heard_s = self.loop.time()
                short_bytes = self.feed(data)
                if short_bytes:
                    await self._wait_for_memory(short_bytes)
                    self.feed(data, reserved=True)
            if self._farewell is not None:
                self._settle(self.ended, self._farewell[1])
            self._end("broken", pipe.why)
        except Damaged as problem:
            self._end("broken", f"damaged on the way: {problem}")
        except ProtocolError as problem:
            self._end("lie", problem.message)

    async def _wait_for_memory(self, count: int) -> None:
        """Read nothing until `count` bytes are had; the silence meanwhile is our own."""
        self._waiting = True
        try:
            await self._budget.wait(count)
        finally:
            self._waiting, self.heard_s = False, self.loop.time()
            self._mark = (self.heard_s, self.inbox.filled)

    def feed(self, data: bytes, reserved: bool = False) -> int:
        """Take in one chunk; returns the bytes of memory that must be had first (then call again with `reserved`), 0 when done.

        Raises Damaged where the stream cannot be trusted any more, ProtocolError where the other side cannot.
        """
        chunk = decode(data, self.pipe is not None and self.pipe.sealed)
        if chunk.form in (Form.DATA, Form.BEAT) and self.outbox.take(chunk.received, chunk.released):
            self._wake.set()
            self._moved()
        if chunk.form is Form.DATA:
            begun = self.inbox.filled
            short_bytes = self.inbox.take(chunk, reserved)
            if not begun:
                self._mark = (self.loop.time(), self.inbox.filled)
            self._acknowledge_soon()
            return short_bytes
        if chunk.form is Form.BEAT:
            if chunk.sequence > self.inbox.received:
                raise Damaged(f"message {self.inbox.received + 1} of {chunk.sequence} is missing")
            self._unanswered += 1
            if self._unanswered >= BEATS_TO_ANSWER or self.loop.time() - self._spoke_s >= self._timing.heartbeat_s / 2:
                self._acknowledge_now()
        elif chunk.form is Form.CLOSE:
            close = read_note(Close, chunk.piece)
            self._end("closed", close.text, close)
        elif chunk.form is Form.BYE:
            self._end("left", "the client has left")
        return 0

    def _arrived(self, kind: int, payload: bytearray | memoryview, total: int) -> None:
        self._deliver(Message(kind, payload, _Release(self, total)))

    def release(self, total: int) -> None:
        """One delivered message of `total` bytes has been dealt with."""
        self.inbox.release(total)
        self._acknowledge_soon()

    # Signs of life

    def _acknowledge_soon(self) -> None:
        """Acknowledge with the next chunk, or alone after a moment; at once where the other side may be waiting for room."""
        if self.pipe is None:
            return
        if self.inbox.released - self._told[1] >= max(1, self._limits.window // 2):
            self._acknowledge_now()
        elif self._acknowledge_handle is None and self._told != (self.inbox.received, self.inbox.released):
            delay_s = min(LONGEST_ACKNOWLEDGE_S, self._timing.heartbeat_s / 4)
            self._acknowledge_handle = self.loop.call_later(delay_s, self._acknowledge_later)

    def _acknowledge_later(self) -> None:
        self._acknowledge_handle = None
        if self._told != (self.inbox.received, self.inbox.released):
            self._acknowledge_now()

    def _acknowledge_now(self) -> None:
        self._beat = True
        self._wake.set()

    def _tick(self) -> None:
        """The one timer of an idle session: a sign of life when due, the end of the stream after silence or a trickle."""
        now_s, liveness_s = self.loop.time(), self._timing.liveness_s
        since_s, since_bytes = self._mark
        if self._waiting:
            silent_at_s = now_s + liveness_s
        else:
            silent_at_s = self.heard_s + liveness_s
            if silent_at_s <= now_s:
                self._end("broken", f"nothing came for {now_s - self.heard_s:.1f} s")
        if not self._waiting and self.inbox.filled and now_s - since_s >= liveness_s:
            if self.inbox.filled - since_bytes < LEAST_BYTES_PER_S * (now_s - since_s):
                self._end("broken", f"a message came in at less than {LEAST_BYTES_PER_S} bytes/s")
            self._mark = (now_s, self.inbox.filled)
        if now_s - self._spoke_s >= self._heartbeat_s - self._grid_s:
            self._acknowledge_now()
            self._spoke_s = now_s
        due_s = max(min(self._spoke_s + self._heartbeat_s, silent_at_s), now_s + SHORTEST_TICK_S)
        if self._grid_s:
            due_s = math.ceil(due_s / self._grid_s) * self._grid_s
        self._tick_handle = self.loop.call_at(due_s, self._tick)
