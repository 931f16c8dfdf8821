"""FedAvgM, FedAdam and FedYogi: worked by hand in plain Python, and equal to the rule inside where they must be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from splitft.aggregate.average import Average
from splitft.aggregate.base import Aggregator, Updates
from splitft.aggregate.fed_adam import FedAdam
from splitft.aggregate.fed_avgm import FedAvgM
from splitft.aggregate.fed_yogi import FedYogi
from splitft.aggregate.product import Product
from splitft.aggregate.server_optimizer import ServerOptimizer
from splitft.aggregate.stack import Stack
from splitft.catalog import build
from splitft.errors import ConfigError
from splitft.lora import Layout
from splitft.rng import torch_stream
from splitft.types import Key

LAYOUT = Layout.of({Key(0, "q"): (3, 4), Key(1, "q"): (3, 4)}, 2, 1.0)
ONE = Layout.of({Key(0, "q"): (1, 1)}, 1, 1.0)  # a row is [a, b]
OPTIMIZERS = pytest.mark.parametrize("kind", [FedAvgM, FedAdam, FedYogi])


def drawn(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, LAYOUT.parameters, generator=torch_stream(seed, "server-optimizer-test"))


def play(rule: Aggregator, changes: list[float], start: float = 0.5) -> list[float]:
    """The first parameter after each round in which the one client moved it by so much."""
    row, state, found = torch.tensor([start, 0.0]), rule.init(ONE), []
    for change in changes:
        merged = rule.merge(row, Updates((0,), (1,), row.unsqueeze(0) + torch.tensor([[change, 0.0]]), ONE), state)
        row, state = merged.adapters, merged.state
        found.append(float(row[0]))
    return found


CHANGES = [0.3, -0.1, 0.25, 0.0, -0.4, 0.001]


def test_momentum_by_hand() -> None:
    value, velocity, wanted = 0.5, 0.0, []
    for change in CHANGES:
        velocity = 0.8 * velocity - change
        value -= 0.7 * velocity
        wanted.append(value)
    assert play(FedAvgM(learning_rate=0.7, momentum=0.8), CHANGES) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("yogi", [False, True])
def test_adam_and_yogi_by_hand(yogi: bool) -> None:
    learning_rate, beta1, beta2, tau = 0.05, 0.8, 0.9, 0.1
    value, mean, square, wanted = 0.5, 0.0, tau**2, []
    for change in CHANGES:
        mean = beta1 * mean + (1 - beta1) * change
        newest = change * change
        if yogi:
            square -= (1 - beta2) * newest * (1 if square > newest else -1 if square < newest else 0)
        else:
            square = beta2 * square + (1 - beta2) * newest
        value += learning_rate * mean / (math.sqrt(square) + tau)
        wanted.append(value)
    rule = (FedYogi if yogi else FedAdam)(learning_rate=learning_rate, beta1=beta1, beta2=beta2, tau=tau)
    assert play(rule, CHANGES) == pytest.approx(wanted, abs=1e-6)


def test_yogi_forgets_large_changes_more_slowly_than_adam() -> None:
    changes = [1.0] * 5 + [0.01] * 30
    squares = []
    for rule in (FedAdam(beta2=0.9), FedYogi(beta2=0.9)):
        row, state = torch.zeros(2), rule.init(ONE)
        for change in changes:
            state = rule.merge(row, Updates((0,), (1,), torch.tensor([[change, 0.0]]), ONE), state).state
        squares.append(float(state["square"][0]))
    assert squares[1] > 5 * squares[0]


@given(st.floats(-(2.0**100), 2.0**100, width=32), st.floats(-(2.0**100), 2.0**100, width=32))
def test_no_momentum_and_a_whole_step_is_the_rule_inside_to_the_last_bit(before: float, after: float) -> None:
    row, updates = torch.tensor([before, after]), Updates((0, 1), (1, 2), torch.tensor([[after, before], [before, before]]), ONE)
    rule = FedAvgM(learning_rate=1.0, momentum=0.0)
    state = {"velocity": torch.tensor([3.0, -1e8])}  # forgotten at once
    assert torch.equal(rule.merge(row, updates, state).adapters, Average().merge(row, updates, {}).adapters)


def test_no_momentum_is_the_rule_inside_over_products_too() -> None:
    before, updates = drawn(1, 0)[0], Updates((0, 1, 2), (3, 1, 5), drawn(3, 1), LAYOUT)
    rule, inside = FedAvgM(rule=Product(), momentum=0.0), Product()
    wanted = inside.merge(before, updates, inside.init(LAYOUT))
    found = rule.merge(before, updates, rule.init(LAYOUT))
    assert torch.equal(found.adapters, wanted.adapters)
    assert wanted.metrics.items() <= found.metrics.items()


def test_momentum_keeps_going_and_tends_to_the_geometric_sum() -> None:
    found = play(FedAvgM(momentum=0.5), [0.1] * 30, start=0.0)
    assert found[-1] - found[-2] == pytest.approx(0.2, rel=1e-4)
    assert play(FedAvgM(momentum=0.5), [0.1, 0.0], start=0.0) == pytest.approx([0.1, 0.15])


@pytest.mark.parametrize("kind", [FedAdam, FedYogi])
def test_an_adaptive_step_does_not_grow_with_the_change(kind: type[FedAdam]) -> None:
    small, large = (play(kind(beta1=0.0), [change] * 20, start=0.0)[-1] for change in (1.0, 1000.0))
    assert large == pytest.approx(small, rel=0.05)
    timid = play(kind(beta1=0.0, tau=1.0), [1e-3], start=0.0)[0]
    assert timid == pytest.approx(1e-3 * 1e-3 / 2, rel=1e-2), "far below tau the step is proportional"


@OPTIMIZERS
def test_states_of_nested_rules_stand_side_by_side(kind: type[ServerOptimizer]) -> None:
    rule = kind(rule=FedAvgM(rule=FedAvgM()))
    state = rule.init(LAYOUT)
    assert {"rule.velocity", "rule.rule.velocity"} < set(state)
    after = rule.merge(drawn(1, 0)[0], Updates((0,), (1,), drawn(1, 1), LAYOUT), state).state
    inside = rule.rule.merge(drawn(1, 0)[0], Updates((0,), (1,), drawn(1, 1), LAYOUT), rule.rule.init(LAYOUT)).state
    for name, tensor in inside.items():
        assert torch.equal(after[f"rule.{name}"], tensor)


@OPTIMIZERS
def test_a_rule_that_folds_is_refused(kind: type[ServerOptimizer]) -> None:
    with pytest.raises(ConfigError, match="folds"):
        kind(rule=Stack())
    with pytest.raises(ConfigError, match="folds"):
        build("aggregator", "fed_avgm", {"rule": {"name": "median", "rule": "stack"}})


@OPTIMIZERS
def test_the_rule_inside_answers_for_ranks_and_uploads(kind: type[ServerOptimizer]) -> None:
    assert (kind().partial_uploads, kind().unequal_ranks, kind().segments) == (True, False, 1)
    over = kind(rule=Product())
    assert (over.partial_uploads, over.unequal_ranks, over.folds) == (False, True, False)
    row, ranks = drawn(1, 0)[0], torch.tensor([1, 2])
    assert torch.equal(over.distribute(LAYOUT, row, ranks)[0], Product().distribute(LAYOUT, row, ranks)[0])


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (FedAvgM, {"momentum": 1.0}),
        (FedAvgM, {"momentum": -0.1}),
        (FedAvgM, {"learning_rate": 0.0}),
        (FedAvgM, {"learning_rate": "fast"}),
        (FedAdam, {"beta1": 1.0}),
        (FedAdam, {"beta2": math.nan}),
        (FedYogi, {"tau": 0.0}),
        (FedYogi, {"tau": True}),
    ],
)
def test_a_bad_field_is_refused_by_name_and_value(kind: type[ServerOptimizer], fields: dict[str, Any]) -> None:
    (name, value), *_ = fields.items()
    with pytest.raises(ConfigError, match=f"aggregator.{name} is {value!r}; allowed is"):
        kind(**fields)


def test_what_is_no_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"aggregator\.rule is 'average'"):
        FedAvgM(rule="average")  # type: ignore[arg-type]
