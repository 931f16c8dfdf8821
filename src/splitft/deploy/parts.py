"""A base model in parts that travel: its small files, its embedding, each of its blocks, its LM head; each named by its content.

    file:NAME     a file of the checkpoint that `received.FILES` lists
    embedding     every tensor outside the blocks but the LM head; the final norm too
    block-0000    the tensors of a block
    head          an LM head that is a tensor of its own; a tied model has none

A tensor part is a safetensors file that never exists on the server: its header is made, its values are ranges of the checkpoint's own
files, read when asked for. It depends on names, types, shapes and values alone, so one file and many shards give the same digests.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from bisect import bisect_right
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from splitft.deploy.letters import PartInfo
from splitft.deploy.received import FILES, STEERING, cleaned
from splitft.deploy.tensors import Place, make_header, read_places
from splitft.engine.tensor_file import PIECE_BYTES
from splitft.errors import ModelError, ProtocolError
from splitft.models.anatomy import block_count
from splitft.models.base import Anatomy
from splitft.models.load import load_model_config
from splitft.selfcheck import inspect_family

EMBEDDING, HEAD, FILE = "embedding", "head", "file:"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What GPT-NeoX checkpoints call their head. One of yet another name travels with the embedding: more bytes, the same numbers.
OLD_HEAD = "embed_out"
MAX_PARTS = 20_000
MAX_PART_BYTES = 1 << 44
_TENSOR_PART = re.compile(r"embedding|head|block-\d{4,5}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DAMAGED = "the checkpoint is incomplete or damaged; fetch it again."


def block_name(block: int) -> str:
    """The part that holds a block."""
    return f"block-{block:04d}"


def model_digest(table: Sequence[PartInfo]) -> str:
    """The name of a base model: SHA-256 over the names and digests of all its parts."""
    lines = sorted(f"{part.name}\0{part.sha256}\n" for part in table)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_table(table: Sequence[PartInfo], model: str) -> dict[str, PartInfo]:
    """The parts a server names, by name. Raises ProtocolError unless they could be a model's, and that of the digest `model`."""
    found: dict[str, PartInfo] = {}
    for part in table[: MAX_PARTS + 1]:
        known = part.name.removeprefix(FILE) in FILES if part.name.startswith(FILE) else _TENSOR_PART.fullmatch(part.name)
        if not known or part.name in found:
            raise _bad(f"names a part {part.name[:80]!r}, which {'comes twice' if known else 'no model has'}")
        if not _DIGEST.fullmatch(part.sha256) or not 0 <= part.size_bytes <= MAX_PART_BYTES:
            raise _bad(f"gives {part.name} {part.size_bytes} bytes and the digest {part.sha256[:80]!r}")
        found[part.name] = part
    blocks = [name for name in found if name.startswith("block-")]
    if len(found) > MAX_PARTS or not {EMBEDDING, f"{FILE}config.json"} <= set(found):
        raise _bad(f"names {len(table)} parts; a model has at most {MAX_PARTS}, with an embedding and a config.json")
    if sorted(blocks) != sorted(map(block_name, range(len(blocks)))):
        raise _bad(f"names {len(blocks)} blocks, not numbered from 0")
    if model_digest(table) != model:
        raise _bad(f"calls the model {model[:80]!r}; its parts make {model_digest(table)}")
    return found


def _bad(what: str) -> ProtocolError:
    return ProtocolError(f"the server {what}.", "its list of the base model's parts is wrong; talk to its operator.")


def wanted_parts(table: Sequence[PartInfo], blocks: Collection[int], needs_exit: bool) -> tuple[str, ...]:
    """The names of the parts that a side with these blocks needs; with `needs_exit`, the LM head too. Raises ModelError."""
    names = {part.name for part in table}
    chosen = {block_name(block) for block in blocks}
    if absent := sorted(chosen - names):
        raise ModelError(f"the base model has no {absent[0]}.", "the cut lies outside the model; talk to the server's operator.")
    wanted = chosen | {EMBEDDING} | ({HEAD} if needs_exit else set()) | {name for name in names if name.startswith(FILE)}
    return tuple(part.name for part in table if part.name in wanted)


