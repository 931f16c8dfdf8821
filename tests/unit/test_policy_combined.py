"""The `combined` policy: quality inside the time it may cost, by the virtual clock."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from unit.cost_shapes import SHAPE, cost_model
from unit.policy_fleets import DESKTOP, KINDS, LAPTOP, PHONE, holding, run, seen

from splitft.adapt.combined import Combined
from splitft.adapt.schedule import round_seconds
from splitft.adapt.search import Search
from splitft.adapt.state import Fleet
from splitft.clock import Network
from splitft.errors import ConfigError

QUICK: dict[str, Any] = {"averaging": 1.0, "cool_down": 0, "dead_band": 0.0}
FLEET = [KINDS[client % 3] for client in range(6)]


def models(clients: int = 6, slots: int = 1, **fields: object) -> list[Any]:
    return [cost_model(network=Network(server_slots=slots), **fields) for _ in range(clients)]


def constant(round_index: int, gains: list[float]) -> list[Any]:
    return [seen(client, round_index, gain=gain, slow=1.0) for client, gain in enumerate(gains)]


def rounds_of(gains: list[float], rounds: int) -> list[tuple[Any, Any]]:
    return [(range(len(gains)), constant(index, gains) if index else []) for index in range(rounds)]


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("slack", [0.0, 0.05, 0.3])
def test_quality_never_costs_more_than_the_slack(slots: int, slack: float) -> None:
    """A strong preference, every combination of who is best, and the clock of every round."""
    costs = models(slots=slots)
    best: Any = Search().init(SHAPE, FLEET, costs)["cuts"]
    limit_s = (1 + slack) * round_seconds(costs, FLEET, best) * (1 + 1e-6)
    for gains in ([0.1, 0.3, 0.5, 0.7, 0.9, 1.1], [1.1, 0.9, 0.7, 0.5, 0.3, 0.1], [0.9, 0.1, 0.9, 0.1, 0.9, 0.1]):
        policy = Combined(slack=slack, gamma=2.0, **QUICK)
        for cuts, _ in run(policy, policy.init(SHAPE, FLEET, costs), rounds_of(gains, 12)):
            assert round_seconds(costs, FLEET, [cuts[client] for client in range(6)]) <= limit_s


def test_without_the_check_the_same_preference_would_cost_more() -> None:
    """So the test above can fail: with a wide slack the moves the narrow one refuses are made."""
    costs, gains = models(), [1.1, 0.9, 0.7, 0.5, 0.3, 0.1]

    def slowest_s(slack: float) -> float:
        policy = Combined(slack=slack, gamma=2.0, **QUICK)
        answers = run(policy, policy.init(SHAPE, FLEET, costs), rounds_of(gains, 12))
        return max(round_seconds(costs, FLEET, [cuts[client] for client in range(6)]) for cuts, _ in answers)

    assert slowest_s(5.0) > 1.5 * slowest_s(0.05)


def test_the_move_that_costs_most_is_undone_and_the_other_kept() -> None:
    """A busy server; the clients with the shortest and the longest rows both learn worse, and a block back is dear for long rows only."""
    profiles = [replace(DESKTOP, flops_per_s=1e12, uplink_bytes_per_s=1e9, downlink_bytes_per_s=1e9, latency_s=0.0)] * 8
    costs = [cost_model(sequence_tokens=rows, maximum_cut=3) for rows in (8, 8, 8, 8, 8, 8, 8, 32)]
    policy = Combined(slack=0.05, gamma=5.0, **QUICK)
    state: Any = policy.init(SHAPE, profiles, costs)
    assert state["cuts"] == [3] * 8
    assert state["bounds"][7] == [1, 3]  # alone it could
    (_, _), (cuts, _) = run(policy, state, rounds_of([0.1, *[0.8] * 3, *[0.9] * 3, 0.1], 2))
    assert [cuts[client] for client in range(8)] == [2, 3, 3, 3, 3, 3, 3, 3]


def test_better_goes_deeper_and_worse_shallower_when_time_allows() -> None:
    costs = models(4, slots=4, minimum_cut=2, maximum_cut=5)
    profiles = [DESKTOP] * 4
    policy = Combined(slack=3.0, gamma=1.0, **QUICK)
    state = policy.init(SHAPE, profiles, costs)
    *_, (cuts, _) = run(policy, state, rounds_of([0.1, 0.5, 0.5, 0.9], 12))
    start: Any = state["cuts"]
    assert cuts[1] == start[1]
    assert cuts[0] == 2
    assert cuts[3] == 5


def test_without_gamma_it_is_search_a_block_at_a_time() -> None:
    policy, search = Combined(gamma=0.0), Search()
    costs = models()
    state, plain = policy.init(SHAPE, FLEET, costs), search.init(SHAPE, FLEET, costs)
    slow = [(range(6), [seen(1, index, gain=0.1 * index, slow=6.0)] if index else []) for index in range(14)]
    ours, theirs = run(policy, state, slow), run(search, plain, slow)
    assert state["cuts"] == plain["cuts"]
    assert ours[-1][0] == theirs[-1][0]
    for (before, _), (after, _) in pairwise(ours):
        assert all(abs(after[client] - before[client]) <= 1 for client in after)


def test_a_slower_device_brings_the_cuts_back_into_the_new_limit() -> None:
    policy = Combined(slack=0.1, gamma=2.0, smoothing=1.0, **QUICK)
    costs, gains = models(slots=6), [0.1, 0.2, 0.9, 0.3, 0.4, 1.0]
    profiles = [DESKTOP] * 6
    answers = run(policy, policy.init(SHAPE, profiles, costs), rounds_of(gains, 6))
    slow = [(range(6), [seen(client, 6, gain=gains[client], slow=8.0 if client == 5 else 1.0) for client in range(6)])]
    _, state = run(policy, answers[-1][1], slow, first=7)[-1]
    after = run(policy, state, [(range(6), [])] * 8, first=8)
    factors = after[-1][1]["slowness"]
    assert factors[5] > 8.0
    slower = Fleet(tuple(costs), tuple(profiles)).slower(factors)
    best: Any = Search().init(SHAPE, slower.profiles, costs)["cuts"]
    cuts = after[-1][0]
    assert round_seconds(costs, slower.profiles, [cuts[client] for client in range(6)]) <= 1.1 * 1.01 * round_seconds(
        costs, slower.profiles, best
    )


def test_another_company_is_measured_by_itself() -> None:
    """Without the phones the round may not stay as long as it was with them, and newcomers begin where the fastest plan has them."""
    costs, profiles = models(4), [PHONE, PHONE, DESKTOP, DESKTOP]
    policy = Combined()
    state = policy.init(SHAPE, profiles, costs)
    answers = run(policy, state, [([2, 3], [])] + [([2, 3], [])] * 6)
    first, last = answers[0][0], answers[-1][0]
    best: Any = Search().init(SHAPE, profiles[2:], costs[2:])["cuts"]
    assert [first[2], first[3]] == best
    assert first == last
    assert answers[-1][1]["cuts"][:2] == state["cuts"][:2]


def test_bounds_of_memory_and_configuration() -> None:
    costs = models(4, slots=4, minimum_cut=2, maximum_cut=5)
    profiles = [holding(3, DESKTOP), DESKTOP, DESKTOP, LAPTOP]
    policy = Combined(slack=50.0, gamma=5.0, **QUICK)
    answers = run(policy, policy.init(SHAPE, profiles, costs), rounds_of([0.9, 0.1, 0.8, 0.2], 10))
    assert max(cuts[0] for cuts, _ in answers) == 3
    assert {cut for cuts, _ in answers for cut in cuts.values()} <= {2, 3, 4, 5}


@pytest.mark.parametrize(("field", "value"), [("slack", -1), ("evaluations", 0), ("gamma", "x"), ("smoothing", 2), ("cool_down", -1)])
def test_bad_fields_are_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"policy\.{field} is {value!r}"):
        Combined(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("slack", [0.0, 0.25, 5.0])
def test_the_shallowest_plan_is_as_shallow_as_the_slack_allows(slack: float) -> None:
    costs = models(slots=1)
    fastest: Any = Search().init(SHAPE, FLEET, costs)["cuts"]
    cuts: Any = Combined(slack=slack, prefer="shallowest").init(SHAPE, FLEET, costs)["cuts"]
    limit_s = (1 + slack) * round_seconds(costs, FLEET, fastest) * (1 + 1e-6)
    assert all(cut <= quick for cut, quick in zip(cuts, fastest, strict=True))
    assert round_seconds(costs, FLEET, cuts) <= limit_s
    lower = [min(cut, max(cuts) - 1) for cut in fastest]
    assert max(cuts) == 1 or round_seconds(costs, FLEET, lower) > limit_s
    if slack == 5.0:
        assert max(cuts) < max(fastest), "the fleet leaves nothing to choose: the test proves nothing"


def test_an_unknown_preference_is_named() -> None:
    with pytest.raises(ConfigError, match=r"policy\.prefer is 'deep'"):
        Combined(prefer="deep")
