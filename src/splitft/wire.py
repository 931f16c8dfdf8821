"""The wire as an autograd function: what crosses a cut is encoded to bytes and decoded, in the forward and in the backward.

In a simulation the whole cohort runs through all blocks in one pass; behind the block where a group of clients is cut, their rows take
this way out of the graph's numbers and back in, so the client's blocks get exactly the gradient a real client would decode.

Axes: s sessions, b sequences of a session, t tokens (padded), d hidden width, q tokens that cross.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from splitft.compress.base import HEADER_BYTES, Codec, Packet, Samples, State
from splitft.rng import torch_stream

Record = Callable[[int, bool, Packet], None]


@dataclass(frozen=True)
class StreamName:
    """Names the random numbers of a stream; `place` tells apart the tensors of a step. Both executors give the same name. `seed` may have
    any number of bits: noise is drawn from a key of which all of them are part."""

    seed: int
    client: int
    round: int
    place: str


class Ends(NamedTuple):
    """The states of a stream's two ends; one and the same where the codec keeps the same at both."""

    sender: State
    receiver: State


@dataclass
class Stream:
    """One direction of one client in one round: its codec, the states of the sending and the receiving end, the packets `sent` so far.

    A codec that draws random numbers needs the `name` from which those of each packet follow. `facts`: sums over what was sent.
    """

    codec: Codec
    sender: State
    receiver: State
    name: StreamName | None = None
    sent: int = 0
    facts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, codec: Codec, name: StreamName | None = None, ends: Ends | None = None) -> Stream:
        """A stream that goes on from `ends`, or a new one."""
        if ends is None:
            state = codec.init()
            ends = Ends(state, state if codec.mirrored else codec.init())
        return cls(codec, ends.sender, ends.receiver, name)

    @property
    def ends(self) -> Ends:
        return Ends(self.sender, self.receiver)

    def generator(self) -> torch.Generator | None:
        """The random numbers of the next packet; None for a codec that draws none."""
        if not self.codec.draws:
            return None
        assert self.name is not None, f"{type(self.codec).__name__} draws random numbers, so its stream needs a name"
        self.sent += 1
        return torch_stream(self.name.seed, f"codec {self.name.place}", self.name.client, self.name.round, self.sent - 1)

    def send(self, tensor: Tensor, samples: Samples | None = None) -> Packet:
        """Encode at the sending end."""
        packet, self.sender = self.codec.encode(tensor, self.sender, self.generator(), samples)
        self.note(packet)
        return packet

    def receive(self, packet: Packet, samples: Samples | None = None) -> Tensor:
        """Decode at the receiving end."""
        tensor, self.receiver = self.codec.decode(packet, self.receiver, samples)
        return tensor

    def carry(self, tensor: Tensor, samples: Samples | None = None) -> tuple[Tensor, Packet]:
        """Encode at one end, decode at the other; the decoded tensor (on the device of the input) and what travelled."""
        rows, [packet] = carry_together([self], tensor.reshape(-1, tensor.shape[-1]), [tensor[..., 0].numel()], [samples])
        return rows.reshape(tensor.shape), replace(packet, shape=tuple(tensor.shape))

    def note(self, packet: Packet) -> None:
        """Add what is known of a packet to the sums; codecs that say nothing leave none."""
        if not packet.facts:
            return
        values = math.prod(packet.shape)
        sizes = {"packets": 1, "bytes": packet.size_bytes, "plain_bytes": HEADER_BYTES + 2 * values, "values": values}
        for fact, amount in (*sizes.items(), *packet.facts.items()):
            self.facts[fact] = self.facts.get(fact, 0.0) + amount


PLACES = ("up activations", "down gradients", "down activations", "up gradients")


def open_streams(
    codecs: Sequence[Codec], seed: int, client: int, round_index: int, ends: Mapping[str, Ends] | None = None, secret: int = 0
) -> tuple[Stream, Stream, Stream, Stream]:
    """The four tensors of a client's step, in the order of PLACES: at the cut up and down, at a U-shape's exit down and up. `ends` are what
    is left of the streams of the round before, by place. What goes up draws its random numbers from `secret`, where that is not 0."""
    known = ends or {}
    made = zip(codecs, PLACES, strict=True)
    up, down, exit_down, exit_up = (
        Stream.open(codec, StreamName(secret if secret and place.startswith("up") else seed, client, round_index, place), known.get(place))
        for codec, place in made
    )
    return up, down, exit_down, exit_up


def carry_together(
    streams: Sequence[Stream], rows: Tensor, counts: Sequence[int], samples: Sequence[Samples | None] | None = None
) -> tuple[Tensor, list[Packet]]:
    """Carry `counts` of the rows [q d] over each of the streams, which have one codec, in one pass; decoded rows and what travelled.

    Where both ends keep the same, one state serves both, and the receiver's step is the sender's too.
    """
    codec = streams[0].codec
    together = codec.mirrored and all(one.sender is one.receiver for one in streams)
    drawn = [one.generator() for one in streams]
    packets, senders = codec.encode_batch(rows, counts, [one.sender for one in streams], drawn, samples, commit=not together)
    decoded, receivers = codec.decode_batch(packets, [one.receiver for one in streams], rows.device, samples)
    for stream, packet, sender, receiver in zip(streams, packets, receivers if together else senders, receivers, strict=True):
        stream.sender, stream.receiver = sender, receiver
        stream.note(packet)
    return decoded, packets


@dataclass
class Wire:
    """The crossing of a group of sessions behind one block.

    `sessions` are their positions in the pass; `lengths` [s b] the tokens of every sequence of the pass, None when none is padded: padding
    never travels. `forward` and `backward` are the streams of each session of the group; `record` is told (session, is_forward, packet).
    `samples`: of each session of the group, for codecs that remember by sample.
    """

    sessions: Sequence[int]
    sequences: int
    lengths: Tensor | None
    forward: Sequence[Stream]
    backward: Sequence[Stream]
    record: Record
    samples: Sequence[Samples | None] | None = None
    _found: tuple[list[int], Tensor] | None = field(default=None, init=False)

    def carry(self, tensor: Tensor, is_forward: bool) -> Tensor:
        """The tensor [s*b t d] with this group's tokens as the other end decodes them, its padding as zeros, other rows as they are."""
        flat, span = tensor.reshape(-1, tensor.shape[2]), self.sequences * tensor.shape[1]
        whole: slice | Tensor = _run(self.sessions, span) or self._positions(span)
        counts, chosen = ([span] * len(self.sessions), whole) if self.lengths is None else self._tokens(tensor.shape[1])
        # As a copy of whole rows: indexing with a tensor goes value by value.
        rows = flat[chosen] if isinstance(chosen, slice) else flat.index_select(0, chosen.to(flat.device))
        decoded, packets = carry_together(self.forward if is_forward else self.backward, rows, counts, self.samples)
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
