"""The clock of one server set for all: everybody waits for everybody, or takes turns."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitft.clock import ClientSchedule, RoundTiming, Stage, simulate_round
from splitft.lockstep import simulate_in_turn, simulate_together

SECONDS = st.floats(0.0, 5.0)


@st.composite
def schedules(draw: st.DrawFn) -> list[ClientSchedule]:
    made = []
    u_shaped = draw(st.booleans())
    for client in range(draw(st.integers(1, 4))):
        kinds = [("front", "client"), ("up", "link"), ("back", "server"), ("down", "link"), ("end", "client")]
        if u_shaped:
            kinds += [("up2", "link"), ("back2", "server"), ("down2", "link")]
        step = tuple(Stage(kind, resource, draw(SECONDS), 0.1 if resource == "link" else 0.0) for kind, resource in kinds)  # type: ignore[arg-type]
        around = (Stage("adapters", "link", draw(SECONDS)),)
        made.append(ClientSchedule(client, (step,) * draw(st.integers(1, 3)), around, around))
    return made


def play(clients: list[ClientSchedule], order: list[int] | None) -> RoundTiming:
    return simulate_together(clients, 3.0, timeline_steps=9) if order is None else simulate_in_turn(clients, order, 3.0, 9)


@given(clients=schedules(), turns=st.booleans(), data=st.data())
@settings(max_examples=150)
def test_time_adds_up_and_never_goes_back(clients: list[ClientSchedule], turns: bool, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(clients)))) if turns else None
    found = play(clients, order)
    longest = max(schedule.alone_s() for schedule in clients)
    assert found.duration_s >= longest * (1 - 1e-9)
    for timed, schedule in zip(found.clients, clients, strict=True):
        assert sum(timed.busy_s.values()) == pytest.approx(schedule.alone_s())
        whole = sum(timed.busy_s.values()) + timed.server_wait_s + timed.barrier_wait_s
        assert whole == pytest.approx(found.duration_s)
        assert list(timed.step_ends_s) == sorted(timed.step_ends_s)
        assert len(timed.step_ends_s) == len(schedule.steps)
        spans = [entry for entry in found.timeline if entry.client == timed.client]
        assert all(one.end_s <= other.start_s + 1e-9 for one, other in itertools.pairwise(spans))
        assert all(entry.start_s <= entry.end_s and entry.start_s >= 3.0 for entry in spans)
    assert simulate_together(clients[::-1], 3.0, timeline_steps=9) == simulate_together(clients, 3.0, timeline_steps=9)


@given(clients=schedules())
def test_one_client_alone_is_an_ordinary_round(clients: list[ClientSchedule]) -> None:
    usual = simulate_round(clients[:1], 3.0)
    for found in (simulate_together(clients[:1], 3.0), simulate_in_turn(clients[:1], [0], 3.0)):
        assert found.duration_s == pytest.approx(usual.duration_s)
        assert found.clients[0].step_ends_s == pytest.approx(usual.clients[0].step_ends_s)


@given(clients=schedules())
def test_in_turn_takes_the_sum(clients: list[ClientSchedule]) -> None:
    order = [schedule.client for schedule in clients][::-1]
    assert simulate_in_turn(clients, order).duration_s == pytest.approx(math.fsum(schedule.alone_s() for schedule in clients))


def test_a_hand_worked_company() -> None:
    """Two clients, the server takes 1 s for each. Arrivals 2 and 5: the pass runs from 5 to 7 for both. Then 1 s and 4 s at home."""

    def client(number: int, front: float, end: float, steps: int) -> ClientSchedule:
        step = (Stage("front", "client", front), Stage("back", "server", 1.0), Stage("end", "client", end))
        return ClientSchedule(number, (step,) * steps)

    found = simulate_together([client(0, 2.0, 1.0, 2), client(1, 5.0, 4.0, 1)])
    fast, slow = found.clients
    assert slow.finish_s == 7.0 + 4.0
    assert fast.step_ends_s == (8.0, 8.0 + 2.0 + 1.0 + 1.0)  # the second step it takes alone
    assert (slow.server_wait_s, fast.server_wait_s) == (1.0, 4.0)
    assert found.server_busy_s == 3.0
    assert simulate_together([client(0, 2.0, 1.0, 1), client(1, 5.0, 4.0, 1)], server_slots=2).clients[1].finish_s == 6.0 + 4.0