class _Range(NamedTuple):
    """Bytes of a part: where they begin in it, and where they lie in the checkpoint."""

    start: int
    path: Path
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class _Source:
    """Where a part's bytes come from: `head` first, then ranges of the checkpoint's files."""

    head: bytes
    ranges: tuple[_Range, ...]

    @property
    def size_bytes(self) -> int:
        return self.ranges[-1].start + self.ranges[-1].size_bytes if self.ranges else len(self.head)

    def read(self, offset: int, count: int) -> bytes:
        """Bytes from `offset` on, `count` or as many as there are."""
        end, pieces = min(offset + count, self.size_bytes), [self.head[offset : offset + count]]
        reached = offset + len(pieces[0])
        index = bisect_right(self.ranges, reached, key=lambda one: one.start) - 1
        while reached < end:
            one = self.ranges[index]
            inside = reached - one.start
            piece = _read_file(one.path, one.offset + inside, min(end - reached, one.size_bytes - inside))
            pieces.append(piece)
            reached, index = reached + len(piece), index + 1
        return b"".join(pieces)


def _read_file(path: Path, offset: int, count: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        data = bytearray()
        while len(data) < count and (piece := file.read(count - len(data))):
            data += piece
    if len(data) < count:
        raise ModelError(f"{path} became shorter while it was read.", "restart the server; leave the checkpoint alone while it runs.")
    return bytes(data)


@dataclass
class ModelParts:
    """The parts of a checkpoint folder. Build it with `of`; digests are computed when first asked for, and thread-safe."""

    sources: dict[str, _Source]
    state: str
    remember: Path | None = None
    _digests: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, folder: Path, anatomy: Anatomy | None = None, remember: Path | None = None) -> ModelParts:
        """The parts of a checkpoint; `remember` is a file that keeps digests from one start to the next. Raises ModelError."""
        sources = {f"{FILE}{name}": _file_source(folder / name) for name in FILES if (folder / name).is_file()}
        config = load_model_config(str(folder))
        known = anatomy or inspect_family(config, str(folder), prove=False)
        tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
        where = _tensors_of(folder)
        for name, tensors in _divide(list(where), known, block_count(config), tied).items():
            if not tensors:
                raise ModelError(f"{folder} holds no tensor of {name}.", _DAMAGED)
            sources[name] = _tensor_source({tensor: where[tensor] for tensor in tensors})
        paths = {path for source in sources.values() for path in (one.path for one in source.ranges)}
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)]
        heads = [(name, hashlib.sha256(source.head).hexdigest()) for name, source in sources.items()]
        state = hashlib.sha256(json.dumps([str(folder.resolve()), facts, heads]).encode()).hexdigest()
        return cls(sources, state, remember, _remembered(remember, state, set(sources)))

    def info(self, name: str) -> PartInfo:
        """A part's name, digest and size. Raises KeyError for a name that is none."""
        source = self.sources[name]
        with self._lock:
            if name not in self._digests:
                digest = hashlib.sha256()
                for offset in range(0, source.size_bytes, PIECE_BYTES):
                    digest.update(source.read(offset, PIECE_BYTES))
                self._digests[name] = digest.hexdigest()
            return PartInfo(name, self._digests[name], source.size_bytes)

    def table(self) -> tuple[PartInfo, ...]:
        """All parts. Reads the whole checkpoint once, unless that is remembered."""
        known = len(self._digests)
        table = tuple(self.info(name) for name in self.sources)
        if self.remember is not None and known < len(table):
            text = json.dumps({"state": self.state, "digests": self._digests}, indent=1)
            temporary = self.remember.with_name(f".{self.remember.name}.part")
            with suppress(OSError):  # it only saves time
                temporary.write_text(text, encoding="utf-8")
                temporary.replace(self.remember)
        return table

    def read(self, name: str, offset: int, count: int) -> bytes:
        """Bytes of a part from `offset` on, `count` or what is left. Raises ProtocolError for no such part or place."""
        source = self.sources.get(name)
        if source is None or not 0 <= offset <= source.size_bytes or count < 0:
            raise ProtocolError(f"there are no {count} bytes at {offset} of {name[:80]!r}.", "run the same splitft version on both sides.")
        return source.read(offset, count)

    def read_content(self, sha256: str, offset: int, count: int) -> bytes:
        """As `read`, of the part with this digest; only of those whose digest has been computed (`table`)."""
        name = next((name for name, digest in list(self._digests.items()) if digest == sha256), "")
        return self.read(name or sha256, offset, count)


