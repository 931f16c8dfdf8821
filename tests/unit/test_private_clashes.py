"""Who comes through a round of a private run, and with how many steps: nothing that follows from one client's text may decide it."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from splitft.apps.assemble import build_components
from splitft.apps.session import FederatedRun
from splitft.config import parse_config
from splitft.errors import ConfigError

from ..tiny_run import tiny_config

PRIVATE: dict[str, Any] = {"name": "private", "noise_multiplier": 1.0}


@pytest.mark.parametrize("rule", [PRIVATE, {"name": "fed_avgm", "rule": PRIVATE}], ids=["private", "under fed_avgm"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clients": {"deadline_s": 5.0, "late": "drop"}}, 'clients.deadline_s = 5 with clients.late = "drop"'),
        ({"clients": {"deadline_s": 0.25}}, 'clients.deadline_s = 0.25 with clients.late = "partial"'),
        ({"clients": {"deadline_s": 5.0, "quorum": 1.0}}, "set clients.deadline_s = 0"),
        ({"work": "balanced"}, 'set work = "equal"'),
        ({"work": {"name": "balanced", "least": 1.0, "most": 1.0}}, 'work "balanced" divides steps by the time they take'),
    ],
    ids=str,
)
def test_rounds_that_follow_from_a_clients_text_are_refused(rule: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    build_components(parse_config(changes))
    with pytest.raises(ConfigError) as refused:
        build_components(parse_config({"aggregator": rule, **changes}))
    assert [line for line in refused.value.problems if words in line], refused.value.problems


def test_what_follows_from_draws_alone_is_not() -> None:
    draws = {"participation": 0.5, "availability": 0.9, "dropout": 0.1, "speed_jitter": 0.3, "quorum": 0.7, "late": "drop"}
    build_components(parse_config({"aggregator": PRIVATE, "clients": draws}))


def rounds_of(folder: Path, words: int, **changes: Any) -> list[dict[str, Any]]:
    """The rounds of four clients with as many texts each; those of the last have so many words."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for client in range(4):
        count = words if client == 3 else 1
        (texts / f"c{client}.txt").write_text("\n\n".join(f"text {number}" + " and a word" * count for number in range(12)) + "\n")
    common: dict[str, Any] = {
        "rounds": 2,
        "data": {"name": "text", "path": str(texts)},
        "partition": {"name": "files"},
        "tokens": {"packing": "documents", "block_tokens": 64},
        "clients": {"count": 4, "profiles": ["laptop"]},
        "policy": {"name": "fixed", "cuts": [2]},
    }
    for name, change in changes.items():
        common[name] = {**common.get(name, {}), **change}
    with closing(FederatedRun(tiny_config(folder, **common))) as run:
        for _ in run.rounds():
            pass
        events = map(json.loads, (run.folder / "journal.jsonl").read_text().splitlines())
        return [event for event in events if event["event"] == "round"]


def told(rounds: list[dict[str, Any]]) -> list[Any]:
    """What is published of who came through."""
    named = ("privacy_participants", "privacy_noise_std")
    return [
        ([(one["client"], one["status"], one["steps"]) for one in event["clients"]], [event["metrics"].get(name) for name in named])
        for event in rounds
    ]


def test_longer_texts_change_nothing_that_is_told_of_who_came_through(tmp_path: Path) -> None:
    """And with a deadline, which another rule may have, they do: so much is refused for a reason."""
    rule = {"aggregator": {"name": "private", "noise_multiplier": 0.05, "rate": 0.0, "most_noise": 1e6}}
    short, long = (told(rounds_of(tmp_path / name, words, **rule)) for name, words in (("short", 1), ("long", 6)))
    assert short == long
    assert [figures[0] for _, figures in short] == [4.0, 4.0]
    usual = rounds_of(tmp_path / "usual", 1)[0]
    late = {"clients": {"deadline_s": 1.05 * (usual["virtual_end_s"] - usual["virtual_start_s"]), "late": "drop"}}
    assert told(rounds_of(tmp_path / "in time", 1, **late)) != told(rounds_of(tmp_path / "too late", 6, **late))
