"""Nested mappings before they are a configuration: overrides merged in, relative paths made absolute, faulty fields set aside."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from splitft.config_checks import Problem
from splitft.toml import format_value, parse_value

Values: TypeAlias = dict[str, Any]
EMBEDDED = "embedded"
# Fields of a component that hold another one.
INSIDE = ("inner", "rule")
# Fields that hold a path.
PATHS = (
    ("model", "path"),
    ("lora", "adapter"),
    ("clients", "profiles_file"),
    ("data", "path"),
    ("federation", "held_out"),
)


def merge_overrides(
    values: Mapping[str, Any], overrides: Sequence[str], folder: Path, components: Mapping[str, Mapping[str, Any]]
) -> tuple[Values, list[Problem]]:
    """`values` with overrides applied in order, and the overrides that make no sense.

    `components` are the default components; a table without a name means the default one. Names are applied before fields,
    so `policy.cuts=[2] policy.name=fixed` does not depend on the order.
    """
    merged: Values = copy.deepcopy(dict(values))
    problems: list[Problem] = []
    parsed = [_parsed(text, problems) for text in overrides]
    for path, value in parsed:
        if path and path[0] in components and (len(path) == 1 or path[1:] == ("name",)):
            _rename(merged, path[0], value, components)
    for name, default in components.items():
        _normalise(merged, name, default, named=any(path[:1] == (name,) for path, _ in parsed))
    for path, value in parsed:
        if path and not (path[0] in components and (len(path) == 1 or path[1:] == ("name",))):
            _set(merged, path, value, folder, problems)
    return merged, problems


def _parsed(text: str, problems: list[Problem]) -> tuple[tuple[str, ...], Any]:
    name, equals, value = text.partition("=")
    path = tuple(part.strip() for part in name.split("."))
    if not equals or not all(path):
        problems.append(
            Problem(
                text, f"override {format_value(text)}: must read field=value, for example train.learning_rate=1e-4 or policy.cuts=[2,3]."
            )
        )
        return (), None
    return path, parse_value(value.strip())


def _rename(values: Values, name: str, value: Any, components: Mapping[str, Mapping[str, Any]]) -> None:
    """Another component than before starts without the fields of the one it replaces."""
    if isinstance(value, dict):
        values[name] = value
        return
    present = values.get(name, dict(components[name]))
    before = present.get("name", components[name]["name"]) if isinstance(present, dict) else present
    if value != before:
        values[name] = {"name": value}


def _normalise(values: Values, name: str, default: Mapping[str, Any], *, named: bool) -> None:
    """A component as a table with a name: `policy = "fixed"` is one without fields, a table without a name is the default."""
    present = values.get(name)
    if present is None and named:
        values[name] = dict(default)
    elif isinstance(present, str):
        values[name] = {"name": present}
    elif isinstance(present, dict) and "name" not in present:
        values[name] = {**default, **present}


def _set(values: Values, path: tuple[str, ...], value: Any, folder: Path, problems: list[Problem]) -> None:
    table = values
    for depth, part in enumerate(path[:-1]):
        if depth and isinstance(table.get(part), str) and part in INSIDE:
            table[part] = {"name": table[part]}  # a component inside another one, so far by its name alone
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            dotted = ".".join(path)
            problems.append(Problem(dotted, f"override {dotted}: {'.'.join(path[: depth + 1])} is a value, not a table."))
            return
        table = inner
    table[path[-1]] = value
    if len(path) == 2:
        _resolve(values, path[0], path[1], folder)


def resolve_paths(values: Values, folder: Path) -> None:
    """Make the relative paths in `values` absolute, seen from `folder`. In place."""
    for section, field in PATHS:
        _resolve(values, section, field, folder)


def _resolve(values: Values, section: str, field: str, folder: Path) -> None:
    table = values.get(section)
    value = table.get(field) if isinstance(table, dict) else None
    if not isinstance(table, dict) or not isinstance(value, str) or not value:
        return
    if (section, field) not in PATHS:
        return
    # A model, and the data of the component `hub`, may be a name on the hub: then only what is a path by its looks or by being there.
    may_be_name = section == "model" or (section == "data" and table.get("name") == "hub")
    if section == "model" and value == EMBEDDED:
        return
    looks_like_path = value.startswith(("/", "./", "../", "~")) or (folder / value).exists()
    if looks_like_path or not may_be_name:
        table[field] = str(folder / Path(value).expanduser())


def without(values: Mapping[str, Any], paths: Collection[str]) -> Values:
    """A copy of `values` in which the fields at these dotted paths are missing, so that their defaults stand in."""
    remaining: Values = copy.deepcopy(dict(values))
    for path in paths:
        *parents, last = path.split(".")
        table: Any = remaining
        for part in parents:
            table = table.get(part) if isinstance(table, dict) else None
        if isinstance(table, dict):
            table.pop(last, None)
    return remaining
