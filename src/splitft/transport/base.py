"""The seam of transports: move whole messages between clients and a handler. A transport knows bytes, not training.

A client's round is a generator that yields the messages to send and is sent the replies; the handler answers what is waiting. A client
that overlaps its messages yields them as `Posted`, which is answered with nothing at once, and yields `NEXT` for each reply, in order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence

from splitft.types import Direction

Talk = Generator[bytes, bytes, None]
NOTHING = b""


class Posted(bytes):
    """A message whose reply is asked for later, by yielding `NEXT`."""


NEXT = Posted()


Handler = Callable[[Sequence[tuple[int, bytes]]], list[tuple[int, bytes]]]
Observe = Callable[[int, Direction, bytes], None]


class Transport(ABC):
    """Carries one round of several clients against one handler."""

    @abstractmethod
    def carry(self, talks: Mapping[int, Talk], handler: Handler, observe: Observe) -> None:
        """Drive every client's talk to its end. `observe` sees each message that travels. Raises what the handler or a client raises."""
