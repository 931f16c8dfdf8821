"""The contract of every controller: a dial within its bounds whatever a round gave, a state that survives a checkpoint."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitft.control.bang_bang import BangBang
from splitft.control.base import Controller, Dial, Facts, Signal, State
from splitft.control.ddpg import Ddpg
from splitft.control.energy import Energy
from splitft.control.fixed import FixedDial

SMALL: dict[str, Any] = {"hidden": 3, "batch": 4, "memory": 5, "updates": 1}
CONTROLLERS: list[Controller] = [
    FixedDial(),
    FixedDial(0.25, 3.0),
    BangBang(),
    BangBang(move=0.0, gradients=False, fine=0.5, coarse=2.0),
    BangBang(fine=2.0, coarse=3.0, start=2.5, gradients=False, hysteresis=1.0, smoothing=0.0),
    Energy(),
    Energy(gain=2.0, limit=100.0, least=1e-6, most=1e6),
    Ddpg(**SMALL),
    Ddpg(**SMALL, separate=True, least=1.0, most=1.0, discount=0.0),
]
every_controller = pytest.mark.parametrize("controller", CONTROLLERS, ids=repr)
ANY = st.none() | st.floats() | st.sampled_from([0.0, 1e-300, 3.0, 1e300, math.inf, math.nan])
SENSIBLE = st.none() | st.floats(0.0, 4.0)
SIZES = st.sampled_from([0, 1, 1000, 10**15])


def signals(numbers: st.SearchStrategy[float | None]) -> st.SearchStrategy[Signal]:
    names = [name for name in Signal.__dataclass_fields__ if name.endswith(("_loss", "_error", "_share"))]
    sizes = dict.fromkeys(("uplink_bytes", "downlink_bytes", "uncompressed_bytes"), SIZES)
    return st.builds(Signal, round=st.integers(1, 50), rounds=st.just(40), **sizes, **dict.fromkeys(names, numbers))


RUNS = st.lists(signals(ANY) | signals(SENSIBLE), min_size=1, max_size=10)


def play(
    controller: Controller, run: Sequence[Signal], seed: int = 3, through_json: bool = False
) -> tuple[list[Dial], list[Facts], list[State]]:
    state = controller.init(seed)
    dials, facts, states = [controller.first(state)], [], [state]
    for signal in run:
        if through_json:
            state = json.loads(json.dumps(state, allow_nan=False))
        dial, state, found = controller.step(signal, state)
        dials.append(dial)
        facts.append(found)
        states.append(state)
    return dials, facts, states


@every_controller
@settings(max_examples=12)
@given(run=RUNS)
def test_every_dial_is_within_the_bounds_and_every_fact_a_number(controller: Controller, run: list[Signal]) -> None:
    least, most = controller.bounds
    dials, facts, states = play(controller, run)
    assert 0.0 <= least <= most < math.inf
    for dial in dials:
        assert least <= dial.activations <= most
        assert least <= dial.gradients <= most
    assert all(type(value) is float and math.isfinite(value) for found in facts for value in found.values())
    assert [controller.first(state) for state in states] == dials, "a resumed run goes on with the dial it had"


@every_controller
@settings(max_examples=8)
@given(run=RUNS)
def test_a_state_survives_a_checkpoint_exactly_and_keeps_its_form(controller: Controller, run: list[Signal]) -> None:
    straight = play(controller, run)
    assert play(controller, run, through_json=True) == straight
    for state in straight[2]:
        assert json.loads(json.dumps(state, allow_nan=False)) == state, "a tuple or an array is not plain"
        assert set(state) == set(straight[2][0])


@every_controller
@settings(max_examples=8)
@given(run=RUNS)
def test_a_step_repeats_and_leaves_its_arguments_alone(controller: Controller, run: list[Signal]) -> None:
    state = play(controller, run[:-1])[2][-1]
    kept = copy.deepcopy(state)
    first, again = controller.step(run[-1], state), controller.step(run[-1], state)
    assert first == again
    assert state == kept


@every_controller
def test_a_round_that_measured_nothing_changes_nothing(controller: Controller) -> None:
    dials, _, _ = play(controller, [Signal(1, 9, 500, 500, 8000), Signal(2, 9, 0, 0, 0)])
    assert len(set(dials)) == 1


def test_only_what_draws_depends_on_the_seed() -> None:
    run = [Signal(number, 20, 500, 500, 8000, clean_loss=3.0, coded_loss=3.02, activation_error=0.3) for number in range(1, 11)]
    for controller in CONTROLLERS:
        one, other = play(controller, run, seed=1)[0], play(controller, run, seed=2)[0]
        least, most = controller.bounds
        assert (one != other) == (isinstance(controller, Ddpg) and least < most)


def test_an_excess_is_a_share_of_the_clean_loss_and_never_hides_a_broken_model() -> None:
    def excess(clean: float | None, coded: float | None) -> float | None:
        return Signal(1, 2, 0, 0, 0, clean_loss=clean, coded_loss=coded).excess

    assert excess(2.0, 2.5) == 0.25
    assert excess(2.0, 1.5) == -0.25
    assert {excess(None, 2.0), excess(2.0, None), excess(0.0, 1.0), excess(math.nan, 1.0), excess(math.inf, 1.0)} == {None}
    assert {excess(2.0, math.inf), excess(2.0, math.nan), excess(1e-300, 1e300)} == {1e6}
