"""The sending half of a session: messages are kept until the other side has them whole, and sent no further ahead than it has room."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from splitft.errors import ProtocolError
from splitft.transport.framing import FAULT

LEAST_CHUNK_BYTES = 4 << 10
# Pieces grow from here to the limit with every acknowledgment, and shrink when a connection breaks.
FIRST_CHUNK_BYTES = 256 << 10


@dataclass(frozen=True)
class Piece:
    """What goes into the next chunk."""

    kind: int
    total: int
    offset: int
    sequence: int
    bytes: memoryview


@dataclass(frozen=True)
class _Outgoing:
    kind: int
    payload: memoryview


class Outbox:
    """Messages on their way out, numbered from 1. Numbers: `sent` were given out, `written` written whole at least once, `acknowledged`
    received whole by the other side, `credit` released by it: at most `window` beyond that may be out."""

    def __init__(self, chunk_bytes: int, window: int) -> None:
        self._most_chunk_bytes, self._window = chunk_bytes, window
        self.sent = self.written = self.acknowledged = self.credit = 0
        self._queue: deque[_Outgoing] = deque()
        self._cursor, self._offset, self._chunk_bytes = 1, 0, min(chunk_bytes, FIRST_CHUNK_BYTES)

    @property
    def idle(self) -> bool:
        """Whether the other side has every message."""
        return self.acknowledged == self.sent

    @property
    def before(self) -> int:
        """The last message that this stream has carried whole, or did not need to."""
        return self._cursor - 1

    def push(self, kind: int, payload: bytes | bytearray | memoryview) -> None:
        """Queue a message."""
        self.sent += 1
        self._queue.append(_Outgoing(kind, memoryview(payload)))

    def can_resume(self, received: int, filled: int) -> bool:
        """Whether what comes after message `received` and `filled` bytes of the next is still here."""
        if not self.acknowledged <= received <= self.written:
            return False
        place = received - self.acknowledged
        return not filled or (place < len(self._queue) and filled < len(self._queue[place].payload))

    def resume(self, received: int, filled: int) -> None:
        """Go on there, on a new stream."""
        self._drop(received)
        self._cursor, self._offset = received + 1, filled

    def pause(self) -> None:
        """The stream broke. With something under way: perhaps it is too slow for pieces of this size within the time of silence."""
        if self._offset or self.acknowledged < self.before:
            self._chunk_bytes = max(LEAST_CHUNK_BYTES, self._chunk_bytes // 8)

    def next(self) -> Piece | None:
        """The next piece to write; None while there is nothing to send or no room for it."""
        sequence, start = self._cursor, self._offset
        if sequence > self.sent or sequence > self.credit + self._window:
            return None
        outgoing = self._queue[sequence - self.acknowledged - 1]
        total, piece = len(outgoing.payload), outgoing.payload[start : start + self._chunk_bytes]
        self._offset += len(piece)
        if self._offset >= total:
            self._cursor, self._offset = sequence + 1, 0
            self.written = max(self.written, sequence)
        return Piece(outgoing.kind, total, start, sequence, piece)

    def take(self, received: int, released: int) -> bool:
        """Take an acknowledgment; False: nothing new. Raises ProtocolError for one of messages that were never sent."""
        if received > self.written or released > received:
            raise ProtocolError(f"{received} messages are acknowledged of {self.written}, {released} released.", FAULT)
        if received <= self.acknowledged and released <= self.credit:
            return False
        if received > self.acknowledged:
            self._chunk_bytes = min(self._most_chunk_bytes, 2 * self._chunk_bytes)
        self._drop(received)
        self.credit = max(self.credit, released)
        return True

    def clear(self) -> None:
        """Forget everything."""
        self._queue.clear()
        self.sent = self.acknowledged

    def _drop(self, received: int) -> None:
        while self.acknowledged < received:
            self._queue.popleft()
            self.acknowledged += 1
