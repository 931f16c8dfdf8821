"""The figures of an adaptive run: what became of cuts, ranks and rounds, and what the rules report of themselves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_journals import Journal, asynchronous_events, write_events

from splitft.apps.plot_aggregation import aggregation_figures
from splitft.apps.plot_cells import equal_stretches
from splitft.apps.plot_clients import client_figures
from splitft.apps.plot_cuts import cuts_figure
from splitft.apps.plot_learning import perplexity_figure
from splitft.apps.plot_ranks import by_column, ranks_figure
from splitft.apps.plot_stages import client_seconds
from splitft.apps.plot_time import time_figures
from splitft.apps.plot_traffic import cost_curve_figure, traffic_figure
from splitft.apps.plots import Figure
from splitft.apps.report_record import RunRecord, load_record


def adaptive(folder: Path, **knobs: Any) -> RunRecord:
    return load_record(Journal(adaptive=True, **knobs).write(folder))


def changed(folder: Path, change: dict[str, Any], **knobs: Any) -> RunRecord:
    """An adaptive run whose rounds have these fields."""
    events = Journal(adaptive=True, **knobs).events()
    return load_record(write_events(folder, [event | change if event["event"] == "round" else event for event in events]))


def present(figure: Figure | None) -> Figure:
    assert figure is not None
    assert all(len(row) == len(figure.columns) for row in figure.rows)
    return figure


def test_a_cell_is_marked_by_shape_for_every_state(tmp_path: Path) -> None:
    journal = Journal(adaptive=True, clients=5, rounds=8)
    record = load_record(journal.write(tmp_path))
    figure = present(cuts_figure(record))
    states = [journal.state(client, number) for client in range(5) for number in range(1, 9)]
    refused = sum(part.refused_cut is not None for item in record.rounds for part in item.clients)
    assert figure.svg.count('class="cross"') == 2 * states.count("lost") > 0
    assert figure.svg.count('class="partial"') == states.count("partial") > 0
    assert figure.svg.count('class="refused"') == refused > 0
    assert figure.svg.count('class="gap"') == states.count("lost")
    assert [entry.shape for entry in figure.legend[-3:]] == ["refused", "partial", "lost"]
    assert f"A deeper cut refused {refused} times, cut short 2 times, lost {states.count('lost')} times." in figure.note


def test_marks_that_do_not_occur_are_not_explained(tmp_path: Path) -> None:
    figure = present(cuts_figure(load_record(Journal().write(tmp_path))))
    assert {entry.shape for entry in figure.legend} == {"box"}
    assert "lost" not in figure.note


def test_the_numbers_tell_what_the_marks_show(tmp_path: Path) -> None:
    record = adaptive(tmp_path, clients=5, rounds=8)
    cells = [cell for row in present(cuts_figure(record)).rows for cell in row[1:]]
    assert sum("lost" in cell for cell in cells) == sum(item.states["lost"] for item in record.rounds)
    assert "4 (refused 5)" in cells


def test_a_long_stretch_breaks_where_a_client_is_lost(tmp_path: Path) -> None:
    events = Journal(clients=1, rounds=100, steps=1, drawn_steps=0).events()
    for event in events:
        if event["event"] == "round":
            event["clients"][0] |= {"cut": 2, "status": "lost" if event["round"] == 50 else "done"}
    svg = present(cuts_figure(load_record(write_events(tmp_path, events)))).svg
    assert re.findall(r"rounds? [\d to]+: cut 2", svg) == ["rounds 1 to 49: cut 2", "round 50: cut 2", "rounds 51 to 100: cut 2"]


def test_a_crowd_has_a_row_for_each_state(tmp_path: Path) -> None:
    record = adaptive(tmp_path, clients=77, rounds=3, drawn_steps=0)
    svg = present(cuts_figure(record)).svg
    for item in record.rounds:
        assert f"round {item.round}, lost: 7 clients" in svg
        assert f"round {item.round}, partial: 7 clients" in svg
    assert "round 1, refused: " in svg


def test_ranks_are_drawn_where_they_differ(tmp_path: Path) -> None:
    record = adaptive(tmp_path, clients=5, rounds=4)
    figure = present(ranks_figure(record))
    assert figure.columns == ("client", "cut", *(f"block {index}" for index in range(6)), "sum of ranks")
    for row, part in zip(figure.rows, record.rounds[-1].clients, strict=True):
        assert row[2 : 2 + 6] == tuple("4" if block == part.cut - 1 else "8" for block in range(6))
        assert row[-1] == str(sum(part.ranks)) == "88"
    assert figure.svg.count('class="cut-mark"') == 5
    assert figure.title == "Ranks in round 4"
    assert "At most 0.20 %" in figure.note


@pytest.mark.parametrize("ranks", [[], [8] * 12])
def test_equal_ranks_make_no_figure(tmp_path: Path, ranks: list[int]) -> None:
    events = Journal(adaptive=True).events()
    for event in events:
        for part in event["clients"] if event["event"] == "round" else ():
            part["ranks"] = ranks
    record = load_record(write_events(tmp_path, events))
    assert ranks_figure(record) is None
    assert [figure.key for figure in client_figures(record)] == ["cuts", "lengths"]


def test_ranks_that_fit_no_block_are_shown_one_by_one_and_none_is_a_gap(tmp_path: Path) -> None:
    events = Journal(adaptive=True, clients=2, rounds=1).events()
    for part in events[2]["clients"]:
        part["ranks"] = [0, 4, 8, 2, 1]
    figure = present(ranks_figure(load_record(write_events(tmp_path, events))))
    assert figure.columns[2:-1] == tuple(f"adapter {index}" for index in range(5))
    assert figure.svg.count("no adapter") == 2
    assert "cut-mark" not in figure.svg


def test_modules_of_a_block_that_differ_are_a_range(tmp_path: Path) -> None:
    events = Journal(adaptive=True, clients=1, rounds=1).events()
    events[2]["clients"][0]["ranks"] = [2, 6] + [4] * 10
    figure = present(ranks_figure(load_record(write_events(tmp_path, events))))
    assert figure.rows[0][2:4] == ("2–6", "4")
    assert "block 0: rank 2, 6<" in figure.svg
    assert "A range" in figure.note


@given(st.lists(st.integers(min_value=0, max_value=9), min_size=1, max_size=40), st.integers(min_value=1, max_value=12))
def test_columns_hold_every_rank_once_and_in_order(ranks: list[int], columns: int) -> None:
    cells = by_column(ranks, columns)
    assert len(cells) == columns
    assert [rank for cell in cells for rank in cell] == ranks


@given(st.lists(st.sampled_from("aab"), min_size=1, max_size=30), st.booleans())
def test_stretches_cover_every_cell_once(values: list[str], merge: bool) -> None:
    stretches = equal_stretches(values, merge)
    assert [index for first, last in stretches for index in range(first, last + 1)] == list(range(len(values)))
    assert all(len(set(values[first : last + 1])) == 1 for first, last in stretches)


def test_cuts_and_ranks_stand_side_by_side(tmp_path: Path) -> None:
    few = client_figures(adaptive(tmp_path / "few", clients=5, rounds=5))
    assert [(figure.key, figure.wide) for figure in few] == [("cuts", False), ("ranks", False), ("lengths", True)]
    long = client_figures(adaptive(tmp_path / "long", clients=5, rounds=30))
    assert [(figure.key, figure.wide) for figure in long] == [("cuts", True), ("ranks", False), ("lengths", False)]


def test_rounds_that_were_not_aggregated_are_marked(tmp_path: Path) -> None:
    figure = present(perplexity_figure(adaptive(tmp_path, rounds=8)))
    assert figure.note.endswith("2 of 8 rounds were not aggregated.")
    assert figure.svg.count('class="open ink"') == figure.svg.count('class="held"') == 2
    assert "not aggregated" in [entry.label for entry in figure.legend]
    plain = present(perplexity_figure(load_record(Journal().write(tmp_path / "plain"))))
    assert "not aggregated" not in [entry.label for entry in plain.legend]


def test_what_the_rules_report_is_drawn_unless_it_is_always_zero(tmp_path: Path) -> None:
    truncation, clip = aggregation_figures(adaptive(tmp_path, clients=5, rounds=4))
    assert (truncation.key, clip.title) == ("truncation", "Clip limit")
    assert truncation.columns == ("round", "server", "client that lost most")
    assert [row[1:] for row in truncation.rows] == [("2.000", "0.2000"), ("1.000", "0.2000"), ("0.6667", "0.2000"), ("0.5000", "0.2000")]
    assert not truncation.wide
    assert not clip.wide


def test_an_old_journal_reports_nothing_of_its_rules(tmp_path: Path) -> None:
    assert aggregation_figures(load_record(Journal().write(tmp_path))) == []


def test_drift_is_drawn_with_its_threshold(tmp_path: Path) -> None:
    metrics = {"drift_variance": 0.5, "drift_threshold": 0.9, "rounds_since_aggregation": 3.0}
    figures = {figure.key: figure for figure in aggregation_figures(changed(tmp_path, {"metrics": metrics}, rounds=2))}
    assert set(figures) == {"truncation", "drift"}
    assert figures["drift"].rows == (("1", "0.5000", "0.9000"), ("2", "0.5000", "0.9000"))


def test_a_figure_missing_in_some_rounds_is_a_gap(tmp_path: Path) -> None:
    events = Journal(adaptive=True, rounds=3).events()
    rounds = [event for event in events if event["event"] == "round"]
    rounds[1]["metrics"] = {"clip_limit": None}
    figures = {figure.title: figure for figure in aggregation_figures(load_record(write_events(tmp_path, events)))}
    assert [row[1] for row in figures["Clip limit"].rows] == ["1.500", "\N{EM DASH}", "1.500"]
    assert "line bridge" in figures["Clip limit"].svg


def test_weights_are_a_kind_of_bytes_like_the_others(tmp_path: Path) -> None:
    record = adaptive(tmp_path, rounds=3)
    figure = present(traffic_figure(record))
    assert "weights" in [entry.label for entry in figure.legend]
    assert "k-weights" in figure.svg
    assert "down weights" in figure.columns
    assert record.traffic("down", "weights") > 0


def test_points_of_the_cost_curve_carry_their_rounds(tmp_path: Path) -> None:
    events = [event for event in Journal(rounds=6).events() if event["event"] != "evaluation" or event["round"] in (0, 3, 6)]
    svg = present(cost_curve_figure(load_record(write_events(tmp_path, events)))).svg
    assert re.findall(r'class="t small"[^>]*>(\d+)<', svg) == ["0", "3", "6"]


def test_a_lost_client_is_away_and_holds_nobody_up(tmp_path: Path) -> None:
    record = adaptive(tmp_path, clients=11, rounds=1)
    lost = next(part.client for part in record.rounds[0].clients if part.status == "lost")
    whole = time_figures(record)[0]
    assert f"client-{lost}: away" in whole.svg
    assert ">lost<" in whole.svg
    assert "Lost: 1 of 11 clients." in whole.note
    assert f"client-{lost} finished last" not in whole.note
    seconds = client_seconds(record)
    assert seconds[lost]["away"] > 0
    assert all("away" not in parts for client, parts in seconds.items() if client != lost)
    for parts in seconds.values():
        assert sum(parts.values()) == pytest.approx(record.virtual_s)


def test_a_round_in_which_all_are_lost_still_draws(tmp_path: Path) -> None:
    events = Journal(adaptive=True, clients=3, rounds=1).events()
    for part in events[2]["clients"]:
        part["status"] = "lost"
    assert "Lost: 3 of 3 clients." in time_figures(load_record(write_events(tmp_path, events)))[0].note


def test_the_asynchronous_time_line_crosses_rounds(tmp_path: Path) -> None:
    record = load_record(write_events(tmp_path, asynchronous_events()))
    line, shares = time_figures(record)
    assert line.title == "Time line of rounds 1 to 2"
    assert line.note.startswith("4 updates merged in 2 rounds.")
    assert line.svg.count('class="merge"') == 2
    assert "client-0: barrier wait, 2.00 s" in line.svg  # arrived at 4 s, merged at 6 s
    assert "client-2: barrier wait, 3.00 s" in line.svg  # arrived at 9 s, merged at 12 s
    assert "client-0: away, 5.00 s" in line.svg
    assert ("2", "client-2", "9.00 s", "12.0 s", "1.00") in line.rows
    assert shares.key == "shares"


def test_asynchronous_seconds_run_to_the_merge(tmp_path: Path) -> None:
    seconds = client_seconds(load_record(write_events(tmp_path, asynchronous_events())))
    assert seconds[0] == pytest.approx({"client": 5.0, "barrier": 2.0, "queue": 0.0, "away": 5.0})
    assert {client: sum(parts.values()) for client, parts in seconds.items()} == pytest.approx({0: 12.0, 1: 12.0, 2: 12.0})


def test_an_asynchronous_round_that_merges_nothing_does_no_harm(tmp_path: Path) -> None:
    events = asynchronous_events()
    nothing = {"clients": [], "step_losses": [], "timeline": [], "aggregated": False, "round": 3}
    events.append(events[3] | nothing | {"virtual_start_s": 12.0, "virtual_end_s": 12.0})
    record = load_record(write_events(tmp_path, events))
    assert time_figures(record)[0].title == "Time line of rounds 1 to 3"
    assert "2 of 3" not in present(perplexity_figure(record)).note
    assert present(cuts_figure(record)).columns[-1] == "round 3"
