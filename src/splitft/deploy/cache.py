"""A client's copy of the base model: parts named by their content, fetched once, put together into a folder that transformers reads.

    ROOT/parts/SHA256             a part, whole and verified; SHA256.part while it is fetched, and after that was interrupted
    ROOT/models/DIGEST/           config.json, tokenizer, an index, and a link to each tensor part that is here

Several processes may share a cache. No name a server gives becomes a path: digests and the names in `received.FILES` do.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from splitft.deploy.disk import locked, private_folder, sync_folder, write_private
from splitft.deploy.letters import PART_BYTES, PartInfo
from splitft.deploy.parts import FILE, INDEX, check_table
from splitft.deploy.received import FILE_LIMIT_BYTES, check_file
from splitft.deploy.tensors import read_places
from splitft.engine.tensor_file import digest_of
from splitft.errors import ModelError, ProtocolError, ResourceError
from splitft.models.anatomy import block_count
from splitft.models.load import load_model_config
from splitft.rng import fresh_bytes

# Bytes of a part (by digest) from an offset on, at most PART_BYTES.
Fetch = Callable[[str, int], bytes]
# Bytes that are here, bytes that are wanted.
Progress = Callable[[int, int], None]
# What a download leaves free on the disk.
RESERVE_BYTES = 256 << 20
# Putting a folder together reads headers and makes links; another process that takes longer is stuck.
LOCK_S = 60.0
_MB = 1_000_000
_OPERATOR = "the server's copy of the base model is damaged, or it lies; talk to its operator."


class ModelCache:
    """Base models in a folder. `limit_bytes` bounds what one model may take (0: the disk does)."""

    def __init__(self, root: Path, limit_bytes: int = 0, reserve_bytes: int = RESERVE_BYTES) -> None:
        self.parts, self.models = root / "parts", root / "models"
        self.limit_bytes, self.reserve_bytes = limit_bytes, reserve_bytes
        self._verified: set[str] = set()
        for folder in (self.parts, self.models):
            private_folder(folder)
        for abandoned in self.parts.glob("*.part-*"):
            with abandoned.open("rb") as file, suppress(BlockingIOError, FileNotFoundError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                abandoned.unlink()

    def missing(self, table: Sequence[PartInfo], wanted: Collection[str]) -> tuple[PartInfo, ...]:
        """The wanted parts that are not here. One that is here is read once per process; if its content has changed, it is removed."""
        return tuple(part for part in table if part.name in wanted and not self._is_here(part))

    def provide(
        self, table: Sequence[PartInfo], model: str, wanted: Collection[str], fetch: Fetch, progress: Progress = lambda done, total: None
    ) -> Path:
        """The folder of the model `model` with at least the wanted parts; what is missing is fetched.

        Raises ProtocolError for content that is not what was promised, ModelError for content that is not taken, ResourceError when the
        parts are larger than the limit or the disk. Whatever `fetch` raises passes through; a later call goes on where it ended.
        """
        named = check_table(table, model)
        if absent := sorted(set(wanted) - set(named)):
            raise ProtocolError(f"the server's base model has no part {absent[0][:80]!r}.", _OPERATOR)
        total = sum(named[name].size_bytes for name in wanted)
        if self.limit_bytes and total > self.limit_bytes:
            raise ResourceError(
                f"the base model's parts for this client take {_mb(total)}, this client allows {_mb(self.limit_bytes)}.",
                "raise maximum_model_mb in the policy file, or ask the operator for a shallower cut.",
            )
        for part in table:
            if part.name.startswith(FILE) and part.size_bytes > FILE_LIMIT_BYTES[part.name.removeprefix(FILE)]:
                raise ProtocolError(
                    f"{part.name} is said to have {part.size_bytes} bytes, more than any tokenizer or configuration.", _OPERATOR
                )
        missing = self.missing(table, wanted)
        self._require_room(missing)
        done = total - sum(part.size_bytes for part in missing)
        progress(done, total)
        for part in missing:
            self._download(part, fetch, lambda have, before=done: progress(before + have, total))  # type: ignore[misc]
            done += part.size_bytes
        return self._assemble(named, model, wanted)

    def _is_here(self, part: PartInfo) -> bool:
        path = self.parts / part.sha256
        if part.sha256 in self._verified and path.is_file():
            return True
        if not path.is_file():
            return False
        if path.stat().st_size != part.size_bytes or digest_of(path) != part.sha256:
            path.unlink(missing_ok=True)
            return False
        self._verified.add(part.sha256)
        return True

    def _require_room(self, missing: Sequence[PartInfo]) -> None:
        begun = sum(path.stat().st_size for part in missing if (path := self.parts / f"{part.sha256}.part").is_file())
        needed = sum(part.size_bytes for part in missing) - begun
        free = shutil.disk_usage(self.parts).free - self.reserve_bytes
        if missing and needed > free:
            raise ResourceError(
                f"{_mb(needed)} of the base model are missing, the disk of {self.parts} has {_mb(max(free, 0))} to spare.",
                "free some space, or name a cache folder on a larger disk.",
            )

    def _download(self, part: PartInfo, fetch: Fetch, progress: Callable[[int], None]) -> None:
        """Fetch one part into the cache, from where an earlier attempt ended."""
        with self._partial(part.sha256) as (file, path):
            resumed = os.fstat(file.fileno()).st_size
            try:
                digest = self._fill(part, file, fetch, progress)
                if digest != part.sha256 and resumed:  # what a crash left on the disk need not be what was written
                    file.truncate(0)
                    digest = self._fill(part, file, fetch, progress)
                if digest != part.sha256:
                    raise ProtocolError(f"{part.name} of the base model arrived with the digest {digest}, not {part.sha256}.", _OPERATOR)
                _check_content(part, path)
                os.fsync(file.fileno())
                path.replace(self.parts / part.sha256)
            except (ProtocolError, ModelError):
                path.unlink(missing_ok=True)
                raise
            except OSError as problem:
                if isinstance(problem, ConnectionError | TimeoutError):
                    raise
                raise ResourceError(
                    f"cannot write {part.name} ({_mb(part.size_bytes)}) to {self.parts}: {problem.strerror or problem}.",
                    "free some space or name another cache folder; the download goes on where it ended.",
                ) from problem
        sync_folder(self.parts)
        self._verified.add(part.sha256)

    @contextmanager
    def _partial(self, sha256: str) -> Iterator[tuple[IO[bytes], Path]]:
        """The unfinished file of a part, this process's alone; a fresh one of its own where another process is at the same part."""
        path = self.parts / f"{sha256}.part"
        own = False
        while True:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "r+b", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):
                    if os.path.samestat(path.stat(), os.fstat(file.fileno())):  # else another has just finished, and renamed it
                        break
            except BlockingIOError:
                path, own = self.parts / f"{sha256}.part-{fresh_bytes(8).hex()}", True
            file.close()
        try:
            with file:
                yield file, path
        finally:
            if own:
                path.unlink(missing_ok=True)

    def _fill(self, part: PartInfo, file: IO[bytes], fetch: Fetch, progress: Callable[[int], None]) -> str:
        """Append to the file what is missing of a part; the digest of the whole."""
        digest = hashlib.sha256()
        file.seek(0)
        reached = 0
        while piece := file.read(PART_BYTES):
            digest.update(piece)
            reached += len(piece)
        if reached > part.size_bytes:
            file.truncate(0)
            file.seek(0)
            digest, reached = hashlib.sha256(), 0
        while reached < part.size_bytes:
            data = fetch(part.sha256, reached)
            if not 0 < len(data) <= min(PART_BYTES, part.size_bytes - reached):
                raise ProtocolError(
                    f"{len(data)} bytes arrived for {part.name} at {reached}, of {part.size_bytes} in pieces of at most {PART_BYTES}.",
                    _OPERATOR,
                )
            rest = memoryview(data)
            digest.update(rest)
            while len(rest):  # an unbuffered file may take less than it is given
                rest = rest[file.write(rest) :]
            reached += len(data)
            progress(reached)
        return digest.hexdigest()

    def _assemble(self, named: dict[str, PartInfo], model: str, wanted: Collection[str]) -> Path:
        """The folder of a model: links to all its parts that are here, and an index of their tensors."""
        folder = private_folder(self.models / model)
        with locked(self.models / f"{model}.lock", LOCK_S):
            weights: dict[str, str] = {}
            total_bytes = 0
            for part in named.values():
                name = part.name.removeprefix(FILE) if part.name.startswith(FILE) else f"{part.name}.safetensors"
                # What an earlier cut needed stays in the index: another process may be about to load it.
                if part.name not in wanted and not ((folder / name).exists() and self._is_here(part)):
                    (folder / name).unlink(missing_ok=True)
                    continue
                _link(self.parts / part.sha256, folder / name)
                if not part.name.startswith(FILE):
                    tensors = read_places(folder / name)
                    if twice := sorted(set(tensors) & set(weights)):
                        raise ProtocolError(f"{part.name} and {weights[twice[0]]} both hold {twice[0]}.", _OPERATOR)
                    weights |= dict.fromkeys(tensors, name)
                    total_bytes += part.size_bytes
            index: dict[str, Any] = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weights.items()))}
            write_private(folder / INDEX, json.dumps(index, indent=1).encode())
        blocks, said = sum(name.startswith("block-") for name in named), block_count(load_model_config(str(folder)))
        if blocks != said:
            raise ProtocolError(f"the base model's config.json names {said} blocks, the server {blocks}.", _OPERATOR)
        return folder


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / _MB:,.1f} MB"


def _check_content(part: PartInfo, path: Path) -> None:
    """Look into a part before it is used. Raises ProtocolError or ModelError."""
    if part.name.startswith(FILE):
        check_file(part.name.removeprefix(FILE), path.read_bytes())
        return
    try:
        read_places(path)
    except ValueError as problem:
        raise ProtocolError(f"{part.name} of the base model is no safetensors file: {problem}.", _OPERATOR) from problem


def _link(source: Path, target: Path) -> None:
    """Let `target` be `source`, by a hard link where the disk has them; at no moment is there nothing, or a half."""
    if target.exists() and target.samefile(source):
        return
    temporary = target.with_name(f".{target.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        temporary.symlink_to(os.path.relpath(source, target.parent))
    temporary.replace(target)
