"""The seam of codecs: a tensor becomes a packet of real bytes and back. Sender and receiver states evolve in step.

A packet is a fixed header of 32 bytes and a payload:

    u8 version | u8 codec | u8 dtype | u8 axes | u32 reserved | u32 x 4 shape | u64 payload length      (little endian)

A codec is a frozen dataclass: its fields are its configuration, its `number` names it on the wire. State goes in and comes out.
"""

from __future__ import annotations

import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

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
State: TypeAlias = Any


@dataclass(frozen=True)
class Packet:
    """The encoded form of one tensor: `codec` and `dtype` as on the wire, `shape` of the tensor, `payload` bytes."""

    codec: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    payload: bytes | memoryview

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


class Codec(ABC):
    """Encode and decode tensors of any shape up to four axes whose last is the channel axis (d). Lossless codecs say so.

    A cohort goes through `encode_batch` and `decode_batch`: the rows of its packets one after the other, [q d], of any number for each.
    They give what one packet after the other would, bit for bit. A codec without memory derives from `Stateless`, which has both.
    """

    number: ClassVar[int]
    references: ClassVar[tuple[str, ...]] = ()
    lossless: ClassVar[bool] = False

    @property
    def draws(self) -> bool:
        """Whether `encode` draws random numbers: then it must be given a generator, a new one for every packet."""
        return False

    def init(self) -> State:
        """The state both ends start from; None for a codec without memory."""
        return None

    @abstractmethod
    def encode(self, tensor: Tensor, state: State, generator: torch.Generator | None = None) -> tuple[Packet, State]:
        """The packet of a tensor. Raises CodecError when it holds NaN or infinity."""

    @abstractmethod
    def decode(self, packet: Packet, state: State) -> tuple[Tensor, State]:
        """The tensor (on CPU, in the dtype it was encoded from) of a packet. Raises CodecError when header and payload disagree."""

    @abstractmethod
    def packet_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Length on the wire for a tensor of this shape and dtype: exact, or an upper bound for codecs of variable rate."""

    def error_bound(self, tensor: Tensor) -> Tensor | None:
        """What each element may differ by after the wire, in float64 and in the tensor's shape; None where no such bound is declared."""
        return torch.zeros_like(tensor, dtype=torch.float64) if self.lossless else None

    def encode_batch(
        self, rows: Tensor, counts: Sequence[int], states: Sequence[State], generators: Sequence[torch.Generator | None]
    ) -> tuple[list[Packet], list[State]]:
        """A packet for each of `counts`: of that many of the rows [q d], in order. Codecs that can do all in one pass override this."""
        parts = torch.split(rows, list(counts))
        pairs = [self.encode(part, state, generator) for part, state, generator in zip(parts, states, generators, strict=True)]
        return [packet for packet, _ in pairs], [state for _, state in pairs]

    def decode_batch(
        self, packets: Sequence[Packet], states: Sequence[State], device: torch.device | None = None
    ) -> tuple[Tensor, list[State]]:
        """The inverse of `encode_batch`: rows [q d], on the CPU or the given device. At least one packet, all of one width and dtype."""
        pairs = [self.decode(packet, state) for packet, state in zip(packets, states, strict=True)]
        return torch.cat([tensor for tensor, _ in pairs]).to(device or "cpu"), [state for _, state in pairs]


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
