"""Bang-bang on plants whose answer is known, and its laws one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from splitft.control.bang_bang import BangBang
from splitft.control.base import Dial, Signal
from splitft.errors import ConfigError
from splitft.rng import numpy_stream


def drive(controller: BangBang, excess_at: Callable[[float, int], float], rounds: int = 60) -> list[tuple[float, float]]:
    """Dial and excess of every round of a plant that gives the excess of a dial in a round."""
    state, trace = controller.init(0), []
    dial = controller.first(state)
    for number in range(1, rounds + 1):
        excess = excess_at(dial.activations, number)
        trace.append((dial.activations, excess))
        signal = Signal(number, rounds, 1000, 1000, 8000, clean_loss=3.0, coded_loss=3.0 * (1.0 + excess))
        dial, state, _ = controller.step(signal, state)
    return trace


def after(controller: BangBang, *signals: dict[str, Any], start: float | None = None) -> list[float]:
    """The dials that follow the signals, given as fields."""
    state = controller.init(0) if start is None else {**controller.init(0), "activations": start, "gradients": start}
    dials = []
    for number, fields in enumerate(signals, 1):
        dial, state, _ = controller.step(Signal(number, 9, 10, 10, 80, **fields), state)
        dials.append(dial.activations)
    return dials


def probe(excess: float, **fields: Any) -> dict[str, Any]:
    return {"clean_loss": 2.0, "coded_loss": 2.0 * (1.0 + excess), **fields}


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("move", [1.2, 1.5])
def test_it_settles_inside_the_band_and_stays(power: float, move: float) -> None:
    controller = BangBang(move=move, fine=0.01, coarse=1000.0, start=1.0)
    trace = drive(controller, lambda dial, _: 0.0007 * dial**power, 150)
    settled = trace[-20:]
    assert len({dial for dial, _ in settled}) == 1, "no chatter"
    assert controller.budget * controller.hysteresis <= settled[0][1] <= controller.budget


@pytest.mark.parametrize("seed", range(5))
def test_from_the_fine_end_it_never_overshoots_by_more_than_a_move_and_noise_in_the_band_moves_nothing(seed: int) -> None:
    trace = drive(
        BangBang(coarse=4.0, start=0.0),
        lambda dial, number: 0.002 * dial**2 * (1.0 + 0.1 * numpy_stream(seed, "plant", number).uniform(-1, 1)),
        80,
    )
    dials = [dial for dial, _ in trace]
    assert dials[0] == 0.25
    assert max(excess for _, excess in trace) <= 0.01 * 1.5 * 1.1, "the root of 1.5, squared"
    assert len(set(dials[-60:])) == 1
    assert trace[-1][1] > 0.004, "what the budget allows is used"


def test_it_follows_a_plant_that_becomes_more_sensitive() -> None:
    trace = drive(BangBang(coarse=4.0, start=0.0), lambda dial, number: (0.001 if number < 40 else 0.004) * dial**2, 80)
    assert 1.4 * trace[-1][0] < trace[38][0]
    assert all(excess <= 0.01 for _, excess in trace[:39])
    assert all(excess <= 0.01 for _, excess in trace[46:])


def test_the_two_valued_law_of_the_paper_knows_two_values() -> None:
    trace = drive(BangBang(move=0.0, fine=0.5, coarse=2.0, start=0.0), lambda dial, _: 0.004 * dial**2)
    assert {dial for dial, _ in trace} == {0.5, 2.0}
    calm = drive(BangBang(move=0.0, fine=0.5, coarse=2.0, start=0.0), lambda dial, _: 0.002 * dial**2)
    assert [dial for dial, _ in calm[1:]] == [2.0] * 59, "an excess in the band keeps the coarse dial"


def test_moves_one_by_one() -> None:
    rule = BangBang(start=1.0, coarse=4.0)
    root = math.sqrt(1.5)
    assert after(rule, probe(0.02), probe(0.007), probe(0.001)) == pytest.approx([1 / 1.5, 1 / 1.5, root / 1.5])
    assert after(rule, probe(0.0), probe(-0.5)) == pytest.approx([root, 1.5])
    assert after(rule, probe(math.nan), probe(math.inf)) == pytest.approx([1 / 1.5, 1 / 2.25])
    assert after(rule, probe(0.001), start=4.0) == [4.0], "the coarse end holds"
    assert after(rule, probe(0.5), start=0.25) == [0.25], "the fine end holds"


def test_the_average_forgets_a_single_excursion_only_in_part_and_starts_anew_after_a_move() -> None:
    rule = BangBang(start=1.0, smoothing=0.5, coarse=4.0)
    assert after(rule, probe(0.006), probe(0.013)) == [1.0, 1.0], "the mean, 0.0095, is inside"
    assert after(rule, probe(0.006), probe(0.015)) == pytest.approx([1.0, 1 / 1.5]), "the mean, 0.0105, is not"
    assert after(rule, probe(0.5), probe(0.007)) == pytest.approx([1 / 1.5, 1 / 1.5]), "the first belongs to the old dial"


def test_the_guard_makes_finer_and_bars_the_way_back_until_an_evaluation_is_inside() -> None:
    rule = BangBang(start=1.0, coarse=4.0)
    signals = [probe(0.0, held_out_loss=3.0), probe(0.0, held_out_loss=3.04), probe(0.0), probe(0.0, held_out_loss=3.02), probe(0.0)]
    root = math.sqrt(1.5)
    assert after(rule, *signals) == pytest.approx([root, root / 1.5, root / 1.5, 1.0, root])
    assert after(rule, {"held_out_loss": 3.0, "base_loss": 2.9}) == pytest.approx([1 / 1.5]), "worse than before training"
    assert after(rule, {"held_out_loss": math.nan}) == pytest.approx([1 / 1.5])
    assert after(rule, {"held_out_loss": 2.0}, {"held_out_loss": 2.0199}) == [1.0, 1.0]


def test_the_gradients_dial_moves_along_or_not_at_all() -> None:
    signal = Signal(1, 2, 1, 1, 8, **probe(0.0))
    for moves in (True, False):
        rule = BangBang(gradients=moves, coarse=4.0, start=0.0)
        assert rule.first(rule.init(0)) == Dial(0.25, 0.25 if moves else 1.0)
        dial, _, facts = rule.step(signal, rule.init(0))
        assert dial.gradients == (dial.activations if moves else 1.0)
        assert facts == {"excess": 0.0, "excess_smoothed": 0.0, "guarded": 0.0}


def test_longer_moves_need_a_wider_band() -> None:
    """What the docstring promises and no more: an excess that jumps over the band makes the dial swing."""
    trace = drive(BangBang(move=4.0, hysteresis=0.9, coarse=4.0, start=0.0), lambda dial, _: 0.002 * dial**2)
    assert any(one != other for (one, _), (other, _) in pairwise(trace[-10:]))


def test_every_wrong_field_is_named() -> None:
    with pytest.raises(ConfigError, match="6 wrong fields") as caught:
        BangBang(budget=0.0, hysteresis=2.0, smoothing=True, fine=3.0, coarse=2.0, move=0.5, gradients=1, start=0.0)  # type: ignore[arg-type]
    assert [problem.split()[0] for problem in caught.value.problems] == ["budget", "hysteresis", "smoothing", "fine", "move", "gradients"]
    with pytest.raises(ConfigError, match=r"start is 9\.0; allowed are 0, or a dial from fine to coarse"):
        BangBang(start=9.0, coarse=4.0)
