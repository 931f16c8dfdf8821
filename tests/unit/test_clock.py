"""The virtual clock on rounds small enough to work out by hand."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from splitft.clock import (
    BARRIER_WAIT,
    SERVER_WAIT,
    STEP_KINDS,
    U_SHAPED_STEP_KINDS,
    ClientSchedule,
    Network,
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


def u_shaped_step() -> tuple[Stage, ...]:
    """One second a stage."""

    def stage(kind: str) -> Stage:
        return Stage(kind, "server" if kind.startswith("back") else "link" if "link" in kind else "client", 1.0)

    return tuple(map(stage, U_SHAPED_STEP_KINDS))


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
    timing = simulate_round([ClientSchedule(0, (u_shaped_step(),)), ClientSchedule(1, (u_shaped_step(),))])
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"server_slots": 0}, "server_slots is 0"),
        ({"uplink_bytes_per_s": 0.0}, r"server's uplink_bytes_per_s is 0\.0"),
        ({"downlink_bytes_per_s": float("nan")}, "server's downlink_bytes_per_s is nan"),
        ({"downlink_order": "shortest_first"}, "downlink_order is 'shortest_first'"),
    ],
)
def test_impossible_networks_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Network(**fields)


def test_impossible_schedules_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="0 exchanges would form a step"):
        ClientSchedule(0, (), micro=0)
    with pytest.raises(ConfigError, match=r"stage 'uplink' would move -1\.0 bytes"):
        Stage("uplink", "link", 1.0, bytes=-1.0)


def test_a_client_appears_once() -> None:
    with pytest.raises(AssertionError, match="twice"):
        simulate_round([ClientSchedule(1, ()), ClientSchedule(1, ())])


@pytest.mark.parametrize(
    "network",
    [
        None,
        Network(pipeline=True),
        Network(shared=True, uplink_bytes_per_s=300.0, downlink_bytes_per_s=300.0),
        Network(shared=True, uplink_bytes_per_s=3.0, downlink_bytes_per_s=300.0, downlink_order="longest_first"),
    ],
    ids=["own links", "pipeline", "shared", "longest first"],
)
def test_a_thousand_clients_are_simulated_quickly(network: Network | None) -> None:
    schedules = [ClientSchedule(client, (transfers(1.0 + client / 1000, 0.5),) * 20, micro=4) for client in range(1000)]
    before_s = monotonic_s()
    timing = simulate_round(schedules, network=network)
    assert monotonic_s() - before_s < 10.0  # well below 1 s on one core; the bound only catches a change of complexity
    assert len(timing.clients) == 1000


# --- optimizer steps, shared links, pipelining


def transfers(front_s: float, backward_s: float, up_bytes: float = 1.0, down_bytes: float = 1.0, own: float = 1.0) -> tuple[Stage, ...]:
    """A step that takes the server no time; the client's link moves `own` bytes a second each way."""
    return (
        Stage("front_forward", "client", front_s),
        Stage("uplink", "link", up_bytes / own, 0.0, up_bytes, "up"),
        Stage("back", "server", 0.0),
        Stage("downlink", "link", down_bytes / own, 0.0, down_bytes, "down"),
        Stage("front_backward", "client", backward_s),
    )


def test_a_step_ends_with_its_last_exchange() -> None:
    schedule = ClientSchedule(0, (step(),) * 5, (Stage("adapters_down", "link", 1.0),), (Stage("adapters_up", "link", 1.0),), micro=2)
    for network in (None, Network(shared=True)):
        assert simulate_round([schedule], 100.0, network=network).clients[0].step_ends_s == (111.0, 121.0, 126.0)
    assert simulate_round([ClientSchedule(0, ())]).clients[0].step_ends_s == ()


def test_a_shared_uplink_is_divided_and_its_slowness_counts_as_busy() -> None:
    # Both could send 4 bytes a second and share 4: the first has sent 4 bytes when the second begins, then they get 2 each.
    schedules = [ClientSchedule(0, (transfers(1.0, 0.0, 8.0, 0.0, 4.0),)), ClientSchedule(1, (transfers(2.0, 0.0, 4.0, 0.0, 4.0),))]
    assert finishes(simulate_round(schedules)) == {0: 3.0, 1: 3.0}
    timing = simulate_round(schedules, network=Network(shared=True, uplink_bytes_per_s=4.0))
    assert finishes(timing) == {0: 4.0, 1: 4.0}
    assert [client.busy_s["uplink"] for client in timing.clients] == [3.0, 2.0]
    assert [client.server_wait_s for client in timing.clients] == [0.0, 0.0]
    assert finishes(simulate_round(schedules, network=Network(shared=True, downlink_bytes_per_s=4.0))) == {0: 3.0, 1: 3.0}


