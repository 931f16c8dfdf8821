"""Which values of the rows of several packets share a scale.

Axes: q rows of all packets together, n packets, d channels, g groups of a row, w channels of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """The rows [q d] of packets of `counts` rows each, in groups of `width` channels of a row; `by_channel`: of one channel of a packet."""

    counts: tuple[int, ...]
    channels: int
    width: int
    by_channel: bool

    @property
    def per_row(self) -> int:
        return -(-self.channels // self.width)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one number for each group: [n 1 d] by channel, else [q g 1]."""
        return (len(self.counts), 1, self.channels) if self.by_channel else (sum(self.counts), self.per_row, 1)

    def split(self, rows: Tensor) -> Tensor:
        """The rows so that numbers of `spread` fit them; a last group that is not full repeats its last value."""
        if self.by_channel:
            return rows.view(len(self.counts), -1, self.channels) if _equal(self.counts) else rows[:, None]
        if missing := self.per_row * self.width - self.channels:
            rows = torch.cat([rows, rows[:, -1:].expand(-1, missing)], 1)
        return rows.view(rows.shape[0], self.per_row, self.width)

    def merge(self, grouped: Tensor) -> Tensor:
        """The inverse of `split`: [q d], contiguous."""
        return grouped.reshape(sum(self.counts), -1)[:, : self.channels].contiguous()

    def spread(self, numbers: Tensor) -> Tensor:
        """One number for each group (see `shape`) so that it can be combined with what `split` returns."""
        return numbers if not self.by_channel or _equal(self.counts) else numbers.index_select(0, self._packets.to(numbers.device))

    def extremes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest value of each group, in `shape`."""
        if self.by_channel:
            lowest, highest = packet_extremes(rows, self.counts)
            return lowest[:, None], highest[:, None]
        grouped = self.split(rows)
        return grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)

    @cached_property
    def _packets(self) -> Tensor:
        return packet_of_row(self.counts)


def packet_of_row(counts: Sequence[int]) -> Tensor:
    """The packet that each row belongs to [q]."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def packet_extremes(rows: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value of each channel of each packet [n d]; a packet has one row at least."""
    most, width = max(counts), rows.shape[1]
    if not _equal(counts):
        # Filled up to equal lengths with first rows: an extreme over an axis is far faster than torch's over ragged segments.
        lengths = torch.tensor(counts)
        first = (lengths.cumsum(0) - lengths)[:, None]
        step = torch.arange(most)
        rows = rows.index_select(0, (first + step.where(step < lengths[:, None], 0)).reshape(-1).to(rows.device))
    packets = rows.view(len(counts), most, width)
    return packets.amin(1), packets.amax(1)


def _equal(counts: Sequence[int]) -> bool:
    return min(counts) == max(counts)
