"""docs/codecs_results.md says what the kept figures say."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.codecs import figures, page, runs, settings  # noqa: E402


def test_the_page_is_the_one_the_figures_give() -> None:
    assert page.page() == (ROOT / "docs" / "codecs_results.md").read_text("utf-8"), "call: python -m experiments.codecs page"


def test_its_images_are_there_and_whole() -> None:
    names = re.findall(r"\]\((images/[a-z_]+\.svg)\)", (ROOT / "docs" / "codecs_results.md").read_text("utf-8"))
    assert len(names) == len(set(names)) == 3
    for name in names:
        assert ET.parse(ROOT / "docs" / name).getroot().tag.endswith("svg")


@pytest.mark.parametrize("setting", settings.SETTINGS)
def test_kept_figures_are_complete_and_name_no_place(setting: str) -> None:
    path = runs.results_path(setting)
    if not path.is_file():
        pytest.skip("no figures of it are kept")
    text = path.read_text("utf-8")
    assert not re.search(r"/(work|home|root|tmp|Users)/", text)
    for run in runs.kept(setting):
        assert [point[0] for point in run["points"]] == list(range(len(run["points"])))
        assert all(len(point) == len(figures.COLUMNS) for point in run["points"])
