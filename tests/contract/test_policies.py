"""The contract of every cut policy in the catalogue: the same answers to the same questions, cuts in bounds, absent clients survived."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitft.adapt.base import Policy
from splitft.clock import Network
from splitft.errors import ConfigError
from splitft.types import Observation

from ..unit.cost_shapes import DEVICE, SHAPE, cost_model
from .variants import POLICY_COSTS, POLICY_VARIANTS, Variant

CLIENTS = 5
every_policy = pytest.mark.parametrize("variant", POLICY_VARIANTS, ids=repr)


def seen(client: int, round_index: int, loss: float, held_out: float | None = None) -> Observation:
    """Those with an even loss were slower than predicted, the larger the loss; of the others nothing is known of their speed."""
    busy_s, predicted_s = (1.0 + loss, 2.0) if int(loss) % 2 == 0 else (0.0, 0.0)
    base_loss = None if held_out is None else 4.0
    return Observation(client, round_index, 100, loss, 1.0 + client, 0.5, 1000, 2000, held_out, base_loss, busy_s, predicted_s)


def start(variant: Variant, **fields: object) -> tuple[Policy, Any]:
    policy, fields = variant.build(), {**POLICY_COSTS.get(variant.name, {}), **fields}
    costs = [cost_model(sequence_tokens=8 + client, **fields) for client in range(CLIENTS)]
    return policy, policy.init(SHAPE, [DEVICE] * CLIENTS, costs)


HISTORY = st.lists(
    st.tuples(
        st.sets(st.integers(0, CLIENTS - 1), min_size=1),
        st.lists(st.floats(0.0, 12.0), min_size=CLIENTS, max_size=CLIENTS),
        st.booleans(),
        st.sets(st.integers(0, CLIENTS - 1)),
    ),
    min_size=1,
    max_size=6,
)


def play(policy: Policy, state: Any, history: list[Any]) -> list[tuple[dict[int, int], Any]]:
    """Rounds with these participants; the observations of some who took part are lost, some were not evaluated."""
    answers, observations = [], []
    for index, (participants, losses, evaluated, lost) in enumerate(history, 1):
        cuts, state = policy.plan(index, sorted(participants), observations, state)
        answers.append((cuts, state))
        observations = [
            seen(client, index, losses[client], losses[client] / 2 if evaluated else None) for client in sorted(participants - lost)
        ]
    return answers


@every_policy
@settings(max_examples=30)
@given(history=HISTORY)
def test_cuts_are_in_bounds_for_exactly_the_participants(variant: Variant, history: list[Any]) -> None:
    policy, state = start(variant)
    for (participants, *_), (cuts, after) in zip(history, play(policy, state, history), strict=True):
        assert set(cuts) == participants
        assert all(isinstance(cut, int) and 1 <= cut <= cost_model().deepest_cut for cut in cuts.values())
        assert len(after["cuts"]) == CLIENTS
        assert all(after["cuts"][client] == cut for client, cut in cuts.items())


@every_policy
@settings(max_examples=10)
@given(history=HISTORY)
def test_configured_bounds_hold_or_are_refused(variant: Variant, history: list[Any]) -> None:
    """And a network of any kind is planned for."""
    fields: dict[str, Any] = {"minimum_cut": 2, "maximum_cut": 4, "network": Network(2, True, 1e6, 1e6, "longest_first", True)}
    if variant.name == "whole" or not all(2 <= cut <= 4 for cut in variant.fields.get("cuts", ())):
        with pytest.raises(ConfigError, match="maximum_cut"):
            start(variant, **fields)
        return
    policy, state = start(variant, **fields)
    assert all(2 <= cut <= 4 for cuts, _ in [({}, state), *play(policy, state, history)] for cut in cuts.values())
    assert all(2 <= cut <= 4 for cut in state["cuts"])


@every_policy
@settings(max_examples=30)
@given(history=HISTORY)
def test_the_same_observations_give_the_same_plan(variant: Variant, history: list[Any]) -> None:
    assert play(*start(variant), history) == play(*start(variant), history)


@every_policy
@settings(max_examples=30)
@given(history=HISTORY)
def test_a_state_survives_a_checkpoint(variant: Variant, history: list[Any]) -> None:
    """Through JSON after every round, as the engine stores it."""
    policy, state = start(variant)
    straight = play(policy, state, history)
    state, observations = json.loads(json.dumps(dict(state))), []
    for index, (participants, losses, evaluated, lost) in enumerate(history, 1):
        cuts, state = policy.plan(index, sorted(participants), observations, state)
        assert cuts == straight[index - 1][0]
        state = json.loads(json.dumps(dict(state), allow_nan=False))
        observations = [
            seen(client, index, losses[client], losses[client] / 2 if evaluated else None) for client in sorted(participants - lost)
        ]


@every_policy
def test_clients_that_vanish_and_come_back_are_planned(variant: Variant) -> None:
    policy, state = start(variant)
    _, state = policy.plan(1, [0, 1, 2], [], state)
    _, state = policy.plan(2, [3, 4], [], state)
    _, state = policy.plan(3, [0], [seen(3, 2, 2.0)], state)
    cuts, _ = policy.plan(4, list(range(CLIENTS)), [], state)
    assert set(cuts) == set(range(CLIENTS))


@every_policy
def test_a_plan_does_not_change_the_state_it_was_given(variant: Variant) -> None:
    policy, state = start(variant)
    before = json.dumps(dict(state), sort_keys=True)
    policy.plan(1, [0, 1], [], state)
    policy.plan(2, [0, 1], [seen(0, 1, 3.0), seen(1, 1, 1.0)], state)
    assert json.dumps(dict(state), sort_keys=True) == before
