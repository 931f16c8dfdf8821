"""A trainable bottleneck at a cut: the sender's encoder makes few channels of a hidden state, the receiver's decoder makes a state of them.

z = scale E [h; 1], h' = scale D [z; 1]: PrivateLoRA's two small matrices (arXiv 2311.14030) around the wire, with an offset each. What
crosses forward is z, what comes back is the gradient with respect to z, so both directions are as narrow as the bottleneck.

A pair belongs to a boundary between blocks and is trained like an adapter: its matrices stand in the same row of the bank, the encoder
beside the adapters of the block in front of the boundary and the decoder beside those of the block behind it, so whoever has the block
has the matrix.

Axes: s sessions, n tokens, d hidden width, c channels, q rows of public states.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

# "cut": from a client's front to the server; "exit": from the server to a U-shape's exit.
Place = Literal["cut", "exit"]


@dataclass(frozen=True)
class Matrix:
    """One matrix [outputs inputs] of a pair, and where it stands in a row; its last column is the offset.

    `boundary` k lies between blocks k-1 and k. Effective is `scale` times what is stored, so a step of the optimizer moves it `scale`
    times as far as an adapter. `clip`: the longest z that leaves the encoder (0: any).
    """

    place: Place
    boundary: int
    encodes: bool
    outputs: int
    inputs: int
    scale: float = 1.0
    trained: bool = True
    clip: float = 0.0
    start: int = 0

    @property
    def block(self) -> int:
        """The block it goes with; for what stands behind the last block, the number of blocks."""
        return self.boundary - 1 if self.encodes else self.boundary

    @property
    def size(self) -> int:
        return self.outputs * self.inputs

    @property
    def end(self) -> int:
        return self.start + self.size

    @property
    def name(self) -> str:
        """Unique in a layout, and a tensor's name in a file."""
        return f"{self.place}_{self.boundary}.{'encoder' if self.encodes else 'decoder'}"

    def at(self, start: int) -> Matrix:
        return replace(self, start=start)

    def of(self, row: Tensor) -> Tensor:
        """The view [outputs inputs] of it in a row [p]."""
        return row[self.start : self.end].view(self.outputs, self.inputs)


@dataclass(frozen=True)
class Pair:
    """Encoder and decoder of one boundary."""

    encoder: Matrix
    decoder: Matrix

    @property
    def channels(self) -> int:
        return self.encoder.outputs


def pair_of(place: Place, boundary: int, width: int, channels: int, scale: float = 1.0, trained: bool = True, clip: float = 0.0) -> Pair:
    """A pair without a place in a row yet."""
    return Pair(
        Matrix(place, boundary, True, channels, width + 1, scale, trained, clip if place == "cut" else 0.0),
        Matrix(place, boundary, False, width, channels + 1, scale, trained),
    )


def clipped(codes: Tensor, limit: float) -> Tensor:
    """Codes [.. c] of which none is longer than `limit` (0: as they are); the gradient goes through."""
    if limit <= 0:
        return codes
    length = torch.linalg.vector_norm(codes, dim=-1, keepdim=True)
    found: Tensor = codes * (limit / length.clamp_min(limit))
    return found


def principal(states: Iterable[Tensor], channels: int) -> tuple[Tensor, Tensor]:
    """The mean [d] of states [q d] and the `channels` axes [c d], of length one, along which they vary most; float64."""
    total: Tensor | None = None
    products, count = torch.zeros(0), 0
    for part in states:
        rows = part.detach().reshape(-1, part.shape[-1]).to("cpu", torch.float64)
        if total is None:
            total, products = (
                torch.zeros(rows.shape[1], dtype=torch.float64),
                torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64),
            )
        total += rows.sum(0)
        products += rows.T @ rows
        count += len(rows)
    assert total is not None, "no states to begin a bottleneck with"
    mean = total / count
    _, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    axes = vectors.T.flip(0)[:channels]
    # An axis and its opposite are the same axis: the largest entry is positive, so that every machine begins alike.
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return mean, axes * torch.where(largest < 0, -1.0, 1.0)


def begin(pair: Pair, row: Tensor, mean: Tensor, axes: Tensor) -> None:
    """Write a pair into a row [p]: to the axes [c d] around the mean [d] and back again, which is the best linear bottleneck."""
    encoder = torch.cat([axes, -(axes @ mean)[:, None]], 1) / pair.encoder.scale
    decoder = torch.cat([axes.T, mean[:, None]], 1) / pair.decoder.scale
    pair.encoder.of(row).copy_(encoder.to(row))
    pair.decoder.of(row).copy_(decoder.to(row))
