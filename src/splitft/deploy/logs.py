"""Structured logs: one line an event whatever its values hold, and never tensors, text, keys or tokens.

`log(logger, "client joined", seat=3)` is the only call needed; `Lines` turns it into a line of JSON or of plain text. Values come from
peers, so control characters, escape sequences of terminals and line separators are written out instead of taking effect.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import IO, Literal

Form = Literal["json", "text"]
Scalar = str | int | float | bool | None

LONGEST_VALUE = 500
MOST_ITEMS, MOST_FACTS = 16, 32
WITHHELD = "(withheld)"
# Names of facts whose values nobody needs in a log and somebody could misuse.
_SECRET_NAME = re.compile(r"(^|_)(key|token|secret|password|passphrase|pem|credential|prompt|text_sample)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"-----BEGIN|PRIVATE KEY")
_BARE = re.compile(r"[A-Za-z0-9_.:/+@%-]+\Z")
_RESERVED = ("utc", "level", "logger", "event", "error", "trace")
_TRACE_FRAMES = 12


def one_line(value: object, limit: int = LONGEST_VALUE) -> str:
    """`value` as at most `limit` printable characters on one line; what is not printable is written as an escape such as `\\x1b`."""
    text = str(value)
    shown = text[: limit + 1]
    if not shown.isprintable() or "\\" in shown:
        shown = "".join(character if character.isprintable() and character != "\\" else _escaped(character) for character in shown)
    return shown if len(shown) <= limit else shown[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _escaped(character: str) -> str:
    if character == "\\":
        return "\\\\"
    return character.encode("unicode_escape").decode("ascii")


def log(logger: logging.Logger, event: str, /, level: int = logging.INFO, **facts: object) -> None:
    """Write `event` with its facts. Numbers, short strings, and lists of these are written; of anything else only its type."""
    if logger.isEnabledFor(level):
        logger.log(level, "%s", event, extra={"facts": facts})


def logged_value(name: str, value: object) -> Scalar | list[Scalar]:
    """What a log may hold of the fact `name`."""
    if _SECRET_NAME.search(name):
        return WITHHELD
    if isinstance(value, list | tuple | set | frozenset):
        items = [_scalar(item) for item in list(value)[:MOST_ITEMS]]
        return items if len(value) <= MOST_ITEMS else [*items, f"and {len(value) - MOST_ITEMS} more"]
    return _scalar(value)


def _scalar(value: object) -> Scalar:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, BaseException):
        return one_line(f"{type(value).__name__}: {value}")
    if isinstance(value, str):
        return WITHHELD if _SECRET_VALUE.search(value) else one_line(value)
    # Tensors, arrays, bytes and structures: their content has no place here.
    return f"<{type(value).__name__}>"


class Lines(logging.Formatter):
    """Formats every record as one line: `form` "json" (an object) or "text" (time, level, event, name=value ...)."""

    def __init__(self, form: Form = "json") -> None:
        super().__init__()
        self.form = form

    def format(self, record: logging.LogRecord) -> str:
        facts = self._facts(record)
        if self.form == "json":
            return json.dumps(facts, ensure_ascii=True, allow_nan=False)
        shown = [str(facts.pop("utc")), f"{facts.pop('level')!s:<7}", str(facts.pop("event"))]
        facts.pop("logger")
        return " ".join([*shown, *(f"{name}={_plain(value)}" for name, value in facts.items())])

    def _facts(self, record: logging.LogRecord) -> dict[str, Scalar | list[Scalar]]:
        stamp = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        message = _scalar(record.getMessage())
        facts: dict[str, Scalar | list[Scalar]] = {
            "utc": stamp,
            "level": record.levelname.lower(),
            "logger": one_line(record.name, 100),
            "event": message,
        }
        given = getattr(record, "facts", None)
        if isinstance(given, Mapping):
            for name, value in list(given.items())[:MOST_FACTS]:
                field = one_line(name, 60)
                facts[f"{field}_" if field in _RESERVED else field] = logged_value(field, value)
        if record.exc_info and record.exc_info[1] is not None:
            facts["error"] = _scalar(record.exc_info[1])
            facts["trace"] = list(_trace(record.exc_info[1]))
        return facts


def _trace(error: BaseException) -> list[str]:
    """Where it happened, the innermost call last: files, lines and functions, never the values."""
    places, step = [], error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        file = code.co_filename.replace("\\", "/").rsplit("/", 1)[-1]
        places.append(one_line(f"{file}:{step.tb_lineno} {code.co_name}", 120))
        step = step.tb_next
    return places[-_TRACE_FRAMES:]


def _plain(value: Scalar | list[Scalar]) -> str:
    if isinstance(value, list):
        return "[" + ",".join(_plain(item) for item in value) + "]"
    if isinstance(value, str) and not _BARE.match(value):
        return '"' + value.replace('"', '\\"') + '"'
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def log_to(stream: IO[str], form: Form = "json", level: int = logging.INFO, name: str = "splitft") -> logging.Handler:
    """Write everything the logger `name` and those below it are told to `stream`, and nothing of it to the root logger. Returns the
    handler, for `logging.getLogger(name).removeHandler`."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Lines(form))
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    return handler
