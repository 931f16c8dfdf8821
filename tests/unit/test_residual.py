"""Changes against what the receiver holds: what travels, what is kept, and the ends of the number range."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch

from splitft.compress.base import Packet, Samples, State
from splitft.compress.cast import Cast
from splitft.compress.error_bounded import ErrorBounded
from splitft.compress.feedback import Feedback
from splitft.compress.residual import HEAD, Residual, largest_of_both
from splitft.errors import CodecError, ConfigError
from splitft.rng import torch_stream

SAMPLES = Samples((7, 2), (3, 2))
ROWS = torch.randn(5, 16, generator=torch_stream(1, "residual-test"))


def send(codec: Residual, rows: torch.Tensor, states: tuple[State, State] | None) -> tuple[Packet, torch.Tensor, tuple[State, State]]:
    sender, receiver = states or (codec.init(), codec.init())
    packet, sender = codec.encode(rows, sender, None, SAMPLES)
    decoded, receiver = codec.decode(packet, receiver, SAMPLES)
    return packet, decoded, (sender, receiver)


def test_what_travels_is_the_change_over_the_root_mean_square() -> None:
    codec = Residual(inner=Cast("float32"), drift=False, cache_dtype="float32")
    _, first, states = send(codec, ROWS, None)
    now = ROWS * 1.1
    packet, second, _ = send(codec, now, states)
    flags, payload = packet.payload[:1], packet.payload[1:]
    assert bytes(flags) == b"\xc0", "both samples are known"
    scale = struct.unpack("<f", payload[:4])[0]
    assert scale == pytest.approx(float(now.square().mean().sqrt()), rel=1e-6)
    sent = torch.frombuffer(bytearray(payload[HEAD.size :]), dtype=torch.float32).reshape(5, 16)
    assert torch.equal(sent, (now - first) / scale)
    assert torch.allclose(second, now, rtol=1e-6, atol=1e-7)


def test_the_cache_is_what_arrived_at_both_ends() -> None:
    codec = Residual()
    _, decoded, (sender, receiver) = send(codec, ROWS, None)
    for state in (sender, receiver):
        assert torch.equal(state.own.rows(SAMPLES, 16), decoded)


def test_what_has_not_changed_costs_next_to_nothing() -> None:
    codec = Residual()
    rows = torch.randn(96, 16, generator=torch_stream(2, "residual-test"))
    samples, sizes, state = Samples((1,), (96,)), [], codec.init()
    for _ in range(2):
        packet, state = codec.encode(rows, state, None, samples)
        sizes.append(len(packet.payload))
    assert sizes[1] < sizes[0] / 4


@pytest.mark.parametrize("now", [0.0, 1e-38, 1e-44, 1e-12, 1e12, 3e38])
@pytest.mark.parametrize("before", [1.0, 3e38, 1e-44])
@pytest.mark.parametrize("inner", [Cast(), ErrorBounded(0.125, "absolute")], ids=["cast", "error_bounded"])
def test_rows_may_vanish_or_explode_between_two_visits(now: float, before: float, inner: Any) -> None:
    """The change over the rows' own size would be beyond float32, or beyond what can be counted; then the change is the measure."""
    codec = Residual(inner=inner, cache_dtype="float32")
    _, _, states = send(codec, ROWS.sign() * before, None)
    rows = -ROWS.sign() * now
    _, decoded, states = send(codec, rows, states)
    reach = max(float(rows.abs().amax()), 2.0**-19 * before)
    # One visit more where the change itself was beyond float32.
    _, decoded, states = send(codec, rows, states)
    assert bool(((decoded - rows).abs() <= 0.13 * reach + 1e-44).all())
    assert torch.equal(states[0].own.rows(SAMPLES, 16), states[1].own.rows(SAMPLES, 16))


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_largest_values_of_every_type_stay_finite(dtype: torch.dtype, cache_dtype: Any) -> None:
    most = min(torch.finfo(dtype).max, 3.38e38)
    rows = (ROWS.sign() * most).to(dtype)
    states = None
    for turn in range(3):
        _, decoded, states = send(Residual(inner=Cast(), cache_dtype=cache_dtype), rows * (-1) ** turn, states)
        assert bool(torch.isfinite(decoded).all())
        assert decoded.dtype == dtype


def test_the_largest_number_of_two_types() -> None:
    assert largest_of_both(torch.float16, torch.bfloat16) == largest_of_both(torch.bfloat16, torch.float16) == 65280.0
    assert largest_of_both(torch.float16, torch.float32) == 65504.0
    assert largest_of_both(torch.float32, torch.bfloat16) == torch.finfo(torch.bfloat16).max


def test_facts_are_those_of_the_rows() -> None:
    codec = Residual(drift=False)
    _, first, states = send(codec, ROWS, None)
    now = ROWS * 1.2
    packet, second, _ = send(codec, now, states)
    assert (packet.facts["samples"], packet.facts["known_samples"]) == (2.0, 2.0)
    assert packet.facts["squared"] == pytest.approx(float(now.square().sum()))
    assert packet.facts["residual_squared"] == pytest.approx(float((now - first).square().sum()), rel=1e-5)
    # But for the cache's own rounding.
    assert packet.facts["squared_error"] == pytest.approx(float((now - second).square().sum()), rel=0.05)


@pytest.mark.parametrize(
    "payload", [b"", bytes(3), bytes(7), *(HEAD.pack(scale, 0) + bytes(9) for scale in (0.0, -1.0, float("nan"), float("inf")))]
)
def test_scales_that_cannot_be_are_refused(payload: bytes) -> None:
    with pytest.raises(CodecError, match="scale"):
        Residual().decode(Packet(5, torch.float32, (5, 16), b"\x00" + payload), Residual().init(), SAMPLES)


def test_ends_that_know_different_samples_notice() -> None:
    codec = Residual()
    first, _, (sender, receiver) = send(codec, ROWS, None)
    assert bytes(first.payload[:1]) == b"\x00", "none is known"
    second, _ = codec.encode(ROWS, sender, None, SAMPLES)
    half, _ = codec.encode(ROWS[:3], codec.init(), None, Samples((7,), (3,)))
    _, knows_one = codec.decode(half, codec.init(), Samples((7,), (3,)))
    empty = Packet(5, torch.float32, (5, 16), b"")
    for packet, state in ((second, codec.init()), (second, knows_one), (first, receiver), (empty, receiver)):
        with pytest.raises(CodecError, match="do not know the same samples"):
            codec.decode(packet, state, SAMPLES)


def test_an_inner_codec_whose_ends_differ_is_refused() -> None:
    with pytest.raises(ConfigError, match="two ends"):
        Residual(inner=Feedback())
