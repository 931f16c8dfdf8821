"""Codecs without memory: said once over the packed rows of any number of packets, so that a cohort is one pass over the data.

Axes: q rows of all packets together, d channels.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import ClassVar

import torch
from torch import Tensor

from splitft.compress.base import HEADER_BYTES, Codec, Packet, State
from splitft.errors import CodecError

Payload = bytes | memoryview


class Stateless(Codec):
    """What a codec does to rows [q d]; a tensor of another shape is the rows of its last axis. A tensor without elements has no payload.

    One packet goes the same way as many, so one by one and together give the same bytes and the same values.
    """

    floating: ClassVar[bool] = True

    @abstractmethod
    def pack(self, rows: Tensor, counts: Sequence[int], generators: Sequence[torch.Generator | None]) -> list[Payload]:
        """The payload of each packet, which holds that many of the rows [q d]: one at least, as of channels. Refuses NaN and infinity."""

    @abstractmethod
    def unpack(self, payloads: Sequence[Payload], counts: Sequence[int], width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The rows [q d] of payloads whose lengths are right, finite, in memory of their own. Raises CodecError for damaged bytes."""

    @abstractmethod
    def payload_bytes(self, count: int, width: int, dtype: torch.dtype) -> int:
        """Exact length of the payload of `count` rows of `width` channels, both at least one."""

    def packet_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        count, width = as_rows(shape)
        return HEADER_BYTES + (self.payload_bytes(count, width, dtype) if count * width else 0)

    def encode(self, tensor: Tensor, state: State, generator: torch.Generator | None = None) -> tuple[Packet, State]:
        count, width = as_rows(tensor.shape)
        [packet], _ = self.encode_batch(tensor.reshape(count, width), [count], [state], [generator])
        return Packet(packet.codec, packet.dtype, tuple(tensor.shape), packet.payload), state

    def decode(self, packet: Packet, state: State) -> tuple[Tensor, State]:
        rows, _ = self.decode_batch([packet], [state])
        return rows.reshape(packet.shape), state

    def encode_batch(
        self, rows: Tensor, counts: Sequence[int], states: Sequence[State], generators: Sequence[torch.Generator | None]
    ) -> tuple[list[Packet], list[State]]:
        width = rows.shape[1]
        full = [k for k, count in enumerate(counts) if count * width]
        packed = self.pack(rows.detach(), [counts[k] for k in full], [generators[k] for k in full]) if full else []
        payloads: list[Payload] = [b""] * len(counts)
        for k, payload in zip(full, packed, strict=True):
            payloads[k] = payload
        made = [Packet(self.number, rows.dtype, (count, width), payload) for count, payload in zip(counts, payloads, strict=True)]
        return made, list(states)

    def decode_batch(
        self, packets: Sequence[Packet], states: Sequence[State], device: torch.device | None = None
    ) -> tuple[Tensor, list[State]]:
        sizes = [self._rows_of(packet) for packet in packets]
        width, dtype, device = sizes[0][1], packets[0].dtype, device or torch.device("cpu")
        if any(size[1] != width or packet.dtype != dtype for size, packet in zip(sizes, packets, strict=True)):
            raise CodecError("packets of different widths or types came together.", "use the same model and dtype on all clients.")
        full = [k for k, (count, _) in enumerate(sizes) if count * width]
        if not full:
            return torch.empty((sum(count for count, _ in sizes), width), dtype=dtype, device=device), list(states)
        return self.unpack([packets[k].payload for k in full], [sizes[k][0] for k in full], width, dtype, device), list(states)

    def _rows_of(self, packet: Packet) -> tuple[int, int]:
        """Rows and channels of a packet whose header and payload agree; else CodecError."""
        name = type(self).__name__.lower()
        if packet.codec != self.number:
            raise CodecError(f"a packet of codec {packet.codec} reached {name} (codec {self.number}).", "use the same codec on both sides.")
        if self.floating and not packet.dtype.is_floating_point:
            raise CodecError(f"a {name} tensor says it is {packet.dtype}.", "use the same splitft version on both sides.")
        count, width = as_rows(packet.shape)
        needed = self.packet_bytes(packet.shape, packet.dtype) - HEADER_BYTES
        if len(packet.payload) != needed:
            raise CodecError(
                f"payload of {len(packet.payload)} bytes does not fill shape {packet.shape} of {name} ({needed} bytes).",
                "use the same codec with the same fields on both sides.",
            )
        return count, width


def as_rows(shape: Sequence[int]) -> tuple[int, int]:
    """A shape as rows of its last axis; a lone value is one row of one channel."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def slices(data: memoryview, sizes: Sequence[int]) -> list[memoryview]:
    """Consecutive pieces of these lengths, as views."""
    return [data[start:end] for start, end in pairwise(accumulate(sizes, initial=0))]
