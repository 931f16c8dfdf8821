"""docs/results.md says what the kept figures say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results_tool", ROOT / "tools" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["results_tool"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_the_one_the_figures_give(results: ModuleType) -> None:
    assert results.page() == (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), "call: python tools/results.py"


def test_reached_is_the_first_round_at_or_below_the_target(results: ModuleType) -> None:
    run = {"seed": 0, "points": [[0, 9.0, 0.0, 0.0, 0.0], [1, 5.0, 1.5, 10.0, 1.0], [2, 4.0, 3.0, 20.0, 2.0], [3, 4.5, 4.5, 30.0, 3.0]]}
    assert results.reached(run, 5.0, 2) == 1.5
    assert results.reached(run, 4.2, 0) == 2
    assert results.reached(run, 3.9, 2) is None
    assert results.reached({"seed": 0, "points": run["points"][:1]}, 10.0, 2) is None, "before training nothing was reached"
    assert (results.final(run), results.best(run)) == (4.5, 4.0)


def test_spread_of_one_run_is_not_shown_as_zero(results: ModuleType) -> None:
    assert results.spread([3.0]) == "3.00"
    assert results.spread([3.0, 5.0]) == "4.00 ± 1.41"
    assert results.spread([]) == "—"
