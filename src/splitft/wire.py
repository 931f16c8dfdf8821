"""The wire as an autograd function: what crosses a cut is encoded to bytes and decoded, in the forward and in the backward.

In a simulation the whole cohort runs through all blocks in one pass; behind the block where a group of clients is cut, their rows take
this way out of the graph's numbers and back in, so the client's blocks get exactly the gradient a real client would decode.

Axes: s sessions, b sequences of a session, t tokens (padded), d hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from splitft.compress.base import Codec, Packet, State

Record = Callable[[int, bool, Packet], None]


@dataclass
class Stream:
    """One direction of one client: its codec and the states of the sending and the receiving end."""

    codec: Codec
    sender: State
    receiver: State

    @classmethod
    def open(cls, codec: Codec) -> Stream:
        return cls(codec, codec.init(), codec.init())

    def carry(self, tensor: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Packet]:
        """Encode at one end, decode at the other; the decoded tensor (on the device of the input) and what travelled."""
        packet, self.sender = self.codec.encode(tensor, self.sender, generator)
        decoded, self.receiver = self.codec.decode(packet, self.receiver)
        return decoded.to(tensor.device), packet


@dataclass
class Wire:
    """The crossing of a group of sessions behind one block.

    `sessions` are their positions in the pass; `lengths` [s b] the tokens of every sequence of the pass, None when none is padded: padding
    never travels. `forward` and `backward` are the streams of each session of the group; `record` is told (session, is_forward, packet).
    """

    sessions: Sequence[int]
    sequences: int
    lengths: Tensor | None
    forward: Sequence[Stream]
    backward: Sequence[Stream]
    record: Record

    def carry(self, tensor: Tensor, is_forward: bool) -> Tensor:
        """The tensor [s*b t d] with this group's rows as the other end decodes them; other rows as they are."""
        streams = self.forward if is_forward else self.backward
        grouped = tensor.reshape(-1, self.sequences * tensor.shape[1], tensor.shape[2])
        chosen = torch.as_tensor(list(self.sessions), device=tensor.device)
        everyone = len(self.sessions) == grouped.shape[0]
        rows = grouped if everyone else grouped.index_select(0, chosen)
        decoded = (
            self._unpadded(rows, streams, is_forward) if self.lengths is None else self._padded(rows, tensor.shape[1], streams, is_forward)
        )
        if everyone:
            return decoded.reshape(tensor.shape)
        return grouped.index_copy(0, chosen, decoded).reshape(tensor.shape)

    def _unpadded(self, rows: Tensor, streams: Sequence[Stream], is_forward: bool) -> Tensor:
        """All sessions in one encode: [s b*t d]."""
        codec = streams[0].codec
        packets, senders = codec.encode_batch(rows, [stream.sender for stream in streams], [None] * len(streams))
        decoded, receivers = codec.decode_batch(packets, [stream.receiver for stream in streams])
        for session, stream, packet, sender, receiver in zip(self.sessions, streams, packets, senders, receivers, strict=True):
            stream.sender, stream.receiver = sender, receiver
            self.record(session, is_forward, packet)
        return decoded.to(rows.device)

    def _padded(self, rows: Tensor, tokens: int, streams: Sequence[Stream], is_forward: bool) -> Tensor:
        """Session by session, the tokens of its sequences one after the other; padding arrives as zeros."""
        assert self.lengths is not None
        result = torch.zeros_like(rows)
        axis = torch.arange(tokens, device=rows.device)
        for position, session in enumerate(self.sessions):
            valid = (axis[None, :] < self.lengths[session].to(rows.device)[:, None]).reshape(-1)
            decoded, packet = streams[position].carry(rows[position][valid])
            result[position, valid] = decoded
            self.record(session, is_forward, packet)
        return result


class Crossing(torch.autograd.Function):
    """Identity up to the codecs: `wire.carry` in the forward for the state, in the backward for its gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        return wire.carry(hidden, True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.wire.carry(gradients[0], False), None


def cross(hidden: Tensor, wire: Wire) -> Tensor:
    """The hidden state behind the wire."""
    return Crossing.apply(hidden, wire)  # type: ignore[no-any-return,no-untyped-call]
