"""The codecs' dial: what a controller is told of a round, and a probe that learns nothing, moves no stream and is counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splitft.compress.base import HEADER_BYTES, Samples
from splitft.compress.cast import Cast
from splitft.compress.quantize import Quantize
from splitft.compress.residual import Residual
from splitft.control.bang_bang import BangBang
from splitft.control.fixed import FixedDial
from splitft.engine.dial import STATE, _probe, _signal, dial_of, observe
from splitft.engine.ledger import Ledger
from splitft.engine.settings import ClientState, RoundResult
from splitft.engine.streams import StreamStates, flattened, open_step_streams, states_after
from splitft.rng import torch_stream
from splitft.types import Plan

from ..support import federation

PLANS = tuple(Plan(client, 1, 2, 3) for client in range(3))


def round_of(facts: dict[int, dict[str, dict[str, float]]], plans: tuple[Plan, ...] = PLANS, **notes: Any) -> tuple[Any, Any]:
    """A run and what a round of it gave."""
    ledger = Ledger()
    for plan in plans:
        ledger.add(plan.client, "up", "activations", 1000)
        ledger.add(plan.client, "down", "gradients", 500)
    result = RoundResult(plans, torch.empty(0, 0), [1] * len(plans), [[2.0, 4.0]] * len(plans), ledger, {}, facts=facts)
    run = SimpleNamespace(
        state=SimpleNamespace(notes=notes), rules=SimpleNamespace(rounds=9, seed=3, probe_rows=4), controller=FixedDial(), federation=None
    )
    return run, SimpleNamespace(result=result, records=None)


def test_a_controller_is_told_shares_of_sums_over_all_clients() -> None:
    activations = {"bytes": 100.0, "plain_bytes": 400.0, "squared": 8.0, "squared_error": 1.0, "samples": 4.0, "skipped": 1.0}
    more = {**activations, "squared_error": 1.0, "known_squared": 10.0, "residual_squared": 2.0}
    gradients = {"bytes": 50.0, "plain_bytes": 60.0, "squared": 4.0, "squared_error": 1.0}
    adapters = {"bytes": 10.0, "plain_bytes": 30.0, "squared": 1.0, "squared_error": 1.0}
    facts = {0: {"up activations": activations, "down gradients": gradients}, 2: {"up activations": more, "up adapters": adapters}}
    run, trained = round_of(facts, base_loss={"a": 5.0, "b": 7.0})
    signal = _signal(run, 4, trained, {"global": {"loss": 1.5}}, {"clean_loss": 1.0, "coded_loss": 1.25})
    assert (signal.round, signal.rounds, signal.uplink_bytes, signal.downlink_bytes) == (4, 9, 3000, 1500)
    assert signal.uncompressed_bytes == 4500 + (400 - 100) * 2 + 10 + 20
    assert (signal.held_out_loss, signal.base_loss, signal.train_loss) == (1.5, 6.0, 3.0)
    assert signal.activation_error == pytest.approx((2 / 16) ** 0.5)
    assert signal.gradient_error == pytest.approx(0.5)
    assert signal.residual_share == pytest.approx(0.2)
    assert signal.skipped_share == pytest.approx(0.25)
    assert signal.excess == pytest.approx(0.25)


def test_what_was_not_measured_is_none() -> None:
    run, trained = round_of({})
    signal = _signal(run, 1, trained, None, {})
    unmeasured = (signal.held_out_loss, signal.base_loss, signal.clean_loss, signal.activation_error, signal.residual_share)
    assert unmeasured == (None,) * 5
    assert signal.uncompressed_bytes == signal.uplink_bytes + signal.downlink_bytes


def test_a_dial_that_never_moves_leaves_no_notes_and_says_only_what_is_not_as_configured() -> None:
    run, trained = round_of({})
    assert observe(run, 1, trained, torch.empty(0), None, {}) == ({}, {})
    dialled = tuple(Plan(one.client, 1, 2, 3, dial=(2.0, 1.0)) for one in PLANS)
    run, trained = round_of({}, dialled)
    assert observe(run, 1, trained, torch.empty(0), None, {}) == ({"dial": {"activations": 2.0, "gradients": 1.0}}, {})


def test_the_next_dial_is_the_controller_s_state() -> None:
    run, _ = round_of({})
    run.controller = FixedDial(activations=1.5, gradients=0.5)
    assert dial_of(run) == (1.5, 0.5)
    run.controller = BangBang()
    state = dict(run.controller.init(3)) | {"activations": 3.0, "gradients": 2.0}
    run.state.notes[STATE] = state
    assert dial_of(run) == (3.0, 2.0)


def probed(
    codec: Any, plans: tuple[Plan, ...] = PLANS, streams: StreamStates | None = None, index: int = 1
) -> tuple[dict[str, float], Ledger]:
    """A probe over a tiny model whose activations take this codec."""
    run, trained = round_of({}, plans)
    run.federation = federation(uplink=codec, downlink=codec, length=(8, 12))
    states = {plan.client: ClientState(streams=streams) for plan in plans} if streams else {}
    trained.result.ledger = Ledger()
    return _probe(run, index, trained, run.federation.start, states), trained.result.ledger


@pytest.mark.parametrize("changes", [{}, {"exit_on_client": True, "tail_blocks": 1}], ids=["split", "u-shape"])
def test_a_probe_measures_what_the_codec_costs_and_its_bytes_are_counted(changes: dict[str, Any]) -> None:
    plans = tuple(Plan(one.client, 1, 2, 3, **changes) for one in PLANS)
    plain, ledger = probed(Cast(), plans)
    assert plain["clean_loss"] == plain["coded_loss"] > 0
    assert plain["bytes"] == sum(ledger.total(plan.client, way) for plan in plans for way in ("up", "down"))
    assert ledger.of(0)["up"]["activations"] > HEADER_BYTES
    assert bool(ledger.of(0)["down"]["activations"]) == bool(changes)
    assert bool(ledger.of(0)["up"]["labels"]) != bool(changes)
    coarse, _ = probed(Quantize(bits=2), plans)
    assert coarse["clean_loss"] == plain["clean_loss"]
    assert coarse["coded_loss"] != coarse["clean_loss"]
    assert probed(Quantize(bits=2), plans)[0] == coarse, "equal arguments give equal answers"


def test_a_probe_goes_through_the_stream_as_it_stands_and_leaves_it_there() -> None:
    codec = Residual()
    config = federation(uplink=codec).settings
    opened = open_step_streams(config, PLANS[0], 1, None)
    opened[0].carry(torch.randn(3, 8, generator=torch_stream(1, "dial-test")), Samples((900,), (3,)))
    states = states_after(config, PLANS[0], opened)
    before = {name: tensor.clone() for name, tensor in flattened(states).items()}
    found, _ = probed(codec, PLANS[:1], states)
    after = flattened(states)
    assert before
    assert found["coded_loss"] != found["clean_loss"]
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_clients_with_the_whole_model_have_nothing_to_probe() -> None:
    whole = tuple(Plan(one.client, 1, 2, 3, exit_on_client=True, tail_blocks=federation().split.blocks - 1) for one in PLANS)
    found, ledger = probed(Cast(), whole)
    assert found == {}
    assert ledger.clients == {}