def test_longest_work_first_shortens_the_round() -> None:
    # Two gradients of 10 bytes over a downlink of 10 bytes a second; then client 0 computes 1 s, client 1 computes 4 s.
    schedules = [ClientSchedule(client, (transfers(0.0, seconds, 0.0, 10.0, 10.0),)) for client, seconds in ((0, 1.0), (1, 4.0))]
    together, serial = (
        simulate_round(schedules, network=Network(2, shared=True, downlink_bytes_per_s=10.0, downlink_order=order))  # type: ignore[arg-type]
        for order in ("together", "longest_first")
    )
    assert finishes(together) == {0: 3.0, 1: 6.0}  # both arrive after 2 s
    assert finishes(serial) == {0: 3.0, 1: 5.0}  # client 1 has its gradient after 1 s, client 0 after 2 s
    assert [client.server_wait_s for client in serial.clients] == [1.0, 0.0]
    assert TimelineEntry(0, SERVER_WAIT, 0.0, 1.0) in serial.timeline


def test_remaining_work_counts_the_steps_to_come() -> None:
    # Client 0 has the longer backward now, client 1 three more steps.
    schedules = [ClientSchedule(0, (transfers(0.0, 2.0),)), ClientSchedule(1, (transfers(0.0, 1.0),) * 4)]
    network = Network(2, shared=True, downlink_bytes_per_s=1.0, downlink_order="longest_first")
    waits = {client.client: client.server_wait_s for client in simulate_round(schedules, network=network).clients}
    assert waits == {0: 1.0, 1: 0.0}


def test_remaining_work_begins_behind_the_transfer() -> None:
    # Client 0 waits for 5 s of transfer and then computes 1 s, client 1 for 1 s and then 4 s: the other order would take 10 s.
    schedules = [ClientSchedule(0, (transfers(0.0, 1.0, 0.0, 5.0),)), ClientSchedule(1, (transfers(0.0, 4.0, 0.0, 1.0),))]
    network = Network(2, shared=True, downlink_bytes_per_s=1.0, downlink_order="longest_first")
    assert finishes(simulate_round(schedules, network=network)) == {0: 7.0, 1: 5.0}


def test_one_transfer_at_a_time_wastes_a_link_faster_than_the_clients() -> None:
    schedules = [ClientSchedule(client, (transfers(0.0, 0.0, 0.0, 1.0),)) for client in range(4)]
    spans = [
        simulate_round(schedules, network=Network(4, shared=True, downlink_bytes_per_s=4.0, downlink_order=order)).duration_s  # type: ignore[arg-type]
        for order in ("together", "longest_first")
    ]
    assert spans == [1.0, 4.0]


def test_pipelined_exchanges_overlap_but_steps_do_not() -> None:
    one_second = [replace(stage, seconds=1.0) for stage in transfers(1.0, 1.0)]
    schedule = ClientSchedule(0, (tuple(one_second),) * 8, micro=4)
    timing = simulate_round([schedule], network=Network(pipeline=True))
    # Fronts 0..4, transfers and server one second behind each other, backwards 4..8: the processor never rests.
    assert timing.clients[0].step_ends_s == (8.0, 16.0)
    assert timing.clients[0].busy_s == dict.fromkeys(STEP_KINDS, 8.0)
    assert timing.clients[0].server_wait_s == 0.0
    assert schedule.alone_s() == simulate_round([schedule]).duration_s == 40.0
    backs = [entry[2:] for entry in timing.timeline if entry.kind == "back"]
    assert backs == [(start, start + 1.0) for start in (2.0, 3.0, 4.0, 5.0, 10.0, 11.0, 12.0, 13.0)]


def test_pipelined_waits_are_when_nothing_goes_on() -> None:
    slow = Stage("back", "server", 10.0)
    timing = simulate_round([ClientSchedule(0, ((slow,),)), ClientSchedule(1, (step(),) * 2, micro=2)], network=Network(pipeline=True))
    # Fronts 0..2, uplinks 1..1.5 and 2..2.5, then the server is taken until 10; it serves 10..12 and 12..14.
    assert timing.clients[1].server_wait_s == 7.5
    assert TimelineEntry(1, SERVER_WAIT, 2.5, 10.0) in timing.timeline
    assert timing.clients[1].finish_s == 15.5


def test_pipelined_u_shape() -> None:
    timing = simulate_round([ClientSchedule(0, (u_shaped_step(),) * 2, micro=2)], network=Network(pipeline=True))
    # The second exchange follows one second behind the first; the processor is free whenever one of them wants it.
    assert timing.duration_s == 10.0


def test_a_pipelining_client_has_one_link_each_way() -> None:
    half_duplex = [replace(stage, direction="") for stage in transfers(0.0, 0.0, 2.0, 2.0)]
    timing = simulate_round([ClientSchedule(0, (tuple(half_duplex),) * 3, micro=3)], network=Network(pipeline=True))
    assert timing.duration_s == 12.0
    schedule = ClientSchedule(0, (transfers(0.0, 0.0, 2.0, 2.0),) * 3, micro=3)
    for network in (Network(pipeline=True), Network(pipeline=True, shared=True, uplink_bytes_per_s=9.0, downlink_bytes_per_s=9.0)):
        assert simulate_round([schedule], network=network).duration_s == pytest.approx(8.0)  # up 0..6, down 2..8


def test_real_clocks() -> None:
    assert monotonic_s() <= monotonic_s()
    moment = datetime.fromisoformat(utc_now())
    assert moment.utcoffset() == timedelta(0)
    assert moment.microsecond == 0
