"""Error-bounded coding: bounds of every kind hold to the last value, steps are as wide as they may be, what cannot be is refused."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import torch

from splitft.compress.base import Packet
from splitft.compress.coding import encode_codes
from splitft.compress.error_bounded import ErrorBounded
from splitft.errors import CodecError, ConfigError
from splitft.rng import torch_stream

ROWS = torch.randn(40, 24, generator=torch_stream(1, "error-bounded-test")) * 2.0 ** torch.arange(-12, 12)


def through(codec: ErrorBounded, rows: torch.Tensor, index: int = 0) -> torch.Tensor:
    packet, _ = codec.encode(rows, None, torch_stream(2, "error-bounded-draw", index))
    return codec.decode(packet, None)[0]


@pytest.mark.parametrize("per", ["packet", "token", "channel"])
@pytest.mark.parametrize("of", ["rms", "range", "absolute"])
@pytest.mark.parametrize(("rounding", "dead_zone"), [("nearest", 0.5), ("nearest", 0.8), ("nearest", 1.0), ("stochastic", 0.5)])
def test_no_value_is_further_off_than_the_bound_says(per: Any, of: Any, rounding: Any, dead_zone: float) -> None:
    """The bound worked out here, by hand, in float64."""
    codec = ErrorBounded(0.25, of, per, rounding, dead_zone)
    axis: dict[str, Any] = {"packet": (0, 1), "token": 1, "channel": 0}
    wide = ROWS.double()
    size = {
        "rms": wide.square().mean(axis[per], keepdim=True).sqrt(),
        "range": wide.amax(axis[per], keepdim=True) - wide.amin(axis[per], keepdim=True),
        "absolute": torch.ones(()),
    }[of]
    error = (through(codec, ROWS).double() - wide).abs()
    assert bool((error <= 0.25 * size + 2.0**-23 * wide.abs()).all())
    # The bound is used: some value is off by three quarters of it.
    assert float((error / size).amax()) > 0.18


@pytest.mark.parametrize("per", ["packet", "token", "channel"])
@pytest.mark.parametrize("value", [-3.7, 1e-30, 3e38, 1e-45, 0.0])
def test_equal_values_have_no_range_and_arrive_exactly(per: Any, value: float) -> None:
    """A range of zero allows no error."""
    rows = torch.full((5, 3), value)
    assert torch.equal(through(ErrorBounded(0.1, "range", per), rows), rows)


def test_a_token_of_one_channel_has_no_range_either() -> None:
    rows = torch.randn(9, 1, generator=torch_stream(3, "error-bounded-test"))
    assert torch.equal(through(ErrorBounded(0.1, "range", "token"), rows), rows)


@pytest.mark.parametrize("of", ["rms", "range"])
@pytest.mark.parametrize("scale", [1e-44, 1e-42, 1e-39, 1e37])
def test_the_bound_holds_at_the_ends_of_float32(of: Any, scale: float) -> None:
    rows = torch.randn(6, 8, generator=torch_stream(4, "error-bounded-test")) * scale
    codec = ErrorBounded(0.125, of)
    assert bool(((through(codec, rows).double() - rows.double()).abs() <= codec.error_bound(rows)).all())


def test_a_bound_beyond_float32_is_as_wide_as_it_gets() -> None:
    rows = torch.tensor([[3e38, -3e38]])
    found = through(ErrorBounded(1e6, "rms"), rows)
    assert bool(torch.isfinite(found).all())


def test_stochastic_rounding_is_right_on_average() -> None:
    rows = torch.tensor([[0.3, -0.7, 0.05, 1.0]])
    codec = ErrorBounded(0.5, "absolute", rounding="stochastic")
    mean = torch.stack([through(codec, rows, index) for index in range(1000)]).mean(0)
    assert bool(((mean - rows).abs() < 4 * 0.25 / 1000**0.5).all())


def test_a_value_beyond_all_numbers_is_refused_by_name() -> None:
    with pytest.raises(CodecError, match=r"1e\+10 is too large for a bound of 1e-06"):
        through(ErrorBounded(1e-6, "absolute"), torch.tensor([1e10]))


@pytest.mark.parametrize("step", [float("nan"), float("inf"), -1.0, struct.unpack("<f", b"\x01\x00\x80\x7f")[0]])
def test_steps_that_cannot_be_are_refused(step: float) -> None:
    body = struct.pack("<f", step) + encode_codes(np.ones((2, 3), np.int32))
    with pytest.raises(CodecError, match="step"):
        ErrorBounded().decode(Packet(4, torch.float32, (2, 3), body), None)


def test_a_nan_that_signals_is_refused_without_a_warning() -> None:
    body = b"\x01\x00\x80\x7f" + encode_codes(np.ones((2, 3), np.int32))
    with pytest.raises(CodecError, match="step"):
        ErrorBounded().decode(Packet(4, torch.float32, (2, 3), body), None)


def test_a_dial_scales_the_bound_and_fewer_bytes_are_taken() -> None:
    codec = ErrorBounded()
    sizes = [len(codec.scaled(factor).encode(ROWS, None)[0].payload) for factor in (0.5, 1.0, 2.0)]
    assert sizes[0] > sizes[1] > sizes[2]
    assert codec.scaled(1.0) is codec


def test_facts_are_energies_of_what_arrives() -> None:
    packet, _ = ErrorBounded().encode(ROWS, None)
    found, _ = ErrorBounded().decode(packet, None)
    assert packet.facts["squared"] == pytest.approx(float(ROWS.double().square().sum()))
    assert packet.facts["squared_error"] == pytest.approx(float((found.double() - ROWS.double()).square().sum()), rel=1e-5)
    assert packet.facts["stage_scales_bytes"] + packet.facts["stage_codes_bytes"] == len(packet.payload)


def test_wrong_fields_are_named_all_at_once() -> None:
    fields: dict[str, Any] = {"bound": -1.0, "of": "x", "per": "y", "rounding": "z", "dead_zone": 2.0}
    with pytest.raises(ConfigError, match="5 wrong fields"):
        ErrorBounded(**fields)
