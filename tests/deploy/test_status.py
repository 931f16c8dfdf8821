"""What the server says of itself: right after every call, bounded however long the run, safe from every thread."""

from __future__ import annotations

import itertools
import json
import math
import threading
import tracemalloc
from collections.abc import Callable

import msgspec
import pytest

from splitft.clock import monotonic_s
from splitft.deploy.curves import MOST_POINTS, Curves
from splitft.deploy.status import MOST_EVENTS, PRESENT, SeatChanges, ServerStatus
from splitft.waits import Waits

from . import status_scenes as scenes


def test_a_run_midway_is_told_as_it_is() -> None:
    waits = Waits()
    status, metrics = scenes.running(waits=waits)
    scenes.midway(status, metrics)
    with waits.waiting("update of round 8", "st-thomas"):
        told = status.snapshot()
    assert json.loads(msgspec.json.encode(told)) == json.loads(json.dumps(told))
    assert (told["run"], told["round"], told["rounds"], told["phase"]) == ("discharge-letters", 8, 20, "running")
    assert [seat["state"] for seat in told["seats"]] == ["training", "waiting", "training", "lost"]
    assert [seat["step"] for seat in told["seats"]] == [7, 5, 9, 0]
    assert told["seats"][0]["steps_done"] == 7 * scenes.STEPS + 7
    assert told["seats"][0]["up_bytes"] == 7 * 511_000
    assert told["seats"][0]["up_total_bytes"] == (7 * scenes.STEPS + 7) * 511_000
    assert told["totals"]["tokens"] == 2048 * (4 * 7 * scenes.STEPS + 7 + 5 + 9)
    assert told["totals"]["present"] == 3
    assert 74.0 <= told["seats"][3]["seen_s"] < 90.0
    assert told["seats"][0]["seen_s"] < 10.0
    assert told["waits"][0]["what"] == "update of round 8"
    assert told["waits"][0]["peer"] == "st-thomas"
    assert told["process"]["rss_bytes"] > 1 << 20
    assert told["process"]["descriptors"] > 0


def test_curves_are_the_journal_s() -> None:
    status, _ = scenes.running(rounds_done=3)
    curves = status.snapshot()["curves"]
    assert curves["round"] == [0, 1, 2, 3]
    assert curves["perplexity"][2] == pytest.approx(scenes.evaluation_record(2)["global"]["perplexity"], rel=1e-5)
    assert curves["loss"][0] is None
    record = scenes.round_record(2)
    assert curves["loss"][2] == pytest.approx(sum(one["loss_mean"] for one in record["clients"]) / 4, rel=1e-5)
    assert curves["up_bytes"][2] == pytest.approx(sum(sum(one["bytes"]["up"].values()) for one in record["clients"]), rel=1e-5)
    assert curves["seconds"][2] == pytest.approx(record["wall_s"], rel=1e-5)


def test_loss_counts_by_what_was_predicted_and_not_for_the_lost() -> None:
    curves = Curves()
    clients = [
        {"status": "done", "loss_mean": 1.0, "targets": 300},
        {"status": "partial", "loss_mean": 3.0, "targets": 100},
        {"status": "lost", "loss_mean": 99.0, "targets": 1000},
        {"status": "done", "loss_mean": math.nan, "targets": 100},
    ]
    curves.trained({"event": "round", "round": 1, "wall_s": 1.0, "clients": clients})
    assert curves.shown()["loss"] == [1.5]


@pytest.mark.parametrize("rounds", [MOST_POINTS, MOST_POINTS + 1, 5 * MOST_POINTS + 17])
def test_long_curves_are_thinned_evenly_and_keep_both_ends(rounds: int) -> None:
    curves = Curves()
    curves.evaluated({"round": 0, "global": {"perplexity": 9.0, "loss": 2.0}})
    for number in range(1, rounds + 1):
        curves.trained({"round": number, "wall_s": float(number), "clients": []})
        curves.evaluated({"round": number, "global": {"perplexity": 1000.0 / number, "loss": 1.0}})
    shown = curves.shown()
    at = shown["round"]
    assert MOST_POINTS // 2 <= len(at) <= MOST_POINTS + 1
    assert at[0] == 0
    assert at[-1] == rounds
    gaps = {right - left for left, right in itertools.pairwise(at[:-1])}
    assert len(gaps) == 1
    assert shown["seconds"][1:] == [float(f"{number:.6g}") for number in at[1:]]


def test_ten_thousand_events_and_steps_take_no_more_memory_than_a_few() -> None:
    status = ServerStatus("run", 10)

    def busy(count: int) -> None:
        for index in range(count):
            status.event("info", f"event {index} " + "x" * 5000, index % 5)
            status.step_done(index % 5, index, count, 100, 0.1, loss=2.0)
            status.stage(f"stage {index}")

    tracemalloc.start()
    try:
        busy(1000)
        before, _ = tracemalloc.get_traced_memory()
        busy(10_000)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 50_000
    events = status.snapshot()["events"]
    assert len(events) == MOST_EVENTS
    assert events[-1]["text"].startswith("event 9999 ")


