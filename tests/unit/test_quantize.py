"""compress/quantize.py against arithmetic in float64, byte for byte where the format says so; rounding, outliers, damaged packets."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
import torch

from splitft.compress.base import HEADER_BYTES, Packet
from splitft.compress.bits import add_noise, bf16_steps, code_bytes, pack_codes, unpack_codes
from splitft.compress.groups import packet_extremes
from splitft.compress.quantize import Quantize
from splitft.errors import CodecError, ConfigError
from splitft.rng import torch_stream


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch_stream(seed, "quantize-test"))


def through(codec: Quantize, tensor: torch.Tensor, seed: int = 0) -> torch.Tensor:
    packet, _ = codec.encode(tensor, None, torch_stream(seed, "noise") if codec.draws else None)
    return codec.decode(packet, None)[0]


def bf16_above(value: float) -> float:
    """The smallest bfloat16 that is not below a positive value, by its bits."""
    bits = struct.unpack("<I", struct.pack("<f", np.float32(value)))[0]
    return struct.unpack("<f", struct.pack("<I", (bits + 0xFFFF) & 0xFFFF0000))[0]


def test_one_token_by_hand() -> None:
    tensor = torch.tensor([[127.0, -63.4, 0.6, 0.0]])
    packet, _ = Quantize().encode(tensor, None)
    assert bytes(packet.payload) == struct.pack("<H4b", 0x3F80, 127, -63, 1, 0), "a step of one is bfloat16's 0x3F80"
    assert Quantize().decode(packet, None)[0].tolist() == [[127.0, -63.0, 1.0, 0.0]]


def test_four_bits_share_a_byte_with_the_other_half_of_the_row() -> None:
    tensor = torch.tensor([[7.0, 1.0, -7.0, 0.0, 3.0]])
    packet, _ = Quantize(bits=4).encode(tensor, None)
    fields = [value + 8 for value in (7, 1, -7, 0, 3, 0)]  # the sixth is filling
    assert bytes(packet.payload[2:]) == bytes(fields[k] + 16 * fields[3 + k] for k in range(3))
    assert torch.equal(Quantize(bits=4).decode(packet, None)[0], tensor)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per", ["token", "channel", "block"])
def test_the_error_is_half_a_step_of_the_group_and_a_step_is_its_range_over_the_levels(bits: int, symmetric: bool, per: Any) -> None:
    """The docstring's formula, computed here in float64 from the tensor alone."""
    codec = Quantize(bits, per, 8, symmetric)
    tensor = random(6, 24) * 10.0 ** torch.arange(-3.0, 3.0)[:, None] + 2.0
    values = tensor.double().numpy()
    grouped = {"token": values[:, None], "channel": values.T[:, None], "block": values.reshape(6, 3, 8)}[per]
    if symmetric:
        steps = np.abs(grouped).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    else:
        # The middle travels in bfloat16: off by 2^-9 of itself, which the levels must also reach.
        middle = np.abs(grouped.max(-1, keepdims=True) + grouped.min(-1, keepdims=True)) / 2
        steps = (np.ptp(grouped, -1, keepdims=True) + 2 * 2.0**-8 * middle) / (2**bits - 1)
    allowed = np.broadcast_to(0.5 * (1 + 2.0**-7) * (1 + 1e-4) * steps, grouped.shape).reshape(-1)
    error = np.abs(through(codec, tensor).double().numpy() - values)
    error = (error.T if per == "channel" else error).reshape(-1)
    assert (error <= allowed).all()
    assert error.max() > 0.5 * allowed[error.argmax()] * 0.5, "the bound is not idle"
    declared = codec.error_bound(tensor).numpy()
    declared = (declared.T if per == "channel" else declared).reshape(-1)
    assert (declared <= allowed * 1.01 + 1e-6 * np.abs(values).max()).all(), "what the codec declares is what its docstring says"


def test_zero_stays_zero_and_the_largest_keeps_its_sign() -> None:
    tensor = random(5, 16)
    tensor[:, ::3] = 0.0
    for bits in (8, 4, 2):
        found = through(Quantize(bits), tensor)
        assert bool((found[:, ::3] == 0.0).all())
        largest = tensor.abs().argmax(1, keepdim=True)
        assert torch.equal(found.gather(1, largest).sign(), tensor.gather(1, largest).sign())


@pytest.mark.parametrize("bits", [4, 2])
def test_what_has_few_levels_is_rounded_once(bits: int) -> None:
    once = through(Quantize(bits), random(7, 33))
    assert torch.equal(through(Quantize(bits), once), once)


