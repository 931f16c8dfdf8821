"""Unequal text lengths, drawn from a Dirichlet distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from splitft.data.base import Ints, Partition
from splitft.data.partitions.draw import check_clients, check_dirichlet, dirichlet_parts
from splitft.errors import ConfigError


@dataclass(frozen=True)
class LengthDirichlet(Partition):
    """Clients that differ in the length of their texts, as in SplitFT (arXiv:2604.26388).

    Documents are sorted into `buckets` by quantiles of their length in tokens; each bucket is dealt by shares drawn from
    Dirichlet(alpha) over the clients (the idea of Hsu et al. 2019, arXiv:1909.06335, with lengths for labels). Parts are disjoint and
    complete, every client has at least `minimum` documents. The paper tells neither the number and edges of its buckets nor
    the direction of its draw: this is our reconstruction. Documents of equal length share a bucket, so fewer may be in use.
    """

    name: ClassVar[str] = "length_dirichlet"
    references: ClassVar[tuple[str, ...]] = ("2604.26388", "1909.06335")

    alpha: float = 0.5
    buckets: int = 10
    minimum: int = 2

    def __post_init__(self) -> None:
        check_dirichlet(self.alpha, self.minimum)
        if self.buckets < 2:
            raise ConfigError(f"partition.buckets is {self.buckets}.", 'Give at least 2; for one bucket use partition "iid".')

    def split(
        self, lengths: Ints, columns: Sequence[Mapping[str, str]], owners: Sequence[str], clients: int, seed: int
    ) -> tuple[Ints, ...]:
        check_clients(len(lengths), clients, self.minimum)
        return dirichlet_parts(length_buckets(lengths, self.buckets), clients, self.alpha, self.minimum, seed)


def length_buckets(lengths: Ints, buckets: int) -> Ints:
    """The quantile bucket [n] of every length, from 0; equal lengths are never apart."""
    edges = np.quantile(lengths, np.linspace(0, 1, buckets + 1)[1:-1])
    # Where many documents share a length, several edges fall on it: the middle keeps it apart from shorter and longer ones.
    return (np.searchsorted(edges, lengths, side="left") + np.searchsorted(edges, lengths, side="right")) // 2
