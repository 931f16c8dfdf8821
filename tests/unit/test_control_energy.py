"""Energy and fixed: convergence on plants whose fixed point is known, and what is done where nothing is known."""

from __future__ import annotations

import math

import pytest

from splitft.control.base import Dial, Signal
from splitft.control.energy import Energy
from splitft.control.fixed import FixedDial
from splitft.errors import ConfigError


@pytest.mark.parametrize("power", [0.3, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("scale", [0.03, 0.1, 0.4])
def test_the_error_converges_to_the_target(power: float, scale: float) -> None:
    rule = Energy(target=0.1, target_gradients=0.05, least=1e-6, most=1e6)
    state = rule.init(0)
    dial = rule.first(state)
    for number in range(1, 80):
        errors = scale * dial.activations**power, 2.0 * scale * dial.gradients**power
        signal = Signal(number, 80, 1, 1, 8, activation_error=errors[0], gradient_error=errors[1])
        dial, state, facts = rule.step(signal, state)
    assert errors == pytest.approx((0.1, 0.05), rel=1e-4)
    assert facts == {"activations_error": errors[0], "gradients_error": errors[1]}


def test_the_distance_shrinks_by_one_minus_gain_times_power() -> None:
    rule, power = Energy(gain=0.4, limit=100.0, least=1e-3, most=1e3), 1.5
    dial = rule.step(Signal(1, 9, 1, 1, 8, activation_error=0.3), rule.init(0))[0]
    error = 0.3 * dial.activations**power
    assert math.log(error / 0.1) == pytest.approx((1 - 0.4 * 1.5) * math.log(0.3 / 0.1))


def test_the_residual_stands_in_for_an_unknown_error_of_activations_only() -> None:
    rule = Energy(most=100.0)
    state = rule.init(0)
    for number in range(1, 60):
        dial, state, _ = rule.step(Signal(number, 60, 1, 1, 8, residual_share=0.0004), state)
    assert dial == Dial(pytest.approx(0.1 / 0.02, rel=1e-4), 1.0)
    known = rule.step(Signal(1, 60, 1, 1, 8, residual_share=0.0004, activation_error=0.1), rule.init(0))[0]
    assert known == Dial(pytest.approx(1.0), 1.0), "a measured error comes first"


def test_no_step_is_longer_than_the_limit_and_a_lossless_round_opens_the_dial() -> None:
    rule = Energy()
    for error, dial in ((1e-9, 2.0), (0.0, 2.0), (1e9, 0.5)):
        assert rule.step(Signal(1, 9, 1, 1, 8, activation_error=error), rule.init(0))[0] == Dial(pytest.approx(dial), 1.0)


def test_fixed_gives_its_fields_always() -> None:
    rule = FixedDial(0.5, 2)
    assert rule.step(Signal(1, 9, 1, 1, 8, coded_loss=math.nan, clean_loss=1.0), rule.init(5)) == (Dial(0.5, 2.0), rule.init(5), {})


def test_every_wrong_field_is_named() -> None:
    with pytest.raises(ConfigError, match="2 wrong fields") as fixed:
        FixedDial(-1.0, math.nan)
    assert [problem.split()[0] for problem in fixed.value.problems] == ["activations", "gradients"]
    with pytest.raises(ConfigError, match="5 wrong fields") as energy:
        Energy(target=0.0, target_gradients=2.0, gain=-1.0, limit=1.0, least=5.0, most=2.0)
    assert [problem.split()[0] for problem in energy.value.problems] == ["target", "target_gradients", "gain", "limit", "least"]
    with pytest.raises(ConfigError, match="start is 20"):
        Energy(start=20)
