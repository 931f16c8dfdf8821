"""The messages between client and server and their byte form. No pickle; every length is checked before memory is taken.

    frame   = b"SFT1" | u8 type | u8 packets | u16 sequences | u32 fields length | u64 body length | fields | packets
    fields  = for a step: StepFields below and the sequence lengths (u32 each); for a round: typed msgpack (msgspec)
    packet  = compress/base.py

A step, exit on the server:   client STEP_UP (activations, labels)            -> server STEP_DOWN (gradients)
A step, exit on the client:   client STEP_UP (activations)                    -> server HIDDEN_DOWN (activations)
                              client GRADIENT_UP (gradients)                  -> server STEP_DOWN (gradients)
A round:                      server ROUND_START (plan, adapters), steps ...,  client ROUND_END (adapters, tokens)
A measurement:                server SCORE_START (plan, adapters), client SCORE_UP (activations, labels) -> server SCORE_DOWN
                              (in a U-shape with activations), ..., client SCORE_END (its sums)

Global-norm clipping needs no round trip of its own: STEP_DOWN carries the squared norm of the server's gradients, the client's next
message the client's, and the server steps when it has it.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import msgspec

from splitft.errors import ProtocolError
from splitft.types import Kind

MAGIC = b"SFT1"
Buffer: TypeAlias = bytes | bytearray | memoryview
FRAME = struct.Struct("<4sBBHIQ")
FRAME_BYTES = FRAME.size
STEP_FIELDS = struct.Struct("<IIIIIIdd")
STEP_BYTES = STEP_FIELDS.size
MAX_FIELDS_BYTES = 1 << 24
MAX_FRAME_BYTES = 1 << 32
MAX_SEQUENCES = (1 << 16) - 1


class Type(enum.IntEnum):
    """What a frame is; the packets it carries, in order, are of the kinds in PACKET_KINDS."""

    ROUND_START = 1
    STEP_UP = 2
    HIDDEN_DOWN = 3
    GRADIENT_UP = 4
    STEP_DOWN = 5
    ROUND_END = 6
    ROUND_ACCEPTED = 7
    SCORE_START = 8
    SCORE_UP = 9
    SCORE_DOWN = 10
    SCORE_END = 11


PACKET_KINDS: dict[Type, tuple[Kind, ...]] = {
    Type.ROUND_START: ("adapters",),
    Type.STEP_UP: ("activations", "labels"),
    Type.HIDDEN_DOWN: ("activations",),
    Type.GRADIENT_UP: ("gradients",),
    Type.STEP_DOWN: ("gradients",),
    Type.ROUND_END: ("adapters",),
    Type.ROUND_ACCEPTED: (),
    Type.SCORE_START: ("adapters",),
    Type.SCORE_UP: ("activations", "labels"),
    Type.SCORE_DOWN: ("activations",),
    Type.SCORE_END: (),
}


@dataclass(frozen=True)
class StepFields:
    """The fixed-size fields of every step message.

    `normaliser` is the number of targets in the client's whole optimizer step, `targets` that of this micro-batch; `loss_sum` (nats) goes
    to the client, `squared_norm` is that of the sender's adapter gradients (0 where there is none yet).
    """

    round: int
    client: int
    step: int
    micro: int
    normaliser: int
    targets: int
    squared_norm: float = 0.0
    loss_sum: float = 0.0

    def pack(self) -> bytes:
        return STEP_FIELDS.pack(
            self.round, self.client, self.step, self.micro, self.normaliser, self.targets, self.squared_norm, self.loss_sum
        )

    def with_result(self, loss_sum: float, squared_norm: float) -> StepFields:
        """The same step with the server's result."""
        return replace(self, loss_sum=loss_sum, squared_norm=squared_norm)


class RoundStart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a participant is to do in a round; the global adapters of its own blocks travel beside it."""

    round: int
    client: int
    cut: int
    tail_blocks: int
    exit_on_client: bool
    local_steps: int
    gradient_accumulation: int
    batch_size: int
    rank: int
    clip_norm: float
    first_step: int
    rates: list[float]
    ranks: list[int] = []
    download: bool = True
    upload: bool = True
    segment: int = 0
    segments: int = 1
    activations_dial: float = 1.0
    gradients_dial: float = 1.0


class RoundEnd(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A participant's report; the adapters of its own blocks travel beside it. `squared_norm` closes the last step's clipping."""

    round: int
    client: int
    tokens: int
    squared_norm: float
    loss_sum: float


class RoundAccepted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The server has taken a participant's update."""

    round: int
    client: int


class ScoreStart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a client is to measure on its held-out rows; the joined adapters of its own blocks travel beside it."""

    round: int
    client: int
    cut: int
    tail_blocks: int
    exit_on_client: bool
    batch_size: int
    max_rows: int


class ScoreEnd(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sums over a client's held-out targets: nll in nats, right predictions, their number. With the exit on the server it knows better."""

    round: int
    client: int
    loss_sum: float
    correct: int
    tokens: int


Fields = RoundStart | RoundEnd | RoundAccepted | ScoreStart | ScoreEnd
FieldsT = TypeVar("FieldsT", RoundStart, RoundEnd, RoundAccepted, ScoreStart, ScoreEnd)


