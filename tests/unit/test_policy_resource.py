"""The `resource` policy: which end of the window, measured slowness, one block at a time."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from unit.cost_shapes import DEVICE, SHAPE, cost_model
from unit.policy_fleets import DESKTOP, KINDS, LAPTOP, PHONE, holding, run, seen

from splitft.adapt.balance import optimum_s, tables, windows
from splitft.adapt.resource import Resource
from splitft.clock import Network
from splitft.errors import ConfigError, ResourceError

FLEET = [*KINDS, *KINDS]


def started(policy: Resource, profiles: list[Any] = FLEET, **fields: object) -> Any:
    return policy.init(SHAPE, profiles, [cost_model(**fields)] * len(profiles))


@pytest.mark.parametrize("slots", [1, 2, 6])
@pytest.mark.parametrize("slack", [0.0, 0.1, 1.0])
def test_both_preferences_take_their_end_of_the_window(slots: int, slack: float) -> None:
    costs = [cost_model(network=Network(server_slots=slots))] * len(FLEET)
    clients = tables(costs, FLEET)
    spans = windows(clients, (1 + slack) * optimum_s(clients, slots), slots)
    for prefer in ("deepest", "shallowest"):
        state = Resource(prefer=prefer, slack=slack).init(SHAPE, FLEET, costs)  # type: ignore[arg-type]
        assert state["cuts"] == [getattr(span, prefer) for span in spans]


def test_equal_clients_get_equal_cuts_in_every_round() -> None:
    policy, rounds = Resource(), []
    for index in range(8):
        rounds.append((range(6), [seen(client, index, slow=[1.0, 4.0, 0.5][client % 3]) for client in range(6)]))
    for cuts, _ in run(policy, started(policy), rounds):
        assert [cuts[client] for client in range(3)] == [cuts[client] for client in range(3, 6)]


def test_the_first_round_begins_with_the_company_that_came() -> None:
    """Six share a server of one processor; a desktop that comes alone has it to itself and is free to leave it all the work."""
    policy = Resource(prefer="shallowest", slack=0.0)
    state = started(policy, [DESKTOP] * 6)
    together, alone = state["cuts"][0], started(policy, [DESKTOP])["cuts"][0]
    assert together > alone + 1
    (cuts, state), (again, _) = run(policy, state, [([3], []), (range(6), [])])
    assert cuts == {3: alone}
    assert again[0] == together  # its first round: at once
    assert again[3] == alone + 1  # its second: one block


def test_a_device_that_turns_out_slow_comes_down_block_by_block_and_the_plan_is_that_of_its_real_speed() -> None:
    policy = Resource(smoothing=1.0)
    profiles = [LAPTOP, LAPTOP, DESKTOP]
    state = started(policy, profiles)
    model = cost_model()
    clients = tables([model] * 3, profiles, [6.0, 1.0, 1.0])
    goal = windows(clients, 1.1 * optimum_s(clients), 1)
    ratios = dict.fromkeys(range(1, 7), 6.0)
    cuts, history = state["cuts"], []
    for index in range(1, 9):
        observed = [] if index == 1 else [seen(0, index - 1, slow=_whole(model, LAPTOP, cuts[0], ratios[1]))]
        plan, state = policy.plan(index, range(3), observed, state)
        cuts = [plan[client] for client in range(3)]
        history.append(cuts[0])
    assert cuts == [span.deepest for span in goal]
    assert all(abs(after - before) <= 1 for before, after in pairwise(history))
    assert state["slowness"] == pytest.approx([6.0, 1.0, 1.0])


def _whole(model: Any, profile: Any, cut: int, factor: float) -> float:
    """busy over predicted of a device whose own part takes `factor` times as long."""
    (table,) = tables([model], [profile])
    (slow,) = tables([model], [profile], [factor])
    return slow.alone_at(cut) / table.alone_at(cut)


def test_small_changes_wait_and_large_ones_do_not() -> None:
    policy = Resource(smoothing=1.0, tolerance=0.2, every_rounds=5)
    state = started(policy)
    planned = []
    for index, slow in enumerate((1.0, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 2.0), 1):
        _, state = policy.plan(index, range(6), [seen(0, index - 1, slow=slow)], state)
        planned.append(state["planned"]["round"])
    assert planned == [1, 1, 1, 1, 1, 6, 6, 8]


def test_without_smoothing_the_description_is_trusted() -> None:
    policy = Resource(smoothing=0.0)
    state = started(policy)
    (_, after), *_ = run(policy, state, [(range(6), [seen(0, slow=50.0)])])
    assert after["slowness"] == [1.0] * 6
    assert after["cuts"] == state["cuts"]


def test_memory_and_bounds_hold() -> None:
    policy = Resource(slack=100.0)
    assert started(policy, [holding(3), DEVICE])["cuts"] == [3, 6]
    assert started(policy, [holding(3), DEVICE], maximum_cut=2)["cuts"] == [2, 2]
    assert started(Resource(prefer="shallowest", slack=100.0), [holding(3), DEVICE], minimum_cut=2)["cuts"] == [2, 2]
    with pytest.raises(ResourceError, match="'phone-1'"):
        started(policy, [holding(1, PHONE)], minimum_cut=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prefer": "middle"}, r"policy\.prefer is 'middle'; allowed are 'deepest', 'shallowest'"),
        ({"slack": -0.1}, r"policy\.slack is -0\.1; allowed is a finite number of 0 or more"),
        ({"slack": float("inf")}, r"policy\.slack is inf"),
        ({"smoothing": 1.5}, r"policy\.smoothing is 1\.5; allowed is a finite number from 0 to 1"),
        ({"tolerance": "much"}, r"policy\.tolerance is 'much'"),
        ({"every_rounds": 0}, r"policy\.every_rounds is 0; allowed is a whole number of 1 or more"),
        ({"every_rounds": 2.5}, r"policy\.every_rounds is 2\.5"),
        ({"every_rounds": True}, r"policy\.every_rounds is True"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Resource(**fields)