def test_the_same_event_again_is_counted() -> None:
    status = ServerStatus("run", 1)
    for _ in range(10_000):
        status.event("warning", "refused", 2)
    status.event("warning", "refused", 3)
    assert [(one["seat"], one["times"]) for one in status.snapshot()["events"]] == [(2, 10_000), (3, 1)]


def test_names_and_texts_of_clients_lose_their_teeth() -> None:
    status = ServerStatus("run\x1b[31m", 1)
    status.seat(0, name="evil\n\x1b[2J" + "x" * 10_000)
    status.event("info", "two\nlines\u202e", 0)
    told = status.snapshot()
    for text in (told["run"], told["seats"][0]["name"], told["events"][0]["text"]):
        assert text.isprintable()
        assert len(text) <= 300


def test_a_figure_that_is_not_finite_is_missing() -> None:
    status = ServerStatus("run", 1)
    status.seat(0, loss=math.nan, wait_s=math.inf, tokens_per_s=math.nan)
    status.round_done({"event": "evaluation", "round": 0, "global": {"loss": math.inf, "perplexity": None}, "clients": []})
    told = status.snapshot()
    json.dumps(told, allow_nan=False)
    assert told["seats"][0]["loss"] is None
    assert told["seats"][0]["losses"] == []


def test_progress_and_what_is_left() -> None:
    status = ServerStatus("run", 4)
    assert status.snapshot()["progress"] == 0.0
    assert status.snapshot()["remaining_s"] is None
    status.begin_phase("running")
    status.round_begins(1)
    status.step_done(0, 5, 10, 1, 0.1)
    assert status.snapshot()["progress"] == pytest.approx(0.125)
    status.round_done({"event": "round", "round": 1, "wall_s": 8.0, "clients": []})
    assert status.snapshot()["progress"] == pytest.approx(0.25)
    assert status.snapshot()["remaining_s"] == pytest.approx(24.0)
    status.begin_phase("finished")
    assert status.snapshot()["progress"] == 1.0
    assert not status.ready


def test_a_round_that_is_begun_again_counts_its_bytes_once_each() -> None:
    status = ServerStatus("run", 4)
    for _ in range(2):
        status.round_begins(1)
        status.traffic(0, up_bytes=10, down_bytes=20)
    seat = status.snapshot()["seats"][0]
    assert (seat["up_bytes"], seat["up_total_bytes"], seat["down_total_bytes"]) == (10, 20, 40)


def test_the_probe_is_asked_at_every_look() -> None:
    silence = iter([3.0, 9.0])

    def probe() -> dict[int, SeatChanges]:
        return {1: {"silent_s": next(silence), "reconnects": 4}}

    status = ServerStatus("run", 1, probe=probe)
    assert status.snapshot()["seats"][0]["seen_s"] == pytest.approx(3.0, abs=0.5)
    seat = status.snapshot()["seats"][0]
    assert seat["seen_s"] == pytest.approx(9.0, abs=0.5)
    assert seat["reconnects"] == 4


def test_states_are_counted() -> None:
    status, metrics = scenes.running()
    scenes.midway(status, metrics)
    counts = status.states()
    assert (counts["training"], counts["waiting"], counts["lost"], counts["absent"]) == (2, 1, 1, 0)
    assert sum(counts[state] for state in PRESENT) == sum(status.present().values()) == 3


@pytest.mark.timeout(60)
def test_threads_lose_nothing() -> None:
    status = ServerStatus("run", 1)
    errors: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            for _ in range(2000):
                work()
        except BaseException as problem:
            errors.append(problem)

    works: list[Callable[[], object]] = [lambda: status.step_done(0, 1, 2, 10, 0.1, loss=1.0), lambda: status.traffic(0, 1, 1)] * 3
    works.append(lambda: status.event("info", "something"))
    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for _ in range(50):
        status.snapshot()
    for thread in threads:
        thread.join()
    assert errors == []
    seat = status.snapshot()["seats"][0]
    assert (seat["steps_done"], seat["tokens"], seat["up_bytes"]) == (6000, 60_000, 6000)


def test_a_step_costs_microseconds() -> None:
    status = ServerStatus("run", 1)
    begun_s = monotonic_s()
    for step in range(5000):
        status.traffic(0, 1000, 1000)
        status.step_done(0, step, 5000, 100, 0.1, loss=2.0, wait_s=0.1)
    assert (monotonic_s() - begun_s) / 5000 < 200e-6
