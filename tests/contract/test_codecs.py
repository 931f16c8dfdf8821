"""The contract of every codec in the catalogue: nothing but the declared error changes, sizes are as declared, bad values are refused."""

from __future__ import annotations

import math

import pytest
import torch

from splitft.compress.base import HEADER_BYTES, Codec, Packet
from splitft.errors import CodecError
from splitft.rng import torch_stream

from .variants import CODEC_VARIANTS, ERROR_BOUNDS, Variant

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 5, 32), (3, 7, 33), (1, 1, 1), (1, 1, 48), (6, 17), (0, 16), (2, 0, 8), (9,)]
every_codec = pytest.mark.parametrize("variant", CODEC_VARIANTS, ids=repr)


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Values over six orders of magnitude and both signs, all of them normal numbers in every type."""
    generator = torch_stream(seed, "codec-sample")
    exponent = torch.randint(-10, 11, shape, generator=generator)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (sign * (1.0 + torch.rand(shape, generator=generator)) * 2.0**exponent).to(dtype)


def through(codec: Codec, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor after real bytes: header and payload are joined and parsed again."""
    packet, _ = codec.encode(tensor, codec.init())
    data = packet.header() + bytes(packet.payload)
    assert len(data) == packet.size_bytes
    parsed, rest = Packet.parse(memoryview(data))
    assert len(rest) == 0
    decoded, _ = codec.decode(parsed, codec.init())
    return decoded


