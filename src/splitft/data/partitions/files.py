"""One file per client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from splitft.data.base import Ints, Partition
from splitft.data.partitions.draw import deal_owners, owner_names


@dataclass(frozen=True)
class Files(Partition):
    """All documents of the same owner, for most sources the file, go to the same client.

    With more files than clients they are dealt, the largest first, so that clients hold about as many tokens; with
    `clients.count = 0` every file is a client. Nothing is drawn.
    """

    name: ClassVar[str] = "files"

    def split(
        self, lengths: Ints, columns: Sequence[Mapping[str, str]], owners: Sequence[str], clients: int, seed: int
    ) -> tuple[Ints, ...]:
        return deal_owners(owners, lengths, clients, "the owner (file)")

    def client_names(self, parts: Sequence[Ints], columns: Sequence[Mapping[str, str]], owners: Sequence[str]) -> tuple[str, ...]:
        return owner_names(owners, parts)
