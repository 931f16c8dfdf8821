"""Safetensors files piece by piece: written, read and mapped one tensor at a time, so that a file never stands in memory as a whole.

The format (https://huggingface.co/docs/safetensors): eight bytes of header length, a JSON header of names, types, shapes and places,
then the values without gaps. `safetensors.safe_open` reads what is written here, and what it writes is read here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH = struct.Struct("<Q")
PIECE_BYTES = 1 << 22
REST_BYTES = 1 << 27
HEADER_LIMIT_BYTES = 100_000_000


class Form(NamedTuple):
    """Type and shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# Where a tensor of this name and form is to be read to; None: into memory of its own.
Destination = Callable[[str, Form], Tensor | None]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def header_of(forms: Mapping[str, Form]) -> tuple[bytes, list[str]]:
    """The beginning of a file that holds these, and the order of their values: wide types first, so that all are aligned."""
    order = sorted(forms, key=lambda name: -forms[name].dtype.itemsize)
    table, place = {}, 0
    for name in order:
        form = forms[name]
        table[name] = {
            "dtype": NAMES[form.dtype],
            "shape": list(form.shape),
            "data_offsets": [place, place + form.size_bytes],
        }
        place += form.size_bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return LENGTH.pack(len(text)) + text, order


def write(path: Path, tensors: Mapping[str, Tensor], rest: Callable[[], None] = lambda: None) -> str:
    """Write the tensors, from any device, and return the file's SHA-256. Only one is copied at a time, and only if it has to be.

    `rest` is called every now and then: memory that was read so far will not be needed again.
    """
    header, order = header_of({name: Form(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    digest, since_bytes = hashlib.sha256(header), 0
    with path.open("wb") as file:
        file.write(header)
        for name in order:
            data = bytes_of(tensors[name].detach().cpu().contiguous())
            digest.update(data)
            file.write(data)
            since_bytes += len(data)
            if since_bytes > REST_BYTES:
                rest()
                since_bytes = 0
    rest()
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    digest, piece = hashlib.sha256(), bytearray(PIECE_BYTES)
    with path.open("rb") as file:
        while count := file.readinto(piece):
            digest.update(memoryview(piece)[:count])
    return digest.hexdigest()


def read(path: Path, destination: Destination = lambda name, form: None) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU. Raises ValueError for a file that is none, and for a destination of another form."""
    found: dict[str, Tensor] = {}
    with path.open("rb") as file:
        forms, places = _table(file, path.stat().st_size)
        for name in sorted(forms, key=lambda one: places[one]):
            given = destination(name, forms[name])
            tensor = torch.empty(forms[name].shape, dtype=forms[name].dtype) if given is None else given
            if Form(tensor.dtype, tuple(tensor.shape)) != forms[name]:
                raise ValueError(f"{name} has the form {forms[name]}, needed is {tuple(tensor.shape)} of {tensor.dtype}")
            file.seek(places[name])
            if forms[name].size_bytes and file.readinto(bytes_of(tensor)) != forms[name].size_bytes:
                raise ValueError(f"the file ends inside {name}")
            found[name] = tensor
    return found


def _table(file: IO[bytes], size_bytes: int) -> tuple[dict[str, Form], dict[str, int]]:
    """What a file holds, and where; checked against its size before anything is reserved for it."""
    head = file.read(LENGTH.size)
    length = LENGTH.unpack(head)[0] if len(head) == LENGTH.size else size_bytes
    if length > min(size_bytes - LENGTH.size, HEADER_LIMIT_BYTES):
        raise ValueError("the header is longer than the file")
    table: dict[str, dict[str, Any]] = json.loads(file.read(length))
    first = LENGTH.size + length
    forms, places = {}, {}
    for name, facts in table.items():
        if name == "__metadata__":
            continue
        form = Form(DTYPES[facts["dtype"]], tuple(int(count) for count in facts["shape"]))
        begin, end = facts["data_offsets"]
        if min((0, *form.shape)) < 0 or begin < 0 or end - begin != form.size_bytes or first + end > size_bytes:
            raise ValueError(f"{name} does not lie where the header says")
        forms[name], places[name] = form, first + begin
    return forms, places


def create(path: Path, name: str, dtype: torch.dtype, shape: Sequence[int]) -> int:
    """A file for one tensor whose values are still to be written, its room reserved; returns where the values begin.

    Raises OSError when the disk has no room for it.
    """
    form = Form(dtype, tuple(shape))
    header, _ = header_of({name: form})
    with path.open("wb") as file:
        file.write(header)
        file.flush()
        reserve(file, len(header) + form.size_bytes)
    return len(header)


def reserve(file: IO[bytes], size_bytes: int) -> None:
    """Give an open file this size, backed by the disk where the system can promise that. Raises OSError when there is no room."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size_bytes)
    else:
        file.truncate(size_bytes)
