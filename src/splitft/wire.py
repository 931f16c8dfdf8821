"""The wire as an autograd function: what crosses a cut is encoded to bytes and decoded, in the forward and in the backward.

In a simulation the whole cohort runs through all blocks in one pass; behind the block where a group of clients is cut, their rows take
this way out of the graph's numbers and back in, so the client's blocks get exactly the gradient a real client would decode.

Axes: s sessions, b sequences of a session, t tokens (padded), d hidden width, q tokens that cross.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from splitft.compress.base import Codec, Packet, State
from splitft.rng import torch_stream

Record = Callable[[int, bool, Packet], None]


@dataclass(frozen=True)
class StreamName:
    """Names the random numbers of a stream; `place` tells apart the tensors of a step. Both executors give the same name."""

    seed: int
    client: int
    round: int
    place: str


@dataclass
class Stream:
    """One direction of one client in one round: its codec, the states of the sending and the receiving end, the packets `sent` so far.

    A codec that draws random numbers needs the `name` from which those of each packet follow.
    """

    codec: Codec
    sender: State
    receiver: State
    name: StreamName | None = None
    sent: int = 0

    @classmethod
    def open(cls, codec: Codec, name: StreamName | None = None) -> Stream:
        return cls(codec, codec.init(), codec.init(), name)

    def generator(self) -> torch.Generator | None:
        """The random numbers of the next packet; None for a codec that draws none."""
        if not self.codec.draws:
            return None
        assert self.name is not None, f"{type(self.codec).__name__} draws random numbers, so its stream needs a name"
        self.sent += 1
        return torch_stream(self.name.seed, f"codec {self.name.place}", self.name.client, self.name.round, self.sent - 1)

    def send(self, tensor: Tensor) -> Packet:
        """Encode at the sending end."""
        packet, self.sender = self.codec.encode(tensor, self.sender, self.generator())
        return packet

    def carry(self, tensor: Tensor) -> tuple[Tensor, Packet]:
        """Encode at one end, decode at the other; the decoded tensor (on the device of the input) and what travelled."""
        packet = self.send(tensor)
        decoded, self.receiver = self.codec.decode(packet, self.receiver)
        return decoded.to(tensor.device), packet


def open_streams(uplink: Codec, downlink: Codec, seed: int, client: int, round_index: int) -> tuple[Stream, Stream, Stream, Stream]:
    """The four tensors of a client's step: at the cut up and down, at a U-shape's exit down and up."""
    places = (
        (uplink, "up activations"),
        (downlink, "down gradients"),
        (downlink, "down activations"),
        (uplink, "up gradients"),
    )
    up, down, exit_down, exit_up = (Stream.open(codec, StreamName(seed, client, round_index, place)) for codec, place in places)
    return up, down, exit_down, exit_up


def carry_together(streams: Sequence[Stream], rows: Tensor, counts: Sequence[int]) -> tuple[Tensor, list[Packet]]:
    """Carry `counts` of the rows [q d] over each of the streams, which have one codec, in one pass; decoded rows and what travelled."""
    codec = streams[0].codec
    packets, senders = codec.encode_batch(rows, counts, [one.sender for one in streams], [one.generator() for one in streams])
    decoded, receivers = codec.decode_batch(packets, [one.receiver for one in streams], rows.device)
    for stream, sender, receiver in zip(streams, senders, receivers, strict=True):
        stream.sender, stream.receiver = sender, receiver
    return decoded, packets


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
    _found: tuple[list[int], Tensor] | None = field(default=None, init=False)

    def carry(self, tensor: Tensor, is_forward: bool) -> Tensor:
        """The tensor [s*b t d] with this group's tokens as the other end decodes them, its padding as zeros, other rows as they are."""
        flat, span = tensor.reshape(-1, tensor.shape[2]), self.sequences * tensor.shape[1]
        whole: slice | Tensor = _run(self.sessions, span) or self._positions(span)
        counts, chosen = ([span] * len(self.sessions), whole) if self.lengths is None else self._tokens(tensor.shape[1])
        # As a copy of whole rows: indexing with a tensor goes value by value.
        rows = flat[chosen] if isinstance(chosen, slice) else flat.index_select(0, chosen.to(flat.device))
        decoded, packets = carry_together(self.forward if is_forward else self.backward, rows, counts)
        for session, packet in zip(self.sessions, packets, strict=True):
            self.record(session, is_forward, packet)
        if decoded.shape == flat.shape:
            return decoded.reshape(tensor.shape)
        result = flat.clone()
        if self.lengths is not None:
            result[whole] = 0.0
        result[chosen] = decoded
        return result.reshape(tensor.shape)

    def _positions(self, span: int) -> Tensor:
        """Of all tokens and paddings of the group among those of the pass, session after session."""
        return (torch.as_tensor(list(self.sessions))[:, None] * span + torch.arange(span)).reshape(-1)

    def _tokens(self, width: int) -> tuple[list[int], Tensor]:
        """Tokens of each session of the group, and where they lie [q]; the same in the backward."""
        if self._found is None:
            assert self.lengths is not None
            lengths = self.lengths[list(self.sessions)]
            valid = torch.arange(width) < lengths[:, :, None]
            self._found = lengths.sum(1).tolist(), self._positions(self.sequences * width)[valid.reshape(-1)]
        return self._found


def _run(sessions: Sequence[int], span: int) -> slice | None:
    """The rows of sessions that follow each other; None when they do not."""
    first = sessions[0]
    if list(sessions) != list(range(first, first + len(sessions))):
        return None
    return slice(first * span, (first + len(sessions)) * span)


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
