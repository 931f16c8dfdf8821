"""Documents dealt at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from splitft import rng
from splitft.data.base import Ints, Partition
from splitft.data.partitions.draw import check_clients


@dataclass(frozen=True)
class Iid(Partition):
    """Documents shuffled and dealt in equal numbers (they differ by one at most): every client sees the same distribution."""

    name: ClassVar[str] = "iid"

    def split(
        self, lengths: Ints, columns: Sequence[Mapping[str, str]], owners: Sequence[str], clients: int, seed: int
    ) -> tuple[Ints, ...]:
        check_clients(len(lengths), clients)
        order = rng.numpy_stream(seed, "partition").permutation(len(lengths))
        return tuple(np.sort(part) for part in np.array_split(order, clients))
