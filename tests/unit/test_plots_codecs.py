"""The figures of the codecs show the journal's numbers, and nothing where there is nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from splitft.apps.plot_codecs import codec_figures, control_figure, place_figure, similarity_figure, stage_figure
from splitft.apps.plot_traffic import cost_curve_figure
from splitft.apps.plots import Figure
from splitft.apps.report_page import render_page
from splitft.apps.report_record import RunRecord, load_record

from .codec_journals import Journal, coded_events, write_events


def record_of(folder: Path, events: list[dict[str, Any]]) -> RunRecord:
    return load_record(write_events(folder, events))


def present(figure: Figure | None) -> Figure:
    assert figure is not None
    assert figure.note
    assert figure.legend
    assert all(len(row) == len(figure.columns) for row in figure.rows)
    return figure


def test_a_journal_without_codecs_has_none_of_the_figures(tmp_path: Path) -> None:
    assert codec_figures(load_record(Journal().write(tmp_path))) == []


def test_every_figure_in_order(tmp_path: Path) -> None:
    figures = codec_figures(record_of(tmp_path, coded_events()))
    keys = ["codec-stages", "skipped", "residual", "cut-error", "similarity-up-activations", "codec-control"]
    assert [present(figure).key for figure in figures] == keys


def test_stages_are_stacked_to_their_bytes(tmp_path: Path) -> None:
    figure = present(stage_figure(record_of(tmp_path, coded_events(rounds=2))))
    assert figure.columns == ("round", "codes", "scales", "flags", "headers", "sent", "of 16 bit")
    assert figure.rows[0] == ("1", "2.10 kB", "654 B", "54 B", "192 B", "2.70 kB", "26 %")
    # Heights are proportional to bytes: codes to scales as 2100 to 654.
    heights = {name: float(height) for height, name in re.findall(r'height="([\d.]+)"><title>round 1, ([a-z ]+):', figure.svg)}
    assert heights["codes"] / heights["scales"] == pytest.approx(2100 / 654, rel=1e-3)
    assert "22 % of the same packets as 16-bit values" in figure.note
    assert "the lossless stage took 10 % off" in figure.note
    assert figure.legend[-1].label == "sent, after the lossless stage"


def test_without_a_lossless_stage_nothing_is_said_of_one(tmp_path: Path) -> None:
    events = coded_events(rounds=2)
    for event in events:
        for part in event["clients"] if event["event"] == "round" else ():
            del part["codec"]["down gradients"]
    figure = present(stage_figure(record_of(tmp_path, events)))
    assert "lossless" not in figure.note + figure.legend[-1].label
    assert "line bold ink" not in figure.svg


def test_many_stages_and_many_rounds_are_condensed_and_said_so(tmp_path: Path) -> None:
    events = coded_events(clients=1, rounds=130)
    for event in events:
        for part in event["clients"] if event["event"] == "round" else ():
            part["codec"] = {"up activations": {"bytes": 360.0, **{f"stage_s{index}_bytes": 10.0 * index for index in range(1, 9)}}}
    figure = present(stage_figure(record_of(tmp_path, events)))
    assert figure.columns == ("round", "s8", "s7", "s6", "s5", "s4", "other stages", "sent", "of 16 bit")
    assert figure.rows[0][6] == "60 B"
    assert "mean of 2 rounds" in figure.note
    assert len(figure.rows) == 130


def test_lines_by_place_leave_out_places_and_rounds_that_do_not_know(tmp_path: Path) -> None:
    record = record_of(tmp_path, coded_events(rounds=4))
    figures = {figure.key: figure for figure in codec_figures(record)}
    assert figures["skipped"].columns == ("round", "up activations", "down gradients")
    assert figures["skipped"].rows[3] == ("4", "40 %", "0 %")
    assert figures["residual"].columns == ("round", "up activations")
    assert [row[1] for row in figures["residual"].rows] == ["\N{EM DASH}", "25 %", "17 %", "12 %"]
    assert figures["cut-error"].rows[0] == ("1", "10 %", "20 %")
    assert (
        figures["cut-error"].note == "Up activations 10 % over the run, 10 % in round 4; down gradients 20 % over the run, 20 % in round 4."
    )
    assert place_figure(record, "x", "X", "x", lambda sums: sums.ratio("no", "such")) is None


def test_similarity_in_thirds_only_where_there_are_enough_rounds(tmp_path: Path) -> None:
    long = present(similarity_figure(record_of(tmp_path / "long", coded_events(rounds=10)), "up activations"))
    short = present(similarity_figure(record_of(tmp_path / "short", coded_events(rounds=3)), "up activations"))
    assert long.columns == ("similarity", "first third", "middle third", "last third")
    assert short.columns == ("similarity", "all rounds")
    # Rounds 2 and 3 of three clients: 20 of one each, four more of 5 in bins 15 to 18, and 60 + 90 in the last.
    assert short.rows[0] == ("0.00 to 0.05", "6")
    assert short.rows[19] == ("0.95 to 1.00", f"{3 * (2 + 60 + 90)}")
    total = 3 * (2 * 20 + 2 * 4 * 5 + 150)
    assert short.note.startswith(f"{total} samples were compared; {3 * (2 + 150 + 12) / total:.0%}".replace("%", " %"))
    assert similarity_figure(record_of(tmp_path / "none", coded_events(rounds=3)), "up adapters") is None


def test_dial_and_probe_with_the_excess_and_the_budget(tmp_path: Path) -> None:
    figure = present(control_figure(record_of(tmp_path, coded_events(rounds=4))))
    assert figure.columns == ("round", "clean loss", "coded loss", "excess", "dial activations", "dial gradients")
    assert figure.rows[0] == ("1", "2.9000", "2.9870", "+3.00 %", "2.000", "1.000")
    assert "largest excess was +3.00 %, in round 1" in figure.note
    assert "The budget of 1.0 % was kept in 2 of 4 probes." in figure.note
    assert "The dial of activations ran from 1.00 to 2.00, at last 1.00. The dial of gradients stayed at 1.00." in figure.note
    assert figure.svg.count("<g transform") == 3


def test_the_budget_may_stand_in_the_configuration_alone(tmp_path: Path) -> None:
    events = coded_events(rounds=4)
    for event in events:
        event.pop("controller", None)
    assert "budget" not in present(control_figure(record_of(tmp_path / "none", events))).note
    events[0]["config"]["controller"] = {"name": "bang_bang", "budget": 0.02}
    assert "The budget of 2.0 % was kept in 3 of 4 probes." in present(control_figure(record_of(tmp_path / "some", events))).note


def test_a_dial_that_never_moved_and_no_probe_are_no_figure(tmp_path: Path) -> None:
    events = coded_events(rounds=3, controlled=False)
    for event in events:
        if event["event"] == "round":
            event["dial"] = {"activations": 1.0, "gradients": 1.0}
    assert control_figure(record_of(tmp_path / "still", events)) is None
    events[-2]["dial"] = {"activations": 1.0, "gradients": 1.0}
    for event in events:
        if event["event"] == "round":
            event["probe"] = {"clean_loss": 2.0, "coded_loss": 1.99, "bytes": 1.0}
    figure = present(control_figure(record_of(tmp_path / "probed", events)))
    assert "0.50 % below the one without" in figure.note
    assert figure.svg.count("<g transform") == 2
    assert figure.rows[0][3] == "\N{MINUS SIGN}0.50 %"


@pytest.mark.parametrize(("clients", "rounds"), [(1, 1), (1, 2), (3, 9), (1, 130)])
def test_no_mark_leaves_its_drawing(clients: int, rounds: int, tmp_path: Path) -> None:
    for figure in codec_figures(record_of(tmp_path, coded_events(clients, rounds))):
        root = ElementTree.fromstring(figure.svg)
        width, height = (float(part) for part in root.attrib["viewBox"].split()[2:])
        for mark in root.iter():
            if mark.tag == "path":
                places = [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", mark.attrib["d"])]
            elif mark.tag in ("rect", "text"):
                places = [(float(mark.attrib["x"]), float(mark.attrib["y"]))]
            else:
                continue
            assert all(0 <= x <= width and 0 <= y <= height + 1 for x, y in places)


def test_no_word_of_the_journal_becomes_markup(tmp_path: Path) -> None:
    events, evil = coded_events(rounds=3), '"><script>alert(1)</script>'
    for event in events:
        if event["event"] == "round":
            event["dial"][evil] = 2.0
            event["probe"][evil] = 2.0
            for part in event["clients"]:
                part["codec"][evil] = {**part["codec"]["up activations"], f"stage_{evil}_bytes": 5.0}
    page = render_page(record_of(tmp_path, events))
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_what_the_bytes_bought_says_the_share_of_16_bit(tmp_path: Path) -> None:
    coded = present(cost_curve_figure(record_of(tmp_path / "coded", coded_events())))
    plain = present(cost_curve_figure(load_record(Journal().write(tmp_path / "plain"))))
    assert "of what they would be with 16-bit values" in coded.note
    assert "16-bit" not in plain.note
