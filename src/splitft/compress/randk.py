"""Send some channels of every packet, drawn at random; the others arrive as zeros.

The payload of a packet of q rows, d channels, k of them kept, little endian:

    seed u64 | payload of the inner codec for the kept values [q k], by ascending channel

Axes: q rows (tokens), n packets, d channels, k kept channels of a packet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from splitft.compress.base import Codec, Packed, Parts, Payload, State, require_finite
from splitft.compress.groups import packet_of_row
from splitft.compress.positions import ENERGIES, kept_channels, require_no_memory, require_share, scaled_share, with_dropped
from splitft.compress.wrapper import Nested, Wrapper
from splitft.errors import CodecError, ConfigError
from splitft.rng import numpy_stream

SEED_BYTES = 8


@dataclass(frozen=True)
class RandK(Wrapper):
    """Keep the `share` of the channels of each packet (one at least), drawn anew for each, and send those through `inner`.

    The receiver draws the same channels from a seed of 8 bytes, so positions cost nothing more. `unbiased`: what arrives is multiplied by
    d/k, so that it is right on average over the drawing, d/k - 1 times its energy off; without it the error is never larger than the
    values. Inside `feedback` it must be off: an error that may be larger than what was sent grows there without end. Prefer `topk` unless
    positions are too dear. An inner codec that remembers samples is refused, for it would compare other channels each time.
    """

    number: ClassVar[int] = 9
    references: ClassVar[tuple[str, ...]] = ("1809.07599", "1610.05492")
    share: float = 0.1
    unbiased: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share(self.share, "randk")
        require_no_memory(self.inner, "randk")
        if type(self.unbiased) is not bool:
            raise ConfigError(f"randk: unbiased is {self.unbiased!r}; allowed are true and false.", "see docs/methods.md.")

    @property
    def draws(self) -> bool:
        return True

    def scaled(self, factor: float) -> Codec:
        return replace(self, share=scaled_share(self.share, factor))

    def pack_rows(self, rows: Tensor, parts: Parts) -> Packed:
        require_finite(rows, "tensor to send by channels drawn")
        rows, kept = rows.cpu(), kept_channels(self.share, rows.shape[1])
        seeds = [_seed(generator) for generator in parts.generators]
        channels = _of_rows(seeds, rows.shape[1], kept, parts.counts)
        inner = self.inner.pack_rows(rows.gather(1, channels), parts.inside([state.inner for state in parts.states]))
        heads = [seed.to_bytes(SEED_BYTES, "little") for seed in seeds]
        known = with_dropped(inner.facts, rows, channels, parts.counts)
        if self.unbiased and kept < rows.shape[1]:
            # What arrives is not what the inner codec was given, so its error is not that of these values; one sum goes with the other.
            known = [{name: value for name, value in facts.items() if name not in ENERGIES} for facts in inner.facts]
        return Packed(
            [b"".join(pair) for pair in zip(heads, inner.payloads, strict=True)],
            [Nested(None, state) for state in inner.states],
            [{**facts, "stage_positions_bytes": SEED_BYTES + facts.get("stage_positions_bytes", 0.0)} for facts in known],
        )

    def unpack_rows(
        self, payloads: Sequence[Payload], parts: Parts, width: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, list[State]]:
        kept = kept_channels(self.share, width)
        if short := [len(payload) for payload in payloads if len(payload) < SEED_BYTES]:
            raise CodecError(f"payload of {short[0]} bytes is shorter than its seed of {SEED_BYTES}.", "the message is damaged.")
        views = [memoryview(payload) for payload in payloads]
        # The values first: with them it is known that the packet has rows as wide as it says, before so many channels are drawn.
        inside = parts.inside([state.inner for state in parts.states])
        values, states = self.inner.unpack_rows([view[SEED_BYTES:] for view in views], inside, kept, dtype, device)
        channels = _of_rows([int.from_bytes(view[:SEED_BYTES], "little") for view in views], width, kept, parts.counts)
        if self.unbiased and kept < width:
            limit = torch.finfo(dtype).max
            values = values.mul_(width / kept).clamp_(-limit, limit)
        rows = torch.zeros((sum(parts.counts), width), dtype=dtype, device=device)
        return rows.scatter_(1, channels.to(device), values), [Nested(None, state) for state in states]

    def payload_bytes(self, count: int, width: int, dtype: torch.dtype) -> int:
        return SEED_BYTES + self.inner.payload_bytes(count, kept_channels(self.share, width), dtype)

    def expected_bytes(self, count: int, width: int, dtype: torch.dtype, visit: int = 0, samples: int = 1) -> float:
        return SEED_BYTES + self.inner.expected_bytes(count, kept_channels(self.share, width), dtype, visit, samples)


def _seed(generator: torch.Generator | None) -> int:
    assert generator is not None, "randk needs a generator for every packet"
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


def _channels(seed: int, width: int, kept: int) -> Tensor:
    """The channels [k], ascending, that a seed stands for: those of the lowest of `width` numbers of its stream.

    Raw numbers of the stream and a stable sort: unlike NumPy's own drawing without replacement, they stay what they are in every version.
    """
    numbers = numpy_stream(seed, "randk").bit_generator.random_raw(width)
    return torch.from_numpy(np.sort(np.argsort(numbers, kind="stable")[:kept]).astype(np.int64))


def _of_rows(seeds: Sequence[int], width: int, kept: int, counts: Sequence[int]) -> Tensor:
    """The kept channels of each row's packet [q k]."""
    return torch.stack([_channels(seed, width, kept) for seed in seeds]).index_select(0, packet_of_row(counts))
