"""Rows for programs, tables for the terminal, events for TensorBoard."""

from __future__ import annotations

import importlib.util
import io
import math
import re
import sys
from pathlib import Path

import pytest
from report_journals import Journal, write_events
from rich.console import Console

from splitft.apps.report import metrics_table, summary_table
from splitft.apps.report_record import load_record
from splitft.apps.tensorboard import export_tensorboard, scalars
from splitft.errors import MissingExtraError


def test_one_row_per_round_with_the_same_columns(tmp_path: Path) -> None:
    record = load_record(Journal(rounds=3).write(tmp_path))
    rows = metrics_table(record)
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert len({tuple(row) for row in rows}) == 1
    assert rows[0]["train_loss"] is None
    assert rows[0]["bytes_up"] == 0
    assert sum(row["bytes_up"] + row["bytes_down"] for row in rows) == record.traffic()
    assert rows[2]["up_activations_bytes"] == record.rounds[1].traffic("up", "activations")
    assert rows[3]["perplexity"] == record.before_after()[1]


def test_rows_say_who_fell_out_and_what_the_rule_reported(tmp_path: Path) -> None:
    rows = metrics_table(load_record(Journal(clients=11, rounds=3, adaptive=True).write(tmp_path)))
    assert [(row["partial"], row["lost"], row["aggregated"]) for row in rows] == [(0, 0, None), (1, 1, True), (1, 1, False), (1, 1, True)]
    assert [row["metric_discarded_energy"] for row in rows] == [None, 0.02, 0.01, 0.02 / 3]
    assert rows[1]["down_weights_bytes"] > 0
    assert len({tuple(row) for row in rows}) == 1


def test_a_round_without_evaluation_has_no_loss(tmp_path: Path) -> None:
    events = [event for event in Journal(rounds=2).events() if not (event["event"] == "evaluation" and event["round"] == 1)]
    rows = metrics_table(load_record(write_events(tmp_path, events)))
    assert rows[1]["loss"] is None
    assert rows[1]["participants"] == 5
    assert rows[2]["loss"] is not None


def printed(journal: Journal, folder: Path) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=120, force_terminal=False)
    for table in summary_table(load_record(journal.write(folder))):
        console.print(table)
    return stream.getvalue()


def test_the_summary_names_clients_bytes_and_times(tmp_path: Path) -> None:
    text = printed(Journal(rounds=2), tmp_path)
    for expected in ("client-4", "global", "activations", "per trained token", "2 rounds", "virtual", "wall"):
        assert expected in text


def test_the_summary_counts_losses_and_warnings_where_there_were_any(tmp_path: Path) -> None:
    adapted = printed(Journal(clients=11, rounds=3, adaptive=True), tmp_path / "adapted")
    counts = dict(re.findall(r"(not aggregated|cut short|lost|warnings, in the report)\s+│\s+(\d+)", adapted))
    assert counts == {"not aggregated": "1", "cut short": "3", "lost": "3", "warnings, in the report": "1"}
    assert "weights" in adapted
    plain = printed(Journal(rounds=1), tmp_path / "plain")
    assert not any(word in plain for word in ("lost", "cut short", "warnings", "aggregated"))


def test_the_summary_cannot_be_styled_from_the_journal(tmp_path: Path) -> None:
    text = printed(Journal(clients=2, rounds=1, names=("[red]x[/red]", "\x1b[31mred")), tmp_path)
    assert "[red]x[/red]" in text
    assert "\x1b" not in text


def test_many_clients_are_counted_not_listed(tmp_path: Path) -> None:
    text = printed(Journal(clients=25, rounds=1), tmp_path)
    assert "and 5 more" in text
    assert "client-24" not in text


def test_an_empty_run_has_a_summary(tmp_path: Path) -> None:
    folder = write_events(tmp_path, [{"event": "run_started"}])
    assert [table.row_count > 0 for table in summary_table(load_record(folder))] == [True, True, True]
    assert metrics_table(load_record(folder)) == []


def test_tensorboard_missing_says_how_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r'pip install "splitft\[tensorboard\]"'):
        export_tensorboard(Journal(rounds=1).write(tmp_path))


def test_scalars_are_finite_and_in_time_order(tmp_path: Path) -> None:
    events = Journal(rounds=3).events()
    events[2]["step_losses"][0] = math.nan
    events[3]["global"]["perplexity"] = None
    points = list(scalars(load_record(write_events(tmp_path, events))))
    assert all(math.isfinite(point.value) for point in points)
    assert [point.moment_s for point in points] == sorted(point.moment_s for point in points)
    steps = [point.step for point in points if point.tag == "train/step_loss"]
    assert steps == list(range(2, 31))
    assert [point.step for point in points if point.tag == "held_out/perplexity"] == [0, 2, 3]
    assert points[0].moment_s == 1775035800.0


def test_scalars_hold_the_rules_own_figures(tmp_path: Path) -> None:
    points = list(scalars(load_record(Journal(clients=11, rounds=3, adaptive=True).write(tmp_path))))
    found = {tag: [point.value for point in points if point.tag == tag] for tag in {point.tag for point in points}}
    assert found["aggregation/discarded_energy"] == pytest.approx([0.02, 0.01, 0.02 / 3])
    assert found["aggregation/aggregated"] == [1.0, 0.0, 1.0]
    assert found["clients/lost"] == [1.0, 1.0, 1.0]


def test_a_start_without_a_moment_counts_from_zero(tmp_path: Path) -> None:
    events = Journal(rounds=1).events()
    events[0]["utc"] = "yesterday"
    assert next(scalars(load_record(write_events(tmp_path, events)))).moment_s == 0.0


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="the extra tensorboard is not installed")
def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = Journal(rounds=2).write(tmp_path)
    path = export_tensorboard(folder)
    first = path.read_bytes()
    assert export_tensorboard(folder).read_bytes() == first
    events = EventAccumulator(str(path.parent))
    events.Reload()
    assert [event.step for event in events.Scalars("held_out/perplexity")] == [0, 1, 2]
