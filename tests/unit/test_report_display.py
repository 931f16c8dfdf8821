"""What `splitft run` shows while it goes on: lines, warnings, a bar whose end is an estimate."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_journals import Journal, asynchronous_events
from rich.console import Console

from splitft.apps.execute import Display, Warnings, training_parts
from splitft.engine.rounds import RoundRecord


def display(rounds: int, quiet: bool = False, colour: bool = False) -> tuple[Display, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, width=200, force_terminal=colour, color_system="standard" if colour else None)
    return Display(console, rounds, quiet), stream


def rounds_of(journal: Journal) -> list[dict[str, Any]]:
    return [event for event in journal.events() if event["event"] == "round"]


def bar(shown: Display) -> tuple[float, float]:
    task = shown.progress.tasks[0]
    assert task.total is not None
    return task.completed, task.total


@given(st.lists(st.integers(min_value=0, max_value=30), min_size=1, max_size=20), st.integers(min_value=0, max_value=50))
def test_the_bar_is_never_past_its_end_and_ends_full(steps: list[int], expected: int) -> None:
    shown, _ = display(len(steps), quiet=True)
    shown.expect(expected, 0)
    event = rounds_of(Journal(clients=1, rounds=1))[0]
    for number, count in enumerate(steps, start=1):
        for _ in range(count):
            shown.listen("step", {"count": 1})
            done, total = bar(shown)
            assert done <= total
        shown.listen("round", {"record": RoundRecord(number, event, None)})
    done, total = bar(shown)
    assert done == sum(steps)
    assert total == max(done, 1)


def test_the_estimate_learns_from_the_rounds_and_forgets_the_first() -> None:
    shown, _ = display(10, quiet=True)
    shown.expect(40, 0)
    event = rounds_of(Journal(clients=1, rounds=1))[0]
    assert bar(shown) == (0, 400)
    for number, (count, total) in enumerate([(100, 100 + 9 * 40), (20, 120 + 8 * 20), (30, 150 + 7 * 25)], start=1):
        shown.listen("step", {"count": count})
        shown.listen("round", {"record": RoundRecord(number, event, None)})
        assert bar(shown)[1] == total


def test_a_resumed_bar_begins_where_it_stopped() -> None:
    shown, _ = display(10, quiet=True)
    shown.expect(12, 4)
    assert bar(shown) == (48, 120)
    assert shown.round == 4


def test_a_round_says_who_fell_out_and_whether_it_was_aggregated() -> None:
    event = rounds_of(Journal(clients=11, rounds=2, adaptive=True))[1]
    parts = training_parts(event)
    assert parts[0] == f"cuts {','.join(str(part['cut']) for part in event['clients'])}"
    assert parts[1:3] == ["1 cut short", "1 lost"]
    assert parts[-1] == "not aggregated"
    assert not {"1 cut short", "1 lost", "not aggregated"} & set(training_parts(rounds_of(Journal(rounds=1))[0]))


def test_a_round_without_updates_is_shown_without_a_loss() -> None:
    shown, stream = display(2)
    shown.expect(4, 0)
    empty = asynchronous_events()[3] | {"clients": [], "aggregated": False}
    shown.listen("round", {"record": RoundRecord(1, empty, None)})
    assert " ".join(stream.getvalue().split()) == "round 1 0 clients 0.0 MB not aggregated 12.0 virtual s, 1.0 s"


def test_a_crowd_is_counted() -> None:
    assert training_parts(rounds_of(Journal(clients=13, rounds=1))[0])[0] == "13 clients"


def test_warnings_are_told_once_and_whole(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"

    def append(text: str) -> None:
        with journal.open("a") as stream:
            stream.write(text)

    old, new = ({"event": "warning", "round": number, "text": f"text {number}"} for number in (1, 2))
    append(json.dumps(old) + "\n")
    warnings = Warnings(journal)
    assert list(warnings.new()) == []
    append(json.dumps({"event": "note", "text": '"warning"'}) + "\n" + json.dumps(new)[:20])
    assert list(warnings.new()) == []
    append(json.dumps(new)[20:] + "\n")
    assert list(warnings.new()) == ["round   2  warning: text 2"]
    assert list(warnings.new()) == []


@pytest.mark.parametrize("quiet", [True, False])
def test_a_warning_is_yellow_and_is_no_markup(quiet: bool) -> None:
    shown, stream = display(1, quiet=quiet, colour=True)
    shown.warn("[red]x[/red] \x1b[31m")
    assert stream.getvalue() == ("" if quiet else "\x1b[33m[red]x[/red] \N{REPLACEMENT CHARACTER}[31m\x1b[0m\n")
