"""split.max_leak: cuts that leak more than allowed are not taken; where none is left, the run does not begin."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitft.apps import leak_limit
from splitft.errors import ConfigError

from ..tiny_run import tiny_config


def measured(monkeypatch: pytest.MonkeyPatch, leaks: dict[int, float]) -> None:
    """What the audit would find, cut by cut; that it finds what is there is shown in test_attacks.py."""
    import splitft.audit.run

    monkeypatch.setattr(splitft.audit.run, "leak_by_cut", lambda case, cuts, options: {cut: leaks[cut] for cut in cuts})


@pytest.mark.parametrize(("limit", "least"), [(0.99, 1), (0.85, 2), (0.5, 3)])
def test_the_shallowest_cut_follows_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, least: int) -> None:
    measured(monkeypatch, {1: 0.95, 2: 0.8, 3: 0.4, 4: 0.3})
    config, text = leak_limit.bounded(tiny_config(tmp_path, split={"max_leak": limit}, policy={"name": "splitft"}))
    assert config.split.minimum_cut == least
    assert config.split.max_leak == limit
    assert "cut 2: 0.80" in text


def test_no_cut_is_a_refusal_that_names_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, dict.fromkeys(range(1, 9), 1.0))
    with pytest.raises(ConfigError, match=r"cut 1: 1\.00.*noise"):
        leak_limit.bounded(tiny_config(tmp_path, split={"max_leak": 0.9}, policy={"name": "splitft"}))


def test_without_a_limit_nothing_is_measured(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    assert leak_limit.bounded(config) == (config, "")
