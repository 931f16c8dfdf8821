"""Natural owners told by a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from splitft.data.base import Ints, Partition
from splitft.data.partitions.draw import column_values, deal_owners, owner_names
from splitft.errors import ConfigError


@dataclass(frozen=True)
class ByColumn(Partition):
    """All documents with the same value of `column` (a speaker, a hospital) go to the same client.

    With more values than clients they are dealt, the largest first, so that clients hold about as many tokens; with
    `clients.count = 0` every value is a client. Nothing is drawn.
    """

    name: ClassVar[str] = "by_column"

    column: str

    def __post_init__(self) -> None:
        if not self.column:
            raise ConfigError("partition.column is empty.", 'Name a column of the data, for example column = "speaker".')

    def required_column(self) -> str:
        return self.column

    def split(
        self, lengths: Ints, columns: Sequence[Mapping[str, str]], owners: Sequence[str], clients: int, seed: int
    ) -> tuple[Ints, ...]:
        return deal_owners(column_values(columns, self.column), lengths, clients, f"column {self.column!r}")

    def client_names(self, parts: Sequence[Ints], columns: Sequence[Mapping[str, str]], owners: Sequence[str]) -> tuple[str, ...]:
        return owner_names(column_values(columns, self.column), parts)
