"""docs/errors.md has a section for every error class, with its exit code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from splitft import errors

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "errors.md").read_text("utf-8")
CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.SplitftError)]
SECTIONS = dict(re.findall(r"^## (\w+) \(exit code (\d+)\)$", PAGE, re.MULTILINE))


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_class_has_its_section_and_code(kind: type[errors.SplitftError]) -> None:
    assert SECTIONS[kind.__name__] == str(kind.exit_code)


def test_page_has_no_class_that_is_gone() -> None:
    assert set(SECTIONS) == {kind.__name__ for kind in CLASSES}


def test_every_section_says_the_same_three_things() -> None:
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        for heading in ("**Meaning.**", "**Typical message.**", "**What to do.**"):
            assert heading in section, section.splitlines()[0]


def test_exit_codes_tell_the_classes_apart() -> None:
    codes = [kind.exit_code for kind in CLASSES]
    assert len(codes) == len(set(codes))


def test_the_tree_in_the_module_names_every_class_and_code() -> None:
    drawn = dict(re.findall(r"^\s+[│├└ ─]*(\w+)\s+(\d+)", inspect.getdoc(errors) or "", re.MULTILINE))
    assert drawn == {kind.__name__: str(kind.exit_code) for kind in CLASSES}
