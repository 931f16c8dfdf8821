"""Each figure shows what the journal says: its numbers, its words, and nothing where there is nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from report_journals import STAGES, Journal, write_events

from splitft.apps.plot_cells import shade
from splitft.apps.plot_clients import bucket_names, client_figures, lengths_figure
from splitft.apps.plot_cuts import cuts_figure
from splitft.apps.plot_learning import learning_figures, perplexity_figure, round_loss_figure, step_loss_figure
from splitft.apps.plot_stages import GROUPS, client_seconds, group_of
from splitft.apps.plot_time import shares_figure, time_figures
from splitft.apps.plot_traffic import cost_curve_figure, traffic_figure, traffic_figures
from splitft.apps.plots import Figure
from splitft.apps.report_record import RunRecord, load_record
from splitft.clock import BLOCKS_DOWN, WHOLE_STEP


def record_of(journal: Journal, folder: Path) -> RunRecord:
    return load_record(journal.write(folder))


def present(figure: Figure | None) -> Figure:
    assert figure is not None
    assert all(len(row) == len(figure.columns) for row in figure.rows)
    return figure


def test_lines_up_to_twelve_clients_then_bands(tmp_path: Path) -> None:
    few = present(perplexity_figure(record_of(Journal(clients=12, rounds=2), tmp_path / "few")))
    many = present(perplexity_figure(record_of(Journal(clients=13, rounds=2), tmp_path / "many")))
    assert len(few.legend) == 13
    assert 'class="band' not in few.svg
    assert [entry.label for entry in many.legend] == ["global", "median of 13 clients", "10th to 90th percentile", "full range"]
    assert len(many.columns) == 2 + 13


def test_one_client_is_not_drawn_over_the_global_line(tmp_path: Path) -> None:
    record = record_of(Journal(clients=1, rounds=2), tmp_path)
    assert [entry.label for entry in present(perplexity_figure(record)).legend] == ["global"]


def test_a_single_number_makes_no_loss_figure_and_its_pair_is_wide(tmp_path: Path) -> None:
    record = record_of(Journal(clients=1, rounds=1), tmp_path)
    assert round_loss_figure(record) is None
    assert [(figure.key, figure.wide) for figure in learning_figures(record)] == [("perplexity", True), ("step-loss", True)]


def test_the_note_compares_before_and_after(tmp_path: Path) -> None:
    record = record_of(Journal(rounds=3), tmp_path)
    note = present(perplexity_figure(record)).note
    assert note.startswith("Global perplexity fell from 35.6 to")
    assert "Largest gain client-0" in note


def test_a_run_that_got_worse_says_so(tmp_path: Path) -> None:
    events = Journal(clients=1, rounds=3).events()
    for event in events:
        if event["event"] == "evaluation":
            event["global"]["perplexity"] = 10.0 + event["round"]
    record = load_record(write_events(tmp_path, events))
    assert "rose from 10.0 to 13.0" in present(perplexity_figure(record)).note
    assert "did not lower" in present(cost_curve_figure(record)).note


def test_very_different_perplexities_get_a_log_axis(tmp_path: Path) -> None:
    events = Journal(clients=1, rounds=2).events()
    events[1]["global"]["perplexity"] = 50000.0
    assert "log scale" in present(perplexity_figure(load_record(write_events(tmp_path, events)))).svg


def test_many_steps_are_condensed_and_said_so(tmp_path: Path) -> None:
    figure = present(step_loss_figure(record_of(Journal(clients=1, rounds=5, steps=300), tmp_path)))
    assert "mean of 4 steps" in figure.note
    assert len(figure.svg) < 40_000


def test_traffic_rows_sum_to_the_journal(tmp_path: Path) -> None:
    record = record_of(Journal(rounds=2), tmp_path)
    figure = present(traffic_figure(record))
    assert len(figure.rows) == 2
    assert [entry.label for entry in figure.legend] == ["activations", "gradients", "labels", "adapters", "control"]
    assert "round 1, up, activations: 9.83 MB" in figure.svg
    assert "50 % of it uplink" in figure.note


def test_long_runs_average_their_bars(tmp_path: Path) -> None:
    figure = present(traffic_figure(record_of(Journal(clients=1, rounds=130, steps=1), tmp_path)))
    assert "mean of 2 rounds" in figure.note
    assert len(figure.rows) == 130


def test_no_evaluation_leaves_the_bytes_alone_and_wide(tmp_path: Path) -> None:
    events = [event for event in Journal(rounds=2).events() if event["event"] != "evaluation"]
    record = load_record(write_events(tmp_path, events))
    assert perplexity_figure(record) is None
    assert [(figure.key, figure.wide) for figure in traffic_figures(record)] == [("traffic", True)]


def test_the_cost_curve_adds_bytes_up(tmp_path: Path) -> None:
    record = record_of(Journal(rounds=3), tmp_path)
    figure = present(cost_curve_figure(record))
    assert [row[0] for row in figure.rows] == ["0", "1", "2", "3"]
    assert figure.rows[0][1] == "0 B"
    assert figure.note.startswith("Nine tenths of the gain")


def test_the_time_line_names_the_slowest(tmp_path: Path) -> None:
    record = record_of(Journal(rounds=2), tmp_path)
    whole, steps, shares = time_figures(record)
    slowest = min(record.rounds[-1].clients, key=lambda client: client.barrier_wait_s).client
    assert whole.note.startswith(f"client-{slowest} finished last")
    assert whole.svg.count("last to finish") == 1
    assert whole.svg.count(">waited ") == 4
    assert whole.svg.count(">7 more steps<") == 5
    assert (whole.title, steps.title) == ("Time line of round 2", "First steps of round 2")
    assert [entry.css for entry in whole.legend][-3:] == ["g-queue", "g-barrier", "gap"]
    assert shares.key == "shares"


def test_every_stage_kind_has_a_group_and_new_ones_count_as_other() -> None:
    kinds = (
        *STAGES,
        "exit",
        "uplink_gradient",
        "back_backward",
        "downlink_gradient",
        "adapters_up",
        "adapters_down",
        "server_wait",
        "barrier_wait",
        BLOCKS_DOWN,
        WHOLE_STEP,
        "away",
    )
    assert "other" not in {group_of(kind) for kind in kinds}
    assert group_of("teleport") == "other"
    assert {group_of(kind) for kind in kinds} | {"other"} == set(GROUPS)


@pytest.mark.parametrize("busy", [True, False])
def test_shares_account_for_the_whole_round(tmp_path: Path, busy: bool) -> None:
    record = record_of(Journal(rounds=2, busy=busy), tmp_path)
    for parts in client_seconds(record).values():
        assert sum(parts.values()) == pytest.approx(record.virtual_s)


def test_shares_estimated_from_drawn_steps_are_close_to_the_exact_ones(tmp_path: Path) -> None:
    exact = client_seconds(record_of(Journal(rounds=1, busy=True), tmp_path / "exact"))
    guess = client_seconds(record_of(Journal(rounds=1), tmp_path / "guess"))
    for client, parts in exact.items():
        for group, seconds in parts.items():
            assert guess[client][group] == pytest.approx(seconds, rel=0.1, abs=0.3)


def test_without_a_time_line_work_is_not_divided(tmp_path: Path) -> None:
    events = Journal(rounds=1).events()
    events[2]["timeline"] = []
    record = load_record(write_events(tmp_path, events))
    assert [figure.key for figure in time_figures(record)] == ["shares"]
    assert "client, link and server" in [entry.label for entry in present(shares_figure(record)).legend]


def test_a_crowd_is_thinned_but_keeps_the_slowest(tmp_path: Path) -> None:
    record = record_of(Journal(clients=60, rounds=1, drawn_steps=1), tmp_path)
    whole = time_figures(record)[0]
    slowest = min(record.rounds[-1].clients, key=lambda client: client.barrier_wait_s).client
    assert "40 of 60 clients are drawn" in whole.note
    assert f">client-{slowest}<" in whole.svg
    assert len(whole.rows) == 60


def test_the_grid_shows_every_cut_and_absence(tmp_path: Path) -> None:
    record = record_of(Journal(clients=6, rounds=4, participation=0.5), tmp_path)
    figure = present(cuts_figure(record))
    taken = sum(len(item.clients) for item in record.rounds)
    clients = {client.client for item in record.rounds for client in item.clients}
    assert len(re.findall(r": cut \d+<", figure.svg)) == taken
    assert figure.svg.count("no part") == len(clients) * 4 - taken
    assert "An empty cell" in figure.note


def test_moves_are_counted(tmp_path: Path) -> None:
    assert "; 2 cut moves." in present(cuts_figure(record_of(Journal(rounds=5), tmp_path / "a"))).note
    assert "; no cut moved." in present(cuts_figure(record_of(Journal(rounds=2), tmp_path / "b"))).note


def test_beyond_sixty_clients_cuts_are_counted(tmp_path: Path) -> None:
    figure = present(cuts_figure(record_of(Journal(clients=64, rounds=2), tmp_path)))
    assert "The number in a cell counts clients." in figure.note
    assert "round 1, cut 1: 16 clients" in figure.svg
    assert "counts clients" not in present(cuts_figure(record_of(Journal(clients=60, rounds=2), tmp_path / "sixty"))).note


def test_lengths_are_shares_of_each_client(tmp_path: Path) -> None:
    record = record_of(Journal(clients=3), tmp_path)
    figure = present(lengths_figure(record))
    assert figure.columns[1:3] == ("0–64", "64–128")
    assert [row[0] for row in figure.rows] == ["client-0", "client-1", "client-2", "all clients"]
    assert "Skew index: 0.31" in figure.note


@pytest.mark.parametrize(
    ("edges", "names"),
    [
        ([0, 10, 20], ["0–10", "10–20"]),
        ([10], ["< 10", "≥ 10"]),
        ([], ["bucket 1", "bucket 2"]),
        ([1, 2, 3, 4, 5], ["bucket 1", "bucket 2"]),
    ],
)
def test_bucket_names(edges: list[float], names: list[str]) -> None:
    assert bucket_names(edges, 2) == names


def test_small_client_figures_stand_side_by_side(tmp_path: Path) -> None:
    assert [figure.wide for figure in client_figures(record_of(Journal(), tmp_path / "a"))] == [False, False]
    assert [figure.wide for figure in client_figures(record_of(Journal(rounds=20), tmp_path / "b"))] == [True, True]


def test_the_ramp_covers_its_range() -> None:
    assert [shade(value, 1, 4) for value in (1, 2, 3, 4)] == [0, 2, 4, 6]
    assert shade(3, 3, 3) == 3
