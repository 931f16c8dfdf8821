"""DDPG: its gradients against autograd, Adam against torch's, resume against a run in one piece, and learning on a simulated plant."""

from __future__ import annotations

import json
import math
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch

from splitft.control.base import Dial, Signal
from splitft.control.ddpg import OBSERVED, Ddpg, Learner, seen_loss
from splitft.control.networks import Moments, Network
from splitft.errors import ConfigError
from splitft.rng import numpy_stream

BUDGET, ROUNDS = 0.01, 80


def plant(dial: Dial, number: int, seed: int, rounds: int = ROUNDS) -> Signal:
    """Bytes fall with the logarithm of the dial, the excess is its square in units of 0.25 % plus noise: the budget is met at dial 2."""
    excess = 0.0025 * dial.activations**2 + 0.0005 * float(numpy_stream(seed, "plant", number).standard_normal())
    sent = int(250_000 / (1.0 + 0.6 * math.log2(4.0 * dial.activations + 1.0)))
    held_out = 3.0 - 0.5 * (1.0 - math.exp(-number / 20)) if number % 5 == 0 else None
    return Signal(number, rounds, sent, 0, 10**6, held_out, 3.1, clean_loss=3.0, coded_loss=3.0 * (1.0 + excess), skipped_share=0.2)


def drive(controller: Ddpg, seed: int, cuts: tuple[int, ...] = (), rounds: int = ROUNDS) -> tuple[list[Signal], list[float], Any]:
    """Signals, dials and last state; after the rounds in `cuts` the state goes through JSON, as in a checkpoint."""
    state, signals, dials = controller.init(seed), [], []
    for number in range(1, rounds + 1):
        dial = controller.first(state)
        dials.append(dial.activations)
        signals.append(plant(dial, number, seed, rounds))
        dial, state, _ = controller.step(signals[-1], state)
        if number in cuts:
            state = json.loads(json.dumps(state, allow_nan=False))
    return signals, dials, state


def reward(signals: list[Signal]) -> float:
    """The mean of what the controller is to make large."""
    return fmean(-math.log(one.bytes_share or 1.0) - math.log(max(1.0, (one.excess or 0.0) / BUDGET)) for one in signals)


@pytest.mark.parametrize("bounded", [True, False])
def test_gradients_are_those_of_autograd(bounded: bool) -> None:
    stream = numpy_stream(1, "test-networks")
    network = Network(tuple(stream.standard_normal(shape) for shape in ((5, 4), (4,), (4, 3), (3,))), bounded)  # type: ignore[arg-type]
    rows, above = stream.standard_normal((7, 5)), stream.standard_normal((7, 3))
    parts = [torch.tensor(part, requires_grad=True) for part in network.parts]
    inputs = torch.tensor(rows, requires_grad=True)
    out = torch.tanh(inputs @ parts[0] + parts[1]) @ parts[2] + parts[3]
    out = torch.tanh(out) if bounded else out
    assert np.allclose(network(rows), out.detach().numpy(), rtol=0, atol=1e-13)
    out.backward(torch.tensor(above))
    by_parts, by_rows = network.gradients(rows, above)
    for mine, tensor in zip([*by_parts, by_rows], [*parts, inputs], strict=True):
        assert tensor.grad is not None
        assert np.allclose(mine, tensor.grad.numpy(), rtol=0, atol=1e-12)


def test_steps_are_those_of_adam() -> None:
    stream = numpy_stream(2, "test-networks")
    network = Network.drawn(3, 4, 2, False, stream)
    moments = Moments.empty(network)
    parts = [torch.tensor(part, requires_grad=True) for part in network.parts]
    optimizer = torch.optim.Adam(parts, lr=0.02)
    for _ in range(5):
        gradients = [stream.standard_normal(part.shape) for part in network.parts]
        network, moments = moments.step(network, gradients, 0.02)
        for part, gradient in zip(parts, gradients, strict=True):
            part.grad = torch.tensor(gradient)
        optimizer.step()
    assert all(np.allclose(mine, part.detach().numpy(), rtol=0, atol=1e-12) for mine, part in zip(network.parts, parts, strict=True))


