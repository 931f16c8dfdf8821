"""What holds for every round of the virtual clock."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitft.clock import RESOURCES, ClientSchedule, Stage, simulate_round

seconds = st.floats(0.0, 100.0, allow_nan=False)
stages = st.builds(Stage, st.sampled_from(("front_forward", "uplink", "back")), st.sampled_from(RESOURCES), seconds, seconds)
parts = st.lists(stages, max_size=4).map(tuple)


@st.composite
def rounds(draw: st.DrawFn) -> list[ClientSchedule]:
    numbers = draw(st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True))
    return [ClientSchedule(number, draw(st.lists(parts, max_size=4).map(tuple)), draw(parts), draw(parts)) for number in numbers]


def server_work_s(schedule: ClientSchedule) -> float:
    every = [stage for part in (schedule.before, *schedule.steps, schedule.after) for stage in part]
    return sum(stage.seconds for stage in every if stage.resource == "server")


@given(rounds(), st.integers(1, 3), st.floats(0.0, 1e6, allow_nan=False))
def test_time_never_goes_back(schedules: list[ClientSchedule], slots: int, start_s: float) -> None:
    timing = simulate_round(schedules, start_s, slots, timeline_steps=99)
    for client in timing.clients:
        entries = [entry for entry in timing.timeline if entry.client == client.client]
        assert all(start_s <= entry.start_s <= entry.end_s <= timing.end_s for entry in entries)
        assert all(earlier.end_s == later.start_s for earlier, later in pairwise(entries))
        assert start_s <= client.finish_s <= timing.end_s


@given(rounds(), st.integers(1, 3))
def test_every_second_is_accounted_for(schedules: list[ClientSchedule], slots: int) -> None:
    timing = simulate_round(schedules, server_slots=slots)
    for client in timing.clients:
        total_s = sum(client.busy_s.values()) + client.server_wait_s + client.barrier_wait_s
        assert total_s == pytest.approx(timing.duration_s, abs=1e-6)
    assert timing.server_busy_s == pytest.approx(sum(map(server_work_s, schedules)), abs=1e-6)


@given(rounds(), st.integers(1, 3))
def test_duration_lies_between_its_bounds(schedules: list[ClientSchedule], slots: int) -> None:
    duration_s = simulate_round(schedules, server_slots=slots).duration_s
    slowest_alone_s = max(schedule.alone_s() for schedule in schedules)
    work_s = sum(map(server_work_s, schedules))
    assert duration_s >= slowest_alone_s - 1e-6
    assert duration_s >= work_s / slots - 1e-6
    assert duration_s <= slowest_alone_s + work_s + 1e-6


@given(rounds())
def test_with_a_slot_for_everyone_nobody_queues(schedules: list[ClientSchedule]) -> None:
    timing = simulate_round(schedules, server_slots=len(schedules))
    alone_s = {schedule.client: schedule.alone_s() for schedule in schedules}
    for client in timing.clients:
        assert client.server_wait_s == 0.0
        assert client.finish_s == pytest.approx(alone_s[client.client], abs=1e-6)


@given(rounds(), st.integers(1, 3), st.floats(0.0, 1e9, allow_nan=False), st.randoms(use_true_random=False))
def test_neither_order_nor_start_changes_a_round(schedules: list[ClientSchedule], slots: int, start_s: float, shuffler: object) -> None:
    shuffled = list(schedules)
    shuffler.shuffle(shuffled)  # type: ignore[attr-defined]
    first, second = simulate_round(schedules, 0.0, slots), simulate_round(shuffled, start_s, slots)
    assert second.duration_s == first.duration_s
    assert [client.barrier_wait_s for client in second.clients] == [client.barrier_wait_s for client in first.clients]