@every_codec
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_and_dtype_survive_and_the_size_is_as_declared(variant: Variant, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    codec: Codec = variant.build()
    tensor = sample(shape, dtype)
    packet, _ = codec.encode(tensor, codec.init())
    decoded = through(codec, tensor)
    assert decoded.shape == tensor.shape
    assert decoded.dtype == dtype
    assert packet.size_bytes <= codec.packet_bytes(shape, dtype)
    assert packet.size_bytes >= HEADER_BYTES
    if codec.encode(sample(shape, dtype, 1), codec.init())[0].size_bytes == packet.size_bytes:
        assert packet.size_bytes == codec.packet_bytes(shape, dtype), "of fixed rate, so the declared size must be exact"


@every_codec
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_declared_error_bound_holds(variant: Variant, dtype: torch.dtype) -> None:
    codec: Codec = variant.build()
    relative, _ = ERROR_BOUNDS[variant.name, variant.fields.get("dtype", "")]
    tensor = sample((4, 33, 31), dtype)
    error = (through(codec, tensor).double() - tensor.double()).abs()
    assert bool((error <= relative * tensor.double().abs()).all())
    if relative > 0 and dtype == torch.float32:
        assert float(error.max()) > 0, "a lossy codec that loses nothing is not what it says"


@every_codec
def test_values_below_the_normal_range_stay_within_the_absolute_bound(variant: Variant) -> None:
    codec: Codec = variant.build()
    relative, absolute = ERROR_BOUNDS[variant.name, variant.fields.get("dtype", "")]
    tensor = torch.tensor([0.0, -0.0, 1e-8, -3e-7, 2.0**-24, 2.0**-26, 1e-30, -1e-38, 6e-42])
    error = (through(codec, tensor).double() - tensor.double()).abs()
    assert bool((error <= torch.maximum(relative * tensor.double().abs(), torch.tensor(absolute, dtype=torch.float64))).all())


@pytest.mark.parametrize("variant", [variant for variant in CODEC_VARIANTS if variant.build().lossless], ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_codec_that_says_lossless_keeps_every_bit(variant: Variant, dtype: torch.dtype) -> None:
    codec: Codec = variant.build()
    tensor = torch.cat([sample((500,), dtype), torch.tensor([0.0, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny], dtype=dtype)])
    assert torch.equal(through(codec, tensor).view(torch.uint8), tensor.view(torch.uint8))


@every_codec
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_re_encoding_a_decoded_tensor_changes_nothing(variant: Variant, dtype: torch.dtype) -> None:
    codec: Codec = variant.build()
    once = through(codec, sample((3, 5, 17), dtype))
    assert torch.equal(through(codec, once), once)


@every_codec
def test_memory_order_does_not_matter(variant: Variant) -> None:
    codec: Codec = variant.build()
    base = sample((6, 10, 14))
    for view in (base.transpose(0, 2), base[::2], base[:, 3:7, ::3], base.permute(2, 0, 1)):
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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 16), (1, 9, 7), (5, 0, 8)], ids=str)
def test_a_batch_equals_one_by_one(variant: Variant, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    codec: Codec = variant.build()
    tensor, count = sample(shape, dtype), shape[0]
    single, batch = [codec.init() for _ in range(count)], [codec.init() for _ in range(count)]
    receivers, batch_receivers = [codec.init() for _ in range(count)], [codec.init() for _ in range(count)]
    for _ in range(2):
        packets, batch = codec.encode_batch(tensor, batch, [None] * count)
        decoded, batch_receivers = codec.decode_batch(packets, batch_receivers)
        assert decoded.dtype == dtype
        for row in range(count):
            packet, single[row] = codec.encode(tensor[row], single[row])
            alone, receivers[row] = codec.decode(packet, receivers[row])
            assert packet.header() == packets[row].header()
            assert bytes(packet.payload) == bytes(packets[row].payload)
            assert torch.equal(alone, decoded[row])


@every_codec
def test_sender_and_receiver_states_stay_in_step(variant: Variant) -> None:
    codec: Codec = variant.build()
    sender, receiver = codec.init(), codec.init()
    for turn in range(3):
        tensor = sample((2, 4, 16), seed=turn)
        packet, sender = codec.encode(tensor, sender)
        decoded, receiver = codec.decode(packet, receiver)
        if codec.lossless:
            assert torch.equal(decoded, tensor)
        assert type(sender) is type(receiver)


@every_codec
@pytest.mark.parametrize(("bad", "word"), [(math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "infinite")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite_are_refused_by_name_and_number(variant: Variant, bad: float, word: str, dtype: torch.dtype) -> None:
    codec: Codec = variant.build()
    tensor = sample((3, 4, 5), dtype)
    tensor[0, 1, 2] = tensor[2, 3, 4] = bad
    with pytest.raises(CodecError, match=rf"2 of 60 values are {word}"):
        codec.encode(tensor, codec.init())
    with pytest.raises(CodecError, match=rf"2 of 60 values are {word}"):
        codec.encode_batch(tensor, [codec.init() for _ in range(3)], [None] * 3)


@every_codec
def test_received_values_that_are_not_finite_are_refused(variant: Variant) -> None:
    codec: Codec = variant.build()
    packet, _ = codec.encode(torch.ones(4), codec.init())
    damaged = Packet(packet.codec, packet.dtype, packet.shape, b"\xff" * len(packet.payload))
    with pytest.raises(CodecError, match="NaN"):
        codec.decode(damaged, codec.init())


def test_float16_refuses_what_it_cannot_hold() -> None:
    codec = Variant("uplink", "cast", {"dtype": "float16"}).build()
    assert through(codec, torch.tensor([65504.0, -65519.0])).tolist() == [65504.0, -65504.0]
    with pytest.raises(CodecError, match="1 of 2 values are infinite"):
        codec.encode(torch.tensor([1.0, 65520.0]), None)
    with pytest.raises(CodecError, match="infinite"):
        codec.encode_batch(torch.tensor([[1.0], [-70000.0]]), [None] * 2, [None] * 2)


@every_codec
def test_another_codec_s_packet_is_refused(variant: Variant) -> None:
    codec: Codec = variant.build()
    packet, _ = codec.encode(torch.ones(4, 8), codec.init())
    for number in (0, codec.number + 1, 255):
        with pytest.raises(CodecError, match=f"codec {number}"):
            codec.decode(Packet(number, packet.dtype, packet.shape, packet.payload), codec.init())


def test_codec_numbers_tell_them_apart_on_the_wire() -> None:
    numbers = {variant.name: variant.build().number for variant in CODEC_VARIANTS}
    assert len(set(numbers.values())) == len(numbers)
    assert all(1 <= number <= 255 for number in numbers.values()), "0 is the labels' packet"


def test_every_codec_has_a_bound_in_this_suite() -> None:
    assert {(variant.name, variant.fields.get("dtype", "")) for variant in CODEC_VARIANTS} <= set(ERROR_BOUNDS)
