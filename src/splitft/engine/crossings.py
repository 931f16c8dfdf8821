"""Where the sessions of a cohort's pass cross between client and server: behind which block, over which wire, through which bottleneck.

Axes: s sessions, b sequences of a session, t tokens, d hidden width, c channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitft.bottleneck import Place
from splitft.compress.base import Packet, Samples
from splitft.engine.exchange import Ownership
from splitft.engine.ledger import Ledger
from splitft.engine.narrow import decode, encode, narrows
from splitft.lora import AdapterBank
from splitft.types import Direction, Kind
from splitft.wire import Stream, Wire, cross

# What crosses forward and what comes back, as the ledger names it.
NAMES: dict[Place, tuple[tuple[Direction, Kind], tuple[Direction, Kind]]] = {
    "cut": (("up", "activations"), ("down", "gradients")),
    "exit": (("down", "activations"), ("up", "gradients")),
}


@dataclass(frozen=True)
class Company:
    """The sessions of one pass, a place in each list for every one; they are counted by it.

    `streams`: the four of each. `rows`: their rows of the bank; `server_row`: the one of the server's blocks, where those share one.
    `lengths` [s b]: tokens of every sequence, None without padding. `samples`: for codecs that remember by sample.
    """

    bank: AdapterBank
    ownership: Sequence[Ownership]
    streams: Sequence[tuple[Stream, Stream, Stream, Stream]]
    rows: Sequence[int]
    server_row: int | None
    sequences: int
    lengths: Tensor | None
    samples: Sequence[Samples] | None
    ledger: Ledger

    def crossing(self) -> Callable[[int, Tensor], Tensor]:
        """The route's `cross`."""
        points: dict[int, list[tuple[Place, list[int]]]] = {}
        split = [j for j, one in enumerate(self.ownership) if not one.plan.is_whole(one.blocks)]
        for cut in sorted({self.ownership[j].plan.cut for j in split}):
            points.setdefault(cut - 1, []).append(("cut", [j for j in split if self.ownership[j].plan.cut == cut]))
        u_shaped = [j for j in split if self.ownership[j].plan.exit_on_client]
        for end in sorted({self.ownership[j].server_end for j in u_shaped}):
            points.setdefault(end - 1, []).append(("exit", [j for j in u_shaped if self.ownership[j].server_end == end]))
        ways = {block: [self._way(block, place, group) for place, group in groups] for block, groups in points.items()}

        def through(block: int, hidden: Tensor) -> Tensor:
            for way in ways.get(block, ()):
                hidden = way(hidden)
            return hidden

        return through

    def _way(self, block: int, place: Place, group: list[int]) -> Callable[[Tensor], Tensor]:
        """How a group of sessions crosses behind a block."""
        if not narrows(self.bank.layout):
            wire = self._wire(place, group, group, self.lengths)
            return lambda hidden: cross(hidden, wire)
        alone = self._wire(place, group, range(len(group)), None if self.lengths is None else self.lengths[group])
        return lambda hidden: self._narrow(block + 1, place, group, alone, hidden)

    def _wire(self, place: Place, group: list[int], sessions: Sequence[int], lengths: Tensor | None) -> Wire:
        """The wire of a group, whose sessions have these positions in the tensor that is carried."""
        client_of = {session: self.ownership[j].plan.client for session, j in zip(sessions, group, strict=True)}

        def record(session: int, is_forward: bool, packet: Packet) -> None:
            direction, kind = NAMES[place][0 if is_forward else 1]
            self.ledger.add(client_of[session], direction, kind, packet.size_bytes)

        first = 0 if place == "cut" else 2
        forward, backward = ([self.streams[j][first + way] for j in group] for way in (0, 1))
        told = None if self.samples is None else [self.samples[j] for j in group]
        return Wire(sessions, self.sequences, lengths, forward, backward, record, told)

    def _narrow(self, boundary: int, place: Place, group: list[int], wire: Wire, hidden: Tensor) -> Tensor:
        """States [s*b t d] of which the group's have gone through their bottleneck and the wire inside it."""
        everyone = len(group) == len(self.ownership)
        held = torch.arange(self.sequences)
        where = torch.cat([j * self.sequences + held for j in group]).to(hidden.device)
        clients = torch.tensor([self.rows[j] for j in group])
        servers = clients if self.server_row is None else torch.full_like(clients, self.server_row)
        sender, receiver = (clients, servers) if place == "cut" else (servers, clients)
        mine = hidden if everyone else hidden.index_select(0, where)
        codes = cross(encode(self.bank, place, boundary, mine, sender, len(group)), wire)
        states = decode(self.bank, place, boundary, codes, receiver, len(group))
        return states if everyone else hidden.index_copy(0, where, states)