def verify_local(folder: Path, table: Sequence[PartInfo], wanted: Collection[str], anatomy: Anatomy | None = None) -> None:
    """Raise ModelError naming the first wanted part in which a checkpoint of this side differs from the server's."""
    parts = ModelParts.of(folder, anatomy)
    for theirs in table:
        if theirs.name not in wanted:
            continue
        remedy = "name the same checkpoint in the same revision as the server, or none: then it comes from the server."
        if theirs.name not in parts.sources:
            raise ModelError(f"{folder} has no {theirs.name}, the server's base model has.", remedy)
        if parts.info(theirs.name) != theirs:
            raise ModelError(f"{theirs.name} of {folder} differs from the server's.", remedy)


def _remembered(path: Path | None, state: str, names: set[str]) -> dict[str, str]:
    """The digests a file keeps for a checkpoint in this state; none if anything about them is strange."""
    with suppress(OSError, ValueError, AttributeError, TypeError, RecursionError):
        kept: dict[str, Any] = json.loads(path.read_text("utf-8")) if path is not None else {}
        digests = kept.get("digests", {})
        if kept.get("state") == state and set(digests) <= names and all(map(_DIGEST.fullmatch, digests.values())):
            return dict(digests)
    return {}


def _file_source(path: Path) -> _Source:
    if path.name in STEERING:
        return _Source(cleaned(path.name, path.read_bytes()), ())
    return _Source(b"", (_Range(0, path.resolve(), 0, path.stat().st_size),))


def _tensors_of(folder: Path) -> dict[str, tuple[Path, Place]]:
    """Where each tensor of a checkpoint lies; one file counts before an index, as for transformers."""
    if (folder / WHOLE).is_file():
        chosen = None
        files = [folder / WHOLE]
    elif (folder / INDEX).is_file():
        try:
            chosen = {str(name): str(file) for name, file in json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
            raise ModelError(f"{folder / INDEX} is no index of tensors.", _DAMAGED) from problem
        files = [folder / name for name in sorted(set(chosen.values())) if Path(name).name == name]
    else:
        raise ModelError(f"{folder} has neither {WHOLE} nor {INDEX}.", "only safetensors checkpoints can be served.")
    found: dict[str, tuple[Path, Place]] = {}
    for file in files:
        try:
            places = read_places(file)
        except (OSError, ValueError) as problem:
            raise ModelError(f"{file} is no safetensors file that can be served: {problem}.", _DAMAGED) from problem
        found |= {name: (file.resolve(), place) for name, place in places.items() if chosen is None or chosen.get(name) == file.name}
    if absent := sorted(set(chosen or ()) - set(found)):
        raise ModelError(f"{folder} holds no tensor {absent[0]}, which its index names.", _DAMAGED)
    return found


def _divide(names: Sequence[str], anatomy: Anatomy, blocks: int, tied: bool) -> dict[str, list[str]]:
    """The tensors of each tensor part. Names are matched by their ends: old checkpoints lack the prefix (`h.0.attn...`).

    Tensors of blocks behind the model's last one (some families ship extra ones for drafting) belong to no part: no causal LM reads them.
    """
    in_block = re.compile(rf"(?:^|\.){re.escape(anatomy.blocks_path.rpartition('.')[2])}\.(\d+)\.")
    of_head = re.compile(rf"(?:^|\.)(?:{re.escape(anatomy.head_path.rpartition('.')[2])}|{OLD_HEAD})\.(?:weight|bias)$")
    found: dict[str, list[str]] = {EMBEDDING: [], **{block_name(block): [] for block in range(blocks)}}
    heads = []
    for name in sorted(names):
        inside = in_block.search(name)
        if inside and int(inside[1]) >= blocks:
            continue
        if not inside and not tied and of_head.search(name):
            heads.append(name)
        else:
            found[block_name(int(inside[1])) if inside else EMBEDDING].append(name)
    return found | ({HEAD: heads} if heads else {})


def _tensor_source(where: dict[str, tuple[Path, Place]]) -> _Source:
    """A safetensors file made of tensors that lie elsewhere."""
    head, order = make_header({name: place for name, (_, place) in where.items()})
    ranges: list[_Range] = []
    start = len(head)
    for name in order:
        path, place = where[name]
        size_bytes = place.end - place.begin
        last = ranges[-1] if ranges else None
        if last and last.path == path and last.offset + last.size_bytes == place.begin:
            ranges[-1] = last._replace(size_bytes=last.size_bytes + size_bytes)
        elif size_bytes:
            ranges.append(_Range(start, path, place.begin, size_bytes))
        start += size_bytes
    return _Source(head, tuple(ranges))
