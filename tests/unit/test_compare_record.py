"""Figures of a comparison: what counts as reached, what a spread is, what is never claimed."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitft.apps.compare_plan import PlannedRun, Variant
from splitft.apps.compare_record import Spread, build_comparison, choose_target, figures_of, ratio, spread_of, to_json, verdict
from splitft.config import RunConfig

from .compare_journals import ended, figures, variant, write_journal


def planned(*names: str) -> tuple[Variant, ...]:
    return (Variant("v", "v", (), tuple(PlannedRun(name, "v", seed, RunConfig()) for seed, name in enumerate(names))),)


def test_sums_over_rounds_clients_and_directions(tmp_path: Path) -> None:
    write_journal(tmp_path / "a", rounds=3, evaluated=(0, 2))
    (found,) = figures_of(planned("a"), tmp_path, {})
    (run,) = found.runs
    assert run.status == "finished"
    assert [point.round for point in run.points] == [0, 2]
    two = run.points[1]
    assert (two.bytes_up, two.bytes_down, two.bytes_both) == (10 * (1 + 2) + 20 * (1 + 2), 20.0, 110.0)
    assert two.client_compute_s == 2 * 2 * 2.0  # links and server do not count
    assert (two.virtual_s, two.tokens, two.perplexity) == (8.0, 128, 48.0)
    assert (run.total.round, run.total.virtual_s, run.total.bytes_up) == (3, 12.0, 180.0)  # the last round was not evaluated
    assert (run.start, run.best, run.held_out_tokens, run.wall_s) == (50.0, 48.0, 77, 0.75)


def test_what_became_of_a_run(tmp_path: Path) -> None:
    write_journal(tmp_path / "a")
    write_journal(tmp_path / "b", finished=False)
    write_journal(tmp_path / "d", finished=False)
    write_journal(tmp_path / "e").write_text("{}\nnot json\n{}\n")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "journal.jsonl").write_text("")
    (found,) = figures_of(planned("a", "b", "c", "d", "e", "f"), tmp_path, {"d": "Boom: it broke", "c": "No: never began"})
    assert [run.status for run in found.runs] == ["finished", "unfinished", "failed", "failed", "failed", "not run"]
    assert found.runs[2].error == "No: never began"
    assert "line 1" in found.runs[4].error
    assert found.final is not None
    assert found.final.runs == 1  # nothing but what finished


def test_reached_exactly_between_evaluations_never_and_before_training() -> None:
    run = figures({0: 100.0, 2: 60.0, 4: 40.0, 6: 45.0})
    assert run.reached(60.0) is not None
    assert run.reached(60.0) == run.points[1]
    between = run.reached(50.0)
    assert between is not None
    assert (between.round, between.virtual_s, between.bytes_both) == (4, 40.0, 1600.0)  # the evaluation that shows it, nothing in between
    assert run.reached(39.9) is None
    start = run.reached(100.0)
    assert start is not None
    assert (start.round, start.virtual_s) == (0, 0.0)
    assert figures({0: None, 1: None}).reached(1e9) is None
    assert figures({}).reached(1e9) is None
    assert figures({0: 9.0, 1: 8.0, 2: 7.0, 3: 20.0}).best == 7.0
    assert figures({0: 9.0, 1: 12.0}).best == 12.0  # before training does not count as a result


@given(st.dictionaries(st.integers(0, 50), st.floats(1.0, 1e6), min_size=1, max_size=12), st.floats(1.0, 1e6))
def test_a_target_is_reached_at_a_measured_point_or_not_at_all(values: dict[int, float], target: float) -> None:
    point = figures(values).reached(target)
    below = [number for number, value in values.items() if value <= target]
    assert (point.round if point else None) == min(below, default=None) or math.isclose(min(values.values()), target, rel_tol=1e-8)
    if point is not None:
        assert point.perplexity == values[point.round]


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9))
def test_spread_is_the_sample_standard_deviation(values: list[float]) -> None:
    found = spread_of(values)
    assert found is not None
    assert found.deviation == pytest.approx(statistics.stdev(values))
    assert (found.low, found.high, found.runs) == (min(values), max(values), len(values))


def test_one_run_has_no_spread() -> None:
    assert spread_of([4.0]) == Spread(4.0, None, 4.0, 4.0, 1)
    assert spread_of([None, math.nan, math.inf]) is None
    assert spread_of([]) is None


def test_the_target_is_the_worst_mean_among_those_that_improved() -> None:
    good, better, worse = ended("good", [60, 64]), ended("better", [40, 44]), ended("worse", [120, 180])
    target = choose_target([better, good, worse], None)
    assert target.perplexity == 62.0
    assert "good" in target.rule
    assert choose_target([worse], None).perplexity is None
    assert choose_target([better], 33.0) == (33.0, "as given")
    assert choose_target([variant("none")], None).perplexity is None
    assert len(good.hits(62.0)) == 1
    assert not good.always_reached(62.0)
    assert better.always_reached(62.0)
    assert not variant("none").always_reached(62.0)
    assert not better.always_reached(None)


def test_equal_runs_reach_their_own_mean() -> None:
    third = ended("same", [0.1 + 0.2 + 40, 40.3, 40.3, 40.3])
    target = choose_target([third], None).perplexity
    assert target is not None
    assert len(third.hits(target)) == 4


def test_no_claim_from_few_seeds_and_none_where_ranges_overlap() -> None:
    base = ended("base", [50, 51, 52])
    assert verdict(base, base) == "baseline"
    assert verdict(ended("a", [40, 41]), base) == "fewer than 3 seeds, no claim"
    assert verdict(ended("a", [40, 41, 49.9]), base) == "lower, ranges apart"
    assert verdict(ended("a", [60, 61, 52.1]), base) == "higher, ranges apart"
    assert verdict(ended("a", [49, 51, 51]), base) == "ranges overlap; lower on 2 of 3 seeds"
    assert verdict(variant("a"), base) == "nothing to compare"
    failed = variant("a", *(figures({0: 100.0, 1: 40.0}, seed, "a", "failed") for seed in range(3)))
    assert verdict(failed, base) == "nothing to compare"


def test_notes_warn_of_what_cannot_be_compared() -> None:
    three = ended("three", [50, 51, 52])
    assert build_comparison("c", [three, ended("other", [40, 41, 42])], None, "").notes == ()
    assert any("same held-out" in note for note in build_comparison("c", [three, ended("other", [40, 41, 42], start=110)], None, "").notes)
    assert any("differences may be chance" in note for note in build_comparison("c", [ended("one", [50])], None, "").notes)
    assert any("different seeds" in note for note in build_comparison("c", [three, ended("two", [40, 41])], None, "").notes)
    assert any("before training" in note for note in build_comparison("c", [three], 200.0, "").notes)


def test_curves_hold_only_rounds_that_all_finished_runs_have() -> None:
    one, two = figures({0: 9.0, 1: 8.0, 2: 7.0}, 0), figures({0: 9.0, 1: None, 2: 6.0, 3: 5.0}, 1)
    late = figures({0: 9.0, 3: 1.0}, 2, status="unfinished")
    assert [[point.round for point in group] for group in variant("v", one, two, late).curve()] == [[0, 0], [2, 2]]
    assert variant("v").curve() == ()


def test_json_has_every_figure_and_ratio_needs_both() -> None:
    base, fast = ended("base", [50, 51, 52]), ended("fast", [40, 41, 42], seconds=5.0)
    facts = to_json(build_comparison("c", [base, fast, variant("none", figures({}, status="not run"))], None, "fast"))
    assert json.loads(json.dumps(facts, allow_nan=False)) == json.loads(json.dumps(facts))
    assert facts["baseline"] == "fast"
    by_name = {item["name"]: item for item in facts["variants"]}
    assert by_name["fast"]["to_target"]["virtual_s"]["mean"] == 10.0
    assert by_name["base"]["target_reached_by"] == 2
    assert by_name["none"]["perplexity_final"] is None
    assert by_name["base"]["runs"][0]["points"][2]["bytes_up"] == 600.0
    assert ratio(Spread(2.0, None, 2.0, 2.0, 1), Spread(4.0, None, 4.0, 4.0, 1)) == 0.5
    assert ratio(None, Spread(4.0, None, 4.0, 4.0, 1)) is None
    assert ratio(Spread(2.0, None, 2.0, 2.0, 1), Spread(0.0, None, 0.0, 0.0, 1)) is None
