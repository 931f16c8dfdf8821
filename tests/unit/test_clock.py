"""The virtual clock on rounds small enough to work out by hand."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from splitft.clock import (
    BARRIER_WAIT,
    SERVER_WAIT,
    ClientSchedule,
    RoundTiming,
    Stage,
    TimelineEntry,
    monotonic_s,
    simulate_round,
    utc_now,
)
from splitft.errors import ConfigError


def step(client_s: float = 1.0, link_s: float = 0.5, server_s: float = 2.0, latency_s: float = 0.0) -> tuple[Stage, ...]:
    return (
        Stage("front_forward", "client", client_s),
        Stage("uplink", "link", link_s, latency_s),
        Stage("back", "server", server_s),
        Stage("downlink", "link", link_s, latency_s),
        Stage("front_backward", "client", client_s),
    )


def finishes(timing: RoundTiming) -> dict[int, float]:
    return {client.client: client.finish_s for client in timing.clients}


def test_one_client_is_the_sum_of_its_stages() -> None:
    schedule = ClientSchedule(
        3, (step(latency_s=0.25),) * 4, (Stage("adapters_down", "link", 3.0),), (Stage("adapters_up", "link", 7.0, 1.0),)
    )
    timing = simulate_round([schedule], start_s=100.0)
    assert timing.duration_s == schedule.alone_s() == 3.0 + 4 * (1 + 0.75 + 2 + 0.75 + 1) + 8.0
    assert timing.end_s == timing.clients[0].finish_s == 100.0 + timing.duration_s
    assert timing.clients[0].server_wait_s == timing.clients[0].barrier_wait_s == 0.0
    assert timing.clients[0].busy_s == {
        "adapters_down": 3.0,
        "front_forward": 4.0,
        "uplink": 3.0,
        "back": 8.0,
        "downlink": 3.0,
        "front_backward": 4.0,
        "adapters_up": 8.0,
    }
    assert timing.server_busy_s == 8.0


def test_server_queue_is_first_come_first_served_with_ties_by_client() -> None:
    # Both reach the server at 1.5; client 1 is served 1.5..3.5, client 2 3.5..5.5; each needs 1.5 more.
    timing = simulate_round([ClientSchedule(2, (step(),)), ClientSchedule(1, (step(),))])
    assert finishes(timing) == {1: 5.0, 2: 7.0}
    assert [client.server_wait_s for client in timing.clients] == [0.0, 2.0]
    assert [client.barrier_wait_s for client in timing.clients] == [2.0, 0.0]
    assert timing.duration_s == 7.0


def test_an_earlier_arrival_goes_first_whatever_its_number() -> None:
    late, early = ClientSchedule(0, (step(client_s=1.1),)), ClientSchedule(9, (step(client_s=1.0),))
    waits = {client.client: client.server_wait_s for client in simulate_round([late, early]).clients}
    assert waits[9] == 0.0
    assert waits[0] == pytest.approx(1.9)


def test_two_slots_serve_two_clients_at_once() -> None:
    schedules = [ClientSchedule(client, (step(),)) for client in range(3)]
    assert finishes(simulate_round(schedules, server_slots=2)) == {0: 5.0, 1: 5.0, 2: 7.0}
    assert finishes(simulate_round(schedules, server_slots=3)) == {0: 5.0, 1: 5.0, 2: 5.0}


def test_u_shaped_step_visits_the_server_twice() -> None:
    kinds = (
        "front_forward",
        "uplink",
        "back",
        "downlink",
        "exit",
        "uplink_gradient",
        "back_backward",
        "downlink_gradient",
        "front_backward",
    )
    stages = tuple(Stage(kind, "server" if kind.startswith("back") else "link" if "link" in kind else "client", 1.0) for kind in kinds)
    timing = simulate_round([ClientSchedule(0, (stages,)), ClientSchedule(1, (stages,))])
    # Client 1 queues one second behind client 0 at the first visit and finds the server free at the second.
    assert finishes(timing) == {0: 9.0, 1: 10.0}
    assert timing.clients[1].server_wait_s == 1.0


def test_timeline_shows_first_and_last_step_and_who_waited() -> None:
    schedules = [ClientSchedule(client, (step(),) * 3) for client in (0, 1)]
    timing = simulate_round(schedules, start_s=10.0, timeline_steps=1)
    mine = [entry for entry in timing.timeline if entry.client == 0]
    assert [entry.kind for entry in mine].count("back") == 2
    assert mine[0] == TimelineEntry(0, "front_forward", 10.0, 11.0)
    other = [entry for entry in timing.timeline if entry.client == 1]
    assert TimelineEntry(1, SERVER_WAIT, 11.5, 13.5) in other
    assert mine[-1] == TimelineEntry(0, BARRIER_WAIT, timing.clients[0].finish_s, timing.end_s)
    whole = simulate_round(schedules, timeline_steps=3)
    assert [entry.kind for entry in whole.timeline if entry.client == 1].count("back") == 3
    assert simulate_round(schedules, timeline_steps=0).timeline == (TimelineEntry(0, BARRIER_WAIT, 15.0, 17.0),)


def test_steps_may_differ() -> None:
    schedule = ClientSchedule(0, (step(server_s=1.0), step(server_s=5.0)))
    assert simulate_round([schedule]).duration_s == schedule.alone_s() == 12.0


def test_round_without_clients_takes_no_time() -> None:
    assert simulate_round([], start_s=4.0) == RoundTiming(4.0, 0.0, (), (), 0.0)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_impossible_durations_are_refused_by_name(seconds: float) -> None:
    with pytest.raises(ConfigError, match=r"stage 'uplink' would take"):
        Stage("uplink", "link", seconds)
    with pytest.raises(ConfigError, match=r"stage 'uplink' would take"):
        Stage("uplink", "link", 1.0, latency_s=seconds)


def test_server_without_slots_is_refused() -> None:
    with pytest.raises(ConfigError, match="server_slots is 0"):
        simulate_round([], server_slots=0)


def test_a_client_appears_once() -> None:
    with pytest.raises(AssertionError, match="twice"):
        simulate_round([ClientSchedule(1, ()), ClientSchedule(1, ())])


def test_a_thousand_clients_are_simulated_quickly() -> None:
    schedules = [ClientSchedule(client, (step(server_s=0.001),) * 50) for client in range(1000)]
    before_s = monotonic_s()
    timing = simulate_round(schedules)
    assert monotonic_s() - before_s < 5.0  # about 0.1 s on one core; the bound only catches a change of complexity
    assert len(timing.clients) == 1000


def test_real_clocks() -> None:
    assert monotonic_s() <= monotonic_s()
    moment = datetime.fromisoformat(utc_now())
    assert moment.utcoffset() == timedelta(0)
    assert moment.microsecond == 0
