"""What may have left of a merge before its round is committed, written down first: so that a budget of privacy counts it in any case.

A merge of a guarded rule is shown to clients when it is measured, and a crash or a refused disk may come before the commit. The round is
merged again then: the same numbers of the same clients are the same release, since noise follows from them; other clients, or a number
that differs in its last bit, make another one, and both have been seen. So every release of every round stays in this file, a round that is
run again after its checkpoint was lost included.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from torch import Tensor

from splitft.errors import CheckpointError

FILE = "releases.json"


def digest_of(adapters: Tensor) -> str:
    """What stands for released adapters [p]."""
    return hashlib.blake2b(adapters.detach().cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def others(folder: Path, index: int, digest: str) -> int:
    """How many other releases of round `index` may have left. Raises CheckpointError when the file cannot be read."""
    return len(set(_read(folder).get(str(index), [])) - {digest})


def note(folder: Path, index: int, digest: str) -> None:
    """Write down a release of round `index`; when this returns it is on the disk. Raises OSError when the disk refuses."""
    known = _read(folder)
    if digest in known.get(str(index), []):
        return
    known[str(index)] = [*known.get(str(index), []), digest]
    temporary = folder / f".{FILE}.part"
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(known, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(folder / FILE)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(folder: Path) -> dict[str, list[str]]:
    path = folder / FILE
    try:
        found: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as problem:
        raise CheckpointError(
            f"{path}, which says what has been released, cannot be read: {problem}.", "restore it from a copy, or start a new run."
        ) from problem
    return found