def test_a_constant_is_exact_when_affine() -> None:
    for value in (0.0, -3.5, 1001.0, 2.0**-140, 3.0e38):
        tensor = torch.full((3, 9), value)
        assert float((through(Quantize(symmetric=False), tensor) - tensor).abs().max()) <= max(2.0**-16 * abs(value), 2.0**-127)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_stochastic_rounding_is_right_on_average_and_nearest_is_not(bits: int, symmetric: bool) -> None:
    tensor = random(1, 40)
    draws = torch.stack([through(Quantize(bits, symmetric=symmetric, rounding="stochastic"), tensor, seed) for seed in range(3000)])
    step = float(Quantize(bits, symmetric=symmetric).error_bound(tensor).max()) * 2
    assert float((draws.double().mean(0) - tensor.double()).abs().max()) < 5 * step / 2 / math.sqrt(3000)
    assert float((through(Quantize(bits, symmetric=symmetric), tensor) - tensor).abs().max()) > 5 * step / 2 / math.sqrt(3000)
    assert bool(((draws - tensor).abs() < step * 1.001).all())
    assert len(draws.unique(dim=0)) > 100


def test_stochastic_rounding_leaves_whole_steps_alone() -> None:
    tensor = torch.arange(-127.0, 128.0)[None]
    for seed in range(20):
        assert torch.equal(through(Quantize(rounding="stochastic"), tensor, seed), tensor)


def test_the_generator_decides_and_is_needed() -> None:
    codec, tensor = Quantize(bits=2, rounding="stochastic"), random(3, 20)
    assert torch.equal(through(codec, tensor, 1), through(codec, tensor, 1))
    assert not torch.equal(through(codec, tensor, 1), through(codec, tensor, 2))
    with pytest.raises(AssertionError, match="generator"):
        codec.encode(tensor, None, None)


def test_noise_is_even_and_reaches_neither_end() -> None:
    drawn = add_noise(torch.zeros(401, 1001), [401], [torch_stream(0, "even")]).double()
    assert 0.0 < float(drawn.min()) < 1e-4
    assert 1.0 - 1e-4 < float(drawn.max()) < 1.0
    counts = torch.histc(drawn, 16, 0, 1)
    assert float((counts / counts.mean() - 1).abs().max()) < 0.03
    assert abs(float(drawn.mean()) - 0.5) < 3 / math.sqrt(12 * drawn.numel())


def test_outlier_channels_are_the_largest_travel_in_bfloat16_and_spoil_nothing() -> None:
    tensor = random(50, 40)
    tensor[:, [3, 17]] *= 500.0
    codec = Quantize(bits=4, outliers=0.05)
    packet, _ = codec.encode(tensor, None)
    found, _ = codec.decode(packet, None)
    assert struct.unpack_from("<2i", packet.payload, 2 * 50) == (3, 17)
    assert torch.equal(found[:, [3, 17]], tensor[:, [3, 17]].bfloat16().float())
    rest = [k for k in range(40) if k not in (3, 17)]
    without = tensor.clone()
    without[:, [3, 17]] = 0.0
    assert torch.equal(found[:, rest], through(Quantize(bits=4), without)[:, rest])
    plain = (through(Quantize(bits=4), tensor) - tensor)[:, rest].square().mean()
    assert float((found - tensor)[:, rest].square().mean()) < 0.01 * float(plain)


def test_equal_channels_are_chosen_in_order() -> None:
    packet, _ = Quantize(outliers=0.25).encode(torch.ones(2, 8), None)
    assert struct.unpack_from("<2i", packet.payload, 2 * 2) == (0, 1)


@pytest.mark.parametrize("shape", [(4, 7, 33), (5, 33), (33,), (1, 1, 1), (2, 256)])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("per", ["token", "channel", "block"])
@pytest.mark.parametrize(("symmetric", "outliers"), [(True, 0.0), (False, 0.0), (True, 0.1)])
def test_size_in_closed_form(shape: tuple[int, ...], bits: int, per: Any, symmetric: bool, outliers: float) -> None:
    codec = Quantize(bits, per, 16, symmetric, outliers=outliers)
    rows, width = math.prod(shape[:-1]), shape[-1]
    scales = {"token": rows, "channel": width, "block": rows * math.ceil(width / 16)}[per] * (1 if symmetric else 2)
    channels = math.ceil(outliers * width)
    expected = HEADER_BYTES + 2 * scales + channels * (4 + 2 * rows) + rows * math.ceil(width * bits / 8)
    packet, _ = codec.encode(random(*shape), None)
    assert packet.size_bytes == codec.packet_bytes(shape, torch.float32) == expected


