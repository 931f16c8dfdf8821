"""Headers of safetensors files, read without trust in who wrote them and written so that equal tensors give equal bytes.

A file (https://huggingface.co/docs/safetensors) is eight bytes of header length, a JSON header, then the values. What is checked here
is what the library leaves to its caller: how long a header is, how many tensors it names, what they are called, and that every byte
belongs to exactly one of them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from splitft.engine.tensor_file import LENGTH

HEADER_LIMIT_BYTES = 16 << 20
MAX_TENSORS = 100_000
# The widest vector register, in bytes. A product with a single row is rounded otherwise on a CPU when its weights are not aligned.
ALIGNMENT = 64
MAX_AXES = 16
MAX_NAME = 512
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


class Place(NamedTuple):
    """A tensor in a file: its type as the header names it, its shape, and where its values begin and end, counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_places(path: Path) -> dict[str, Place]:
    """The tensors of a file. Raises ValueError saying what is wrong, before memory is taken for more than the header."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(LENGTH.size)
        length = LENGTH.unpack(head)[0] if len(head) == LENGTH.size else size_bytes
        if length > min(size_bytes - LENGTH.size, HEADER_LIMIT_BYTES):
            raise ValueError(f"its header claims {length} bytes, in a file of {size_bytes}; allowed are {HEADER_LIMIT_BYTES}")
        text = file.read(length)
    try:
        table = json.loads(text, object_pairs_hook=_distinct)
    except RecursionError as problem:
        raise ValueError("its header is nested too deeply") from problem
    if not isinstance(table, dict):
        raise ValueError("its header is no table")
    table.pop("__metadata__", None)
    if len(table) > MAX_TENSORS:
        raise ValueError(f"its header names {len(table)} tensors; allowed are {MAX_TENSORS}")
    first = LENGTH.size + len(text)
    places = {name: _place(name, facts, first) for name, facts in table.items()}
    _require_gapless(places, first, size_bytes)
    return places


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("its header names something twice")
    return table


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 60


def _place(name: str, facts: object, first: int) -> Place:
    """One entry of a header, with types and sizes that agree."""
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise ValueError(f"a tensor is called {name[:80]!r}; names are letters, digits, '.', '_' and '-'")
    if not isinstance(facts, dict) or set(facts) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{name} has the type {str(dtype)[:40]!r}; known are {', '.join(sorted(ITEM_BYTES))}")
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(_whole(count) for count in shape):
        raise ValueError(f"{name} has no possible shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_whole(place) for place in offsets):
        raise ValueError(f"{name} has no possible place")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{name} is given {end - begin} bytes, its shape {shape} of {dtype} needs {math.prod(shape) * ITEM_BYTES[dtype]}")
    return Place(dtype, tuple(shape), first + begin, first + end)


def _require_gapless(places: Mapping[str, Place], first: int, size_bytes: int) -> None:
    """Every byte behind the header belongs to exactly one tensor."""
    reached = first
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin != reached:
            raise ValueError(f"{name} begins at byte {place.begin}, the one before it ends at {reached}")
        reached = place.end
    if reached != size_bytes:
        raise ValueError(f"its tensors end at byte {reached}, the file at {size_bytes}")


def make_header(places: Mapping[str, Place]) -> tuple[bytes, list[str]]:
    """The beginning of a file that holds these tensors, and the order of their values; it depends on names, types and shapes alone.

    Wide types come first and the values begin at a multiple of ALIGNMENT: whoever maps the file computes on it where it lies.
    """
    order = sorted(places, key=lambda name: (-ITEM_BYTES[places[name].dtype], name))
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    reached = 0
    for name in order:
        place = places[name]
        end = reached + place.end - place.begin
        table[name] = {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": [reached, end]}
        reached = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH.size + len(text)) % ALIGNMENT)
    return LENGTH.pack(len(text)) + text, order
