"""What holds for every component of the catalogue: its form, its documentation, its names."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import pytest

from splitft.catalog import AGGREGATORS, CATALOG, CODECS, PARTITIONS, POLICIES, SOURCES, TRANSPORTS
from splitft.config import RunConfig

ENTRIES = sorted(
    {(name, kind) for table in CATALOG.values() for name, kind in table.items()}, key=lambda entry: (entry[0], entry[1].__name__)
)
every_component = pytest.mark.parametrize(("name", "kind"), ENTRIES, ids=[f"{name}-{kind.__name__}" for name, kind in ENTRIES])


@every_component
def test_it_is_a_frozen_dataclass_without_abstract_parts(name: str, kind: type[Any]) -> None:
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen
    assert not inspect.isabstract(kind)


@every_component
def test_its_docstring_is_written_and_ends_a_sentence(name: str, kind: type[Any]) -> None:
    text = inspect.cleandoc(kind.__doc__ or "")
    assert not text.startswith(f"{kind.__name__}("), "the dataclass made it up"
    assert len(text) > 30
    assert text.endswith(".")


@every_component
def test_its_name_is_plain_and_says_what_the_file_says(name: str, kind: type[Any]) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
    assert getattr(kind, "name", name) == name
    assert kind.__module__.startswith("splitft.")


@every_component
def test_its_fields_are_plain_values(name: str, kind: type[Any]) -> None:
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            assert isinstance(field.default, str | int | float | bool | tuple | None.__class__), field.name
        assert not field.name.startswith("_")
        assert field.name != "name", "the configuration uses it for the component itself"


@every_component
def test_references_are_numbers_of_papers(name: str, kind: type[Any]) -> None:
    assert all(re.fullmatch(r"\d{4}\.\d{4,5}", number) for number in getattr(kind, "references", ()))


@pytest.mark.parametrize("table", [SOURCES, PARTITIONS], ids=["sources", "partitions"])
def test_sources_and_partitions_carry_their_own_name(table: Any) -> None:
    assert all(kind.name == name for name, kind in table.items())


def test_no_class_stands_under_two_names() -> None:
    for table in (SOURCES, PARTITIONS, CODECS, POLICIES, AGGREGATORS, TRANSPORTS):
        assert len(set(table.values())) == len(table)


def test_every_component_section_of_the_configuration_has_a_table_and_its_default_is_in_it() -> None:
    config = RunConfig()
    for seam, table in CATALOG.items():
        if seam != "transport":
            assert getattr(config, seam).name in table
