"""All parties in one process: the same bytes as on a network, without one."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from splitft.errors import ProtocolError
from splitft.transport.base import NEXT, NOTHING, Handler, Observe, Posted, Talk, Transport


@dataclass(frozen=True)
class InProcess(Transport):
    """Clients advance in lockstep: all messages of a turn reach the handler together, so it can batch them."""

    def carry(self, talks: Mapping[int, Talk], handler: Handler, observe: Observe) -> None:
        sides = {client: _Side(talks[client]) for client in sorted(talks)}
        for side in sides.values():
            side.advance(None)
        while turn := [(client, side.outgoing.popleft()) for client, side in sides.items() if side.outgoing]:
            for client, message in turn:
                observe(client, "up", message)
            for client, reply in handler(turn):
                observe(client, "down", reply)
                sides[client].hear(reply)
        if stuck := [client for client, side in sides.items() if not side.ended]:
            raise ProtocolError(
                f"clients {stuck} wait for a reply that does not come.", "this is a fault of the handler; please report it."
            )


class _Side:
    """A client's talk, the messages it has sent and nobody has taken, replies it has not asked for."""

    def __init__(self, talk: Talk) -> None:
        self.talk, self.ended, self.waits = talk, False, False
        self.outgoing: deque[bytes] = deque()
        self.replies: deque[bytes] = deque()

    def hear(self, reply: bytes) -> None:
        self.replies.append(reply)
        if self.waits:
            self.advance(self.replies.popleft())

    def advance(self, reply: bytes | None) -> None:
        """Give the client its reply (None: start it) and go on until it waits for the next."""
        self.waits = False
        while True:
            try:
                message = next(self.talk) if reply is None else self.talk.send(reply)
            except StopIteration:
                self.ended = True
                return
            if message is not NEXT:
                self.outgoing.append(bytes(message))
                if isinstance(message, Posted):
                    reply = NOTHING
                    continue
            if not self.replies:
                self.waits = True
                return
            reply = self.replies.popleft()
