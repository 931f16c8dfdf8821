"""The `search` policy against brute force over the virtual clock."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from unit.cost_shapes import SHAPE, cost_model
from unit.policy_fleets import DESKTOP, KINDS, LAPTOP, PHONE, fleets, run, seen

from splitft.adapt.balance import optimum_s, tables
from splitft.adapt.schedule import round_seconds
from splitft.adapt.search import Measure, Search, best_plan
from splitft.adapt.state import Fleet
from splitft.clock import Network
from splitft.errors import ConfigError


def brute_s(costs: list[Any], profiles: list[Any]) -> float:
    measure = Measure(Fleet(tuple(costs), tuple(profiles)), 10**9)
    every = itertools.product(*(range(table.first, table.last + 1) for table in tables(costs, profiles)))
    return min(measure.seconds(cuts) for cuts in every)


def plan_s(policy: Search, costs: list[Any], profiles: list[Any]) -> float:
    cuts: Any = policy.init(SHAPE, profiles, costs)["cuts"]
    return round_seconds(costs, profiles, cuts)


@given(fleets(most=3))
@settings(max_examples=30, deadline=None)
def test_small_fleets_are_within_a_few_per_cent_of_brute_force(fleet: tuple[list[Any], list[Any]]) -> None:
    best_s = brute_s(*fleet)
    assert best_s * (1 - 1e-12) <= plan_s(Search(), *fleet) <= 1.03 * best_s


@pytest.mark.parametrize("slots", [1, 2])
def test_eight_clients_with_three_cuts_each(slots: int) -> None:
    costs = [cost_model(minimum_cut=2, maximum_cut=4, sequence_tokens=8 + i, network=Network(server_slots=slots)) for i in range(8)]
    profiles = [KINDS[client % 3] for client in range(8)]
    assert plan_s(Search(), costs, profiles) <= 1.02 * brute_s(costs, profiles)


def test_queueing_counts_and_the_balance_alone_does_not_see_it() -> None:
    """Many equal fast devices on one processor: every play is longer than the bound, and no uniform cut is better than the plan."""
    costs, profiles = [cost_model(network=Network(server_slots=1))] * 10, [DESKTOP, LAPTOP] * 5
    found_s = plan_s(Search(), costs, profiles)
    assert found_s >= optimum_s(tables(costs, profiles), 1)
    assert found_s <= min(round_seconds(costs, profiles, [cut] * 10) for cut in range(1, 7)) * (1 + 1e-12)


def test_measure_is_round_seconds_played_once() -> None:
    costs = [cost_model(sequence_tokens=8 + client, network=Network(2, True, 1e6, 1e6)) for client in range(4)]
    profiles = [PHONE, LAPTOP, DESKTOP, LAPTOP]
    measure = Measure(Fleet(tuple(costs), tuple(profiles)), 2)
    for cuts in ((1, 2, 3, 4), (6, 6, 1, 2), (1, 2, 3, 4)):
        assert measure.seconds(cuts) == round_seconds(costs, profiles, cuts)
    assert len(measure.known) == 2
    assert measure.is_spent


@pytest.mark.parametrize(("clients", "limit", "allowed"), [(100, 200, 200), (200, 200, 100), (5000, 200, 30), (5000, 7, 7)])
def test_more_clients_are_played_less_often(clients: int, limit: int, allowed: int) -> None:
    assert Measure(Fleet((cost_model(),) * clients, (LAPTOP,) * clients), limit).limit == allowed


@pytest.mark.parametrize("limit", [1, 2, 9, 40, 200])
def test_the_limit_is_kept_and_more_plays_are_never_worse(limit: int) -> None:
    costs, profiles = [cost_model(sequence_tokens=8 + client) for client in range(9)], [KINDS[client % 3] for client in range(9)]
    clients, fleet = tables(costs, profiles), Fleet(tuple(costs), tuple(profiles))
    measure, more = Measure(fleet, limit), Measure(fleet, 4 * limit)
    found, better = best_plan(measure, clients), best_plan(more, clients)
    assert len(measure.known) <= limit
    assert more.known[better] <= measure.known[found]
    assert all(table.clip(cut) == cut for table, cut in zip(clients, found, strict=True))


def test_the_plan_in_use_stays_unless_another_is_clearly_better() -> None:
    costs, profiles = [cost_model()] * 4, [LAPTOP, LAPTOP, PHONE, DESKTOP]
    clients, fleet = tables(costs, profiles), Fleet(tuple(costs), tuple(profiles))
    measure = Measure(fleet, 500)
    best = best_plan(measure, clients)
    others = sorted(measure.known, key=lambda cuts: measure.known[cuts])
    near = [cuts for cuts in others if cuts != best and measure.known[cuts] <= 1.005 * measure.known[best]]
    far = others[-1]
    assert measure.known[far] > 1.05 * measure.known[best]
    assert best_plan(Measure(fleet, 500), clients, far) != far
    assert near
    for cuts in near[:2]:
        assert best_plan(Measure(fleet, 500), clients, cuts) == cuts
    assert best_plan(Measure(fleet, 500), clients, (9, 9, 9, 9)) == best  # no longer allowed


def test_another_company_and_a_slower_device_are_planned_for_at_once() -> None:
    policy, profiles = Search(smoothing=1.0), [DESKTOP] * 4
    state = policy.init(SHAPE, profiles, [cost_model()] * 4)
    (first, _), (alone, _), (back, same), (slow, after) = run(
        policy, state, [(range(4), []), ([2], []), (range(4), []), (range(4), [seen(2, slow=10.0)])]
    )
    assert [first[client] for client in range(4)] == state["cuts"]
    assert round_seconds([cost_model()], [DESKTOP], [alone[2]]) == brute_s([cost_model()], [DESKTOP])
    assert back == first
    assert (first[2], slow[2]) == (6, 1)
    assert after["planned"]["round"] == 4
    assert policy.plan(5, range(4), [], after)[0] == slow
    assert same["planned"]["round"] == 3


def test_bad_evaluations_are_named() -> None:
    with pytest.raises(ConfigError, match=r"policy\.evaluations is 0"):
        Search(evaluations=0)
