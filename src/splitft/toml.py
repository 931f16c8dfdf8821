"""TOML in and out: read with the place of a fault, write a resolved configuration. No schema here; `config.py` has it."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from splitft.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_PLACE = re.compile(r"^(?P<fault>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)$", re.DOTALL)


def nearest(name: str, known: list[str]) -> str:
    """The known name most like `name`, or an empty string."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), "")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a file. Raises ConfigError with file and line for what cannot be read."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes; a configuration has at most {MAX_FILE_BYTES}.", "Name a TOML file.")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}).", "Save the file as UTF-8, or name a TOML file.") from error
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration {path}: {error.strerror or error}.", _other_files(path)) from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        fault, line, column = _place(str(error), text)
        raise ConfigError(
            f"{path}:{line}:{column}: {fault[:1].lower()}{fault[1:]}.",
            f"The line reads: {_line(text, line)!r}. Strings need quotes, tables look like [train].",
        ) from error


def _other_files(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"There is no folder {folder}."
    files = sorted(file.name for file in folder.glob("*.toml"))
    close = nearest(path.name, files)
    if close:
        return f"Did you mean {folder / close}?"
    return f"Files there: {', '.join(files[:8])}." if files else f"There is no .toml file in {folder.resolve()}."


def _place(message: str, text: str) -> tuple[str, int, int]:
    """tomllib gives the place only inside its message (before Python 3.14)."""
    match = _PLACE.match(message)
    if match is None:
        return message, 1, 1
    if match["line"] is None:
        return match["fault"], max(1, text.rstrip("\n").count("\n") + 1), 1
    return match["fault"], int(match["line"]), int(match["column"])


def _line(text: str, line: int) -> str:
    lines = text.splitlines()
    return lines[line - 1].strip()[:80] if 0 < line <= len(lines) else ""


def parse_value(text: str) -> Any:
    """The value of a dotted override: TOML where it is TOML (`1e-4`, `[2, 3]`, `true`, `"x"`), otherwise the text as it stands."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = table["value"]
    plain = isinstance(value, str | int | float | bool | list | dict)
    return value if plain and len(table) == 1 else text


def write_toml(values: Mapping[str, Any]) -> str:
    """`values` as TOML text: plain keys first, then a table per mapping. `tomllib.loads` gives the same values back."""
    return "\n".join(_lines(values, ())).lstrip("\n") + "\n"


def _lines(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    if path and (len(tables) < len(values) or not values):
        yield ""
        yield f"[{'.'.join(_key(part) for part in path)}]"
    for key, value in values.items():
        if key not in tables:
            yield f"{_key(key)} = {format_value(value)}"
    for key, table in tables.items():
        yield from _lines(table, (*path, key))


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else format_value(key)


def format_value(value: Any) -> str:
    """One value as TOML on one line; also how error messages show a value. Raises TypeError for what TOML cannot hold."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, but JSON lets the delete character stand.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(format_value(item) for item in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(str(key))} = {format_value(item)}" for key, item in value.items()) + "}"
    raise TypeError(f"{type(value).__name__} {value!r} has no place in a configuration")
