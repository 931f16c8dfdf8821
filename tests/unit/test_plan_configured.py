"""`splitft plan` shows the cuts a run would take: those of the configuration, where it names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitft.apps.plan_command import show_plan

from ..tiny_run import tiny_config


def test_configured_cuts_are_marked_and_the_derived_one_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(tiny_config(tmp_path, policy={"name": "fixed", "cuts": [1, 3, 3]}))
    out = capsys.readouterr().out
    assert "Cut 1: set by policy.cuts" in out
    assert "Cut 3: set by policy.cuts" in out
    assert "derived, it would be" in out


def test_without_cuts_the_derived_one_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(tiny_config(tmp_path, policy={"name": "fixed"}))
    out = capsys.readouterr().out
    assert "set by policy.cuts" not in out
    assert "deepest within" in out or "fastest" in out
