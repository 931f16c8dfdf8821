"""Send the largest values of every row; the others arrive as zeros.

The payload of a packet of q rows, d channels, k of them kept:

    positions u8 [q position_bytes(d, k)] | payload of the inner codec for the kept values [q k], by ascending channel

Axes: q rows (tokens), d channels, k kept channels of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from splitft.compress.base import Codec, Packed, Parts, Payload, State, as_rows, require_finite, to_bytes
from splitft.compress.positions import (
    kept_channels,
    pack_positions,
    position_bytes,
    require_no_memory,
    require_share,
    scaled_share,
    unpack_positions,
    with_dropped,
)
from splitft.compress.stateless import slices
from splitft.compress.wrapper import Nested, Wrapper, on_cpu
from splitft.errors import CodecError, ConfigError


@dataclass(frozen=True)
class TopK(Wrapper):
    """Of each row keep the `share` of the values that are largest in magnitude (one at least), and send those through `inner`.

    Of two equal values the lower channel is kept. `random`: this share of the kept places goes to values drawn evenly among the others
    (randomised top-k, arXiv 2305.18469, which draws place by place whether it is such a one; here their number is fixed, so that a
    packet's size is). Without it what is dropped is off by its own magnitude. Prefer it inside `feedback`, where that is made good later.
    Every row keeps other channels each time, so an inner codec that remembers samples is refused: put it outside.
    """

    number: ClassVar[int] = 8
    references: ClassVar[tuple[str, ...]] = ("1809.07599", "2305.18469")
    share: float = 0.1
    random: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share(self.share, "topk")
        require_no_memory(self.inner, "topk")
        if type(self.random) not in (int, float) or not 0.0 <= self.random <= 1.0:
            raise ConfigError(f"topk: random is {self.random!r}; allowed are numbers from 0 to 1.", "see docs/methods.md.")

    @property
    def draws(self) -> bool:
        return self.random > 0.0 or self.inner.draws

    def scaled(self, factor: float) -> Codec:
        return replace(self, share=scaled_share(self.share, factor))

    def pack_rows(self, rows: Tensor, parts: Parts) -> Packed:
        require_finite(rows, "tensor to send by its largest values")
        rows, kept = rows.cpu(), kept_channels(self.share, rows.shape[1])
        channels = self._channels(on_cpu(rows).abs(), kept, parts)
        inner = self.inner.pack_rows(rows.gather(1, channels), parts.inside([state.inner for state in parts.states]))
        sizes = [count * position_bytes(rows.shape[1], kept) for count in parts.counts]
        heads = slices(to_bytes(pack_positions(channels, rows.shape[1])), sizes)
        return Packed(
            [b"".join(pair) for pair in zip(heads, inner.payloads, strict=True)],
            [Nested(None, state) for state in inner.states],
            [
                {**facts, "stage_positions_bytes": size + facts.get("stage_positions_bytes", 0.0)}
                for facts, size in zip(with_dropped(inner.facts, rows, channels, parts.counts), sizes, strict=True)
            ],
        )

    def unpack_rows(
        self, payloads: Sequence[Payload], parts: Parts, width: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, list[State]]:
        kept = kept_channels(self.share, width)
        sizes = [count * position_bytes(width, kept) for count in parts.counts]
        views = [memoryview(payload) for payload in payloads]
        for view, size in zip(views, sizes, strict=True):
            if len(view) < size:
                raise CodecError(f"payload of {len(view)} bytes is shorter than its {size} bytes of positions.", "the message is damaged.")
        # The values first: with them it is known that there are as many rows as the packet says, even where positions take no bytes.
        tails = [view[size:] for view, size in zip(views, sizes, strict=True)]
        values, states = self.inner.unpack_rows(tails, parts.inside([state.inner for state in parts.states]), kept, dtype, device)
        heads = zip(views, sizes, parts.counts, strict=True)
        channels = torch.cat([unpack_positions(view[:size], count, width, kept) for view, size, count in heads])
        rows = torch.zeros((sum(parts.counts), width), dtype=dtype, device=device)
        return rows.scatter_(1, channels.to(device), values), [Nested(None, state) for state in states]

    def payload_bytes(self, count: int, width: int, dtype: torch.dtype) -> int:
        kept = kept_channels(self.share, width)
        return count * position_bytes(width, kept) + self.inner.payload_bytes(count, kept, dtype)

    def expected_bytes(self, count: int, width: int, dtype: torch.dtype, visit: int = 0, samples: int = 1) -> float:
        kept = kept_channels(self.share, width)
        return count * position_bytes(width, kept) + self.inner.expected_bytes(count, kept, dtype, visit, samples)

    def error_bound(self, tensor: Tensor) -> Tensor | None:
        count, width = as_rows(tensor.shape)
        bound = tensor.detach().double().cpu().abs()
        if self.random or not count * width:
            return None if self.random else bound
        rows, own = tensor.detach().cpu().reshape(count, width), bound.reshape(count, width)
        channels = _largest(on_cpu(rows).abs(), kept_channels(self.share, width))
        inner = self.inner.error_bound(rows.gather(1, channels))
        return None if inner is None else own.scatter(1, channels, inner).reshape(tensor.shape)

    def _channels(self, magnitudes: Tensor, kept: int, parts: Parts) -> Tensor:
        """The kept channels of each row [q k], ascending, of magnitudes [q d] (spoilt)."""
        drawn = round(self.random * kept)
        if not drawn:
            return _largest(magnitudes, kept)
        largest = _largest(magnitudes, kept - drawn) if kept > drawn else magnitudes.new_empty((len(magnitudes), 0), dtype=torch.int64)
        for part, generator in zip(torch.split(magnitudes, list(parts.counts)), parts.generators, strict=True):
            assert generator is not None, "randomised top-k needs a generator for every packet"
            part.copy_(torch.rand(part.shape, generator=generator))
        others = _largest(magnitudes.scatter_(1, largest, -1.0), drawn)
        return torch.cat([largest, others], 1).sort(dim=1).values


def _largest(values: Tensor, kept: int) -> Tensor:
    """The channels of the `kept` largest of each row's values [q d], ascending; of equal ones the lower channels."""
    count, width = values.shape
    if kept == width:
        return torch.arange(width).expand(count, width)
    # Not torch's choice of channels: which of equal values it takes is not said.
    least = values.topk(kept, dim=1, sorted=False).values.amin(1, keepdim=True)
    chosen = values >= least
    too_many = (chosen.sum(1) > kept).nonzero()[:, 0]
    if len(too_many):
        above = values[too_many] > least[too_many]
        equal = chosen[too_many] & ~above
        room = kept - above.sum(1, keepdim=True)
        chosen[too_many] = above | (equal & (equal.cumsum(1) <= room))
    return chosen.nonzero()[:, 1].view(count, kept)
