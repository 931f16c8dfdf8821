"""Where clients' adapters and moments lie while others train: in memory, or in mapped safetensors files.

A place is written over every round, so what a client keeps exists once and not as old and new. Hence the values a round began with
are gone when it fails half-way: then the last checkpoint is what counts (`rounds.recover`).

Axes: n participants, p adapter parameters.
"""

from __future__ import annotations

import mmap
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from splitft.engine import tensor_file
from splitft.errors import ResourceError

if TYPE_CHECKING:
    from splitft.engine.settings import ClientState

FOLDER = "store"
ROUND = "round"  # the kind of the participants' adapters after a round; other kinds are fields of ClientState
KINDS = ("first", "second", "adapter")
# Left free beside the files, for checkpoints and the journal to begin with.
SPARE_BYTES = 64_000_000
BLOCK_BYTES = 1 << 26


class Shelf(ABC):
    """Rows [p] float32 by kind and client, and the matrix of the round in progress."""

    @abstractmethod
    def place(self, kind: str, client: int) -> Tensor:
        """The place [p] for one kind of row of one client (-1: of the server that all share): always the same memory."""

    def holds(self, kind: str) -> bool:
        """Whether there are places for this kind of row."""
        return True

    @abstractmethod
    def matrix(self, rows: int) -> Tensor:
        """Room [rows p] for the adapters after a round; the next call may give the same memory."""

    @abstractmethod
    def rest(self) -> None:
        """Nothing will be read or written for a while: keep no more in memory than has to be."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is not memory."""

    def keep(self, kind: str, client: int, row: Tensor) -> Tensor:
        """Put a row [p] into its place, which is returned."""
        place = self.place(kind, client)
        if place.data_ptr() != row.data_ptr():
            place.copy_(row)
        return place


class MemoryShelf(Shelf):
    """Everything in memory; a row takes some from when it is first kept. Rows are taken from large blocks, which the system maps by
    themselves: one by one they would lie among the activations of the passes and leave holes between them."""

    def __init__(self, parameters: int) -> None:
        self.parameters = parameters
        self.places: dict[tuple[str, int], Tensor] = {}
        self.block, self.taken = torch.empty(0, parameters), 0

    def place(self, kind: str, client: int) -> Tensor:
        if (kind, client) not in self.places:
            if self.taken == len(self.block):
                self.block, self.taken = torch.empty(max(1, BLOCK_BYTES // max(1, 4 * self.parameters)), self.parameters), 0
            self.places[kind, client] = self.block[self.taken]
            self.taken += 1
        return self.places[kind, client]

    def matrix(self, rows: int) -> Tensor:
        return torch.empty(rows, self.parameters)

    def rest(self) -> None:
        return

    def close(self) -> None:
        self.places.clear()
        self.block, self.taken = torch.empty(0, self.parameters), 0


class DiskShelf(Shelf):
    """A safetensors file for each of `kinds` [clients + 1, p] and for the round [clients, p], in `<folder>/store`, mapped into memory.

    The system keeps what it has room for in memory and writes the rest to the files. They are scratch: what is found in the folder at
    the start is removed, and so is all at the end. Raises ResourceError when the disk has no room, before anything is written.
    """

    def __init__(self, folder: Path, clients: int, parameters: int, kinds: Collection[str]) -> None:
        self.folder = folder / FOLDER
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        rows = {ROUND: clients, **dict.fromkeys(kinds, clients + 1)}
        needed_bytes = 4 * parameters * sum(rows.values())
        free_bytes = shutil.disk_usage(self.folder).free
        self.maps: dict[str, np.memmap[tuple[int, int], np.dtype[np.float32]]] = {}
        try:
            if needed_bytes + SPARE_BYTES > free_bytes:
                raise _no_room(folder, clients, needed_bytes, free_bytes)
            for kind, count in rows.items():
                self.maps[kind] = _mapped(self.folder / f"{kind}.safetensors", (count, parameters))
        except OSError as problem:
            self.close()
            raise _no_room(folder, clients, needed_bytes, free_bytes) from problem
        except ResourceError:
            self.close()
            raise
        self.matrices = {kind: torch.from_numpy(one) for kind, one in self.maps.items()}

    def place(self, kind: str, client: int) -> Tensor:
        return self.matrices[kind][client]  # the server's, -1, is the last

    def holds(self, kind: str) -> bool:
        return kind in self.matrices

    def matrix(self, rows: int) -> Tensor:
        return self.matrices[ROUND][:rows]

    def rest(self) -> None:
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for one in self.maps.values():
            pages: mmap.mmap = one._mmap  # type: ignore[attr-defined]
            pages.madvise(mmap.MADV_DONTNEED)  # of a shared mapping: the values stay in the file

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _mapped(path: Path, shape: tuple[int, int]) -> np.memmap[tuple[int, int], np.dtype[np.float32]]:
    start = tensor_file.create(path, "rows", torch.float32, shape)
    return np.memmap(path, dtype=np.float32, mode="r+", offset=start, shape=shape)


def _no_room(folder: Path, clients: int, needed_bytes: int, free_bytes: int) -> ResourceError:
    return ResourceError(
        f"the adapters and moments of {clients} clients need {needed_bytes / 1e6:.0f} MB in {folder}, where {free_bytes / 1e6:.0f} MB "
        "are free.",
        'make room, choose another run.folder, or set engine.store = "memory", lora.rank lower or train.moments = "reset".',
    )


def settled(
    states: Mapping[int, ClientState], shelf: Shelf | None, lost: Collection[int] = (), everyone: Collection[int] = ()
) -> dict[int, ClientState]:
    """The states with their rows in their places. Clients that are `lost` go back to what they had before the round: their places are
    left alone, their new states lose their rows. The server's common rows go with the clients': left alone when all are lost of `everyone`
    in the round (empty: those of the states)."""
    if shelf is None:
        return dict(states)
    found = {}
    forlorn = bool(lost) and all(client in lost for client in (everyone or states) if client >= 0)
    for client, state in states.items():
        dropped = client in lost or (client < 0 and forlorn)

        def put(kind: str, row: Tensor | None, client: int = client, dropped: bool = dropped) -> Tensor | None:
            return None if row is None or dropped else shelf.keep(kind, client, row)

        first, second, adapter = put("first", state.first), put("second", state.second), put("adapter", state.adapter)
        found[client] = replace(state, first=first, second=second, adapter=adapter)
    return found
