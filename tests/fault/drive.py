"""A round driven message by message, so that a test can slip a bad message in and look at what it did to the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from splitft.compress.base import Packet
from splitft.engine.client import Client
from splitft.engine.exchange import Ownership, packet_bytes, parse_packet, round_start_frame, take
from splitft.engine.server import Server
from splitft.engine.settings import ClientState, Federation, same_start
from splitft.messages import decode
from splitft.types import Plan, RoundPlan

from ..support import federation

Disturb = Callable[["Drive", int, int, bytes], None]


def federation_of(**changes: Any) -> Federation:
    """Three clients with rows of unequal length."""
    return federation(**{"length": (6, 12), "rows": 4, **changes})


class Drive:
    """One round of three clients with the cuts 1, 2, 3 and two steps each; every message is handled alone, in client order."""

    def __init__(self, fed: Federation, u_shape: bool = False, steps: int = 2, round_index: int = 4) -> None:
        self.federation = fed
        self.plan = RoundPlan(round_index, tuple(Plan(client, cut, steps, 3, u_shape) for client, cut in enumerate((1, 2, 3))))
        start = fed.layout.initial_row(1)
        self.server = Server(fed, self.plan, 0, same_start(start), {}, deterministic=True)
        self.clients = {one.client: Client(fed, one.client, ClientState()) for one in self.plan.plans}
        self.talks, self.waiting = {}, {}
        for one in self.plan.plans:
            columns = Ownership(one, fed.split.blocks).client_columns(fed.layout)
            opening = round_start_frame(one, round_index, 0, fed.settings, take(start, columns)).encode()
            self.talks[one.client] = self.clients[one.client].round(opening)
            self.waiting[one.client] = next(self.talks[one.client])

    def deliver(self, client: int) -> None:
        """Hand the client's waiting message to the server and its reply to the client."""
        ((who, reply),) = self.server.handle([(client, self.waiting.pop(client))])
        assert who == client
        try:
            self.waiting[client] = self.talks[client].send(reply)
        except StopIteration:
            return

    def play(self, disturb: Disturb | None = None, abandoned: frozenset[int] = frozenset(), from_turn: int = 1) -> Drive:
        """To the end. `disturb` is called before each delivery with the turn, the client and its message.

        `abandoned` clients stop in turn `from_turn`.
        """
        turn = 0
        while self.waiting:
            for client in sorted(self.waiting):
                if disturb is not None:
                    disturb(self, turn, client, self.waiting[client])
                if client in abandoned and turn >= from_turn:
                    del self.waiting[client]
                else:
                    self.deliver(client)
            turn += 1
        return self

    def result(self, client: int) -> tuple[torch.Tensor, list[float], int]:
        """What the round gave for this client: its adapters on the server, its losses, its tokens."""
        one = self.clients[client]
        return self.server.bank.values[self.server.sessions[client].row].clone(), one.step_losses, one.tokens


def refields(message: bytes, **fields: Any) -> bytes:
    """The step message with other fields."""
    frame = decode(message)
    return replace(frame, fields=replace(frame.step(), **fields).pack()).encode()


def repacket(message: bytes, index: int, change: Callable[[Packet], Packet]) -> bytes:
    """The message with its packet number `index` changed."""
    frame = decode(message)
    packets = [bytes(packet) for packet in frame.packets]
    packets[index] = packet_bytes(change(parse_packet(packets[index])))
    return replace(frame, packets=tuple(packets)).encode()


def reframe(message: bytes, **parts: Any) -> bytes:
    """The message with other parts of its frame."""
    return replace(decode(message), **parts).encode()


def tensor_packet(packet: Packet, tensor: torch.Tensor) -> Packet:
    """The packet with these numbers instead, of the same codec and type (identity)."""
    return Packet(packet.codec, tensor.dtype, tuple(tensor.shape), tensor.contiguous().numpy().tobytes())
