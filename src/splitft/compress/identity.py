"""Send tensors as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from splitft.compress.base import from_bytes, join, require_finite, to_bytes
from splitft.compress.stateless import Payload, Stateless, slices


@dataclass(frozen=True)
class Identity(Stateless):
    """The raw bytes of the tensor, bit for bit. For proofs and as the reference other codecs are measured against. Stateless."""

    number: ClassVar[int] = 1
    lossless: ClassVar[bool] = True
    floating: ClassVar[bool] = False

    def pack(self, rows: Tensor, counts: Sequence[int], generators: Sequence[torch.Generator | None]) -> list[Payload]:
        require_finite(rows, "tensor to send")
        return [*slices(to_bytes(rows), [self.payload_bytes(count, rows.shape[1], rows.dtype) for count in counts])]

    def unpack(self, payloads: Sequence[Payload], counts: Sequence[int], width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        rows = from_bytes(join(payloads), dtype, (sum(counts), width)).to(device)
        if dtype.is_floating_point:
            require_finite(rows, "received tensor")
        return rows

    def payload_bytes(self, count: int, width: int, dtype: torch.dtype) -> int:
        return count * width * dtype.itemsize

    def stride_bytes(self, dtype: torch.dtype) -> int:
        return dtype.itemsize
