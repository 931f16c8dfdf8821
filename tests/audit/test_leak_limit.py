"""split.max_leak: cuts that leak more than allowed are not taken; where none is left, the run does not begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splitft.apps import leak_limit
from splitft.audit.base import Attack, Case, Figures, Finding, Options
from splitft.audit.scores import wilson
from splitft.config import RunConfig
from splitft.errors import ConfigError

from ..tiny_run import tiny_config


def found(cut: int, leak: float, attacker: Attack = "K", tokens: int = 96) -> Finding:
    low, high = wilson(round(leak * tokens), tokens)
    return Finding(attacker, cut, "first", Figures(tokens, leak, low, high, 0.0, leak, None, 0, ()), {}, 0.0, 48, None, 0.0)


def measured(monkeypatch: pytest.MonkeyPatch, leaks: dict[int, float], attacker: Attack = "K") -> None:
    """What the audit would find, cut by cut; that it finds what is there is shown in test_attacks.py, and below."""
    import splitft.audit.run

    def worst(case: Case, cuts: Sequence[int], options: Options) -> dict[int, Finding]:
        return {cut: found(cut, leaks[cut], attacker) for cut in cuts}

    monkeypatch.setattr(splitft.audit.run, "worst_by_cut", worst)


def limited(folder: Path, limit: float, **changes: Any) -> RunConfig:
    split = {"max_leak": limit, "labels": "client"}
    return tiny_config(folder, split=split, policy={"name": "splitft"}, **changes)


# Of 96 tokens the upper end of the interval is 0.98 for 0.95, 0.87 for 0.8 and 0.50 for 0.4.
@pytest.mark.parametrize(("limit", "least"), [(0.99, 1), (0.96, 2), (0.85, 3), (0.51, 3)])
def test_the_shallowest_cut_follows_the_upper_end_of_the_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, least: int
) -> None:
    measured(monkeypatch, {1: 0.95, 2: 0.8, 3: 0.4, 4: 0.3})
    config, text = leak_limit.bounded(limited(tmp_path, limit))
    assert config.split.minimum_cut == least
    assert config.split.max_leak == limit
    assert "cut 2: 0.800 by K, at most 0.86" in text


def test_the_longest_row_of_cuts_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With noise the leak may rise with depth, or come and go: what keeps to the limit is not refused for what lies beside it."""
    for leaks, first, last in (
        ({1: 0.1, 2: 0.2, 3: 0.9}, 1, 2),
        ({1: 0.9, 2: 0.1, 3: 0.1}, 2, 3),
        ({1: 0.1, 2: 0.9, 3: 0.1}, 3, 3),
    ):
        measured(monkeypatch, leaks)
        config, _ = leak_limit.bounded(limited(tmp_path, 0.5))
        assert (config.split.minimum_cut, config.split.maximum_cut) == (first, last)


def test_what_could_not_be_measured_in_time_is_not_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import splitft.audit.run

    def hasty(case: Case, cuts: Sequence[int], options: Options) -> dict[int, Finding]:
        return {cut: replace(found(cut, 0.1), complete=cut > 2) for cut in cuts}

    monkeypatch.setattr(splitft.audit.run, "worst_by_cut", hasty)
    with pytest.raises(ConfigError, match="at cut 1 not all attacks ended"):
        leak_limit.bounded(limited(tmp_path, 0.5))


def test_of_cuts_that_are_named_each_has_to_keep_to_it_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def named(cuts: list[int]) -> RunConfig:
        return tiny_config(tmp_path, split={"max_leak": 0.5, "labels": "client"}, policy={"name": "fixed", "cuts": cuts})

    measured(monkeypatch, {2: 0.1})  # the others are not even looked at
    config = named([2])
    assert leak_limit.bounded(config)[0] == config
    measured(monkeypatch, {1: 0.9, 2: 0.1})
    with pytest.raises(ConfigError, match=r"cut 1: 0\.900 by K"):
        leak_limit.bounded(named([1, 2, 2]))


def test_no_cut_is_a_refusal_that_names_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, dict.fromkeys(range(1, 9), 1.0))
    with pytest.raises(ConfigError, match=r"cut 1: 1\.000 by K.*noise") as refusal:
        leak_limit.bounded(limited(tmp_path, 0.9))
    assert "gradients" not in str(refusal.value)
    measured(monkeypatch, dict.fromkeys(range(1, 9), 1.0), "L")
    with pytest.raises(ConfigError, match=r"cut 1: 1\.000 by L.*gradients that a U-shape returns"):
        leak_limit.bounded(limited(tmp_path, 0.9))


def test_labels_in_clear_keep_to_no_limit(tmp_path: Path) -> None:
    """Whatever the hidden states give away: the text is sent."""
    with pytest.raises(ConfigError, match=r'labels are the text.*split\.labels = "client"'):
        leak_limit.bounded(tiny_config(tmp_path, split={"max_leak": 0.9}))


@pytest.mark.timeout(120)
def test_what_gradients_give_away_counts(tmp_path: Path) -> None:
    """A real audit: noise hides the states from K, and the labels come out of gradients all the same; noise there too hides both."""
    noise = {"name": "noise", "clip": 0.0, "multiple": 30.0}
    common: dict[str, Any] = {"rounds": 1, "lora": {"targets": "all"}, "data": {"name": "python_docs", "max_documents": 60}}
    with pytest.raises(ConfigError, match=r"cut 1: (1\.000|0\.9\d\d) by L.*gradients that a U-shape returns"):
        leak_limit.bounded(limited(tmp_path, 0.6, uplink=noise, exit_downlink={"name": "identity"}, **common))
    config, text = leak_limit.bounded(limited(tmp_path, 0.6, uplink=noise, exit_uplink=noise, exit_downlink=noise, **common))
    assert config.split.minimum_cut == 1, text


def test_without_a_limit_nothing_is_measured(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    assert leak_limit.bounded(config) == (config, "")
