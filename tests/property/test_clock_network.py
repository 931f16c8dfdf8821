"""What holds for every round of the virtual clock, whatever the clients share and whatever overlaps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitft.clock import SERVER_WAIT, ClientSchedule, Network, RoundTiming, Stage, Step, simulate_round

RESOURCES = ("client", "up", "down", "server")
quarters = st.integers(0, 20).map(lambda value: value / 4)
networks = st.builds(
    Network,
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from((0.5, 2.0, 7.0, math.inf)),
    st.sampled_from((0.5, 2.0, 7.0, math.inf)),
    st.sampled_from(("together", "longest_first")),
    st.booleans(),
)


@st.composite
def schedules(draw: st.DrawFn, clients: int = 5) -> list[ClientSchedule]:
    """Rounds in which every stage has a kind of its own, "exchange.stage", so that the timeline tells them apart."""
    made = []
    for number in draw(st.lists(st.integers(0, 99), min_size=1, max_size=clients, unique=True)):
        rates = {"up": draw(st.sampled_from((1.0, 3.0))), "down": draw(st.sampled_from((1.0, 5.0)))}

        def part(exchange: int, longest: int, rates: dict[str, float] = rates) -> Step:
            stages = []
            for place, name in enumerate(draw(st.lists(st.sampled_from(RESOURCES), max_size=longest))):
                amount, latency_s = draw(quarters), draw(st.sampled_from((0.0, 0.0, 0.5)))
                kind = f"{exchange}.{place}"
                if name in ("up", "down"):
                    stages.append(Stage(kind, "link", amount / rates[name], latency_s, amount, name))  # type: ignore[arg-type]
                else:
                    stages.append(Stage(kind, name, amount))  # type: ignore[arg-type]
            return tuple(stages)

        steps = [part(exchange, 6) for exchange in range(1, 1 + draw(st.integers(0, 4)))]
        made.append(ClientSchedule(number, tuple(steps), part(0, 2), part(99, 2), draw(st.integers(1, 3))))
    return made


@dataclass(frozen=True)
class Done:
    """One stage as it was played."""

    client: int
    exchange: int
    place: int
    stage: Stage
    start_s: float
    end_s: float  # when the resource is free again, latency not included


def exchanges(schedule: ClientSchedule) -> dict[int, Step]:
    return {0: schedule.before, **dict(enumerate(schedule.steps, start=1)), 99: schedule.after}


def played(timing: RoundTiming, rounds: list[ClientSchedule]) -> list[Done]:
    every = {(one.client, stage.kind): stage for one in rounds for part in exchanges(one).values() for stage in part}
    done = []
    for entry in timing.timeline:
        if (stage := every.get((entry.client, entry.kind))) is not None:
            exchange, place = map(int, entry.kind.split("."))
            done.append(Done(entry.client, exchange, place, stage, entry.start_s, entry.end_s - stage.latency_s))
    assert len(done) == len(every)
    return done


def simulated(rounds: list[ClientSchedule], network: Network) -> RoundTiming:
    return simulate_round(rounds, timeline_steps=99, network=network)


@given(schedules(), networks)
def test_stages_follow_each_other_and_steps_do_too(rounds: list[ClientSchedule], network: Network) -> None:
    timing = simulated(rounds, network)
    at = {(one.client, one.exchange, one.place): one for one in played(timing, rounds)}
    for schedule, client in zip(sorted(rounds, key=lambda one: one.client), timing.clients, strict=True):
        units: dict[int, list[Done]] = {}
        for exchange, stages in exchanges(schedule).items():
            mine = [at[schedule.client, exchange, place] for place in range(len(stages))]
            assert all(after.start_s >= before.end_s + before.stage.latency_s - 1e-9 for before, after in pairwise(mine))
            assert all(one.end_s - one.start_s >= one.stage.seconds - 1e-9 for one in mine)
            size = schedule.micro if network.pipeline else 1
            units.setdefault(-1 if exchange == 0 else 1000 if exchange == 99 else (exchange - 1) // size, []).extend(mine)
        reached_s = 0.0
        for unit in sorted(units):
            assert all(one.start_s >= reached_s - 1e-9 for one in units[unit])
            reached_s = max([reached_s, *(one.end_s + one.stage.latency_s for one in units[unit])])
        assert client.finish_s == pytest.approx(reached_s)
        assert len(client.step_ends_s) == math.ceil(len(schedule.steps) / schedule.micro)
        assert [*client.step_ends_s, client.finish_s] == sorted([0.0, *client.step_ends_s, client.finish_s])[1:]


def most_at_once(spans: list[Done]) -> int:
    """Most of these under way at one moment; touching ends do not count, nor do spans without length."""
    spans = [one for one in spans if one.end_s > one.start_s + 1e-9]
    return max(
        (sum(one.start_s <= other.start_s + 1e-9 and other.start_s < one.end_s - 1e-9 for one in spans) for other in spans), default=0
    )


def resources(done: list[Done]) -> Iterator[tuple[str, list[Done]]]:
    for client, name in itertools.product({one.client for one in done}, RESOURCES[:3]):
        own = (one for one in done if one.client == client and name in (one.stage.direction, one.stage.resource))
        yield f"{name} of {client}", list(own)


@given(schedules(), networks)
def test_no_resource_is_over_its_capacity(rounds: list[ClientSchedule], network: Network) -> None:
    done = played(simulated(rounds, network), rounds)
    assert most_at_once([one for one in done if one.stage.resource == "server"]) <= network.server_slots
    for name, own in resources(done):
        assert most_at_once(own) <= 1, name
    for direction, rate in (("up", network.uplink_bytes_per_s), ("down", network.downlink_bytes_per_s)):
        sent = [one for one in done if one.stage.direction == direction and one.stage.bytes > 0]
        if not network.shared or rate == math.inf:
            assert all(one.end_s - one.start_s == pytest.approx(one.stage.seconds) for one in sent)
            continue
        for begin, end in itertools.product(sent, sent):
            within = sum(one.stage.bytes for one in sent if one.start_s >= begin.start_s and one.end_s <= end.end_s)
            assert within <= rate * max(0.0, end.end_s - begin.start_s) + 1e-6
        if direction == "down" and network.downlink_order == "longest_first":
            assert most_at_once(sent) <= 1


@given(schedules(), networks)
def test_a_round_is_no_shorter_than_any_of_its_bounds(rounds: list[ClientSchedule], network: Network) -> None:
    duration_s = simulated(rounds, network).duration_s
    every = [stage for one in rounds for part in exchanges(one).values() for stage in part]
    assert duration_s >= math.fsum(stage.seconds for stage in every if stage.resource == "server") / network.server_slots - 1e-9
    for schedule in rounds:
        if not network.pipeline:
            assert duration_s >= schedule.alone_s() - 1e-9
        longest = [math.fsum(stage.total_s for stage in part) for part in exchanges(schedule).values()]
        assert duration_s >= max(longest) - 1e-9
    if network.shared:
        assert duration_s >= sum(stage.bytes for stage in every if stage.direction == "up") / network.uplink_bytes_per_s - 1e-9
        assert duration_s >= sum(stage.bytes for stage in every if stage.direction == "down") / network.downlink_bytes_per_s - 1e-9


@given(schedules(), networks)
def test_waiting_is_when_nothing_of_a_client_goes_on(rounds: list[ClientSchedule], network: Network) -> None:
    timing = simulated(rounds, network)
    for client in timing.clients:
        total_s = math.fsum(client.busy_s.values()) + client.server_wait_s + client.barrier_wait_s
        if network.pipeline:
            assert total_s >= timing.duration_s - 1e-9
        else:
            assert total_s == pytest.approx(timing.duration_s)
        mine = sorted((one for one in timing.timeline if one.client == client.client), key=lambda one: one.start_s)
        reached_s = 0.0
        for entry in mine:  # the timeline has no gaps, and waits overlap nothing
            assert entry.start_s <= reached_s + 1e-9
            assert entry.kind != SERVER_WAIT or entry.start_s == pytest.approx(reached_s)
            reached_s = max(reached_s, entry.end_s)
        waits_s = math.fsum(entry.end_s - entry.start_s for entry in mine if entry.kind == SERVER_WAIT)
        assert client.server_wait_s == pytest.approx(waits_s)


@given(schedules(clients=1), networks)
def test_pipelining_is_never_slower_for_one_client(rounds: list[ClientSchedule], network: Network) -> None:
    pipelined = simulated(rounds, replace(network, pipeline=True)).duration_s
    assert pipelined <= simulated(rounds, replace(network, pipeline=False)).duration_s + 1e-9


@given(schedules(), networks)
def test_pipelining_needs_more_than_one_exchange_a_step(rounds: list[ClientSchedule], network: Network) -> None:
    single = [replace(schedule, micro=1) for schedule in rounds]
    assert simulated(single, replace(network, pipeline=True)) == simulated(single, replace(network, pipeline=False))


@given(schedules(), networks)
def test_sharing_is_never_faster(rounds: list[ClientSchedule], network: Network) -> None:
    """Where nobody queues for the server: with a queue, as in any, a delayed request can let a more urgent one pass."""
    own = replace(network, shared=False, pipeline=False, server_slots=len(rounds))
    for alone, together in zip(simulated(rounds, own).clients, simulated(rounds, replace(own, shared=True)).clients, strict=True):
        assert together.finish_s >= alone.finish_s - 1e-9


@given(schedules(), networks)
def test_a_link_that_is_wide_enough_is_not_noticed(rounds: list[ClientSchedule], network: Network) -> None:
    wide = replace(network, shared=True, uplink_bytes_per_s=1e3, downlink_bytes_per_s=1e3, downlink_order="together", pipeline=False)
    slots = replace(wide, server_slots=len(rounds))  # without a queue, in which a hair's breadth could change the order
    noticed, not_shared = simulated(rounds, slots), simulated(rounds, replace(slots, shared=False))
    for one, other in zip(noticed.clients, not_shared.clients, strict=True):
        assert one.finish_s == pytest.approx(other.finish_s)


@given(schedules(), networks, st.floats(0.0, 1e6), st.randoms(use_true_random=False))
def test_neither_order_nor_start_changes_a_round(rounds: list[ClientSchedule], network: Network, start_s: float, shuffler: object) -> None:
    shuffled = list(rounds)
    shuffler.shuffle(shuffled)  # type: ignore[attr-defined]
    assert simulated(shuffled, network) == simulated(rounds, network)
    later = simulate_round(rounds, start_s, timeline_steps=99, network=network)
    assert later.duration_s == simulated(rounds, network).duration_s


@given(schedules(), st.integers(1, 3))
def test_the_default_network_is_none(rounds: list[ClientSchedule], slots: int) -> None:
    assert simulate_round(rounds, network=Network()) == simulate_round(rounds)
    assert simulate_round(rounds, server_slots=slots) == simulate_round(rounds, server_slots=7, network=Network(slots))


def best_order_s(step: Step, micro: int) -> float:
    """Shortest optimizer step over every order in which the client could compute fronts and backwards of equal exchanges."""
    front, uplink, back, downlink, backward = step
    best_s = math.inf
    for fronts in itertools.combinations(range(2 * micro), micro):
        cpu_s = up_s = server_s = down_s = 0.0
        ready: list[float] = []
        begun = 0
        for turn in range(2 * micro):
            if turn in fronts:
                cpu_s += front.seconds
                up_s = max(up_s, cpu_s) + uplink.seconds
                server_s = max(server_s, up_s + uplink.latency_s) + back.seconds
                down_s = max(down_s, server_s) + downlink.seconds
                ready.append(down_s + downlink.latency_s)
            elif begun < len(ready):
                cpu_s = max(cpu_s, ready[begun]) + backward.seconds
                begun += 1
            else:
                break
        else:
            best_s = min(best_s, cpu_s)
    return best_s


@given(st.tuples(*[quarters] * 5), quarters, st.integers(1, 4))
def test_fronts_first_is_the_best_order_for_one_client(seconds: tuple[float, ...], latency_s: float, micro: int) -> None:
    step = (
        Stage("front_forward", "client", seconds[0]),
        Stage("uplink", "link", seconds[1], latency_s, seconds[1], "up"),
        Stage("back", "server", seconds[2]),
        Stage("downlink", "link", seconds[3], latency_s, seconds[3], "down"),
        Stage("front_backward", "client", seconds[4]),
    )
    timing = simulate_round([ClientSchedule(0, (step,) * micro, micro=micro)], network=Network(pipeline=True))
    assert timing.duration_s == pytest.approx(best_order_s(step, micro))
