"""Laws of the cut policies over any fleet and any history: clients vanish, figures are missing, devices slow down."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.cost_shapes import SHAPE, cost_model
from unit.policy_fleets import KINDS, fleets, seen

from splitft.adapt.balance import tables
from splitft.adapt.base import Policy
from splitft.adapt.combined import Combined
from splitft.adapt.oscillation import oscillates
from splitft.adapt.resource import Resource
from splitft.adapt.schedule import round_seconds
from splitft.adapt.search import Search
from splitft.adapt.splitft import SplitFT

QUALITY: dict[str, Any] = {"gamma": 3.0, "averaging": 1.0, "dead_band": 0.0, "cool_down": 0}
BY_THE_BLOCK = [
    Resource(smoothing=1.0),
    Resource(prefer="shallowest", slack=0.5, tolerance=0.0),
    SplitFT(**QUALITY),
    Combined(smoothing=1.0, slack=1.0, evaluations=40, **QUALITY),
]
EVERY = [*BY_THE_BLOCK, Search(smoothing=1.0, evaluations=40)]
every_policy = pytest.mark.parametrize("policy", EVERY, ids=lambda policy: type(policy).__name__)
by_the_block = pytest.mark.parametrize("policy", BY_THE_BLOCK, ids=lambda policy: type(policy).__name__)

# One round: who takes part, and of each whether its figures are lost, its improvement (None: not evaluated), how slow it was.
ONE = st.tuples(
    st.booleans(),
    st.booleans(),
    st.one_of(st.none(), st.floats(-3.0, 3.0), st.just(float("nan"))),
    st.one_of(st.none(), st.floats(0.2, 8.0)),
)
HISTORY = st.lists(st.lists(ONE, min_size=4, max_size=4), min_size=1, max_size=7)


def play(policy: Policy, fleet: Any, history: list[Any], through_json: bool = False) -> list[tuple[list[int], Any, dict[int, int], Any]]:
    """(participants, state before, cuts, state after) of every round."""
    costs, profiles = fleet
    state, observations = policy.init(SHAPE, profiles, costs), []
    answers = []
    for index, drawn in enumerate(history, 1):
        if through_json:
            state = json.loads(json.dumps(state, allow_nan=False))
        participants = [client for client in range(len(costs)) if drawn[client][0]]
        cuts, after = policy.plan(index, participants, observations, state)
        answers.append((participants, state, cuts, after))
        state = after
        observations = [seen(client, index, *drawn[client][2:]) for client in participants if not drawn[client][1]]
    return answers


@every_policy
@given(fleet=fleets(), history=HISTORY)
@settings(max_examples=25, deadline=None)
def test_bounds_always_hold_and_the_absent_keep_their_cuts(policy: Policy, fleet: Any, history: list[Any]) -> None:
    allowed = tables(*fleet)
    for participants, before, cuts, after in play(policy, fleet, history):
        assert list(cuts) == participants
        for client, table in enumerate(allowed):
            assert table.first <= after["cuts"][client] <= table.last
            assert after["cuts"][client] == (cuts[client] if client in cuts else before["cuts"][client])


@by_the_block
@given(fleet=fleets(), history=HISTORY)
@settings(max_examples=25, deadline=None)
def test_after_its_first_round_a_client_moves_one_block_at_most(policy: Policy, fleet: Any, history: list[Any]) -> None:
    came: set[int] = set()
    for participants, before, cuts, _ in play(policy, fleet, history):
        assert all(abs(cuts[client] - before["cuts"][client]) <= 1 for client in participants if client in came)
        came |= set(participants)


@every_policy
@given(fleet=fleets(), history=HISTORY)
@settings(max_examples=15, deadline=None)
def test_a_state_through_json_has_the_same_future(policy: Policy, fleet: Any, history: list[Any]) -> None:
    straight, resumed = play(policy, fleet, history), play(policy, fleet, history, through_json=True)
    assert [cuts for _, _, cuts, _ in straight] == [cuts for _, _, cuts, _ in resumed]
    assert json.loads(json.dumps(straight[-1][3])) == json.loads(json.dumps(resumed[-1][3]))


@given(fleet=fleets(), gain=st.floats(-2, 2), rounds=st.integers(2, 8), start=st.sampled_from([0, 2, 3]))
@settings(max_examples=30, deadline=None)
def test_equal_improvements_never_move_splitft(fleet: Any, gain: float, rounds: int, start: int) -> None:
    policy = SplitFT(start=start, **QUALITY)
    history = [[(True, False, gain, 1.0)] * 4] * rounds
    for _, before, _, after in play(policy, fleet, history):
        assert after["cuts"] == before["cuts"]


@given(fleet=fleets(), history=HISTORY)
@settings(max_examples=30, deadline=None)
def test_gamma_0_is_deaf_to_quality(fleet: Any, history: list[Any]) -> None:
    """Whatever the improvements, `splitft` stays and `combined` does what it does without them."""
    silent = [[(*one[:2], None, one[3]) for one in drawn] for drawn in history]
    assert all(after["cuts"] == before["cuts"] for _, before, _, after in play(SplitFT(gamma=0.0), fleet, history))
    policy = Combined(gamma=0.0, evaluations=40)
    assert [cuts for _, _, cuts, _ in play(policy, fleet, history)] == [cuts for _, _, cuts, _ in play(policy, fleet, silent)]


@given(
    kinds=st.lists(st.sampled_from(range(3)), min_size=2, max_size=6), history=HISTORY, prefer=st.sampled_from(["deepest", "shallowest"])
)
@settings(max_examples=30, deadline=None)
def test_equal_clients_have_equal_cuts_under_resource(kinds: list[int], history: list[Any], prefer: Any) -> None:
    policy = Resource(prefer=prefer)
    state: Any = policy.init(SHAPE, [KINDS[kind] for kind in kinds], [cost_model()] * len(kinds))
    for index, drawn in enumerate(history, 1):
        observed = [seen(client, index - 1, slow=drawn[kind][3]) for client, kind in enumerate(kinds)]
        cuts, state = policy.plan(index, range(len(kinds)), observed if index > 1 else [], state)
        assert len({(kind, cuts[client]) for client, kind in enumerate(kinds)}) == len(set(kinds))


@given(fleet=fleets(), history=HISTORY, slack=st.sampled_from([0.0, 0.1, 0.5]))
@settings(max_examples=25, deadline=None)
def test_combined_with_the_same_company_stays_within_its_slack(fleet: Any, history: list[Any], slack: float) -> None:
    costs, profiles = fleet
    present = [[(True, *one[1:3], None) for one in drawn] for drawn in history]
    best: Any = Search().init(SHAPE, profiles, costs)["cuts"]
    limit_s = (1 + slack) * round_seconds(costs, profiles, best) * (1 + 1e-6)
    for _, _, cuts, _ in play(Combined(slack=slack, **QUALITY), fleet, present):
        assert round_seconds(costs, profiles, list(cuts.values())) <= limit_s


@given(fleet=fleets(), gains=st.lists(st.floats(-3, 3), min_size=4, max_size=4))
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("policy", [Resource(), SplitFT(), Combined(evaluations=40)], ids=lambda policy: type(policy).__name__)
def test_a_world_that_does_not_change_is_no_reason_to_oscillate(policy: Policy, fleet: Any, gains: list[float]) -> None:
    history = [[(True, False, gain, 1.3) for gain in gains]] * 25
    cuts = [after["cuts"] for *_, after in play(policy, fleet, history)]
    for client in range(len(fleet[0])):
        assert not oscillates([one[client] for one in cuts], window=25, turns=2)


@given(st.lists(st.integers(1, 12), max_size=30), st.integers(0, 12), st.integers(1, 6))
def test_oscillation_counts_turns(history: list[int], window: int, turns: int) -> None:
    if oscillates(history, window, turns):
        assert not oscillates(sorted(history), window, turns)
        assert oscillates(history, window + 1, turns)
        assert oscillates([13 - cut for cut in history], window, turns)
        assert oscillates(history, window, max(1, turns - 1))
        assert window > turns
