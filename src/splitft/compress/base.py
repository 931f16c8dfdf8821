"""The seam of codecs: a tensor becomes a packet of real bytes and back. Sender and receiver states evolve in step.

A codec works on the rows of many packets at once (`pack_rows`, `unpack_rows`), and a codec over another one hands rows on to it; what is
about headers, shapes and single packets is said once, here.

A packet is a fixed header of 32 bytes and a payload:

    u8 version | u8 codec | u8 dtype | u8 axes | u32 reserved | u32 x 4 shape | u64 payload length      (little endian)

A codec is a frozen dataclass: its fields are its configuration, its `number` names it on the wire. State goes in and comes out.
"""

from __future__ import annotations

import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from splitft.errors import CodecError

HEADER = struct.Struct("<BBBBI4IQ")
HEADER_BYTES = HEADER.size
VERSION = 1
MAX_AXES = 4
MAX_PAYLOAD_BYTES = 1 << 31
DTYPES: tuple[torch.dtype, ...] = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.uint8,
    torch.int32,
    torch.int16,
    torch.uint16,
    torch.float64,
)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
# What an end remembers from packet to packet. A step never changes the state it is given: it returns another, which may share memory.
State: TypeAlias = Any
Payload: TypeAlias = bytes | memoryview
# What the sender knows about a packet and does not send: sums over its samples and values, for reports (docs/methods.md names them).
Facts: TypeAlias = Mapping[str, float]
NOTHING: Facts = {}


@dataclass(frozen=True)
class Packet:
    """The encoded form of one tensor: `codec` and `dtype` as on the wire, `shape` of the tensor, `payload` bytes."""

    codec: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    payload: Payload
    facts: Facts = field(default_factory=dict, compare=False, repr=False)

    @property
    def size_bytes(self) -> int:
        """Length on the wire, header included."""
        return HEADER_BYTES + len(self.payload)

    def header(self) -> bytes:
        shape = (*self.shape, *(0,) * (MAX_AXES - len(self.shape)))
        return HEADER.pack(VERSION, self.codec, DTYPE_CODES[self.dtype], len(self.shape), 0, *shape, len(self.payload))

    @classmethod
    def parse(cls, buffer: memoryview, limit_bytes: int = MAX_PAYLOAD_BYTES) -> tuple[Packet, memoryview]:
        """The packet at the start of `buffer` and the rest. Every field is checked before memory is taken; raises CodecError."""
        if len(buffer) < HEADER_BYTES:
            raise CodecError(f"a packet header needs {HEADER_BYTES} bytes, {len(buffer)} are left.", _TORN)
        version, codec, dtype, axes, reserved, *rest = HEADER.unpack(buffer[:HEADER_BYTES])
        shape, length = tuple(rest[:axes]), rest[-1]
        if version != VERSION or reserved != 0:
            raise CodecError(
                f"packet version {version} is unknown, this is version {VERSION}.", "run the same splitft version on both sides."
            )
        if dtype >= len(DTYPES) or axes > MAX_AXES or any(rest[axes:MAX_AXES]):
            raise CodecError(
                f"packet header names dtype {dtype} and {axes} axes, allowed are 0..{len(DTYPES) - 1} and 0..{MAX_AXES}.", _TORN
            )
        if length > limit_bytes or math.prod(max(1, size) for size in shape) * DTYPES[dtype].itemsize > limit_bytes:
            raise CodecError(f"packet of {length} bytes for shape {shape} is over the limit of {limit_bytes} bytes.", _TORN)
        body = buffer[HEADER_BYTES : HEADER_BYTES + length]
        if len(body) != length:
            raise CodecError(f"packet says {length} payload bytes, {len(body)} arrived.", _TORN)
        return cls(codec, DTYPES[dtype], shape, body), buffer[HEADER_BYTES + length :]


_TORN = "the message is damaged or not splitft's; check the connection and that both sides run the same version."


