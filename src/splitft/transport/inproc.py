"""All parties in one process: the same bytes as on a network, without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from splitft.errors import ProtocolError
from splitft.transport.base import Handler, Observe, Talk, Transport


@dataclass(frozen=True)
class InProcess(Transport):
    """Clients advance in lockstep: all messages of a turn reach the handler together, so it can batch them."""

    def carry(self, talks: Mapping[int, Talk], handler: Handler, observe: Observe) -> None:
        waiting: dict[int, bytes] = {}
        for client in sorted(talks):
            self._advance(client, talks[client], None, waiting)
        while waiting:
            turn = sorted(waiting.items())
            for client, message in turn:
                observe(client, "up", message)
            waiting = {}
            for client, reply in handler(turn):
                observe(client, "down", reply)
                self._advance(client, talks[client], reply, waiting)
            if not waiting and any(talk.gi_frame is not None for talk in talks.values()):  # type: ignore[attr-defined]
                stuck = [client for client, talk in talks.items() if talk.gi_frame is not None]  # type: ignore[attr-defined]
                raise ProtocolError(
                    f"clients {stuck} wait for a reply that does not come.", "this is a fault of the handler; please report it."
                )

    @staticmethod
    def _advance(client: int, talk: Talk, reply: bytes | None, waiting: dict[int, bytes]) -> None:
        """Give a client its reply (None: start it) and note what it sends next."""
        try:
            waiting[client] = next(talk) if reply is None else talk.send(reply)
        except StopIteration:
            return
