"""The tables and pictures of docs/privacy.md are those of the kept results."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments import privacy, privacy_plots, utility  # noqa: E402

PAGE = (ROOT / "docs" / "privacy.md").read_text("utf-8")


@pytest.mark.parametrize(("model", "blocks", "width"), [("stories260K", 5, 64), ("embedded", 8, 256)])
def test_the_tables_are_the_kept_results(model: str, blocks: int, width: int) -> None:
    results = privacy_plots.read(f"privacy-{model}")
    assert privacy.table(results, list(privacy.rows(blocks, width))) in PAGE


def test_the_utility_table_is_the_kept_results() -> None:
    losses = next(line for line in utility.table(privacy_plots.read("utility-embedded")).splitlines() if line.startswith("| held-out loss"))
    assert losses in PAGE


@pytest.mark.parametrize("name", list(privacy_plots.PLOTS))
def test_pictures_show_the_kept_results(name: str) -> None:
    kept = (privacy_plots.IMAGES / f"{name}.svg").read_text("utf-8")
    assert kept == privacy_plots.PLOTS[name](), "run: python -m experiments.privacy_plots"
    assert f"images/{name}.svg" in PAGE
