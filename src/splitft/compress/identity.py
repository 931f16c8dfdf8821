"""Send tensors as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from splitft.compress.base import HEADER_BYTES, Codec, Packet, State, equal_packets, from_bytes, require_finite, to_bytes
from splitft.errors import CodecError


@dataclass(frozen=True)
class Identity(Codec):
    """The raw bytes of the tensor, bit for bit. For proofs and as the reference other codecs are measured against. Stateless."""

    number: ClassVar[int] = 1
    lossless: ClassVar[bool] = True

    def encode(self, tensor: Tensor, state: State, generator: torch.Generator | None = None) -> tuple[Packet, State]:
        require_finite(tensor, "tensor to send")
        return Packet(self.number, tensor.dtype, tuple(tensor.shape), to_bytes(tensor)), state

    def decode(self, packet: Packet, state: State) -> tuple[Tensor, State]:
        if packet.codec != self.number:
            raise CodecError(
                f"a packet of codec {packet.codec} reached identity (codec {self.number}).", "use the same codec on both sides."
            )
        tensor = from_bytes(packet.payload, packet.dtype, packet.shape)
        if packet.dtype.is_floating_point:
            require_finite(tensor, "received tensor")
        return tensor, state

    def packet_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return HEADER_BYTES + math.prod(shape) * dtype.itemsize

    def encode_batch(
        self, tensor: Tensor, states: Sequence[State], generators: Sequence[torch.Generator | None]
    ) -> tuple[list[Packet], list[State]]:
        require_finite(tensor, "tensor to send")
        return equal_packets(self.number, tensor, tensor), list(states)
