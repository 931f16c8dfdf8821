"""Codecs without memory: said once over the packed rows of any number of packets, so that a cohort is one pass over the data.

Axes: q rows of all packets together, d channels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import ClassVar

import torch
from torch import Tensor

from splitft.compress.base import HEADER_BYTES, NOTHING, Codec, Packed, Packet, Parts, Payload, State, as_rows
from splitft.errors import CodecError

__all__ = ["Payload", "Stateless", "as_rows", "slices"]


class Stateless(Codec):
    """What a codec of fixed rate does to rows [q d]; a tensor of another shape is the rows of its last axis.

    One packet goes the same way as many, so one by one and together give the same bytes and the same values.
    """

    fixed_rate: ClassVar[bool] = True

    @abstractmethod
    def pack(self, rows: Tensor, counts: Sequence[int], generators: Sequence[torch.Generator | None]) -> list[Payload]:
        """The payload of each packet, which holds that many of the rows [q d]: one at least, as of channels. Refuses NaN and infinity."""

    @abstractmethod
    def unpack(self, payloads: Sequence[Payload], counts: Sequence[int], width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The rows [q d] of payloads whose lengths are right, finite, in memory of their own. Raises CodecError for damaged bytes."""

    def pack_rows(self, rows: Tensor, parts: Parts) -> Packed:
        return Packed(self.pack(rows, parts.counts, parts.generators), list(parts.states), [NOTHING] * len(parts.counts))

    def unpack_rows(
        self, payloads: Sequence[Payload], parts: Parts, width: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, list[State]]:
        for payload, count in zip(payloads, parts.counts, strict=True):
            self._require_length(payload, (count, width), dtype)
        return self.unpack(payloads, parts.counts, width, dtype, device), list(parts.states)

    def _rows_of(self, packet: Packet) -> tuple[int, int]:
        size = super()._rows_of(packet)
        self._require_length(packet.payload, packet.shape, packet.dtype)
        return size

    def _require_length(self, payload: Payload, shape: Sequence[int], dtype: torch.dtype) -> None:
        needed = self.packet_bytes(shape, dtype) - HEADER_BYTES
        if len(payload) != needed:
            raise CodecError(
                f"payload of {len(payload)} bytes does not fill shape {tuple(shape)} of {type(self).__name__.lower()} ({needed} bytes).",
                "use the same codec with the same fields on both sides.",
            )


def slices(data: memoryview, sizes: Sequence[int]) -> list[memoryview]:
    """Consecutive pieces of these lengths, as views."""
    return [data[start:end] for start, end in pairwise(accumulate(sizes, initial=0))]
