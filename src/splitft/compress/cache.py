"""Caches by sample: the last decoded rows of every sample, the same at both ends because both follow the same packets.

A cache is a value: `put` gives another one that shares what has not changed, so an end can go back to the state before a packet.
What is dropped when the budget is reached follows from the order of the packets alone, so both ends drop the same.

Axes: q rows (tokens) of a packet, d channels.
"""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from splitft.compress.base import Parts, Samples, State
from splitft.errors import ConfigError, ResourceError

Kept = Literal["bfloat16", "float16", "float32"]
KEPT = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Evict = Literal["new", "oldest"]
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Budget:
    """How much a cache may hold: `megabytes` in memory (0: any amount), what goes when that is reached, the type of what is kept.

    `evict = "new"`: what does not fit is not kept, so that a part of the samples is served in every epoch; `"oldest"` drops what was
    used longest ago, for streams that do not come back (over whole epochs it would drop every sample just before it is due).
    `spill`: what does not fit lies in a temporary file in place of being dropped. It does not bound the memory that writing a checkpoint
    takes: `flatten` reads all of it back. Each cache has a file of its own. Where none can be made, or the disk is full: ResourceError.
    """

    megabytes: float = 0.0
    evict: Evict = "new"
    kept: Kept = "bfloat16"
    spill: bool = False

    def __post_init__(self) -> None:
        wrong = {
            f"cache_mb is {self.megabytes!r}; allowed are numbers from 0": type(self.megabytes) not in (int, float)
            or not 0 <= self.megabytes < 1e9,
            f"evict is {self.evict!r}; allowed are new and oldest": self.evict not in ("new", "oldest"),
            f"cache_dtype is {self.kept!r}; allowed are {', '.join(KEPT)}": self.kept not in KEPT,
            f"spill is {self.spill!r}; allowed are true and false": type(self.spill) is not bool,
        }
        if found := tuple(problem for problem, is_wrong in wrong.items() if is_wrong):
            raise ConfigError("a codec's cache has wrong fields.", "see docs/methods.md.", found)

    @property
    def bytes(self) -> float:
        return self.megabytes * 1e6 if self.megabytes else float("inf")


class SpillFile:
    """A temporary file without a name for what does not fit into memory; places that are free again are used again."""

    def __init__(self) -> None:
        self.end = 0
        with self._disk("open"):
            self.file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as somebody may read from it
        weakref.finalize(self, _close, self.file)
        self.free: dict[int, list[int]] = {}

    def write(self, values: Tensor) -> Spilled:
        data = values.contiguous().view(torch.uint8).numpy().tobytes()
        places = self.free.get(len(data))
        offset = places.pop() if places else self.end
        self.end = max(self.end, offset + len(data))
        with self._disk(f"write {len(data)} bytes to"):
            self.file.seek(offset)
            self.file.write(data)
            self.file.flush()  # or a full disk would be noticed when something else is read
        return Spilled(self, offset, tuple(values.shape), values.dtype)

    def read(self, offset: int, size_bytes: int) -> bytearray:
        """What was written there."""
        with self._disk(f"read {size_bytes} bytes from"):
            self.file.seek(offset)
            data = bytearray(self.file.read(size_bytes))
            if len(data) != size_bytes:
                raise OSError(f"{len(data)} bytes are there")
        return data

    @contextlib.contextmanager
    def _disk(self, action: str) -> Iterator[None]:
        """Says what the system refuses as a ResourceError."""
        try:
            yield
        except OSError as problem:
            raise ResourceError(
                f"cannot {action} the temporary file of a codec's cache, which holds {self.end / 1e6:.3g} MB: {problem}.",
                "raise cache_mb so that more fits into memory, set spill = false to drop what does not, allow more open files (ulimit -n; "
                "each client and tensor that spills has one), or free disk space where TMPDIR is.",
            ) from problem


def _close(file: IO[bytes]) -> None:
    # What could not be written is tried once more by closing; nobody needs it any longer.
    with contextlib.suppress(OSError):
        file.close()


