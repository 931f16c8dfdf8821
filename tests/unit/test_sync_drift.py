"""Drift: the sketch against the exact variance, its linearity, and the control of the threshold on drifts made for the purpose."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitft.errors import AdapterError, ConfigError
from splitft.rng import torch_stream
from splitft.sync.base import State
from splitft.sync.drift import Drift, squared_norm

PARAMETERS = 3000


def drawn(rows: int, seed: int, parameters: int = PARAMETERS) -> Tensor:
    return torch.randn(rows, parameters, generator=torch_stream(seed, "drift-test"))


def shares(*tokens: int) -> Tensor:
    return torch.tensor(tokens, dtype=torch.float64) / sum(tokens)


def dense(drifts: Tensor, weights: Tensor) -> float:
    """The variance as it is defined about the mean, the long way round."""
    mean = (weights.unsqueeze(1) * drifts.double()).sum(0)
    return float((weights * (drifts.double() - mean).square().sum(1)).sum())


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any), st.floats(0.0, 100.0))
def test_exact_is_the_variance_about_the_mean(tokens: list[int], offset: float) -> None:
    drifts, weights = drawn(len(tokens), 1, 50) + offset, shares(*tokens)
    wanted = dense(drifts, weights)
    assert Drift(exact=True).variance(drifts, weights) == pytest.approx(wanted, rel=1e-6, abs=1e-6 * (1 + offset**2))


def test_the_estimate_of_a_norm_is_unbiased_and_as_narrow_as_promised() -> None:
    drift = drawn(1, 2)
    exact = float(drift.double().square().sum())
    ratios = torch.tensor([squared_norm(Drift(seed=seed, rows=1, width=200).sketches(drift)[0]) / exact for seed in range(60)])
    promised = math.sqrt(2 / 200)
    assert abs(float(ratios.mean()) - 1) < 4 * promised / math.sqrt(60)
    assert 0.5 * promised < float(ratios.std()) < 1.4 * promised
    medians = torch.tensor([squared_norm(Drift(seed=seed, width=200).sketches(drift)[0]) / exact for seed in range(60)])
    assert float(medians.std()) < float(ratios.std()), "three rows must do better than one"


@pytest.mark.parametrize("common", [0.0, 1.0, 3.0])
def test_the_variance_is_estimated_within_the_sketch_s_error_and_rarely_too_low(common: float) -> None:
    drifts, weights = drawn(5, 3) + common * drawn(1, 4), shares(1, 2, 3, 4, 5)
    exact = dense(drifts, weights)
    square_of_mean = float((weights.unsqueeze(1) * drifts.double()).sum(0).square().sum())
    epsilon = 1 / math.sqrt(500)
    found = [Drift(seed=seed).variance(drifts, weights) for seed in range(20)]
    assert all(abs(one - exact) <= 5 * epsilon * square_of_mean for one in found)
    assert sum(one < exact for one in found) <= 6
    assert sum(found) / 20 == pytest.approx(exact + square_of_mean * epsilon / (1 + epsilon), abs=1.5 * epsilon * square_of_mean)


@settings(max_examples=15)
@given(st.floats(-5, 5), st.floats(-5, 5))
def test_a_sketch_is_linear(first: float, second: float) -> None:
    rule, drifts = Drift(rows=2, width=30), drawn(2, 5, 400)
    one, other = rule.sketches(drifts).double()
    both = rule.sketches((first * drifts[0] + second * drifts[1]).unsqueeze(0))[0].double()
    torch.testing.assert_close(both, first * one + second * other, rtol=1e-4, atol=1e-4)


def test_a_client_s_front_and_the_server_s_back_are_sketched_apart_and_added() -> None:
    rule, drift = Drift(), drawn(1, 6)
    front, back = drift.clone(), drift.clone()
    front[:, 1000:], back[:, :1000] = 0.0, 0.0
    torch.testing.assert_close(rule.sketches(front) + rule.sketches(back), rule.sketches(drift), rtol=1e-5, atol=1e-5)


def test_hash_functions_come_from_the_seed_and_rows_differ() -> None:
    drift = drawn(1, 7)
    first = Drift(seed=1).sketches(drift)
    assert torch.equal(first, Drift(seed=1).sketches(drift))
    assert not torch.equal(first, Drift(seed=2).sketches(drift))
    assert not torch.equal(first[0, 0], first[0, 1])
    assert first.shape == (1, 3, 500)
    assert first.dtype == torch.float32


def control(rule: Drift, variance_of: Any, rounds: int) -> tuple[list[int], State]:
    """In which rounds there was an aggregation, when two clients are `variance_of(rounds since the last)` apart."""
    state, since, hits = rule.init(), 0, []
    for index in range(1, rounds + 1):
        since += 1
        side = math.sqrt(variance_of(since, index))
        decision = rule.decide(torch.tensor([[side, 0.0], [-side, 0.0]]), shares(1, 1), state)
        state = decision.state
        if decision.aggregate:
            hits.append(index)
            since = 0
    return hits, state


def gaps(hits: list[int]) -> list[int]:
    return [after - before for before, after in itertools.pairwise(hits)]


def test_the_threshold_is_reset_as_published() -> None:
    rule = Drift(max_rounds=10, exact=True)
    first = rule.decide(torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), shares(1, 1), rule.init())
    assert first.aggregate
    assert first.state == {"theta": pytest.approx(5 / 1 * 4.0), "rounds_since": 0, "aggregations": 1}
    second = rule.decide(torch.tensor([[4.0, 0.0], [-4.0, 0.0]]), shares(1, 1), first.state)
    assert not second.aggregate
    assert second.state == {"theta": pytest.approx(20.0), "rounds_since": 1, "aggregations": 1}
    assert second.metrics == {"drift_variance": pytest.approx(16.0), "drift_threshold": 20.0, "rounds_since_aggregation": 1.0}
    third = rule.decide(torch.tensor([[5.0, 0.0], [-5.0, 0.0]]), shares(1, 1), second.state)
    assert third.aggregate
    assert third.state["theta"] == pytest.approx(5 / 2 * 25.0)


@pytest.mark.parametrize("exact", [True, False])
def test_a_linear_variance_is_aggregated_after_about_half_the_most_rounds(exact: bool) -> None:
    hits, _ = control(Drift(max_rounds=10, exact=exact), lambda since, index: 0.3 * since, 60)
    assert hits[0] == 1
    assert all(5 <= gap <= 6 for gap in gaps(hits)), gaps(hits)


def test_a_shrinking_variance_runs_into_the_most_rounds_and_a_growing_one_is_caught_early() -> None:
    calm, _ = control(Drift(max_rounds=8, exact=True), lambda since, index: 0.4**index, 60)
    assert set(gaps(calm)) == {8}
    wild, _ = control(Drift(max_rounds=8, exact=True), lambda since, index: 1.5**index, 30)
    assert max(gaps(wild)) <= 5
    assert len(wild) > len(calm)


def test_one_round_at_most_is_every_round() -> None:
    hits, _ = control(Drift(max_rounds=1), lambda since, index: 0.0, 5)
    assert hits == [1, 2, 3, 4, 5]


def test_one_client_alone_has_no_variance() -> None:
    drift = drawn(1, 8)
    assert Drift(exact=True).variance(drift, shares(3)) == pytest.approx(0.0, abs=1e-9 * float(drift.square().sum()))


def test_a_report_is_the_norm_and_the_sketch() -> None:
    assert Drift().report_bytes == 4 * 1501
    assert Drift(rows=5, width=10).report_bytes == 204
    assert Drift(exact=True).report_bytes == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_drifts_that_are_not_finite_are_refused(bad: float) -> None:
    drifts = drawn(3, 9, 10)
    drifts[1, 4] = bad
    for exact in (True, False):
        with pytest.raises(AdapterError, match="participant 1 of the round"):
            Drift(exact=exact).decide(drifts, shares(1, 1, 1), Drift().init())


@pytest.mark.parametrize(
    "fields", [{"max_rounds": 0}, {"rows": 0}, {"width": 0}, {"width": 2.5}, {"rows": True}, {"seed": -1}, {"exact": 1}], ids=repr
)
def test_bad_fields_are_refused_by_name_and_value(fields: dict[str, Any]) -> None:
    ((name, value),) = fields.items()
    with pytest.raises(ConfigError, match=f"synchronisation.{name} is {value!r}"):
        Drift(**fields)
