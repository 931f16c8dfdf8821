"""What secure aggregation is refused with, before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from splitft.apps.assemble import build_components
from splitft.apps.secrecy import secrecy_clashes, secrecy_of
from splitft.config import parse_config
from splitft.config_secure import SecureAggregationSection
from splitft.engine.secure_round import Secrecy

ON = SecureAggregationSection(enabled=True)
FITTING: dict[str, Any] = {"train": {"moments": "reset"}}


def clashes(changes: dict[str, Any], section: SecureAggregationSection = ON) -> list[str]:
    config = parse_config({**FITTING, **changes})
    return list(secrecy_clashes(section, config, build_components(config)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"aggregator": "freeze_a"},
        {"aggregator": {"name": "fed_avgm", "rule": "average"}},
        {"policy": {"name": "fixed", "cuts": [1, 2, 2, 2, 1]}},
        {"policy": "splitft"},
        {"policy": {"name": "fixed", "cuts": [2]}, "train": {"moments": "keep"}},
        {"split": {"labels": "client"}},
    ],
    ids=str,
)
def test_what_fits_is_let_through(changes: dict[str, Any]) -> None:
    assert clashes(changes) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(
            ({"aggregator": name}, "looks at single updates")
            for name in ("median", "trimmed_mean", "krum", "product", "norm_clip", "stack")
        ),
        ({"aggregator": {"name": "fed_adam", "rule": "median"}}, "looks at single updates"),
        ({"clients": {"buffer": 3}}, "end a round together"),
        ({"synchronisation": "drift"}, "sums in every round"),
        ({"split": {"server": "shared"}}, 'split.server = "per_client"'),
        ({"adapter_uplink": {"name": "cast", "dtype": "bfloat16"}}, "no codec makes smaller"),
        ({"clients": {"count": 2}}, "a round has 2"),
        ({"clients": {"count": 10, "participation": 0.2}}, "a round has 2"),
        ({"policy": {"name": "fixed", "cuts": [1, 2, 2, 3, 3]}}, "block 2 lies at 2 clients (3, 4)"),
        ({"policy": "splitft", "train": {"moments": "keep"}}, "one client's gradients"),
        ({"policy": {"name": "fixed", "cuts": [1, 2, 2, 2, 1]}, "train": {"moments": "keep"}}, "one client's gradients"),
    ],
    ids=str,
)
def test_what_contradicts_it_is_refused_with_the_reason(changes: dict[str, Any], words: str) -> None:
    found = clashes(changes)
    assert len(found) == 1
    assert words in found[0]
    assert clashes(changes, SecureAggregationSection()) == []


def test_a_threshold_of_half_is_refused() -> None:
    assert "could open single updates" in clashes({}, SecureAggregationSection(enabled=True, threshold=0.5))[0]
    assert clashes({}, SecureAggregationSection(enabled=True, threshold=0.51)) == []


def test_the_engine_is_told() -> None:
    assert secrecy_of(SecureAggregationSection()) is None
    told = secrecy_of(SecureAggregationSection(enabled=True, threshold=0.8, minimum=4, limit=8))
    assert told == Secrecy(0.8, 4, 8)
    assert [told.of(count) for count in (3, 5, 10)] == [3, 4, 8]
    assert [Secrecy().of(count) for count in (3, 5, 10)] == [3, 4, 7]
