"""The files around the package agree with each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import splitft
from splitft.apps import doctor

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line and not line.startswith("#"))


def test_constraints_lie_in_the_declared_ranges() -> None:
    for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]:
        requirement = Requirement(line)
        assert Version(PINS[canonicalize_name(requirement.name)]) in requirement.specifier


def test_constraints_are_plain_versions() -> None:
    for name, version in PINS.items():
        assert name == canonicalize_name(name)
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), "no local part: such a package exists on one machine only"


def test_requirements_name_no_place() -> None:
    for name in ("pyproject.toml", "constraints.txt", "Makefile", "tools/setup.sh", ".ci/run"):
        text = (ROOT / name).read_text("utf-8")
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links", text), name


def test_citation_has_the_version_and_licence() -> None:
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {splitft.__version__}\n" in citation
    assert "license: Apache-2.0" in citation
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")


def test_python_range_is_the_same_everywhere() -> None:
    low, beyond = doctor.MINIMUM_PYTHON, doctor.BEYOND_PYTHON
    assert PROJECT["requires-python"] == f">={low[0]}.{low[1]},<{beyond[0]}.{beyond[1]}"
    assert f"{low} <= sys.version_info[:2] < {beyond}" in (ROOT / "tools" / "setup.sh").read_text("utf-8")


def test_every_make_target_named_in_the_guide_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z]+)", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE)) <= targets
    assert {"setup", "demo", "test", "check", "format", "docs", "bench", "clean", "help"} <= targets
