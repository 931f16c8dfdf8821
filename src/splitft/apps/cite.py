"""`splitft cite`: the references behind the methods a configuration uses.

A component names what it follows in `references: ClassVar[tuple[str, ...]]` (arXiv ids). `papers` and `papers_traffic` hold the full
reference for each id; this file knows what the parts of a run that are no component rest on. "and others" stands where only the first
authors could be confirmed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from splitft.apps import papers, papers_privacy, papers_traffic
from splitft.apps.papers import Reference

if TYPE_CHECKING:
    from splitft.config import Component, RunConfig

Catalogue = Mapping[str, Mapping[str, type]]

REFERENCES: Mapping[str, Reference] = {paper.arxiv: paper for paper in (*papers.PAPERS, *papers_traffic.PAPERS, *papers_privacy.PAPERS)}
# What every run rests on; the rest is named by the components, or follows from fields that are no component.
ALWAYS = ("2604.26388", "2106.09685", "2004.12088", "2407.00952", "1711.05101")
SEAMS = (
    "data",
    "partition",
    "policy",
    "ranks",
    "work",
    "uplink",
    "downlink",
    "exit_downlink",
    "exit_uplink",
    "adapter_uplink",
    "adapter_downlink",
    "controller",
    "aggregator",
    "synchronisation",
)
NESTED = ("rule", "inner")  # fields that hold a component inside another one of its seam, by name or as a table
U_SHAPE = "1812.00564"
SERVER_MODES: Mapping[str, str] = {
    "shared": "2407.00952",
    "alternating": "2407.00952",
    "sequential": "2004.12088",
    "unaveraged": "2012.12591",
}
LONGEST_FIRST = "2511.15404"
BOTTLENECK = "2311.14030"
SECURE_AGGREGATION = "1611.04482"
ASYNCHRONOUS = ("2106.06639", "1903.03934")


def catalogue() -> Catalogue:
    """The tables of every component, with their classes. Imports torch, as some components do."""
    from splitft.catalog import CATALOG

    return CATALOG


def references_of(config: RunConfig, components: Catalogue) -> list[str]:
    """The arXiv ids behind `config`, each once: what every run uses, what its components name, what its other fields follow."""
    found = list(ALWAYS)
    for seam in SEAMS:
        component: Component = getattr(config, seam)
        kinds = components.get(seam, {})
        for fields in _tables({"name": component.name, **component.fields}):
            kind = kinds.get(fields["name"])
            found += getattr(kind, "references", ())
            found += _by_default(kind, fields)
    return list(dict.fromkeys([*found, *_by_field(config)]))


def _by_field(config: RunConfig) -> Iterator[str]:
    """What is chosen by a plain field and not by a component."""
    if config.split.labels == "client":
        yield U_SHAPE
    if config.split.server in SERVER_MODES:
        yield SERVER_MODES[config.split.server]
    if config.network.downlink_order == "longest_first":
        yield LONGEST_FIRST
    if config.bottleneck.channels:
        yield BOTTLENECK
    if config.secure_aggregation.enabled:
        yield SECURE_AGGREGATION
    if config.clients.buffer > 0:
        yield from ASYNCHRONOUS


def _tables(fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The component's own table and those of the components nested in its fields; each has a name."""
    if isinstance(fields.get("name"), str):
        yield fields
    for field, value in fields.items():
        if field in NESTED and isinstance(value, str):
            yield {"name": value}
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Mapping):
                yield from _tables(inner)


def _by_default(kind: type | None, fields: Mapping[str, Any]) -> Iterator[str]:
    """What the components follow that a component holds where its table names none, such as the codec inside `residual`."""
    if kind is None or not dataclasses.is_dataclass(kind):
        return
    for field in dataclasses.fields(kind):
        if field.name in NESTED and field.name not in fields and field.default_factory is not dataclasses.MISSING:
            inner = field.default_factory()
            while inner is not None:
                yield from getattr(inner, "references", ())
                inner = next((getattr(inner, name) for name in NESTED if hasattr(inner, name)), None)


def render(ids: Iterable[str]) -> str:
    """The references as BibTeX. An id without an entry here is still named."""
    return "\n\n".join(_bibtex(REFERENCES[name]) if name in REFERENCES else f"% arXiv:{name}" for name in ids)


def _bibtex(paper: Reference) -> str:
    fields = {
        "author": paper.authors,
        "title": f"{{{paper.title}}}",
        "year": str(paper.year),
        **({"booktitle": paper.venue} if paper.venue else {}),
        "eprint": paper.arxiv,
        "archivePrefix": "arXiv",
    }
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@{'inproceedings' if paper.venue else 'misc'}{{{paper.key},\n{lines}\n}}"
