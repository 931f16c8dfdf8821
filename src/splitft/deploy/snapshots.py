"""A client's state on its own disk: what it needs to go on after each round, in plain safetensors and JSON.

A snapshot is written and forced to the disk before the update it belongs to leaves the client. So whatever the server has committed, the
client can go on from; and until the server says that a round is committed, the snapshot before it stays as well.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitft.deploy.disk import sync_folder
from splitft.deploy.letters import Snapshot
from splitft.engine import tensor_file
from splitft.engine.settings import ClientState
from splitft.engine.streams import flattened, unflattened
from splitft.errors import CheckpointError

FORMAT = 1
# Snapshots kept from before the last committed round.
KEPT = 3
TENSORS, FACTS = "state.safetensors", "state.json"
# What a tensor's line in the header takes, and the facts: enough for a message.
HEADER_BYTES, FACTS_BYTES = 128, 512


@dataclass(frozen=True)
class Snapshots:
    """The snapshots of one client in one run, a folder for each. `data` is the digest of the text they were made with."""

    folder: Path
    data: str

    def list(self) -> list[Snapshot]:
        """What is there and whole, oldest first. What a crash left half-written is removed; what cannot be read now is left alone."""
        found = []
        for path in sorted(self.folder.glob("round-*")) if self.folder.is_dir() else ():
            with suppress(OSError, ValueError, KeyError, TypeError):
                facts = self._facts(path)
                found.append(Snapshot(int(facts["round"]), str(facts["digest"])))
        for part in self.folder.glob(".round-*") if self.folder.is_dir() else ():
            shutil.rmtree(part, ignore_errors=True)
        return found

    def save(self, round_index: int, digest: str, state: ClientState) -> None:
        """Write the state after a round. Raises OSError when the disk refuses; the others stay as they are."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        target = self._path(round_index)
        temporary = target.with_name(f".{target.name}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)
        sha256 = tensor_file.write(temporary / TENSORS, _tensors(state))
        facts = {
            "format": FORMAT,
            "round": round_index,
            "digest": digest,
            "data": self.data,
            "sha256": sha256,
            "batches": state.batches,
            "steps": state.steps,
            "streams": None if state.streams is None else dict(state.streams.forms),
        }
        (temporary / FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")
        for path in (temporary / TENSORS, temporary / FACTS, temporary):
            sync_folder(path)
        # Sent again with other numbers, a round replaces its snapshot: nothing can need the old one, the server never committed it.
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        sync_folder(self.folder)

    @staticmethod
    def needed_bytes(state: ClientState) -> int:
        """How much a snapshot of this state takes."""
        tensors = _tensors(state)
        return sum(one.nbytes + HEADER_BYTES for one in tensors.values()) + FACTS_BYTES

    def load(self, wanted: Snapshot) -> ClientState:
        """The state of a snapshot. Raises CheckpointError when it is missing, damaged or another one."""
        path, remedy = self._path(wanted.round), "the server will begin with this client afresh."
        try:
            facts = self._facts(path)
            if facts["digest"] != wanted.digest:
                raise CheckpointError(f"the snapshot of round {wanted.round} is not the one the server took.", remedy)
            if tensor_file.digest_of(path / TENSORS) != facts["sha256"]:
                raise CheckpointError(f"{path / TENSORS} is damaged: its checksum is not the one in {FACTS}.", remedy)
            return _state(facts, tensor_file.read(path / TENSORS))
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise CheckpointError(f"{path} cannot be read: {type(problem).__name__}: {problem}.", remedy) from problem

    def prune(self, committed: int) -> None:
        """Keep the snapshots from round `committed` on, and a few before it: a server whose newest checkpoint is damaged goes back."""
        older = [one.round for one in self.list() if one.round < committed]
        for round_index in older[: -KEPT or None]:
            shutil.rmtree(self._path(round_index), ignore_errors=True)

    def _path(self, round_index: int) -> Path:
        return self.folder / f"round-{round_index:05d}"

    def _facts(self, path: Path) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((path / FACTS).read_text(encoding="utf-8"))
        if facts["format"] != FORMAT or facts["data"] != self.data:
            raise ValueError(f"{path} is of another format or was made with other text")
        return facts


def _tensors(state: ClientState) -> dict[str, Tensor]:
    tensors = {name: tensor for name in ("first", "second") if (tensor := getattr(state, name)) is not None}
    if state.streams is not None:
        tensors.update({f"streams.{name}": tensor for name, tensor in flattened(state.streams).items()})
    return tensors or {"empty": torch.zeros(0)}


def _state(facts: dict[str, Any], tensors: dict[str, Tensor]) -> ClientState:
    stored = {name.removeprefix("streams."): tensor for name, tensor in tensors.items() if name.startswith("streams.")}
    return ClientState(
        batches=int(facts["batches"]),
        steps=int(facts["steps"]),
        first=tensors.get("first"),
        second=tensors.get("second"),
        streams=None if facts["streams"] is None else unflattened(facts["streams"], stored),
    )