@dataclass(frozen=True)
class Frame:
    """One message: its type, its fields, the token counts of its sequences (step messages; behind them the ids of its samples, where a
    codec remembers by sample) and its encoded packets."""

    kind: Type
    fields: bytes
    lengths: tuple[int, ...]
    packets: tuple[bytes | memoryview, ...]

    @property
    def overhead_bytes(self) -> int:
        """Everything but the packets: counted as control."""
        return FRAME_BYTES + len(self.fields) + 4 * len(self.lengths)

    @property
    def size_bytes(self) -> int:
        return self.overhead_bytes + sum(len(packet) for packet in self.packets)

    def encode(self) -> bytes:
        """The frame as bytes."""
        head = FRAME.pack(MAGIC, self.kind, len(self.packets), len(self.lengths), len(self.fields), self.size_bytes - FRAME_BYTES)
        return b"".join((head, self.fields, struct.pack(f"<{len(self.lengths)}I", *self.lengths), *self.packets))

    def step(self) -> StepFields:
        """The fields of a step message. Raises ProtocolError for another type."""
        if len(self.fields) != STEP_BYTES:
            raise ProtocolError(f"{self.kind.name} has {len(self.fields)} bytes of fields, a step has {STEP_BYTES}.", _SAME_VERSION)
        return StepFields(*STEP_FIELDS.unpack(self.fields))

    def read(self, form: type[FieldsT]) -> FieldsT:
        """The typed fields of a round message. Raises ProtocolError naming the field that is wrong."""
        try:
            return msgspec.msgpack.decode(self.fields, type=form)
        except (msgspec.MsgspecError, UnicodeDecodeError) as problem:
            raise ProtocolError(f"{self.kind.name}: {problem}.", _SAME_VERSION) from problem


_SAME_VERSION = "run the same splitft version on both sides."


def step_frame(kind: Type, fields: StepFields, lengths: Sequence[int], packets: Sequence[bytes | memoryview]) -> Frame:
    """A step message. Raises ProtocolError when the batch has more sequences than a frame can name."""
    if len(lengths) > MAX_SEQUENCES:
        raise ProtocolError(f"a step of {len(lengths)} sequences, at most {MAX_SEQUENCES} fit.", "lower train.batch_size.")
    return Frame(kind, fields.pack(), tuple(lengths), tuple(packets))


def round_frame(kind: Type, fields: Fields, packets: Sequence[bytes | memoryview] = ()) -> Frame:
    """A round message."""
    return Frame(kind, msgspec.msgpack.encode(fields), (), tuple(packets))


def decode(data: Buffer, limit_bytes: int = MAX_FRAME_BYTES) -> Frame:
    """The frame in `data`, which must be exactly one. The packets are views, still to be parsed by their codec's Packet.parse.

    Raises ProtocolError for anything that is not a well-formed frame; nothing is allocated before the lengths are checked.
    """
    buffer = memoryview(data)
    if len(buffer) < FRAME_BYTES:
        raise ProtocolError(f"a frame header needs {FRAME_BYTES} bytes, {len(buffer)} arrived.", _SAME_VERSION)
    magic, kind, packets, sequences, fields_bytes, body_bytes = FRAME.unpack(buffer[:FRAME_BYTES])
    if magic != MAGIC:
        raise ProtocolError(f"not a splitft frame (starts with {bytes(magic)!r}).", "check the address: another program may be listening.")
    if kind not in Type._value2member_map_:
        raise ProtocolError(f"message type {kind} is unknown.", _SAME_VERSION)
    if packets > len(PACKET_KINDS[Type(kind)]):
        raise ProtocolError(
            f"{Type(kind).name} names {packets} packets, it carries at most {len(PACKET_KINDS[Type(kind)])}.", _SAME_VERSION
        )
    if fields_bytes > MAX_FIELDS_BYTES or body_bytes > limit_bytes or len(buffer) != FRAME_BYTES + body_bytes:
        raise ProtocolError(
            f"frame says {body_bytes} bytes ({fields_bytes} of fields), {len(buffer) - FRAME_BYTES} arrived.", _SAME_VERSION
        )
    body = buffer[FRAME_BYTES:]
    if fields_bytes + 4 * sequences > body_bytes:
        raise ProtocolError(
            f"frame of {body_bytes} bytes cannot hold {fields_bytes} bytes of fields and {sequences} lengths.", _SAME_VERSION
        )
    start = fields_bytes + 4 * sequences
    lengths = struct.unpack(f"<{sequences}I", body[fields_bytes:start])
    return Frame(Type(kind), bytes(body[:fields_bytes]), lengths, _cut(body[start:], packets))


def _cut(body: memoryview, count: int) -> tuple[memoryview, ...]:
    """The packets one after the other; each header ends with its payload's length."""
    found: list[memoryview] = []
    for _ in range(count):
        if len(body) < 32:
            raise ProtocolError(f"frame names {count} packets, the body ends in number {len(found) + 1}.", _SAME_VERSION)
        end = 32 + int(struct.unpack("<Q", body[24:32])[0])
        if end > len(body):
            raise ProtocolError(f"packet {len(found) + 1} of {count} says {end} bytes, {len(body)} are left.", _SAME_VERSION)
        found.append(body[:end])
        body = body[end:]
    if len(body):
        raise ProtocolError(f"{len(body)} bytes follow the last packet.", _SAME_VERSION)
    return tuple(found)
