"""The contract of every synchronisation in the catalogue: a decision from what was reported, a state that survives a checkpoint."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitft.rng import torch_stream
from splitft.sync.base import State, Synchronisation

from .variants import SYNCHRONISATION_VARIANTS, Variant

PARAMETERS = 40
every_synchronisation = pytest.mark.parametrize("variant", SYNCHRONISATION_VARIANTS, ids=repr)
# Rounds as the tokens of their participants and how far these went.
ROUNDS = st.lists(st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.floats(0.0, 3.0)), min_size=1, max_size=8)


def round_of(tokens: list[int], size: float, seed: int) -> tuple[Tensor, Tensor]:
    drifts = size * torch.randn(len(tokens), PARAMETERS, generator=torch_stream(seed, "synchronisation-test"))
    weights = torch.tensor(tokens, dtype=torch.float64)
    return drifts, weights / weights.sum()


def play(rule: Synchronisation, rounds: list[tuple[list[int], float]], through_json: bool) -> list[tuple[bool, State]]:
    state, answers = rule.init(), []
    for index, (tokens, size) in enumerate(rounds):
        if through_json:
            state = json.loads(json.dumps(dict(state), allow_nan=False))
        decision = rule.decide(*round_of(tokens, size, index), state)
        state = decision.state
        answers.append((decision.aggregate, state))
    return answers


@every_synchronisation
@settings(max_examples=20)
@given(rounds=ROUNDS)
def test_a_state_survives_a_checkpoint_and_answers_repeat(variant: Variant, rounds: list[tuple[list[int], float]]) -> None:
    straight = play(variant.build(), rounds, False)
    assert play(variant.build(), rounds, True) == straight
    assert all(type(aggregate) is bool for aggregate, _ in straight)
    assert all(set(state) == set(variant.build().init()) for _, state in straight)


@every_synchronisation
@settings(max_examples=20)
@given(rounds=ROUNDS)
def test_the_first_round_ends_with_an_aggregation_and_always_means_always(variant: Variant, rounds: list[tuple[list[int], float]]) -> None:
    rule, answers = variant.build(), play(variant.build(), rounds, False)
    assert answers[0][0]
    assert not rule.always or all(aggregate for aggregate, _ in answers)


@every_synchronisation
def test_the_order_of_participants_does_not_matter(variant: Variant) -> None:
    rule = variant.build()
    state = rule.decide(*round_of([1, 2], 1.0, 9), rule.init()).state
    drifts, weights = round_of([3, 1, 7, 2], 0.8, 1)
    order = [2, 0, 3, 1]
    first, other = rule.decide(drifts, weights, state), rule.decide(drifts[order], weights[order], state)
    assert first.aggregate == other.aggregate
    assert other.metrics == pytest.approx(dict(first.metrics))


@every_synchronisation
def test_arguments_are_left_alone_and_figures_are_finite(variant: Variant) -> None:
    rule = variant.build()
    drifts, weights = round_of([3, 1, 7], 0.8, 1)
    state = rule.init()
    kept = drifts.clone(), weights.clone(), json.dumps(dict(state))
    decision = rule.decide(drifts, weights, state)
    assert torch.equal(drifts, kept[0])
    assert torch.equal(weights, kept[1])
    assert json.dumps(dict(state)) == kept[2]
    assert all(isinstance(figure, float) and math.isfinite(figure) for figure in decision.metrics.values())


@every_synchronisation
def test_clients_that_did_not_move_are_no_reason(variant: Variant) -> None:
    rule = variant.build()
    state = rule.decide(*round_of([1, 1], 1.0, 0), rule.init()).state
    assert rule.decide(torch.zeros(2, PARAMETERS), torch.full((2,), 0.5, dtype=torch.float64), state).aggregate == rule.always


@every_synchronisation
def test_a_report_has_a_size(variant: Variant) -> None:
    rule = variant.build()
    assert isinstance(rule.report_bytes, int)
    assert rule.report_bytes >= 0
    assert not rule.always or rule.report_bytes == 0, "who always aggregates needs no report"
