"""The receiving half of a session: pieces become messages, in order, once each, within limits that are checked before memory is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from splitft.errors import ProtocolError
from splitft.transport.budget import Budget
from splitft.transport.framing import FAULT, Chunk, Damaged
from splitft.transport.values import HIGHEST_KIND


@dataclass
class _Partial:
    kind: int
    total: int
    buffer: bytearray
    filled: int


class Inbox:
    """Messages on their way in. `whole` is called with kind, payload and the bytes it holds of the budget, for each message in turn.

    `limit_bytes`: the largest message allowed now. At most `window` messages may have come that were not released.
    """

    def __init__(self, window: int, limit_bytes: int, budget: Budget, whole: Callable[[int, bytearray | memoryview, int], None]) -> None:
        self._window, self._budget, self._whole = window, budget, whole
        self.limit_bytes = limit_bytes
        self.received = self.released = self.duplicates = 0
        self._held_bytes = 0
        self._partial: _Partial | None = None
        self._over = False

    @property
    def filled(self) -> int:
        """Bytes of the next message that are there already."""
        return 0 if self._partial is None else self._partial.filled

    def take(self, chunk: Chunk, reserved: bool) -> int:
        """Take a piece in; returns the bytes of memory that must be had first (then call again with `reserved`), 0 when it is done.

        Raises Damaged where something is missing, ProtocolError for what no honest sender sends.
        """
        if chunk.sequence <= self.received:
            self.duplicates += 1
            return 0
        if chunk.sequence > self.received + 1:
            raise Damaged(f"message {self.received + 1} is missing, {chunk.sequence} came")
        if self._partial is not None:
            self._fill(self._partial, chunk)
            return 0
        if chunk.offset:
            raise Damaged(f"message {chunk.sequence} begins at byte {chunk.offset}")
        self._check(chunk)
        if not reserved and not self._budget.take(chunk.total):
            return chunk.total
        self._held_bytes += chunk.total
        if len(chunk.piece) == chunk.total:
            self._arrive(chunk.kind, chunk.piece, chunk.total)
        else:
            self._partial = _Partial(chunk.kind, chunk.total, bytearray(chunk.total), 0)
            self._fill(self._partial, chunk)
        return 0

    def _check(self, chunk: Chunk) -> None:
        if chunk.kind > HIGHEST_KIND:
            raise ProtocolError(f"a message has the kind {chunk.kind}; allowed is 0 to {HIGHEST_KIND}.", FAULT)
        if chunk.total > self.limit_bytes:
            raise ProtocolError(f"a message of {chunk.total} bytes is announced; allowed now is {self.limit_bytes}.", FAULT)
        if chunk.sequence > self.released + self._window:
            raise ProtocolError(f"message {chunk.sequence} came with {self.released} released; the window is {self._window}.", FAULT)

    def _fill(self, partial: _Partial, chunk: Chunk) -> None:
        if (chunk.kind, chunk.total) != (partial.kind, partial.total):
            raise ProtocolError(f"message {chunk.sequence} changed its kind or length on the way.", FAULT)
        end = chunk.offset + len(chunk.piece)
        if end <= partial.filled:
            self.duplicates += 1
            return
        if chunk.offset != partial.filled:
            raise Damaged(f"message {chunk.sequence} lacks bytes {partial.filled} to {chunk.offset}")
        partial.buffer[chunk.offset : end] = chunk.piece
        partial.filled = end
        if end == partial.total:
            self._partial = None
            self._arrive(partial.kind, partial.buffer, partial.total)

    def _arrive(self, kind: int, payload: bytearray | memoryview, total: int) -> None:
        self.received += 1
        self._whole(kind, payload, total)

    def release(self, total: int) -> None:
        """One message of `total` bytes has been dealt with."""
        if not self._over:
            self._give(total)
            self.released += 1

    def pause(self) -> None:
        """The stream broke: keep what there is of the next message, unless others need the memory."""
        if self._budget.contested:
            self._drop_partial()

    def dispose(self) -> None:
        """Give all memory back."""
        self._over, self._partial = True, None
        self._give(self._held_bytes)

    def _drop_partial(self) -> None:
        if self._partial is not None:
            self._give(self._partial.total)
            self._partial = None

    def _give(self, count: int) -> None:
        self._held_bytes -= count
        self._budget.give(count)
