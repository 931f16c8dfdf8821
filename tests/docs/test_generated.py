"""The generated pages say what the code says now."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from splitft import catalog
from splitft.config import RunConfig
from splitft.deploy.policy import ClientPolicy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generator", ROOT / "tools" / "docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_generated_page_is_stale(generator: ModuleType) -> None:
    assert generator.stale_pages() == [], "call make docs"


def test_a_changed_page_is_stale(generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(generator.PAGES, "docs/configuration.md", lambda: "other")
    assert generator.stale_pages() == ["docs/configuration.md"]


def test_every_field_is_on_the_page(generator: ModuleType) -> None:
    page = generator.configuration_page()
    for name, field in RunConfig.model_fields.items():
        schema = field.annotation
        if isinstance(schema, type) and hasattr(schema, "model_fields"):
            assert f"## `[{name}]`" in page
            rows = page.split(f"## `[{name}]`")[1].split("\n## ")[0]
            for inner, inner_field in schema.model_fields.items():
                assert "(component)" in rows or f"| `{inner}` | " in rows
                assert inner_field.description is None or inner_field.description in rows
        else:
            assert f"| `{name}` | " in page


def test_every_method_is_on_the_page_with_its_fields_and_defaults(generator: ModuleType) -> None:
    page = generator.configuration_page()
    for seam, table in catalog.CATALOG.items():
        if seam not in RunConfig.model_fields:
            continue
        rows = page.split(f"## `[{seam}]`")[1].split("\n## ")[0]
        for name, kind in table.items():
            if f"| `{name}` | " not in rows:
                assert "Methods: those of [`[uplink]`](#uplink-component)" in rows, (seam, name)
                assert name in catalog.CODECS or f"`{name}`" in rows
                continue
            row = rows.split(f"| `{name}` | ")[1].splitlines()[0]
            for field in dataclasses.fields(kind):
                needed = field.default is field.default_factory is dataclasses.MISSING
                assert (f"`{field.name}` (needed)" if needed else f"`{field.name} = ") in row, (seam, name, field.name)
            assert not row.endswith("| . |"), f"{seam} {name} has no docstring"
    assert '`inner = {name = "error_bounded", of = "absolute"}`' in page
    assert '`evict = "new"` (or `"oldest"`)' in page


def test_every_field_of_a_client_policy_is_on_the_deployment_page(generator: ModuleType) -> None:
    page = generator.deploy_page()
    assert page == (ROOT / "docs" / "deploy.md").read_text("utf-8")
    for name, field in ClientPolicy.model_fields.items():
        assert f"| `{name}` | " in page
        assert str(field.description) in page


def test_limits_are_in_words(generator: ModuleType) -> None:
    page = generator.configuration_page()
    assert "| `participation` | `1.0` | number, > 0, ≤ 1 |" in page
    assert "| `rank` | `8` | whole number, ≥ 1, ≤ 4096 |" in page
    assert '| `labels` | `"server"` | `"server"`, `"client"` |' in page