def test_steps_are_rounded_up_to_bfloat16_and_never_vanish_or_overflow() -> None:
    reach = torch.cat([10.0 ** torch.linspace(-37.0, 38.0, 4001), torch.tensor([1.4e-45, 1e-40, 3.4028234e38])])
    for levels in (127.0, 7.0, 1.0, 127.5, 1.5):
        steps = bf16_steps(reach, levels)
        assert torch.equal(steps, steps.bfloat16().float())
        assert bool(torch.isfinite(steps).all())
        assert bool((steps.float() >= 2.0**-126).all())
        wanted = (reach / levels).double().numpy()
        expected = [min(bf16_above(max(one, 2.0**-126)), torch.finfo(torch.bfloat16).max) for one in wanted]
        assert steps.double().tolist() == expected
    assert bf16_steps(torch.zeros(3), 7.0).tolist() == [0.0] * 3


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("width", [1, 3, 4, 5, 8, 33])
def test_every_code_survives_packing(bits: int, width: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.randint(low, high + 1, (50, width), generator=torch_stream(0, "codes")).float()
    codes[0] = low
    codes[1] = high
    data = pack_codes(codes.clone(), bits)
    assert data.dtype == torch.uint8
    assert data.shape == (50, code_bytes(width, bits))
    assert torch.equal(unpack_codes(data, bits, width), codes)


def test_extremes_of_ragged_packets() -> None:
    rows = random(13, 5)
    for counts in ([13], [4, 1, 8], [1] * 13):
        lowest, highest = packet_extremes(rows, counts)
        assert torch.equal(lowest, torch.stack([part.amin(0) for part in rows.split(counts)]))
        assert torch.equal(highest, torch.stack([part.amax(0) for part in rows.split(counts)]))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 3}, "bits is 3"),
        ({"bits": True}, "bits is True"),
        ({"bits": 8.0}, "bits is 8.0"),
        ({"per": "row"}, "per is 'row'"),
        ({"block": 1}, "block is 1"),
        ({"symmetric": 1}, "symmetric is 1"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"outliers": 0.6}, "outliers is 0.6"),
        ({"outliers": math.nan}, "outliers is nan"),
        ({"outliers": "0.1"}, "outliers is '0.1'"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Quantize(**fields)
    assert words in " ".join(refusal.value.problems)


def damaged(codec: Quantize, position: int, data: bytes) -> Packet:
    packet, _ = codec.encode(random(4, 10), None)
    payload = bytearray(packet.payload)
    payload[position : position + len(data)] = data
    return Packet(packet.codec, packet.dtype, packet.shape, bytes(payload))


@pytest.mark.parametrize(
    ("codec", "position", "data", "words"),
    [
        (Quantize(), 2, b"\xc0\x7f", "1 of 4 values are NaN"),
        (Quantize(), 2, b"\x80\x7f", "1 of 4 values are infinite"),
        (Quantize(symmetric=False), 8, b"\x80\xff", "1 of 4 values are infinite"),
        (Quantize(outliers=0.2), 8 + 8, b"\xc0\x7f", "1 of 8 values are NaN"),
        (Quantize(outliers=0.2), 8, struct.pack("<2i", 3, 3), "order or out of range"),
        (Quantize(outliers=0.2), 8, struct.pack("<2i", 5, 1), "order or out of range"),
        (Quantize(outliers=0.2), 8, struct.pack("<2i", -1, 1), "order or out of range"),
        (Quantize(outliers=0.2), 8, struct.pack("<2i", 1, 10), "order or out of range"),
    ],
)
def test_damaged_scales_and_channels_are_refused(codec: Quantize, position: int, data: bytes, words: str) -> None:
    with pytest.raises(CodecError, match=words):
        codec.decode(damaged(codec, position, data), None)


def test_another_configuration_s_packet_is_refused_by_its_length() -> None:
    packet, _ = Quantize(bits=8).encode(random(4, 10), None)
    for other in (Quantize(bits=4), Quantize(symmetric=False), Quantize(outliers=0.1), Quantize(per="channel")):
        with pytest.raises(CodecError, match="same fields on both sides"):
            other.decode(packet, None)


def test_steps_of_a_hostile_sender_give_numbers_all_the_same() -> None:
    """The largest step times the lowest code is beyond float32; what comes out is its largest number."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        packet = Packet(Quantize.number, dtype, (1, 2), b"\x7f\x7f\x80\x7f")
        assert Quantize().decode(packet, None)[0].tolist() == [[-torch.finfo(dtype).max, torch.finfo(dtype).max]]
