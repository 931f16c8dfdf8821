"""What streams remember between rounds: kept while their form fits, dropped at both ends when it does not, the same after a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from splitft.compress.base import Codec, Samples
from splitft.compress.feedback import Feedback
from splitft.compress.residual import Residual
from splitft.compress.temporal import Temporal
from splitft.engine.streams import StreamStates, flattened, form_of, joined, open_step_streams, states_after, unflattened
from splitft.rng import torch_stream
from splitft.types import Plan
from splitft.wire import PLACES

from ..support import settings

PLAN = Plan(client=2, cut=3, local_steps=4, rank=2)
SAMPLES = Samples((5, 1), (3, 2))
CODECS: list[Codec] = [Residual(), Temporal(), Feedback(), Feedback(inner=Residual())]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=["residual", "temporal", "feedback", "feedback-residual"])


def rows(turn: int) -> torch.Tensor:
    base = torch.randn(5, 8, generator=torch_stream(1, "streams-test"))
    return base + 0.01 * torch.randn(5, 8, generator=torch_stream(2, "streams-test", turn))


def used(codec: Codec, before: StreamStates | None, first: int, plan: Plan = PLAN) -> tuple[StreamStates, list[bytes]]:
    """Two steps over the activations' stream of a round; what is remembered, and what travelled."""
    config = settings(uplink=codec)
    streams = open_step_streams(config, plan, 1, before)
    sent = [bytes(streams[0].carry(rows(first + k), SAMPLES)[1].payload) for k in range(2)]
    return states_after(config, plan, streams), sent


@every_codec
def test_a_stream_goes_on_where_it_stopped_also_after_a_checkpoint(codec: Codec) -> None:
    states, first = used(codec, None, 0)
    stored = unflattened(states.forms, {name: tensor.clone() for name, tensor in flattened(states).items()})
    _, second = used(codec, states, 2)
    assert used(codec, stored, 2)[1] == second
    assert second != used(codec, None, 2)[1], "what is remembered matters"
    # What is stored and not used since is written as it was.
    again = flattened(stored)
    assert again.keys() == flattened(states).keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in flattened(states).items())
    assert first


@every_codec
@pytest.mark.parametrize("change", [{"cut": 2}, {"tail_blocks": 1, "exit_on_client": True}], ids=str)
def test_memory_of_another_cut_is_dropped(codec: Codec, change: dict[str, Any]) -> None:
    states, _ = used(codec, None, 0)
    moved = replace(PLAN, **change)
    assert used(codec, states, 2, moved)[1] == used(codec, None, 2, moved)[1]


def test_memory_of_another_codec_is_dropped() -> None:
    states, _ = used(Residual(), None, 0)
    other = Residual(cache_dtype="float32")
    assert used(other, states, 2)[1] == used(other, None, 2)[1]


@every_codec
def test_a_dial_does_not_cost_the_memory(codec: Codec) -> None:
    """It turns between rounds; the form is that of the codec as configured."""
    states, _ = used(codec, None, 0)
    dialled = replace(PLAN, dial=(2.0, 1.0))
    assert form_of(codec, PLAN) == form_of(codec, dialled)
    assert used(codec, states, 2, dialled)[1] != used(codec, None, 2, dialled)[1]


@every_codec
def test_ends_kept_apart_are_joined_as_an_engine_that_has_both_keeps_them(codec: Codec) -> None:
    config = settings(uplink=codec)
    together, _ = used(codec, None, 0)
    client, server = (open_step_streams(config, PLAN, 1, None) for _ in range(2))
    for turn in range(2):
        server[0].receive(client[0].send(rows(turn), SAMPLES), SAMPLES)
    both = joined(states_after(config, PLAN, client), states_after(config, PLAN, server))
    for side in ("sender", "receiver"):
        one, other = (codec.flatten(getattr(states.ends[PLACES[0]], side)) for states in (both, together))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
