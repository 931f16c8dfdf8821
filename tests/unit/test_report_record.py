"""Reading a journal back: torn and damaged lines, repeats after a resume, gaps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_journals import Journal, asynchronous_events, write_events

from splitft.apps.report_record import finite, load_record, read_journal
from splitft.errors import CheckpointError


def test_events_come_back_in_order(tmp_path: Path) -> None:
    events = Journal(rounds=2).events()
    assert read_journal(Journal(rounds=2).write(tmp_path) / "journal.jsonl") == events


@pytest.mark.parametrize("tail", ['{"event":"round","rou', "\x00\x00\x00", '{"event": 3}\n', "[1]\n", "{}"])
def test_a_torn_last_line_is_left_out(tmp_path: Path, tail: str) -> None:
    folder = Journal(rounds=1).write(tmp_path)
    whole = read_journal(folder / "journal.jsonl")
    with (folder / "journal.jsonl").open("a") as stream:
        stream.write(tail)
    assert read_journal(folder / "journal.jsonl") == whole


def test_a_line_torn_inside_a_character_is_left_out(tmp_path: Path) -> None:
    folder = Journal(rounds=1).write(tmp_path)
    whole = read_journal(folder / "journal.jsonl")
    with (folder / "journal.jsonl").open("ab") as stream:
        stream.write('{"event":"note","text":"é'.encode()[:-1])
    assert read_journal(folder / "journal.jsonl") == whole


@given(cut=st.integers(min_value=1, max_value=400))
def test_any_cut_of_the_file_reads_as_a_prefix(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = Journal(clients=1, rounds=1, steps=1).write(tmp_path_factory.mktemp("run"))
    journal = folder / "journal.jsonl"
    whole = read_journal(journal)
    journal.write_bytes(journal.read_bytes()[:-cut])
    kept = read_journal(journal)
    assert kept == whole[: len(kept)]
    assert len(kept) <= len(whole)


def test_an_earlier_damaged_line_names_file_and_line(tmp_path: Path) -> None:
    folder = Journal(rounds=1).write(tmp_path)
    lines = (folder / "journal.jsonl").read_text().splitlines()
    lines[2] = lines[2][:50]
    (folder / "journal.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(CheckpointError, match=r"journal\.jsonl, line 3: not a journal event"):
        read_journal(folder / "journal.jsonl")


def test_a_field_of_the_wrong_type_names_line_and_field(tmp_path: Path) -> None:
    events = Journal(rounds=1).events()
    events[2]["clients"][1]["cut"] = "deep"
    with pytest.raises(CheckpointError, match=r"line 3: .*clients\[.*cut"):
        load_record(write_events(tmp_path, events))


def test_a_missing_journal_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No such file.*folder of a run"):
        load_record(tmp_path)


def test_a_journal_without_a_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run_started"):
        load_record(write_events(tmp_path, []))


def test_blank_lines_and_unknown_events_and_fields_do_no_harm(tmp_path: Path) -> None:
    events = [{**event, "later": {"x": 1}} for event in Journal(rounds=2).events()]
    events.insert(2, {"event": "something_new", "round": "?"})
    folder = write_events(tmp_path, events)
    journal = folder / "journal.jsonl"
    journal.write_text(journal.read_text().replace("\n", "\n\n"))
    assert len(load_record(folder).rounds) == 2


def _resumed(after: int, redo: int) -> list[dict[str, Any]]:
    """Five rounds, then a resume after round `after`, then `redo` rounds with another loss."""
    events = Journal(rounds=5).events()[:-1]
    events.append({"event": "resumed", "round": after, "utc": "2026-04-01T10:00:00+00:00"})
    again = Journal(rounds=5, seed=1)
    for number in range(after + 1, after + 1 + redo):
        events += [again.round_event(number, 100.0 * number), again.evaluation_event(number)]
    return events


def test_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    record = load_record(write_events(tmp_path, _resumed(after=3, redo=1)))
    assert [item.round for item in record.rounds] == [1, 2, 3, 4]
    assert record.rounds[-1].virtual_start_s == 400.0
    assert [item.round for item in record.evaluations] == [0, 1, 2, 3, 4]
    assert [item.round for item in record.resumed] == [3]
    assert record.status == "unfinished"


@pytest.mark.parametrize(("last", "status"), [("run_finished", "finished"), ("interrupted", "interrupted"), (None, "unfinished")])
def test_status_is_what_the_journal_ends_with(tmp_path: Path, last: str | None, status: str) -> None:
    events = Journal(rounds=2).events()[:-1]
    record = load_record(write_events(tmp_path, events + ([{"event": last}] if last else [])))
    assert record.status == status


def test_an_interrupted_run_that_went_on_is_not_interrupted(tmp_path: Path) -> None:
    events = Journal(rounds=2).events()
    events[3:3] = [{"event": "interrupted"}, {"event": "resumed", "round": 1, "utc": ""}]
    assert load_record(write_events(tmp_path, events)).status == "finished"


def test_sums_match_the_events(tmp_path: Path) -> None:
    events = Journal(rounds=3).events()
    record = load_record(write_events(tmp_path, events))
    parts = [client for event in events if event["event"] == "round" for client in event["clients"]]
    assert record.tokens == sum(client["tokens"] for client in parts)
    assert record.traffic() == sum(sum(kinds.values()) for client in parts for kinds in client["bytes"].values())
    assert record.traffic("up", "labels") == sum(client["bytes"]["up"]["labels"] for client in parts)
    assert record.wall_s == pytest.approx(12.0)
    assert record.virtual_s == events[-1]["virtual_s"]


def test_the_round_loss_is_weighted_by_tokens(tmp_path: Path) -> None:
    events = Journal(clients=2, rounds=1).events()
    events[2]["clients"][0] |= {"loss_mean": 1.0, "tokens": 300}
    events[2]["clients"][1] |= {"loss_mean": 2.0, "tokens": 100}
    assert load_record(write_events(tmp_path, events)).rounds[0].loss == pytest.approx(1.25)


def test_missing_and_infinite_perplexities_are_gaps(tmp_path: Path) -> None:
    events = Journal(clients=2, rounds=2).events()
    evaluations = [event for event in events if event["event"] == "evaluation"]
    evaluations[1]["clients"] = evaluations[1]["clients"][1:]
    evaluations[2]["clients"][0]["perplexity"] = math.inf
    evaluations[2]["global"]["perplexity"] = None
    record = load_record(write_events(tmp_path, events))
    assert [value is None for _, value in record.perplexities(0)] == [False, True, True]
    assert [value is None for _, value in record.perplexities()] == [False, False, True]
    assert record.before_after(0)[1] is None
    assert record.before_after()[1] == pytest.approx(evaluations[1]["global"]["perplexity"])


def test_a_first_version_journal_reads_as_done_and_aggregated(tmp_path: Path) -> None:
    record = load_record(Journal(rounds=2).write(tmp_path))
    assert all(item.aggregated and item.metrics == {} for item in record.rounds)
    assert {(part.status, part.refused_cut, part.ranks, part.staleness) for item in record.rounds for part in item.clients} == {
        ("done", None, (), None)
    }
    assert record.warnings == ()
    assert not record.asynchronous


def test_states_count_every_participant(tmp_path: Path) -> None:
    journal = Journal(clients=11, rounds=3, adaptive=True)
    for item in load_record(journal.write(tmp_path)).rounds:
        assert item.states == {"done": 9, "partial": 1, "lost": 1}


def test_a_resume_drops_the_warnings_of_rounds_it_repeats(tmp_path: Path) -> None:
    events = Journal(rounds=6, adaptive=True).events()[:-1]
    assert [one.round for one in load_record(write_events(tmp_path / "whole", events)).warnings] == [2, 5]
    events.append({"event": "resumed", "round": 4, "utc": ""})
    assert [one.round for one in load_record(write_events(tmp_path / "resumed", events)).warnings] == [2]


def test_staleness_makes_a_run_asynchronous(tmp_path: Path) -> None:
    assert load_record(write_events(tmp_path, asynchronous_events())).asynchronous


def test_names_fall_back_to_numbers(tmp_path: Path) -> None:
    events = Journal(clients=2, rounds=1).events()
    events[0]["clients"] = events[0]["clients"][:1]
    events[0]["clients"][0]["name"] = ""
    record = load_record(write_events(tmp_path, events))
    assert [record.client_name(client) for client in record.client_ids] == ["client-0", "client-1"]


def test_the_smallest_journal_is_enough(tmp_path: Path) -> None:
    record = load_record(write_events(tmp_path, [{"event": "run_started"}]))
    assert (record.tokens, record.virtual_s, record.wall_s, record.client_ids) == (0, 0.0, 0.0, ())
    assert json.dumps(record.perplexities()) == "[]"


def test_finite_drops_what_is_no_number() -> None:
    assert finite([1.0, None, math.nan, math.inf, -2.0]) == [1.0, -2.0]
