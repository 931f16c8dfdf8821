"""The small files of a checkpoint, and what a client refuses to find in them: anything that names code, or another file, to be loaded.

The server takes such entries out where the model does without them (`cleaned`), so that a checkpoint which names code of its own but
belongs to a family that transformers knows can be served; a client believes nothing and looks again (`check_file`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from splitft.errors import ModelError

# The only names of a checkpoint's files that ever become a path on a client.
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)
FILE_LIMIT_BYTES = dict.fromkeys(FILES, 64 << 20) | {
    "config.json": 1 << 20,
    "generation_config.json": 1 << 20,
    "tokenizer_config.json": 16 << 20,
    "chat_template.jinja": 1 << 20,
}
# Their entries steer what transformers does, beyond vocabulary and text.
STEERING = ("config.json", "generation_config.json", "tokenizer_config.json")
# Entries that name code or kernels to fetch, or files elsewhere; the model is whole without them.
_NEEDLESS = {"auto_map", "trust_remote_code", "custom_pipelines", "custom_generate", "use_kernels", "kernel_config"}
# Entries without which the tensors mean something else, and which make transformers import code or open other files.
_FATAL = {"quantization_config", "compression_config", "transformers_weights"}
# Entries that may name a kernel on the hub instead of a way to compute.
_CHOICES = "_implementation"


def _is_needless(name: str, key: str, value: object) -> bool:
    names_kernel = _CHOICES in key and isinstance(value, str) and "/" in value
    names_file = name == "tokenizer_config.json" and key.endswith("_file")
    return key in _NEEDLESS or names_kernel or names_file


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every entry of every table in `value`, however deep."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from item.items()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _without(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(name, item) for key, item in value.items() if not _is_needless(name, key, item)}
    return [_without(name, item) for item in value] if isinstance(value, list) else value


def _table(name: str, data: bytes) -> dict[str, Any]:
    try:
        table = json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise ModelError(f"{name} is not JSON: {str(problem)[:120]}.", "the checkpoint is damaged.") from problem
    if not isinstance(table, dict):
        raise ModelError(f"{name} holds no table.", "the checkpoint is damaged.")
    return table


def cleaned(name: str, data: bytes) -> bytes:
    """A steering file as it is served: unchanged, or without the entries that no client would take. Raises ModelError."""
    table = _table(name, data)
    if any(_is_needless(name, key, value) for key, value in _entries(table)):
        data = json.dumps(_without(name, table), indent=2, sort_keys=True).encode()
    check_file(name, data)
    return data


def check_file(name: str, data: bytes) -> None:
    """Refuse a steering file that makes transformers run, import or open anything beside the checkpoint. Raises ModelError."""
    if len(data) > FILE_LIMIT_BYTES[name]:
        raise ModelError(f"{name} has {len(data)} bytes; allowed are {FILE_LIMIT_BYTES[name]}.", "choose another model.")
    if name not in STEERING:
        return
    for key, value in _entries(_table(name, data)):
        if value is not None and (key in _FATAL or _is_needless(name, key, value)):
            raise ModelError(
                f"{name} has an entry {key}, which makes transformers load something beside the checkpoint.",
                "splitft loads plain tensors and built-in families only; the server must offer another checkpoint.",
            )
