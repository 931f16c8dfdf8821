"""Crash-safe checkpoints: after every round the whole state of a federation, in plain safetensors and JSON.

A checkpoint is written to a temporary folder, forced to the disk, and renamed; so a folder called `round-00003` is whole. The journal is
written first: if a crash falls between the two, the journal's last events are cut off at resume and the round is run again, with
the same numbers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitft.engine import tensor_file
from splitft.engine.points import Reached, nothing
from splitft.engine.settings import ClientState
from splitft.engine.shelf import Shelf
from splitft.engine.streams import flattened, unflattened
from splitft.errors import CheckpointError

FORMAT = 2
FOLDER = "checkpoints"
NAME = re.compile(r"^round-(\d{5,})$")


@dataclass
class Pending:
    """An update on its way in asynchronous aggregation: the change [p] of an adapter that began at round `version`, when it arrives,
    what was trained, and what the journal will say of it."""

    change: Tensor
    version: int
    finish_s: float
    targets: int
    cut: int
    record: dict[str, Any]
    losses: list[float]


@dataclass
class RunState:
    """Everything a run needs to go on after `round` rounds. `identity` says what it belongs to (model, data, layout, threads).

    `folded`: frozen weights that an aggregation rule has changed, by key. `notes`: what the engine remembers between rounds, plain JSON.
    """

    round: int
    adapters: Tensor
    clients: dict[int, ClientState]
    policy: dict[str, Any]
    aggregator: dict[str, Tensor]
    observations: list[dict[str, Any]]
    virtual_s: float
    wall_s: float
    journal_bytes: int
    identity: dict[str, Any] = field(default_factory=dict)
    ranks: dict[str, Any] = field(default_factory=dict)
    synchronisation: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)
    pending: dict[int, Pending] = field(default_factory=dict)


CLIENT_TENSORS = ("first", "second", "adapter")
CLIENT_NUMBERS = ("batches", "steps", "deepest", "folded", "cut")
PENDING_FACTS = ("version", "finish_s", "targets", "cut", "record", "losses")


def tensors_of(state: RunState) -> dict[str, Tensor]:
    """Every tensor of a state under the name it has in the file."""
    tensors = {"adapters": state.adapters, **{f"aggregator.{name}": tensor for name, tensor in state.aggregator.items()}}
    tensors.update({f"folded.{key}": weight.contiguous() for key, weight in state.folded.items()})
    tensors.update({f"pending.{client}": one.change for client, one in state.pending.items()})
    for client, state_of in state.clients.items():
        for name in CLIENT_TENSORS:
            if (tensor := getattr(state_of, name)) is not None:
                tensors[f"client.{client}.{name}"] = tensor
        if state_of.streams is not None:
            tensors.update({f"streams.{client}.{name}": tensor for name, tensor in flattened(state_of.streams).items()})
    return tensors


def facts_of(state: RunState) -> dict[str, Any]:
    """Everything of a state that is no tensor."""
    clients = sorted(state.clients.items())
    return {
        "format": FORMAT,
        "round": state.round,
        "clients": {str(client): {name: getattr(one, name) for name in CLIENT_NUMBERS} for client, one in clients},
        "streams": {str(client): dict(one.streams.forms) for client, one in clients if one.streams is not None},
        "policy": state.policy,
        "ranks": state.ranks,
        "synchronisation": state.synchronisation,
        "notes": state.notes,
        "pending": {str(client): {name: getattr(one, name) for name in PENDING_FACTS} for client, one in sorted(state.pending.items())},
        "observations": state.observations,
        "virtual_s": state.virtual_s,
        "wall_s": state.wall_s,
        "journal_bytes": state.journal_bytes,
        "identity": state.identity,
    }


def save(folder: Path, state: RunState, keep: int, shelf: Shelf | None = None, reached: Reached = nothing) -> Path:
    """Write the checkpoint of `state`, whose rows lie on the `shelf`, below a run folder and drop all but the newest `keep`.

    Raises OSError when the disk refuses; what was there before is whole then, and a later call puts right what is left over.
    """
    parent = folder / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    target, temporary = parent / f"round-{state.round:05d}", parent / f".round-{state.round:05d}.part"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(mode=0o700)  # a private run's state holds the key of its noise
    reached("checkpoint_begun")
    digest = tensor_file.write(temporary / "tensors.safetensors", tensors_of(state), *([] if shelf is None else [shelf.rest]))
    reached("tensors_written")
    facts = {**facts_of(state), "sha256": digest}
    (temporary / "state.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    for name in ("tensors.safetensors", "state.json"):
        (temporary / name).chmod(0o600)
    reached("state_written")
    for path in (temporary / "tensors.safetensors", temporary / "state.json", temporary):
        _sync(path)
    reached("checkpoint_synced")
    if target.exists():  # the same round again: the old one steps aside first, so that one of the two is always whole
        aside = parent / f".round-{state.round:05d}.old"
        if aside.exists():
            shutil.rmtree(aside)
        target.rename(aside)
        temporary.rename(target)
        shutil.rmtree(aside)
    else:
        temporary.rename(target)
    reached("checkpoint_renamed")
    _sync(parent)
    reached("checkpoint_committed")
    for old in _numbered(parent)[:-keep]:
        # Out of the numbered names first: a crash while deleting must not leave half a checkpoint that looks whole.
        leaving = old.with_name(f".{old.name}.part")
        old.rename(leaving)
        shutil.rmtree(leaving)
    return target


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _numbered(parent: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not parent.is_dir():
        return []
    return sorted((path for path in parent.iterdir() if NAME.match(path.name)), key=lambda path: int(path.name.split("-")[1]))


def exists(folder: Path) -> bool:
    """Whether a run folder holds a checkpoint. Without one a run has not begun: a crash came before anything worth keeping."""
    _recover(folder / FOLDER)
    return bool(_numbered(folder / FOLDER))


def _recover(parent: Path) -> None:
    """Put back a checkpoint that had stepped aside for its replacement when the crash came."""
    for aside in parent.glob(".round-*.old") if parent.is_dir() else ():
        target = parent / aside.name.removeprefix(".").removesuffix(".old")
        if target.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(target)


def newest(folder: Path) -> Path:
    """The newest checkpoint of a run folder. Raises CheckpointError when there is none."""
    _recover(folder / FOLDER)
    found = _numbered(folder / FOLDER)
    if not found:
        raise CheckpointError(f"{folder} has no checkpoint.", "the run stopped before its first one; start it again without --resume.")
    return found[-1]


def load(path: Path, shelf: Shelf | None = None, identity: dict[str, Any] | None = None) -> RunState:
    """The state in a checkpoint folder; what clients keep goes onto the shelf, if there is one.

    Raises CheckpointError naming the file for anything missing, damaged or of another format, and for a checkpoint of another
    `identity`: before its tensors are read, since those would not fit the shelf.
    """
    remedy = f"delete {path} to go back to the checkpoint before it, or start a new run."
    try:
        facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = path / "tensors.safetensors"
        if facts["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {facts['format']}, this version reads {FORMAT}.", "use the splitft version that wrote it."
            )
        if identity is not None:
            require_same(facts["identity"], identity, path.parent.parent)
        if tensor_file.digest_of(tensors) != facts["sha256"]:
            raise CheckpointError(f"{tensors} is damaged: its checksum is not the one in state.json.", remedy)
        return _state(facts, tensor_file.read(tensors, _places(shelf)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise CheckpointError(f"{path} cannot be read: {type(problem).__name__}: {problem}.", remedy) from problem


def _places(shelf: Shelf | None) -> tensor_file.Destination:
    """Where on the shelf the tensors of clients have their places, by their names in the file."""

    def place(name: str, form: tensor_file.Form) -> Tensor | None:
        owner, _, rest = name.partition(".")
        client, _, kind = rest.rpartition(".")
        # A run may be resumed with train.moments = "reset": then the files have no place for what the checkpoint still holds.
        return None if shelf is None or owner != "client" or not shelf.holds(kind) else shelf.place(kind, int(client))

    return place


def _state(facts: dict[str, Any], tensors: dict[str, Tensor]) -> RunState:
    """The inverse of `facts_of` and `tensors_of`."""

    def named(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    forms, streams = facts.get("streams", {}), _by_client(named("streams."))
    clients = {
        int(client): ClientState(
            batches=int(one["batches"]),
            steps=int(one["steps"]),
            first=tensors.get(f"client.{client}.first"),
            second=tensors.get(f"client.{client}.second"),
            adapter=tensors.get(f"client.{client}.adapter"),
            deepest=int(one["deepest"]),
            folded=int(one["folded"]),
            cut=int(one["cut"]),
            streams=unflattened(forms[client], streams.get(client, {})) if client in forms else None,
        )
        for client, one in facts["clients"].items()
    }
    return RunState(
        round=int(facts["round"]),
        adapters=tensors["adapters"].to(torch.float32),
        clients=clients,
        policy=dict(facts["policy"]),
        aggregator=named("aggregator."),
        observations=list(facts["observations"]),
        virtual_s=float(facts["virtual_s"]),
        wall_s=float(facts["wall_s"]),
        journal_bytes=int(facts["journal_bytes"]),
        identity=dict(facts["identity"]),
        ranks=dict(facts["ranks"]),
        synchronisation=dict(facts["synchronisation"]),
        notes=dict(facts["notes"]),
        folded=named("folded."),
        pending={
            int(client): Pending(tensors[f"pending.{client}"], **{name: one[name] for name in PENDING_FACTS})
            for client, one in facts["pending"].items()
        },
    )


def _by_client(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors whose names begin with a client and a dot, by client and what follows."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        client, _, rest = name.partition(".")
        found.setdefault(client, {})[rest] = tensor
    return found


def require_same(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """CheckpointError naming what differs between the run a checkpoint belongs to and the one that wants to resume it."""
    for name, value in now.items():
        if saved.get(name) != value:
            remedies = {
                "threads": f"resume with engine.threads={saved.get('threads')}, or with engine.deterministic=false, not bit for bit.",
                "data": "the texts or the partition have changed; restore them, or start a new run.",
                "seats": "a run keeps its seats: set clients.count back, or start a new run under another name.",
                "model": "the base model's weights have changed; restore them, or start a new run.",
            }
            raise CheckpointError(
                f"{folder} was made with {name} = {saved.get(name)}, now it is {value}.",
                remedies.get(name, "restore it, or start a new run."),
            )
