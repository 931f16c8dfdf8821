"""Crash-safe checkpoints: after every round the whole state of a federation, in plain safetensors and JSON.

A checkpoint is written to a temporary folder, forced to the disk, and renamed; so a folder called `round-00003` is whole. The journal is
written first: if a crash falls between the two, the journal's last events are cut off at resume and the round is run again, with
the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from splitft.engine.settings import ClientState
from splitft.errors import CheckpointError

FORMAT = 1
FOLDER = "checkpoints"
NAME = re.compile(r"^round-(\d{5,})$")


@dataclass
class RunState:
    """Everything a run needs to go on after `round` rounds. `identity` says what it belongs to (model, data, layout, threads)."""

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


def save(folder: Path, state: RunState, keep: int) -> Path:
    """Write the checkpoint of `state` below a run folder and drop all but the newest `keep`."""
    parent = folder / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    target, temporary = parent / f"round-{state.round:05d}", parent / f".round-{state.round:05d}.part"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    tensors = {"adapters": state.adapters, **{f"aggregator.{name}": tensor for name, tensor in state.aggregator.items()}}
    for client, one in state.clients.items():
        if one.first is not None and one.second is not None:
            tensors[f"client.{client}.first"], tensors[f"client.{client}.second"] = one.first, one.second
    save_file(tensors, temporary / "tensors.safetensors")
    facts = {
        "format": FORMAT,
        "round": state.round,
        "clients": {str(client): {"batches": one.batches, "steps": one.steps} for client, one in sorted(state.clients.items())},
        "policy": state.policy,
        "observations": state.observations,
        "virtual_s": state.virtual_s,
        "wall_s": state.wall_s,
        "journal_bytes": state.journal_bytes,
        "identity": state.identity,
        "sha256": hashlib.sha256((temporary / "tensors.safetensors").read_bytes()).hexdigest(),
    }
    (temporary / "state.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for path in (temporary / "tensors.safetensors", temporary / "state.json", temporary):
        _sync(path)
    if target.exists():  # the same round again: the old one steps aside first, so that one of the two is always whole
        aside = parent / f".round-{state.round:05d}.old"
        if aside.exists():
            shutil.rmtree(aside)
        target.rename(aside)
        temporary.rename(target)
        shutil.rmtree(aside)
    else:
        temporary.rename(target)
    _sync(parent)
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


def load(path: Path) -> RunState:
    """The state in a checkpoint folder. Raises CheckpointError naming the file for anything missing, damaged or of another format."""
    remedy = f"delete {path} to go back to the checkpoint before it, or start a new run."
    try:
        facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
        data = (path / "tensors.safetensors").read_bytes()
        if facts["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {facts['format']}, this version reads {FORMAT}.", "use the splitft version that wrote it."
            )
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            raise CheckpointError(f"{path / 'tensors.safetensors'} is damaged: its checksum is not the one in state.json.", remedy)
        tensors = load_file(path / "tensors.safetensors")
        clients = {
            int(client): ClientState(
                int(one["batches"]), int(one["steps"]), tensors.get(f"client.{client}.first"), tensors.get(f"client.{client}.second")
            )
            for client, one in facts["clients"].items()
        }
        return RunState(
            int(facts["round"]),
            tensors["adapters"].to(torch.float32),
            clients,
            dict(facts["policy"]),
            {name.removeprefix("aggregator."): tensor for name, tensor in tensors.items() if name.startswith("aggregator.")},
            list(facts["observations"]),
            float(facts["virtual_s"]),
            float(facts["wall_s"]),
            int(facts["journal_bytes"]),
            dict(facts["identity"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as problem:
        raise CheckpointError(f"{path} cannot be read: {type(problem).__name__}: {problem}.", remedy) from problem


def require_same(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """CheckpointError naming what differs between the run a checkpoint belongs to and the one that wants to resume it."""
    for name, value in now.items():
        if saved.get(name) != value:
            remedies = {
                "threads": f"resume with engine.threads={saved.get('threads')}, or with engine.deterministic=false, not bit for bit.",
                "data": "the texts or the partition have changed; restore them, or start a new run.",
                "model": "the base model's weights have changed; restore them, or start a new run.",
            }
            raise CheckpointError(
                f"{folder} was made with {name} = {saved.get(name)}, now it is {value}.",
                remedies.get(name, "restore it, or start a new run."),
            )