@dataclass(frozen=True)
class Samples:
    """Whose rows a packet holds: for each of its samples, in order, its id (0 to 2^32 - 1) and how many rows (tokens) it has.

    A sample that is sent again has as many rows as before; the same id may stand twice in a packet.
    """

    ids: tuple[int, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Parts:
    """What a codec is told of packets whose rows lie one after the other: how many rows each has (one at least), the state of each at this
    end, its random numbers, its samples (None where the caller knows of none).

    `commit`: the sender needs the state after the packet; without it the caller decodes the packet at the same state and takes that.
    """

    counts: tuple[int, ...]
    states: Sequence[State]
    generators: Sequence[torch.Generator | None]
    samples: Sequence[Samples | None]
    commit: bool = True

    def inside(
        self, states: Sequence[State], counts: Sequence[int] | None = None, samples: Sequence[Samples | None] | None = None
    ) -> Parts:
        """The same packets for a codec inside another one: with its own states, and other rows where the outer one changes them."""
        changed = replace(self, states=states, counts=self.counts if counts is None else tuple(counts))
        return changed if samples is None else replace(changed, samples=samples)


class Packed(NamedTuple):
    """Of each packet: its payload, the sender's state after it, what is known about it."""

    payloads: list[Payload]
    states: list[State]
    facts: Sequence[Facts]


class Codec(ABC):
    """Encode and decode tensors of any shape up to four axes whose last is the channel axis (d). Lossless codecs say so.

    A cohort goes through `encode_batch` and `decode_batch`: the rows of its packets one after the other, [q d], of any number for each.
    They give what one packet after the other would, bit for bit. A codec without memory derives from `Stateless`, one over another codec
    from `Wrapper`.
    """

    number: ClassVar[int]
    references: ClassVar[tuple[str, ...]] = ()
    lossless: ClassVar[bool] = False
    floating: ClassVar[bool] = True
    fixed_rate: ClassVar[bool] = False
    # Whether a codec outside would undo what this one is for.
    outermost: ClassVar[bool] = False

    @property
    def draws(self) -> bool:
        """Whether `encode` draws random numbers: then it must be given a generator, a new one for every packet."""
        return False

    @property
    def keyed(self) -> bool:
        """Whether it remembers by sample: then it must be told every packet's samples, at both ends."""
        return False

    @property
    def hears_samples(self) -> bool:
        """Whether it is to be told a packet's samples where the caller knows them, though it may do without."""
        return self.keyed

    @property
    def mirrored(self) -> bool:
        """Whether the sender's state is the receiver's: then a simulation keeps one for both."""
        return True

    def init(self) -> State:
        """The state both ends start from; None for a codec without memory."""
        return None

    def flatten(self, state: State) -> dict[str, Tensor]:
        """A state as named tensors, for checkpoints."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> State:
        """The inverse of `flatten`."""
        return self.init()

    def scaled(self, factor: float) -> Codec:
        """The same codec with errors about `factor` times as large (a controller's dial); itself where it has no such dial. States stay
        valid."""
        return self

    def for_adapters(self, rank: int, gradients: bool) -> Codec:
        """The codec as a run with adapters of this rank wants it, for gradients or for activations; itself where it does not matter."""
        return self

    @abstractmethod
    def pack_rows(self, rows: Tensor, parts: Parts) -> Packed:
        """The payloads of the rows [q d], d at least one. Raises CodecError when they hold NaN or infinity."""

    @abstractmethod
    def unpack_rows(
        self, payloads: Sequence[Payload], parts: Parts, width: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, list[State]]:
        """The rows [q d] of payloads, finite, in memory of their own, and the states after them.

        Raises CodecError for damaged bytes, before memory is taken for what they claim."""

    @abstractmethod
    def payload_bytes(self, count: int, width: int, dtype: torch.dtype) -> int:
        """Length of the payload of `count` rows of `width` channels, both at least one: exact, or an upper bound at a variable rate."""

    def expected_bytes(self, count: int, width: int, dtype: torch.dtype, visit: int = 0, samples: int = 1) -> float:
        """About how long that payload will be, for plans, when its rows are `samples` samples of equal length that have been sent `visit`
        times before."""
        return float(self.payload_bytes(count, width, dtype))

    def stride_bytes(self, dtype: torch.dtype) -> int:
        """At what distance bytes of the same significance follow each other in the payload of rows of that type; 1: at none."""
        return 1

    def packet_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Length on the wire for a tensor of this shape and dtype: exact, or an upper bound for codecs of variable rate."""
        count, width = as_rows(shape)
        return HEADER_BYTES + (self.payload_bytes(count, width, dtype) if count * width else 0)

    def error_bound(self, tensor: Tensor) -> Tensor | None:
        """What each element may differ by after the wire, in float64 and in the tensor's shape; None where no such bound is declared."""
        return torch.zeros_like(tensor, dtype=torch.float64) if self.lossless else None

    def encode(
        self, tensor: Tensor, state: State, generator: torch.Generator | None = None, samples: Samples | None = None
    ) -> tuple[Packet, State]:
        """The packet of a tensor. Raises CodecError when it holds NaN or infinity."""
        count, width = as_rows(tensor.shape)
        [packet], [state] = self.encode_batch(tensor.reshape(count, width), [count], [state], [generator], [samples])
        return replace(packet, shape=tuple(tensor.shape)), state

    def decode(self, packet: Packet, state: State, samples: Samples | None = None) -> tuple[Tensor, State]:
        """The tensor (on CPU, in the dtype it was encoded from) of a packet. Raises CodecError when header and payload disagree."""
        rows, [state] = self.decode_batch([packet], [state], samples=[samples])
        return rows.reshape(packet.shape), state

    def encode_batch(
        self,
        rows: Tensor,
        counts: Sequence[int],
        states: Sequence[State],
        generators: Sequence[torch.Generator | None],
        samples: Sequence[Samples | None] | None = None,
        commit: bool = True,
    ) -> tuple[list[Packet], list[State]]:
        """A packet for each of `counts`: of that many of the rows [q d], in order. `commit` as in `Parts`."""
        width = rows.shape[1]
        full = [k for k, count in enumerate(counts) if count * width]
        payloads: list[Payload] = [b""] * len(counts)
        after, facts = list(states), [NOTHING] * len(counts)
        if full:
            parts = self._parts(full, counts, states, generators, samples, commit)
            for k, payload, state, known in zip(full, *self.pack_rows(rows.detach(), parts), strict=True):
                payloads[k], after[k], facts[k] = payload, state, known
        shapes = ((count, width) for count in counts)
        made = zip(shapes, payloads, facts, strict=True)
        return [Packet(self.number, rows.dtype, shape, payload, known) for shape, payload, known in made], after

    def decode_batch(
        self,
        packets: Sequence[Packet],
        states: Sequence[State],
        device: torch.device | None = None,
        samples: Sequence[Samples | None] | None = None,
    ) -> tuple[Tensor, list[State]]:
        """The inverse of `encode_batch`: rows [q d], on the CPU or the given device. At least one packet, all of one width and dtype."""
        sizes = [self._rows_of(packet) for packet in packets]
        width, dtype, device = sizes[0][1], packets[0].dtype, device or torch.device("cpu")
        if any(size[1] != width or packet.dtype != dtype for size, packet in zip(sizes, packets, strict=True)):
            raise CodecError("packets of different widths or types came together.", "use the same model and dtype on all clients.")
        counts = [count for count, _ in sizes]
        full = [k for k, count in enumerate(counts) if count * width]
        after = list(states)
        if not full:
            return torch.empty((sum(counts), width), dtype=dtype, device=device), after
        parts = self._parts(full, counts, states, [None] * len(counts), samples, True)
        rows, changed = self.unpack_rows([packets[k].payload for k in full], parts, width, dtype, device)
        for k, state in zip(full, changed, strict=True):
            after[k] = state
        return rows, after

    def _parts(
        self,
        full: Sequence[int],
        counts: Sequence[int],
        states: Sequence[State],
        generators: Sequence[torch.Generator | None],
        samples: Sequence[Samples | None] | None,
        commit: bool,
    ) -> Parts:
        """The packets that are not empty. Raises CodecError when their samples are not known or do not add up."""
        told = [None] * len(counts) if samples is None else [samples[k] for k in range(len(counts))]
        if self.keyed:
            for k in full:
                require_samples(told[k], counts[k], type(self).__name__.lower())
        return Parts(
            tuple(counts[k] for k in full), [states[k] for k in full], [generators[k] for k in full], [told[k] for k in full], commit
        )

    def _rows_of(self, packet: Packet) -> tuple[int, int]:
        """Rows and channels of a packet for this codec; CodecError for another one's, and for a length that cannot be."""
        name = type(self).__name__.lower()
        if packet.codec != self.number:
            raise CodecError(f"a packet of codec {packet.codec} reached {name} (codec {self.number}).", "use the same codec on both sides.")
        if self.floating and not packet.dtype.is_floating_point:
            raise CodecError(f"a {name} tensor says it is {packet.dtype}.", "use the same splitft version on both sides.")
        count, width = as_rows(packet.shape)
        most = self.packet_bytes(packet.shape, packet.dtype) - HEADER_BYTES
        if len(packet.payload) > most or (count * width == 0 and len(packet.payload)):
            raise CodecError(
                f"payload of {len(packet.payload)} bytes for shape {packet.shape} of {name}, which has at most {most}.",
                "use the same codec with the same fields on both sides.",
            )
        return count, width


def as_rows(shape: Sequence[int]) -> tuple[int, int]:
    """A shape as rows of its last axis; a lone value is one row of one channel."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def require_samples(samples: Samples | None, count: int, name: str) -> None:
    """CodecError unless the samples of a packet are known and have so many rows together."""
    if samples is None or len(samples.ids) != len(samples.rows) or sum(samples.rows) != count or min(samples.rows, default=1) < 1:
        raise CodecError(
            f"{name} keeps a cache by sample and was told {samples} for {count} rows.", "both sides must name every packet's samples."
        )


def require_finite(tensor: Tensor, where: str) -> None:
    """CodecError when a value is NaN or infinite; the message counts them."""
    # A finite sum has only finite terms; only a sum that overflowed needs the second look.
    total = tensor.sum(dtype=torch.float32) if tensor.dtype == torch.float16 else tensor.sum()
    if math.isfinite(total.item()) or bool(torch.isfinite(tensor).all()):
        return
    bad = int(tensor.numel() - torch.isfinite(tensor).sum())
    kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinite"
    raise CodecError(
        f"{where}: {bad} of {tensor.numel()} values are {kind}.",
        "the training has diverged: lower train.learning_rate, or set train.clip_norm.",
    )


def to_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor, without a copy where it lies contiguous on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def join(parts: Sequence[bytes | memoryview]) -> bytearray:
    """The parts one after the other, in memory of its own: the one copy that decoding a whole cohort takes."""
    return bytearray().join(parts)


def from_bytes(payload: bytes | bytearray | memoryview, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A tensor over a copy of the payload; over a bytearray itself. Raises CodecError when the length does not fit the shape."""
    needed = math.prod(shape) * dtype.itemsize
    if len(payload) != needed:
        raise CodecError(f"payload of {len(payload)} bytes does not fill shape {tuple(shape)} of {dtype} ({needed} bytes).", _TORN)
    if needed == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    owned = payload if isinstance(payload, bytearray) else bytearray(payload)
    return torch.frombuffer(owned, dtype=dtype).reshape(tuple(shape))
