"""The contract of every codec in the catalogue and of codecs over codecs: nothing but the declared error changes, sizes are as declared,
bad values are refused, one by one and together are the same. What states must do is in test_codec_streams.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from splitft.compress.base import HEADER_BYTES, Codec, Packet
from splitft.compress.cast import Cast
from splitft.compress.error_bounded import ErrorBounded
from splitft.errors import CodecError

from .codec_scenes import DTYPES, HALF_MAX, decode, draw, encode, same_bits, same_state, sample, samples_for, through, turns
from .variants import ALL_CODEC_VARIANTS, CODEC_VARIANTS, ERROR_BOUNDS, Variant

SHAPES = [(2, 5, 32), (3, 7, 33), (2, 1, 2, 9), (1, 1, 1), (1, 1, 48), (6, 17), (0, 16), (2, 0, 8), (4, 0), (9,), ()]
# No bound can hold element by element: what is dropped, skipped or projected is not known before.
UNBOUNDED = {"randk", "residual", "temporal", "lowrank", "projection", "feedback", "noise"}
# Over a codec of fixed rate these have one too.
FIXED_OVER = {"topk", "randk", "feedback", "residual", "noise"}
every_codec = pytest.mark.parametrize("variant", ALL_CODEC_VARIANTS, ids=repr)
BOUNDED = [variant for variant in ALL_CODEC_VARIANTS if variant.build().error_bound(torch.ones(1, 2)) is not None]
every_bound = pytest.mark.parametrize("variant", BOUNDED, ids=repr)


def fixed_rate(codec: Any) -> bool:
    """Whether the size of a packet follows from its shape."""
    over = type(codec).__name__.lower() in FIXED_OVER and not getattr(codec, "drift", False)
    return bool(codec.fixed_rate) or (over and fixed_rate(codec.inner))


def widest(codec: Any, dtype: torch.dtype) -> float:
    """The largest magnitude that a codec takes of a type: absolute bounds and float16 have their own ends."""
    if isinstance(codec, ErrorBounded) and codec.of == "absolute":
        return min(HALF_MAX, codec.bound * 2**28)
    narrow = isinstance(codec, Cast) and codec.dtype == "float16"
    inner = widest(codec.inner, dtype) if hasattr(codec, "inner") else math.inf
    return min(inner, HALF_MAX if narrow or dtype == torch.float16 else 3.38e38)


def require_bounded(codec: Codec, tensor: torch.Tensor) -> None:
    """No element is further off than the codec says."""
    bound = codec.error_bound(tensor)
    if bound is not None:
        assert bound.shape == tensor.shape
        assert bound.dtype == torch.float64
        assert bool(((through(codec, tensor).double() - tensor.double()).abs() <= bound).all())


@every_codec
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shape_and_dtype_survive_and_the_size_is_as_declared(variant: Variant, dtype: torch.dtype) -> None:
    codec: Codec = variant.build()
    for shape in SHAPES:
        tensor = sample(shape, dtype)
        packet = encode(codec, tensor)
        decoded = decode(codec, packet)
        assert decoded.shape == tensor.shape
        assert decoded.dtype == dtype
        assert bool(torch.isfinite(decoded).all())
        assert HEADER_BYTES <= packet.size_bytes <= codec.packet_bytes(shape, dtype)
        if fixed_rate(codec):
            assert packet.size_bytes == codec.packet_bytes(shape, dtype), "of fixed rate, so the declared size must be exact"


@every_codec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_whatever_is_finite_arrives_finite(variant: Variant, dtype: torch.dtype) -> None:
    """Zeros, constants, outliers, numbers below the normal range and the largest ones, for the first time and after something else."""
    codec: Codec = variant.build()
    most = min(widest(codec, dtype), torch.finfo(dtype).max)
    sender, receiver = codec.init(), codec.init()
    for turn, now in enumerate(turns(1, 9, 1, 7, torch.float32, ids=3)):
        rows = now.rows.clamp(-most, most).to(dtype)
        packet, sender = codec.encode(rows, sender, draw(codec, turn), now.samples[0])
        assert packet.size_bytes <= codec.packet_bytes(rows.shape, dtype)
        decoded, receiver = codec.decode(packet, receiver, now.samples[0])
        assert decoded.dtype == dtype
        assert bool(torch.isfinite(decoded).all())
        if fixed_rate(codec):
            assert packet.size_bytes == codec.packet_bytes(rows.shape, dtype)


@every_bound
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 60.0])
def test_the_declared_error_bound_holds(variant: Variant, dtype: torch.dtype, scale: float) -> None:
    codec: Codec = variant.build()
    tensor = (sample((4, 33, 31), torch.float32) * scale).clamp(-HALF_MAX, HALF_MAX).to(dtype)
    require_bounded(codec, tensor)
    whole = {"dtype": "float32"}, {"share": 1.0}, {"inner": "identity"}
    if not codec.lossless and variant.fields not in whole and dtype == torch.float32:
        assert not torch.equal(through(codec, tensor), tensor), "a lossy codec that loses nothing is not what it says"


@pytest.mark.parametrize("variant", [variant for variant in CODEC_VARIANTS if variant.name in ("identity", "cast")], ids=repr)
def test_the_declared_bound_is_that_of_the_type(variant: Variant) -> None:
    relative, absolute = ERROR_BOUNDS[variant.name, variant.fields.get("dtype", "")]
    tensor = torch.cat([sample((500,)), torch.tensor([0.0, 1e-8, 2.0**-26, 1e-38, 6e-42])])
    bound = variant.build().error_bound(tensor)
    assert bool((bound <= torch.maximum(relative * tensor.double().abs(), torch.tensor(absolute, dtype=torch.float64))).all())


@every_bound
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_equal_tiny_or_huge_stay_within_the_bound(variant: Variant, dtype: torch.dtype) -> None:
    codec: Codec = variant.build()
    most = widest(codec, dtype)
    below_normal = [0.0, -0.0, 1e-8, -3e-7, 2.0**-24, 2.0**-26, 1e-30, -1e-38, 6e-42, -1.5e-45]
    for values in ([0.0] * 7, [-3.7] * 5, below_normal, [most, -most, 1.0], [most] * 3, [most, 0.0, 1e-30], [1000.0, 1000.5, 1001.0]):
        require_bounded(codec, torch.tensor([values, values[::-1]]).to(dtype))


@pytest.mark.parametrize("variant", [variant for variant in ALL_CODEC_VARIANTS if variant.build().lossless], ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_codec_that_says_lossless_keeps_every_bit(variant: Variant, dtype: torch.dtype) -> None:
    codec: Codec = variant.build()
    tensor = torch.cat([sample((500,), dtype), torch.tensor([0.0, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny], dtype=dtype)])
    assert torch.equal(through(codec, tensor).view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("variant", [variant for variant in CODEC_VARIANTS if variant.name in ("identity", "cast")], ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_re_encoding_a_rounded_tensor_changes_nothing(variant: Variant, dtype: torch.dtype) -> None:
    codec: Codec = variant.build()
    once = through(codec, sample((3, 5, 17), dtype))
    assert torch.equal(through(codec, once), once)


@every_codec
def test_memory_order_does_not_matter(variant: Variant) -> None:
    codec: Codec = variant.build()
    base = sample((6, 10, 14))
    for view in (base.transpose(0, 2), base[::2], base[:, 3:7, ::3], base.permute(2, 0, 1), base[0].T, base[0, ::2, ::2]):
        assert not view.is_contiguous()
        assert torch.equal(through(codec, view), through(codec, view.contiguous()))


@every_codec
def test_input_and_graph_are_left_alone(variant: Variant) -> None:
    codec: Codec = variant.build()
    tensor = sample((2, 3, 8)).requires_grad_(True)
    before = tensor.detach().clone()
    decoded = through(codec, tensor * 1.0)
    assert not decoded.requires_grad
    assert torch.equal(tensor.detach(), before)
    decoded.fill_(7.0)
    assert torch.equal(tensor.detach(), before), "the decoded tensor shares memory with what was sent"


@every_codec
@pytest.mark.parametrize(("width", "dtype"), [(16, torch.bfloat16), (7, torch.bfloat16), (1, torch.float16), (0, torch.float32)], ids=str)
def test_a_cohort_together_equals_one_by_one_to_the_bit(variant: Variant, width: int, dtype: torch.dtype) -> None:
    """The rows of four clients, some of which have none in a turn: packets, values, facts, and the states of both ends."""
    codec: Codec = variant.build()
    senders, receivers, alone, readers = ([codec.init() for _ in range(4)] for _ in range(4))
    kinds = ("normal", "drift", "same", "zero", "outlier")
    for turn, now in enumerate(turns(2, 3, 4, max(width, 1), dtype, 5, kinds)):
        rows = now.rows[:, :width]
        packets, senders = codec.encode_batch(rows, now.counts, senders, [draw(codec, k + 9 * turn) for k in range(4)], now.samples)
        decoded, receivers = codec.decode_batch(packets, receivers, samples=now.samples)
        assert decoded.dtype == dtype
        assert decoded.shape == rows.shape
        for k, (part, found) in enumerate(zip(torch.split(rows, now.counts), torch.split(decoded, now.counts), strict=True)):
            packet, alone[k] = codec.encode(part, alone[k], draw(codec, k + 9 * turn), now.samples[k])
            single, readers[k] = codec.decode(packet, readers[k], now.samples[k])
            assert packet.header() == packets[k].header()
            assert bytes(packet.payload) == bytes(packets[k].payload)
            assert dict(packet.facts) == dict(packets[k].facts)
            assert same_bits(single, found)
            assert same_state(codec, alone[k], senders[k])
            assert same_state(codec, readers[k], receivers[k])


@every_codec
def test_a_batch_is_decoded_from_its_bytes(variant: Variant) -> None:
    """Payloads are copied and one exchanged: only its rows change, whatever has become of the tensor that was sent."""
    codec: Codec = variant.build()
    rows, counts, states = sample((12, 8)), [4, 2, 6], [codec.init()] * 3
    told = [samples_for(count) for count in counts]
    sent, _ = codec.encode_batch(rows, counts, states, [draw(codec, k) for k in range(3)], told)
    copies = [Packet(one.codec, one.dtype, one.shape, bytes(one.payload)) for one in sent]
    expected, _ = codec.decode_batch(sent, states, samples=told)
    expected = expected.clone()
    rows.zero_()
    plain, _ = codec.decode_batch(copies, states, samples=told)
    assert torch.equal(plain, expected)
    mixed, _ = codec.decode_batch([copies[0], encode(codec, sample((2, 8), seed=5)), copies[2]], states, samples=told)
    assert torch.equal(mixed[:4], expected[:4])
    assert torch.equal(mixed[6:], expected[6:])
    assert not torch.equal(mixed[4:6], expected[4:6])


@every_codec
def test_packets_of_different_widths_do_not_come_together(variant: Variant) -> None:
    codec: Codec = variant.build()
    packets = [encode(codec, sample((2, 8))), encode(codec, sample((2, 6)))]
    with pytest.raises(CodecError, match="widths"):
        codec.decode_batch(packets, [codec.init()] * 2)


@every_codec
@pytest.mark.parametrize(("bad", "word"), [(math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "infinite")])
def test_values_that_are_not_finite_are_refused_by_name_and_number(variant: Variant, bad: float, word: str) -> None:
    codec: Codec = variant.build()
    told = [samples_for(count) for count in (4, 1, 7)]
    for dtype in DTYPES:
        tensor = sample((3, 4, 5), dtype)
        tensor[0, 1, 2] = tensor[2, 3, 4] = bad
        with pytest.raises(CodecError, match=rf"2 of 60 values are {word}"):
            encode(codec, tensor)
        with pytest.raises(CodecError, match=rf"2 of 60 values are {word}"):
            codec.encode_batch(tensor.reshape(12, 5), [4, 1, 7], [codec.init()] * 3, [draw(codec, k) for k in range(3)], told)


@every_codec
@pytest.mark.parametrize("fill", [0xFF, 0x7F, 0x80, 0x7C])
def test_received_values_that_are_not_finite_are_refused(variant: Variant, fill: int) -> None:
    """Of 0xff every float type makes NaN, of 0x7f and 0xff in turn too; whatever else such a packet can mean, it is finite."""
    codec: Codec = variant.build()
    packet = encode(codec, torch.ones(3, 4))
    body = bytes(packet.payload)
    for first in range(0, len(body), max(1, len(body) // 16)):
        damaged = Packet(packet.codec, packet.dtype, packet.shape, body[:first] + bytes([fill]) * (len(body) - first))
        try:
            found, _ = codec.decode(damaged, codec.init(), samples_for(3))
        except CodecError:
            continue
        assert bool(torch.isfinite(found).all())
    if codec.fixed_rate:
        with pytest.raises(CodecError, match="NaN"):
            codec.decode(Packet(packet.codec, packet.dtype, packet.shape, b"\xff" * len(body)), codec.init())


def test_float16_refuses_what_it_cannot_hold() -> None:
    codec = Variant("uplink", "cast", {"dtype": "float16"}).build()
    assert through(codec, torch.tensor([65504.0, -65519.0])).tolist() == [65504.0, -65504.0]
    with pytest.raises(CodecError, match="1 of 2 values are infinite"):
        codec.encode(torch.tensor([1.0, 65520.0]), None)
    with pytest.raises(CodecError, match="infinite"):
        codec.encode_batch(torch.tensor([[1.0], [-70000.0]]), [1, 1], [None] * 2, [None] * 2)


@every_codec
def test_another_codec_s_packet_is_refused(variant: Variant) -> None:
    codec: Codec = variant.build()
    packet = encode(codec, torch.ones(4, 8))
    for number in (0, codec.number + 1, 255):
        with pytest.raises(CodecError, match=f"codec {number}"):
            codec.decode(Packet(number, packet.dtype, packet.shape, packet.payload), codec.init(), samples_for(4))


def test_codec_numbers_tell_them_apart_on_the_wire() -> None:
    numbers = {variant.name: variant.build().number for variant in CODEC_VARIANTS}
    assert len(set(numbers.values())) == len(numbers)
    assert all(1 <= number <= 255 for number in numbers.values()), "0 is the labels' packet"


def test_codecs_of_the_catalogue_declare_a_bound_unless_none_can_hold() -> None:
    for variant in CODEC_VARIANTS:
        none = variant.name in UNBOUNDED or bool(variant.fields.get("random"))
        assert (variant.build().error_bound(torch.ones(2, 3)) is None) == none, variant


@every_codec
def test_who_needs_to_know_samples_says_so_and_refuses_to_guess(variant: Variant) -> None:
    codec: Codec = variant.build()
    rows = sample((6, 5))
    if not codec.keyed:
        packet, _ = codec.encode(rows, codec.init(), draw(codec))
        codec.decode(packet, codec.init())
        return
    assert codec.hears_samples
    for wrong in (None, samples_for(5), samples_for(7)):
        with pytest.raises(CodecError, match="samples"):
            codec.encode(rows, codec.init(), draw(codec), wrong)
        with pytest.raises(CodecError, match="samples"):
            codec.decode(encode(codec, rows), codec.init(), wrong)


@pytest.mark.parametrize("variant", ALL_CODEC_VARIANTS, ids=repr)
def test_the_size_that_plans_expect_is_within_a_factor_of_two_of_what_normal_values_take(variant: Variant) -> None:
    """First visits: packets of 64 rows and 96 channels of a normal distribution."""
    codec: Codec = variant.build()
    if "learned" in repr(codec):
        pytest.skip("a learned basis expects axes that matter more than others, and counts on sending itself once")
    sizes = [
        len(codec.encode(torch.randn((64, 96), generator=draw_normal(seed)), codec.init(), draw(codec, seed), samples_for(64))[0].payload)
        for seed in range(2)
    ]
    expected = codec.expected_bytes(64, 96, torch.float32)
    assert 0.5 * expected <= sum(sizes) / len(sizes) <= 2 * expected, (expected, sizes)
    assert expected <= codec.payload_bytes(64, 96, torch.float32)


def draw_normal(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
