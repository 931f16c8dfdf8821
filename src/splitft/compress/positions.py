"""Which channels of a row are sent, and how the receiver is told.

Axes: q rows, d channels, k channels of a row that are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from splitft.compress.base import Codec, Facts, Payload
from splitft.errors import CodecError, ConfigError

# What a dial may bring a share down to; one channel is sent at least.
SMALLEST_SHARE = 1e-9
# Facts about the energy of a packet's values and of their errors.
ENERGIES = ("squared", "squared_error")


def require_share(share: float, name: str) -> None:
    """ConfigError unless it is a share of the channels: above 0, at most 1."""
    if type(share) not in (int, float) or not 0.0 < share <= 1.0:
        raise ConfigError(f"{name}: share is {share!r}; allowed are numbers above 0 up to 1.", "see docs/methods.md.")


def require_no_memory(inner: Codec, name: str) -> None:
    """ConfigError for a codec inside that remembers by sample: other channels are kept each time, which it would take for the same."""
    if inner.hears_samples:
        raise ConfigError(
            f"{name}: inner is {type(inner).__name__.lower()}, which remembers samples; {name} hands it other channels each time.",
            f"put what remembers outside, {name} inside of it.",
        )


def with_dropped(facts: Sequence[Facts], rows: Tensor, channels: Tensor, counts: Sequence[int]) -> list[Facts]:
    """The facts of a codec that was given `channels` [q k] of the rows [q d] of packets alone, as they are of all channels, of which the
    others arrive as zeros: what is dropped adds its squares to those of the values and of their errors."""
    found: list[Facts] = []
    for fact, part, kept in zip(facts, torch.split(rows, list(counts)), torch.split(channels, list(counts)), strict=True):
        told = [name for name in ENERGIES if name in fact]
        lost = float(part.double().scatter(1, kept, 0.0).square().sum()) if told else 0.0
        found.append({**fact, **{name: fact[name] + lost for name in told}})
    return found


def scaled_share(share: float, factor: float) -> float:
    """The share that loses about `factor` times as much."""
    return min(1.0, max(SMALLEST_SHARE, share / factor))


def kept_channels(share: float, width: int) -> int:
    """How many of `width` channels a share is: the nearest number, one at least."""
    return min(width, max(1, round(share * width)))


def _index_bits(width: int) -> int:
    return (width - 1).bit_length()


def position_bytes(width: int, kept: int) -> int:
    """Bytes that tell which `kept` of `width` channels a row has: a bit for each channel or a number for each kept one, what is less."""
    return 0 if kept == width else min(-(-width // 8), -(-kept * _index_bits(width) // 8))


def _is_bitmap(width: int, kept: int) -> bool:
    return -(-width // 8) <= -(-kept * _index_bits(width) // 8)


def pack_positions(channels: Tensor, width: int) -> Tensor:
    """Channels [q k], ascending in each row, as bytes [q position_bytes]."""
    count, kept = channels.shape
    if kept == width:
        return torch.empty((count, 0), dtype=torch.uint8)
    if _is_bitmap(width, kept):
        bits = torch.zeros((count, width), dtype=torch.uint8).scatter_(1, channels, 1)
    else:
        bits = ((channels[:, :, None] >> torch.arange(_index_bits(width))) & 1).to(torch.uint8).reshape(count, -1)
    return torch.from_numpy(np.packbits(bits.numpy(), axis=1, bitorder="little"))


def unpack_positions(data: Payload, count: int, width: int, kept: int) -> Tensor:
    """The inverse of `pack_positions`: channels [q k]. Raises CodecError unless every row names `kept` ascending channels below `width`."""
    size = position_bytes(width, kept)
    if len(data) != count * size:
        raise CodecError(f"{len(data)} bytes of positions for {count} rows, needed are {count * size}.", "the message is damaged.")
    if kept == width:
        return torch.arange(width).expand(count, width)
    packed: Any = np.frombuffer(data, dtype=np.uint8).reshape(count, size)
    bits = torch.from_numpy(np.unpackbits(packed, axis=1, bitorder="little"))
    used = width if _is_bitmap(width, kept) else kept * _index_bits(width)
    sound = not bool(bits[:, used:].any())
    if _is_bitmap(width, kept):
        sound = sound and bool((bits.sum(1) == kept).all())
        channels = bits.nonzero()[:, 1].view(count, kept) if sound else None
    else:
        places = 1 << torch.arange(_index_bits(width))
        channels = (bits[:, :used].view(count, kept, -1) * places).sum(2)
        sound = sound and bool((channels[:, -1] < width).all()) and bool((channels[:, 1:] > channels[:, :-1]).all())
    if channels is None or not sound:
        raise CodecError(f"positions do not name {kept} of {width} channels in every row.", "the message is damaged.")
    return channels
