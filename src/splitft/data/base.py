"""What flows through the data layer: documents, token rows, clients' shares, and the two seams (sources and partitions).

Axes: n rows or documents, b rows of a batch, t tokens. Everything is NumPy; torch is not needed to prepare data.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int64]
Ids: TypeAlias = npt.NDArray[np.int32]
Mask: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Segment:
    """A piece of a document. The loss is taken on `trained` pieces only; the others are context."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Document:
    """One text and where it came from.

    `segments` holds plain text and prompt/completion pairs, `messages` a conversation (then `segments` is empty). `owner` is
    the natural owner (a file, a speaker), `columns` the scalar fields beside the text, `origin` is "file:line" for errors.
    """

    segments: tuple[Segment, ...]
    messages: tuple[Mapping[str, str], ...] | None = None
    owner: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""

    def digest(self) -> bytes:
        """SHA-256 of the content: equal for documents that train the same text, whatever their owner or columns."""
        state = hashlib.sha256()
        for segment in self.segments:
            state.update(b"\x01" if segment.trained else b"\x00")
            state.update(len(segment.text).to_bytes(8, "little") + segment.text.encode())
        for message in self.messages or ():
            for key in sorted(message):
                state.update(len(message[key]).to_bytes(8, "little") + f"{key}\x00{message[key]}".encode())
        return state.digest()


class Source(ABC):
    """Where documents come from. A frozen dataclass whose fields are its configuration."""

    name: ClassVar[str]

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """All documents in a fixed order; called once per run. DataError names file, line and remedy."""


class Partition(ABC):
    """Which client gets which document. A frozen dataclass whose fields are its configuration."""

    name: ClassVar[str]
    references: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def split(
        self, lengths: Ints, columns: Sequence[Mapping[str, str]], owners: Sequence[str], clients: int, seed: int
    ) -> tuple[Ints, ...]:
        """One ascending index array per client; together they hold every document exactly once.

        `lengths` [n] counts tokens. The same arguments give the same answer on every machine. DataError if it cannot be done.
        """

    def required_column(self) -> str:
        """The column every document must have, or "" if none: lets the caller name file and line of one that has not."""
        return ""

    def client_names(self, parts: Sequence[Ints], columns: Sequence[Mapping[str, str]], owners: Sequence[str]) -> tuple[str, ...]:
        """A distinct name for each of the `parts` that `split` gave."""
        return tuple(f"client-{client}" for client in range(len(parts)))


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of unequal length stored flat: row i is `ids[offsets[i]:offsets[i + 1]]`.

    `trained` is True where this token is a target to be predicted; a row's first token never is, whatever the mask says, for
    nothing precedes it. `truncated` counts documents cut short and `dropped_tokens` the tokens left out when the rows were made.
    """

    ids: Ids
    trained: Mask
    offsets: Ints
    truncated: int = 0
    dropped_tokens: int = 0

    def __post_init__(self) -> None:
        assert self.ids.dtype == np.int32, self.ids.dtype
        assert self.trained.dtype == np.bool_, self.trained.dtype
        assert self.offsets.dtype == np.int64, self.offsets.dtype
        assert self.ids.shape == self.trained.shape == (self.offsets[-1],), "ids, mask and offsets disagree"
        assert self.offsets[0] == 0, "offsets start at 0"
        assert (np.diff(self.offsets) > 0).all(), "no row is empty"

    @classmethod
    def build(cls, rows: Sequence[tuple[Ids, Mask]], truncated: int = 0, dropped_tokens: int = 0) -> TokenRows:
        """From (ids, trained) pairs of one row each."""
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(ids) for ids, _ in rows], out=offsets[1:])
        ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in rows)], dtype=np.int32)
        trained = np.concatenate([np.zeros(0, np.bool_), *(mask for _, mask in rows)], dtype=np.bool_)
        return cls(ids, trained, offsets, truncated, dropped_tokens)

    @classmethod
    def concatenate(cls, parts: Sequence[TokenRows]) -> TokenRows:
        """The rows of all parts, in order; the counts add up."""
        lengths = np.concatenate([np.zeros(1, np.int64), *(part.lengths for part in parts)])
        ids = np.concatenate([np.zeros(0, np.int32), *(part.ids for part in parts)])
        trained = np.concatenate([np.zeros(0, np.bool_), *(part.trained for part in parts)])
        truncated, dropped = sum(part.truncated for part in parts), sum(part.dropped_tokens for part in parts)
        return cls(ids, trained, np.cumsum(lengths), truncated, dropped)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> Ints:
        """Tokens per row [n]."""
        return np.diff(self.offsets)

    @property
    def tokens(self) -> int:
        """All tokens."""
        return len(self.ids)

    @property
    def target_tokens(self) -> int:
        """Tokens that take part in the loss: trained and not first in their row."""
        return int(self.trained.sum()) - int(self.trained[self.offsets[:-1]].sum())

    def _gather(self, indices: Ints) -> tuple[Ints, Ints, Mask]:
        """Flat positions [b, t] of the rows `indices`, their lengths [b], and where [b, t] is inside the row."""
        lengths = self.lengths[indices]
        steps = np.arange(lengths.max(initial=0))
        inside = steps < lengths[:, None]
        return np.where(inside, self.offsets[:-1][indices][:, None] + steps, 0), lengths, inside

    def batch(self, indices: Sequence[int] | Ints) -> tuple[Ints, Ints, Mask]:
        """(ids int64 [b, t] padded on the right with 0, lengths int64 [b], trained bool [b, t], False on padding)."""
        positions, lengths, inside = self._gather(np.asarray(indices, np.int64))
        return np.where(inside, self.ids[positions], 0).astype(np.int64), lengths, self.trained[positions] & inside

    def select(self, indices: Sequence[int] | Ints) -> TokenRows:
        """Only these rows, in this order; the counts of what was left out stay with the original."""
        wanted = np.asarray(indices, np.int64)
        lengths = self.lengths[wanted]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        positions = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][wanted] - offsets[:-1], lengths)
        return TokenRows(self.ids[positions], self.trained[positions], offsets)


class DistantRows(TokenRows):
    """Rows that lie with their owner elsewhere: how many there are, of how many tokens together, and nothing of what they say."""

    def __init__(self, rows: int, tokens: int) -> None:
        super().__init__(np.zeros(0, np.int32), np.zeros(0, np.bool_), np.zeros(1, np.int64))
        object.__setattr__(self, "_counts", (rows, tokens))

    def __len__(self) -> int:
        return int(self._counts[0])  # type: ignore[attr-defined]

    @property
    def tokens(self) -> int:
        return int(self._counts[1])  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class ClientData:
    """One client's share. `documents` counts all its documents; no document is in both `train` and `held_out`."""

    client: int
    name: str
    documents: int
    train: TokenRows
    held_out: TokenRows


@dataclass(frozen=True, eq=False)
class FederatedData:
    """All clients' shares, the common held-out slice, and how they came about.

    `manifest` is JSON-able and says which document went where. Bucket k of a histogram counts documents whose token length
    is in [edges[k], edges[k + 1]). `skew_index` is the mean total-variation distance between a client's length histogram and that
    of all clients: 0 when alike, near 1 when every client has lengths of its own.
    """

    clients: tuple[ClientData, ...]
    common_held_out: TokenRows
    manifest: dict[str, Any]
    length_edges: list[int]
    length_histograms: list[list[int]]
    skew_index: float
