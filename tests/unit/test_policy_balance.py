"""The balance of a round against every combination of cuts; the windows; the slowness of devices."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.cost_shapes import DEVICE, SERVER, cost_model
from unit.policy_fleets import DESKTOP, LAPTOP, PHONE, fleets, holding, seen

from splitft.adapt.balance import Table, Window, measured_slowness, optimum_s, tables, windows
from splitft.adapt.schedule import step_seconds
from splitft.adapt.state import slowed
from splitft.errors import ResourceError


def needs_s(clients: tuple[Table, ...], cuts: tuple[int, ...], slots: int) -> float:
    """The objective, written as the page defines it."""
    alone_s = max(table.alone_s[cut - table.first] for table, cut in zip(clients, cuts, strict=True))
    return max(alone_s, math.fsum(table.server_s[cut - table.first] for table, cut in zip(clients, cuts, strict=True)) / slots)


def every_choice(clients: tuple[Table, ...]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(table.first, table.first + len(table.alone_s)) for table in clients)))


# Any numbers at all, as long as deeper cuts leave the server less: own times need not rise or fall.
RANDOM_TABLES = st.lists(
    st.tuples(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), min_size=1, max_size=4), st.integers(1, 3)).map(
        lambda drawn: Table(
            drawn[1],
            tuple(float(own) for own, _ in drawn[0]),
            tuple(float(sum(less for _, less in drawn[0][index:])) for index in range(len(drawn[0]))),
        )
    ),
    min_size=1,
    max_size=4,
).map(tuple)


@given(RANDOM_TABLES, st.integers(1, 3))
def test_the_optimum_is_that_of_every_combination(clients: tuple[Table, ...], slots: int) -> None:
    assert optimum_s(clients, slots) == pytest.approx(min(needs_s(clients, cuts, slots) for cuts in every_choice(clients)), rel=1e-12)


@given(fleets(), st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=4, max_size=4))
@settings(max_examples=40, deadline=None)
def test_the_optimum_of_real_fleets_is_that_of_every_combination(fleet: tuple[list, list], factors: list[float]) -> None:  # type: ignore[type-arg]
    costs, profiles = fleet
    clients = tables(costs, profiles, factors[: len(costs)])
    slots = costs[0].network.server_slots
    assert optimum_s(clients, slots) == pytest.approx(min(needs_s(clients, cuts, slots) for cuts in every_choice(clients)), rel=1e-12)


@given(RANDOM_TABLES, st.integers(1, 3), st.sampled_from([0.0, 0.2, 1.0]))
def test_any_choice_from_the_windows_keeps_the_limit(clients: tuple[Table, ...], slots: int, slack: float) -> None:
    limit_s = (1 + slack) * optimum_s(clients, slots)
    spans = windows(clients, limit_s, slots)
    for cuts in itertools.product(*(range(span.shallowest, span.deepest + 1) for span in spans)):
        assert needs_s(clients, cuts, slots) <= limit_s * (1 + 1e-12)


@given(RANDOM_TABLES, st.integers(1, 3))
def test_no_deeper_cut_than_the_window_s_keeps_the_limit(clients: tuple[Table, ...], slots: int) -> None:
    limit_s = 1.2 * optimum_s(clients, slots)
    for table, span in zip(clients, windows(clients, limit_s, slots), strict=True):
        deeper = range(span.deepest + 1, table.first + len(table.alone_s))
        assert all(table.alone_at(cut) > limit_s for cut in deeper)


def test_a_table_is_what_the_cost_model_says_and_slowness_spares_the_server() -> None:
    model = cost_model(local_steps=10**9)  # so that the share of the adapters' transfers vanishes
    plain, slow = tables([model] * 2, [PHONE] * 2, [1.0, 3.0])
    for cut in range(1, 7):
        step = step_seconds(model.cost(model.plan(cut)), PHONE, SERVER)
        assert plain.alone_at(cut) == pytest.approx(step.total_s)
        assert slow.alone_at(cut) == pytest.approx(3 * (step.client_s + step.link_s) + step.server_s)
        assert plain.server_at(cut) == slow.server_at(cut) == step.server_s
        slower = step_seconds(model.cost(model.plan(cut)), slowed(PHONE, 3.0), SERVER)
        assert slow.alone_at(cut) == pytest.approx(slower.total_s)


def test_tables_stop_at_the_memory_and_at_the_bounds() -> None:
    model = cost_model(minimum_cut=2, maximum_cut=5)
    assert [(table.first, table.last) for table in tables([model] * 2, [holding(3), DEVICE])] == [(2, 3), (2, 5)]
    with pytest.raises(ResourceError, match="'device-1'"):
        tables([model], [holding(1)])


def test_slow_processors_go_shallow_and_fast_ones_relieve_the_server() -> None:
    wide = [replace(profile, uplink_bytes_per_s=1e9, downlink_bytes_per_s=1e9, latency_s=0.0) for profile in (PHONE, LAPTOP, DESKTOP)]
    clients = tables([cost_model()] * 3, wide)
    phone, laptop, desktop = windows(clients, 1.1 * optimum_s(clients), 1)
    assert phone == Window(1, 1)
    assert phone.deepest < laptop.deepest <= desktop.deepest == 6


def test_of_two_islands_in_reach_the_window_is_the_deep_one() -> None:
    island = Table(1, (1.0, 9.0, 2.0, 2.0), (3.0, 2.0, 1.0, 0.0))
    assert windows((island,), 2.5) == (Window(3, 4),)
    assert windows((island,), 0.5) == (Window(1, 1),)  # nothing is in reach: the fastest
    assert windows((), 1.0) == ()
    assert optimum_s(()) == 0.0


def test_a_thousand_clients_balance_quickly_and_exactly() -> None:
    """400 distinct tables: the bisection must not try combinations. The bound is the value of its own answer."""
    clients = tuple(
        Table(1, tuple(1 + 0.01 * (i % 400) + 0.1 * cut for cut in range(12)), tuple(0.01 * (12 - cut) for cut in range(12)))
        for i in range(1000)
    )
    best_s = optimum_s(clients, 4)
    spans = windows(clients, best_s, 4)
    assert needs_s(clients, tuple(span.deepest for span in spans), 4) <= best_s * (1 + 1e-12)
    assert needs_s(clients, tuple(table.last for table in clients), 4) >= best_s


def test_slowness_is_found_again_whatever_part_the_server_has() -> None:
    """The device takes 3 times as long for its own part, the server does not: the factor found is 3, not the ratio of the whole."""
    model = cost_model(local_steps=10**9)
    for cut in (1, 6):
        step = step_seconds(model.cost(model.plan(cut)), DESKTOP, SERVER)
        ratio = (3 * (step.client_s + step.link_s) + step.server_s) / step.total_s
        assert ratio < 3
        found = measured_slowness([1.0], [seen(0, slow=ratio)], [cut], [model], [DESKTOP], 1.0)
        assert found == pytest.approx([3.0])
        assert measured_slowness([1.0], [seen(0, slow=ratio)], [cut], [model], [DESKTOP], 0.25) == pytest.approx([1.5])


@pytest.mark.parametrize("busy_s", [0.0, -1.0, math.inf, math.nan])
def test_figures_that_are_none_change_nothing(busy_s: float) -> None:
    odd = [replace(seen(0, slow=1.0), busy_s=busy_s), seen(7, slow=2.0)]
    assert measured_slowness([1.5], odd, [2], [cost_model()], [DEVICE], 0.5) == [1.5]


def test_a_stalled_device_is_bounded() -> None:
    assert measured_slowness([1.0], [seen(0, slow=1e9)], [2], [cost_model()], [DEVICE], 1.0) == [100.0]
    assert measured_slowness([1.0], [seen(0, slow=1e-9)], [2], [cost_model()], [DEVICE], 1.0) == pytest.approx([0.01])
