"""Unequal label shares, drawn from a Dirichlet distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from splitft.data.base import Ints, Partition
from splitft.data.partitions.draw import check_clients, check_dirichlet, column_values, dirichlet_parts
from splitft.errors import ConfigError


@dataclass(frozen=True)
class Dirichlet(Partition):
    """The documents of each value of `column` (a label, a topic, a source) dealt by shares drawn from Dirichlet(alpha).

    Small `alpha`: most of a value goes to few clients; large: all clients alike. Every client has at least `minimum` documents.
    The draw goes value by value over the clients (Yurochkin et al. 2019, arXiv:1905.12022), so parts are disjoint and complete;
    Hsu et al. 2019 (arXiv:1909.06335), who made it usual, draw client by client over the values.
    """

    name: ClassVar[str] = "dirichlet"
    references: ClassVar[tuple[str, ...]] = ("1909.06335", "1905.12022")

    column: str
    alpha: float = 0.5
    minimum: int = 2

    def __post_init__(self) -> None:
        check_dirichlet(self.alpha, self.minimum)
        if not self.column:
            raise ConfigError("partition.column is empty.", 'Name a column of the data, for example column = "label".')

    def required_column(self) -> str:
        return self.column

    def split(
        self, lengths: Ints, columns: Sequence[Mapping[str, str]], owners: Sequence[str], clients: int, seed: int
    ) -> tuple[Ints, ...]:
        check_clients(len(lengths), clients, self.minimum)
        values = np.array(column_values(columns, self.column), dtype=object)
        labels = np.unique(values, return_inverse=True)[1]
        return dirichlet_parts(labels, clients, self.alpha, self.minimum, seed)
