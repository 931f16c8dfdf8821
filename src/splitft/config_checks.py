"""What can be wrong with a configuration, in words: the dotted path, the value, what was allowed, the nearest valid name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from splitft.toml import format_value, nearest

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails

    from splitft.config import RunConfig

_ALLOWED = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text in quotes",
    "bool_type": "must be true or false",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
    "string_too_short": "must not be empty",
    "string_unicode": "must be valid Unicode text",
    "finite_number": "must be a finite number",
    "string_pattern_mismatch": "must start with a letter or digit and hold only letters, digits, '.', '_' and '-' (at most 100)",
}
_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
_LONGEST_VALUE = 80


class Problem(NamedTuple):
    """One fault: where, in words, and the other fields that take part in it."""

    path: str
    text: str
    others: tuple[str, ...] = ()


def problems_of(error: ValidationError, schema: type[BaseModel]) -> list[Problem]:
    """Each of pydantic's findings in our words, in the order of the file's sections."""
    return [_problem(details, schema) for details in error.errors(include_url=False)]


def _problem(details: ErrorDetails, schema: type[BaseModel]) -> Problem:
    location = [str(part) for part in details["loc"]]
    if location[1:2] == ["fields"]:  # a component's fields stand beside its name in the file
        location.pop(1)
    path = ".".join(location)
    if details["type"] == "extra_forbidden":
        return Problem(path, f"{path}: {_unknown(location, schema)}.")
    return Problem(path, f"{path} = {shown(details['input'])}: {_allowed(details)}.")


def _allowed(details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"must be {words} {context[key]}"
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in str(context["expected"]).replace(" or ", ", ").split(", ")]
        close = nearest(str(details["input"]), choices)
        return f"must be one of {', '.join(choices)}" + (f"; did you mean {close}?" if close else "").rstrip("?")
    if kind == "value_error":
        return str(context["error"])
    return _ALLOWED.get(kind, details["msg"][:1].lower() + details["msg"][1:])


def _unknown(location: list[str], schema: type[BaseModel]) -> str:
    *parents, name = location
    table: Any = schema
    for part in parents:
        table = table.model_fields[part].annotation
    known = list(table.model_fields)
    close = nearest(name, known) or _elsewhere(name, schema)
    hint = f"; did you mean {close}" if close else ""
    return f"unknown {'field' if parents else 'table or field'}{hint}; known here: {', '.join(known)}"


def _elsewhere(name: str, schema: type[BaseModel]) -> str:
    """A field of that name in another table, dotted: `learning_rate` at the top means `train.learning_rate`."""
    leaves = {
        leaf: f"{section}.{leaf}"
        for section, field in schema.model_fields.items()
        for leaf in getattr(field.annotation, "model_fields", {})
    }
    leaves.pop("fields", None)
    return leaves.get(nearest(name, list(leaves)), "")


def shown(value: object) -> str:
    """A value as the file would have it, cut to a readable length."""
    try:
        text = format_value(value)
    except TypeError:
        text = str(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def plain_fault(value: object) -> str:
    """Why `value` cannot be a component's field (dates, not-a-number, broken text), or an empty string."""
    if isinstance(value, Mapping):
        return next((fault for item in value.values() if (fault := plain_fault(item))), "")
    if isinstance(value, list | tuple):
        return next((fault for item in value if (fault := plain_fault(item))), "")
    if isinstance(value, float) and not math.isfinite(value):
        return f"must hold finite numbers, not {value}"
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        return "must hold valid Unicode text"
    if not isinstance(value, bool | int | float | str):
        return f"must hold texts, numbers, true or false, lists and tables, not {value} ({type(value).__name__})"
    return ""


def cross_check(config: RunConfig) -> Iterator[Problem]:
    """Faults that no single field shows."""
    clients, split, train, tokens = config.clients, config.split, config.train, config.tokens
    if split.tail_blocks > 0 and split.labels != "client":
        yield Problem(
            "split.tail_blocks",
            f'split.tail_blocks = {split.tail_blocks}: needs split.labels = "client" (they lead to the exit).',
            ("split.labels",),
        )
    if clients.count and len(clients.profiles) not in (1, clients.count):
        yield Problem(
            "clients.profiles",
            f"clients.profiles has {len(clients.profiles)} names for {clients.count} clients: give one for all or one per client.",
            ("clients.count",),
        )
    if clients.count and clients.minimum > clients.count:
        yield Problem(
            "clients.minimum",
            f"clients.minimum = {clients.minimum}: must be at most clients.count = {clients.count}.",
            ("clients.count",),
        )
    total_steps = config.rounds * train.local_steps
    if train.warmup_steps > total_steps:
        yield Problem(
            "train.warmup_steps",
            f"train.warmup_steps = {train.warmup_steps}: must be at most the run's {total_steps} steps (rounds × train.local_steps).",
            ("rounds", "train.local_steps"),
        )
    for name in ("noise", "clip", "cuts") if not config.bottleneck.channels else ():
        if value := getattr(config.bottleneck, name):
            yield Problem(f"bottleneck.{name}", f"bottleneck.{name} = {shown(value)}: needs bottleneck.channels.", ("bottleneck.channels",))
    if tokens.bucket_tokens and tokens.block_tokens % tokens.bucket_tokens:
        yield Problem(
            "tokens.bucket_tokens",
            f"tokens.bucket_tokens = {tokens.bucket_tokens}: must divide tokens.block_tokens = {tokens.block_tokens}, or be 0.",
            ("tokens.block_tokens",),
        )
    if tokens.held_out + tokens.common_held_out >= 1.0:
        yield Problem(
            "tokens.held_out",
            f"tokens.held_out = {tokens.held_out} and tokens.common_held_out = {tokens.common_held_out}: "
            "together they must leave something to train on (less than 1).",
            ("tokens.common_held_out",),
        )
    for name in ("address", "actors"):
        if config.engine.name != "ray" and (value := getattr(config.engine, name)):
            yield Problem(f"engine.{name}", f'engine.{name} = {shown(value)}: needs engine.name = "ray".', ("engine.name",))
    if tokens.held_out == 0 and tokens.common_held_out == 0:
        yield Problem(
            "tokens.held_out",
            "tokens.held_out = 0 and tokens.common_held_out = 0: one must be more than 0, to have something to measure.",
            ("tokens.common_held_out",),
        )