def test_the_learner_finds_the_best_action_of_a_one_step_problem() -> None:
    """Reward -(action - 0.5 first feature)^2 at discount 0: the actor must become half the first feature."""
    stream, features = numpy_stream(3, "test-learner"), len(OBSERVED)
    states, actions = stream.uniform(-1, 1, (600, features)), stream.uniform(-1, 1, (600, 1))
    rewards = -((actions - 0.5 * states[:, :1]) ** 2)
    known = np.hstack([states, actions, rewards, states])
    learner = Learner.drawn(1, 16, 5)
    before = np.abs(learner.actor(states) - 0.5 * states[:, :1]).mean()
    for _ in range(1500):
        learner = learner.improved(known[stream.integers(0, 600, 64)], 0.0, 0.01, 0.05, 0.0)
    after = np.abs(learner.actor(states) - 0.5 * states[:, :1]).mean()
    assert before > 0.2
    assert after < 0.08


@pytest.mark.parametrize("start", [0.25, 8.0])
def test_it_learns_to_sit_near_the_budget(start: float) -> None:
    seeds = range(3)
    runs = [drive(Ddpg(start=start), seed) for seed in seeds]
    for signals, dials, _ in runs:
        tail = fmean(dials[-20:])
        assert abs(math.log(tail / 2.0)) < 0.5 * abs(math.log(start / 2.0)), "less than half as far from the best dial as it began"
        assert reward(signals[-20:]) > reward(signals[:5]) + 0.3
        assert fmean(one.excess or 0.0 for one in signals[-20:]) < BUDGET


@pytest.mark.parametrize("separate", [False, True])
def test_a_resumed_run_is_the_run_in_one_piece(separate: bool) -> None:
    controller = Ddpg(separate=separate, updates=3)
    whole = drive(controller, 7, rounds=24)
    assert drive(controller, 7, tuple(range(1, 25)), rounds=24) == whole
    assert drive(controller, 7, (9,), rounds=24) == whole
    assert len(whole[2]["transitions"]) == 23


def test_the_memory_is_bounded_and_holds_the_latest() -> None:
    long, short = (drive(Ddpg(memory=memory, updates=0), 1, rounds=30)[2]["transitions"] for memory in (256, 7))
    assert (len(long), len(short)) == (29, 7)
    assert long[-7:] == short
    assert {len(row) for row in long} == {2 * len(OBSERVED) + 2}


def test_a_round_without_a_probe_keeps_the_dial_and_teaches_nothing() -> None:
    controller = Ddpg(updates=1)
    state = drive(controller, 1, rounds=12)[2]
    dial, after, facts = controller.step(Signal(13, 80, 1, 1, 8, held_out_loss=2.0), state)
    assert (dial, facts) == (controller.first(state), {})
    assert after == {**state, "before": None, "held_out": after["held_out"]}
    assert after["held_out"]["loss"] == 2.0
    again = controller.step(plant(dial, 14, 1), after)[1]
    assert again["transitions"] == state["transitions"], "no transition across the gap"


def test_one_action_moves_both_dials_and_separate_moves_each() -> None:
    for separate in (False, True):
        dial = Ddpg(separate=separate).step(plant(Dial(), 1, 1), Ddpg(separate=separate).init(4))[0]
        assert (dial.activations == dial.gradients) != separate
        assert all(1 / 1.5 <= value <= 1.5 for value in (dial.activations, dial.gradients))


def test_the_slope_is_per_round_between_evaluations() -> None:
    first = seen_loss(Signal(1, 9, 1, 1, 8, base_loss=3.0), {"loss": None, "best_loss": None, "evaluated": 0, "slope": 0.0})
    assert first == {"loss": None, "best_loss": 3.0, "evaluated": 0, "slope": 0.0}
    second = seen_loss(Signal(4, 9, 1, 1, 8, held_out_loss=2.94, base_loss=3.0), first)
    assert second == {"loss": 2.94, "best_loss": 2.94, "evaluated": 4, "slope": pytest.approx(20 * 0.02 / 4)}
    assert seen_loss(Signal(5, 9, 1, 1, 8, held_out_loss=math.nan), second) == second


def test_every_wrong_field_is_named() -> None:
    with pytest.raises(ConfigError, match="5 wrong fields") as caught:
        Ddpg(penalty=-1.0, least=0.0, updates=1.5, hidden=0, rate=0.0)  # type: ignore[arg-type]
    assert [problem.split()[0] for problem in caught.value.problems] == ["penalty", "least", "updates", "hidden", "rate"]
