"""Write the generated pages of docs/ from the code they describe.

    python tools/docs.py            write them
    python tools/docs.py --check    say which are stale and exit with 1

A new page is one function and one line in PAGES.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import typing
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import UnionType
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from splitft import catalog  # noqa: E402 - the source tree counts, installed or not
from splitft.config import Component, RunConfig  # noqa: E402
from splitft.deploy.policy import ClientPolicy  # noqa: E402
from splitft.toml import format_value  # noqa: E402

PLAIN_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false"}
BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
LARGEST = 10**9  # the limit of every whole number that has no smaller one: said once, not in each row
CONFIGURATION_HEAD = """\
<!-- Written by tools/docs.py from src/splitft/config.py; change it there and call make docs. -->
# Configuration

A run is described by one TOML file and, if you like, overrides on the command line:

```
splitft run experiment.toml train.learning_rate=2e-4 policy.cuts=[2,3,4]
```

- Every field has a default, so an empty file is a valid configuration, and `splitft run` without a file uses the defaults.
- Values are TOML. An override that is no TOML value is taken as text: `name=first` means `name = "first"`.
- Relative paths in the file are seen from the file's folder, in overrides from the folder you are in. `run.folder` and
  `federation.identity` always from the latter.
- Whole numbers go up to 10⁹, the seed to 2⁶³ - 1. Nothing is converted silently: `rank = "8"` and `rank = true` are refused.
- Every fault is reported at once, with its path, the value, what is allowed and the nearest valid name.
- The resolved configuration is saved as `config.toml` in the run folder and gives the same run again.

Tables marked *component* name a method and carry that method's own fields. `policy = "fixed"` is short for a table with only a name;
a table without a name means the default method. An override that names another method drops the fields of the one it replaces.
Below, each method stands with its fields and their defaults; fields of a method inside another one are written as a table in turn:
`uplink = {name = "entropy", inner = {name = "cast", dtype = "float16"}}`. [methods.md](methods.md) explains them.
"""


def configuration_page() -> str:
    """docs/configuration.md: a table of fields per section, from the descriptions and limits in the schema."""
    sections = {name: field for name, field in RunConfig.model_fields.items() if _section(field) is not None}
    parts = [CONFIGURATION_HEAD, "## At the top of the file\n", _table(RunConfig, skip=set(sections))]
    for name, field in sections.items():
        section = _section(field)
        if section is Component:
            default = format_value(RunConfig().model_dump(mode="json")[name])
            parts += [f"## `[{name}]` (component)\n", f"{field.description} Default: `{name} = {default}`\n", _methods(name)]
        elif section is not None:
            parts += [f"## `[{name}]`\n", f"{(section.__doc__ or '').splitlines()[0]}\n", _table(section)]
    return "\n".join(parts).rstrip("\n") + "\n"


def _methods(seam: str) -> str:
    """A row for each method of a seam; a table that another section has already is only named."""
    table = catalog.CATALOG[seam]
    earlier = next(name for name, other in catalog.CATALOG.items() if {**table, **other} == table)
    if earlier != seam:
        own = [f"`{name}`" for name in table if name not in catalog.CATALOG[earlier]]
        return f"Methods: those of [`[{earlier}]`](#{earlier}-component){', and ' + ', '.join(own) if own else ''}.\n"
    rows = ["| method | fields and defaults | what it does |", "|---|---|---|"]
    for name, kind in table.items():
        fields = ", ".join(_component_field(seam, kind, field) for field in dataclasses.fields(kind))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{name}`", fields, _first_sentence(kind))) + " |")
    return "\n".join(rows) + "\n"


def _component_field(seam: str, kind: type[Any], field: dataclasses.Field[Any]) -> str:
    """A field with its default, and the other values where they are a choice of few."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = _as_table(seam, field.default_factory())
    else:
        return f"`{field.name}` (needed)"
    hint = typing.get_type_hints(kind)[field.name]
    others = (
        [format_value(choice) for choice in typing.get_args(hint) if choice != value] if typing.get_origin(hint) is typing.Literal else []
    )
    return f"`{field.name} = {format_value(value)}`" + (f" (or {', '.join(f'`{other}`' for other in others)})" if others else "")


def _as_table(seam: str, component: Any) -> Any:
    """A component as it would be written in a file: its name, and the fields that are not as usual."""
    name = next(name for name, kind in catalog.CATALOG[seam].items() if kind is type(component))
    usual = type(component)()
    changed = {
        field.name: _as_table(seam, value) if dataclasses.is_dataclass(value) else value
        for field in dataclasses.fields(component)
        if (value := getattr(component, field.name)) != getattr(usual, field.name)
    }
    return {"name": name, **changed} if changed else name


def _first_sentence(kind: type) -> str:
    paragraph = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
    found = re.match(r".*?(?<!et al)[.:](?=\s|$)", paragraph)
    return (found.group()[:-1] if found else paragraph) + "."


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _table(schema: type[BaseModel], skip: Collection[str] = ()) -> str:
    rows = ["| field | default | allowed | meaning |", "|---|---|---|---|"]
    for name, field in schema.model_fields.items():
        if name not in skip:
            default = format_value(field.get_default(call_default_factory=True))
            cells = (f"`{name}`", f"`{default}`", _allowed(field), field.description or "")
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _allowed(field: FieldInfo) -> str:
    found = ((sign, getattr(item, key, None)) for key, sign in BOUNDS for item in _metadata(field))
    limits = [f"{sign} {value:.10g}" for sign, value in found if value is not None and value < LARGEST]
    return ", ".join([_kind(field.annotation), *limits])


def _metadata(field: FieldInfo) -> Iterator[Any]:
    for item in field.metadata:
        yield from getattr(item, "metadata", [item])


def _kind(annotation: Any) -> str:
    if annotation in PLAIN_NAMES:
        return PLAIN_NAMES[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{format_value(choice)}`" for choice in arguments)
    if origin in (tuple, list):
        return "list of whole numbers" if arguments[0] is int else "list of texts"
    if origin in (typing.Union, UnionType):
        return ", ".join(_kind(argument) for argument in arguments)
    raise TypeError(f"tools/docs.py has no words for the type {annotation!r}: add them to _kind.")


POLICY_FIELDS = re.compile(r"(<!-- policy fields[^\n]*-->\n).*?(<!-- end of policy fields -->)", re.DOTALL)


def deploy_page() -> str:
    """docs/deploy.md is written by hand, but for the table of the client policy's fields between its two marks."""
    text = (ROOT / "docs" / "deploy.md").read_text("utf-8")
    table = _table(ClientPolicy)
    page, found = POLICY_FIELDS.subn(lambda marks: f"{marks[1]}\n{table}\n{marks[2]}", text)
    assert found == 1, "docs/deploy.md has lost the marks around the policy's fields"
    return page


PAGES: dict[str, Callable[[], str]] = {"docs/configuration.md": configuration_page, "docs/deploy.md": deploy_page}


def stale_pages() -> list[str]:
    """The pages whose file differs from what the code says now."""
    return [page for page, render in PAGES.items() if not (ROOT / page).is_file() or (ROOT / page).read_text("utf-8") != render()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the generated pages of docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is stale")
    stale = stale_pages()
    if parser.parse_args().check:
        sys.exit(f"Stale: {', '.join(stale)}. Call make docs." if stale else 0)
    for page in stale:
        (ROOT / page).write_text(PAGES[page](), "utf-8")
        print(f"wrote {page}")


if __name__ == "__main__":
    main()