class Spilled:
    """Rows of a sample in a spill file. Their place is free again when nobody can ask for them."""

    def __init__(self, store: SpillFile, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.store, self.offset, self.shape, self.dtype = store, offset, shape, dtype
        self.bytes = int(np.prod(shape)) * dtype.itemsize

    def read(self) -> Tensor:
        return torch.frombuffer(self.store.read(self.offset, self.bytes), dtype=self.dtype).reshape(self.shape)

    def __del__(self) -> None:
        self.store.free.setdefault(self.bytes, []).append(self.offset)


@dataclass(frozen=True)
class Cache:
    """Rows [t d] of samples by id, in the order of their last use; `held_bytes` of them lie in memory."""

    budget: Budget
    entries: Mapping[int, Tensor | Spilled] = field(default_factory=dict)
    held_bytes: int = 0
    store: SpillFile | None = None

    def known(self, samples: Samples, width: int) -> list[bool]:
        """Whether each sample of a packet is here with as many rows and channels as it has now."""
        return [self._fits(self.entries.get(one), rows, width) for one, rows in zip(samples.ids, samples.rows, strict=True)]

    def rows(self, samples: Samples, width: int) -> Tensor:
        """What is known of a packet's rows [q d], float32; zeros for samples that are not here."""
        found = torch.empty(sum(samples.rows), width)
        parts = torch.split(found, list(samples.rows)) if samples.rows else ()
        for one, part, here in zip(samples.ids, parts, self.known(samples, width), strict=True):
            if here:
                part.copy_(_values(self.entries[one]))
            else:
                part.zero_()
        return found

    def put(self, samples: Samples, rows: Tensor) -> Cache:
        """The cache after these rows [q d] have been seen; of an id that stands twice in a packet the last rows count."""
        kept = finite_as(rows.detach().to("cpu"), KEPT[self.budget.kept])
        return self._with(zip(samples.ids, torch.split(kept, list(samples.rows)), strict=True))

    def _with(self, seen: Iterable[tuple[int, Tensor]]) -> Cache:
        """The cache after these rows [t d] of samples, in the type it keeps: one copy of what it held, however many they are."""
        entries, held, store = dict(self.entries), self.held_bytes, self.store
        for one, part in seen:
            size = part.numel() * part.element_size()
            held, fits = _make_room(self.budget, entries, held, one, size, _held)
            if fits:
                entries[one] = part.clone()
                held += size
            elif self.budget.spill:
                store = store or SpillFile()
                entries[one] = store.write(part)
        return replace(self, entries=entries, held_bytes=held, store=store)

    def touched(self, ids: Sequence[int]) -> Cache:
        """The cache after the rows of these samples, which are here, have been used again."""
        return replace(self, entries=_last(self.entries, ids))

    def flatten(self) -> dict[str, Tensor]:
        """As tensors: ids, rows of each, and the values one after the other, in the order of use."""
        if not self.entries:
            return {}
        parts = [_values(entry) for entry in self.entries.values()]
        shapes = torch.tensor([[one, *part.shape] for one, part in zip(self.entries, parts, strict=True)])
        return {"samples": shapes, "values": torch.cat([part.reshape(-1) for part in parts])}

    def restored(self, tensors: Mapping[str, Tensor]) -> Cache:
        """The cache that `flatten` has written, under this one's budget."""
        if "samples" not in tensors:
            return self
        shapes: list[list[int]] = tensors["samples"].tolist()
        kept = finite_as(tensors["values"].detach().to("cpu"), KEPT[self.budget.kept])
        parts = torch.split(kept, [rows * width for _, rows, width in shapes])
        return self._with((one, part.reshape(rows, width)) for (one, rows, width), part in zip(shapes, parts, strict=True))

    @staticmethod
    def _fits(entry: Tensor | Spilled | None, rows: int, width: int) -> bool:
        return entry is not None and tuple(entry.shape) == (rows, width)


class Note(NamedTuple):
    """What the far end of a cache knows of a sample there: a summary [t k], channels of its rows, their bytes in memory (0: spilled)."""

    summary: Tensor
    width: int
    held_bytes: int


@dataclass(frozen=True)
class Ledger:
    """What a `Cache` of this budget at the other end holds, with a summary of each sample in place of its rows.

    Both are told the same samples in the same order (`put`, `touched`), and what a cache keeps and drops follows from the shapes alone: so
    a sample is known here if, and only if, it is known there.
    """

    budget: Budget
    entries: Mapping[int, Note] = field(default_factory=dict)
    held_bytes: int = 0

    def known(self, samples: Samples, width: int) -> list[bool]:
        """As of the cache."""
        notes = (self.entries.get(one) for one in samples.ids)
        return [
            note is not None and (note.summary.shape[0], note.width) == (rows, width)
            for note, rows in zip(notes, samples.rows, strict=True)
        ]

    def put(self, samples: Samples, summaries: Tensor, width: int) -> Ledger:
        """After the cache has been given rows of `width` channels, of which these are the summaries [q k]."""
        return self._with((one, part, width) for one, part in zip(samples.ids, torch.split(summaries, list(samples.rows)), strict=True))

    def _with(self, seen: Iterable[tuple[int, Tensor, int]]) -> Ledger:
        """The ledger after these summaries [t k] of samples of so many channels: one copy of what it held, however many they are."""
        entries, held = dict(self.entries), self.held_bytes
        for one, part, width in seen:
            size = part.shape[0] * width * KEPT[self.budget.kept].itemsize
            held, fits = _make_room(self.budget, entries, held, one, size, lambda note: note.held_bytes if note else 0)
            if fits or self.budget.spill:
                entries[one] = Note(part.clone(), width, size if fits else 0)
                held += size if fits else 0
        return replace(self, entries=entries, held_bytes=held)

    def touched(self, ids: Sequence[int]) -> Ledger:
        """As of the cache."""
        return replace(self, entries=_last(self.entries, ids))

    def flatten(self) -> dict[str, Tensor]:
        """As tensors under other names than a cache's: ids, rows and width of each, and the summaries, in the order of use."""
        if not self.entries:
            return {}
        shapes = torch.tensor([[one, note.summary.shape[0], note.width] for one, note in self.entries.items()])
        return {"noted": shapes, "summaries": torch.cat([note.summary for note in self.entries.values()])}

    def restored(self, tensors: Mapping[str, Tensor]) -> Ledger:
        """The ledger that `flatten` has written, under this one's budget as the cache at the other end is restored under it."""
        if "noted" not in tensors:
            return self
        shapes: list[list[int]] = tensors["noted"].tolist()
        parts = torch.split(tensors["summaries"], [rows for _, rows, _ in shapes])
        return self._with((one, part, width) for (one, _, width), part in zip(shapes, parts, strict=True))


def finite_as(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Finite rows in another type, those beyond its range as its largest."""
    most = torch.finfo(dtype).max
    if most < torch.finfo(rows.dtype).max:
        # In float32: bfloat16 has no 65504, the largest float16, and would round it up to beyond that.
        rows = rows.float().clamp(-most, most)
    return rows.to(dtype)


def _make_room(
    budget: Budget, entries: dict[int, Entry], held: int, one: int, size: int, held_of: Callable[[Entry | None], int]
) -> tuple[int, bool]:
    """Take a sample's old entry out of `entries`, and others as the budget says; the bytes then held, and whether `size` more fit."""
    held -= held_of(entries.pop(one, None))
    if budget.evict == "oldest":
        while held + size > budget.bytes and entries and not budget.spill:
            held -= held_of(entries.pop(next(iter(entries))))
    return held, held + size <= budget.bytes


def _last(entries: Mapping[int, Entry], ids: Sequence[int]) -> dict[int, Entry]:
    """The entries with these at the end, in the order in which they are named last."""
    changed = dict(entries)
    for one in ids:
        changed[one] = changed.pop(one)
    return changed


def _values(entry: Tensor | Spilled) -> Tensor:
    return entry if isinstance(entry, Tensor) else entry.read()


def _held(entry: Tensor | Spilled | None) -> int:
    return entry.numel() * entry.element_size() if isinstance(entry, Tensor) else 0


def rows_of(samples: Sequence[Samples], chosen: Sequence[Sequence[bool]]) -> tuple[Tensor, list[Samples]]:
    """Of packets one after the other: which rows [q] belong to the chosen samples, and the samples that are left of each packet."""
    flags = [flag for flags in chosen for flag in flags]
    counts = [rows for one in samples for rows in one.rows]
    kept = [
        Samples(
            tuple(i for i, f in zip(one.ids, flags_of, strict=True) if f), tuple(r for r, f in zip(one.rows, flags_of, strict=True) if f)
        )
        for one, flags_of in zip(samples, chosen, strict=True)
    ]
    return torch.repeat_interleave(torch.tensor(flags, dtype=torch.bool), torch.tensor(counts)), kept


def packets_left(parts: Parts, chosen: Sequence[int], states: Sequence[State], samples: Sequence[Samples]) -> Parts:
    """The chosen packets with what `rows_of` has left of their samples, at these states, for a codec inside another one."""
    return Parts(
        tuple(sum(samples[k].rows) for k in chosen),
        [states[k] for k in chosen],
        [parts.generators[k] for k in chosen],
        [samples[k] for k in chosen],
        parts.commit,
    )
