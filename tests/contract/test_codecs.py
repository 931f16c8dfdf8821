"""The contract of every codec in the catalogue: nothing but the declared error changes, sizes are as declared, bad values are refused."""

from __future__ import annotations

import math

import pytest
import torch

from splitft.compress.base import HEADER_BYTES, Codec, Packet, State
from splitft.errors import CodecError
from splitft.rng import torch_stream

from .variants import CODEC_VARIANTS, ERROR_BOUNDS, Variant

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 5, 32), (3, 7, 33), (1, 1, 1), (1, 1, 48), (6, 17), (0, 16), (2, 0, 8), (9,)]
HALF_MAX = 65280.0  # the largest number that float16 and bfloat16 have both
every_codec = pytest.mark.parametrize("variant", CODEC_VARIANTS, ids=repr)


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Values over six orders of magnitude and both signs, all of them normal numbers in every type."""
    generator = torch_stream(seed, "codec-sample")
    exponent = torch.randint(-10, 11, shape, generator=generator)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (sign * (1.0 + torch.rand(shape, generator=generator)) * 2.0**exponent).to(dtype)


def draw(codec: Codec, index: int = 0) -> torch.Generator | None:
    """What `encode` is given: a new generator for a codec that draws, the same for the same index."""
    return torch_stream(7, "codec-contract", index) if codec.draws else None


def encode(codec: Codec, tensor: torch.Tensor, state: State | None = None) -> Packet:
    return codec.encode(tensor, codec.init() if state is None else state, draw(codec))[0]


def through(codec: Codec, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor after real bytes: header and payload are joined and parsed again."""
    packet = encode(codec, tensor)
    data = packet.header() + bytes(packet.payload)
    assert len(data) == packet.size_bytes
    parsed, rest = Packet.parse(memoryview(data))
    assert len(rest) == 0
    decoded, _ = codec.decode(parsed, codec.init())
    return decoded


def require_bounded(codec: Codec, tensor: torch.Tensor) -> None:
    """No element is further off than the codec says."""
    bound = codec.error_bound(tensor)
    if bound is not None:
        assert bound.shape == tensor.shape
        assert bound.dtype == torch.float64
        assert bool(((through(codec, tensor).double() - tensor.double()).abs() <= bound).all())


@every_codec
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_and_dtype_survive_and_the_size_is_as_declared(variant: Variant, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    codec: Codec = variant.build()
    tensor = sample(shape, dtype)
    packet = encode(codec, tensor)
    decoded = through(codec, tensor)
    assert decoded.shape == tensor.shape
    assert decoded.dtype == dtype
    assert packet.size_bytes <= codec.packet_bytes(shape, dtype)
    assert packet.size_bytes >= HEADER_BYTES
    if encode(codec, sample(shape, dtype, 1)).size_bytes == packet.size_bytes:
        assert packet.size_bytes == codec.packet_bytes(shape, dtype), "of fixed rate, so the declared size must be exact"


@every_codec
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 60.0])
def test_the_declared_error_bound_holds(variant: Variant, dtype: torch.dtype, scale: float) -> None:
    codec: Codec = variant.build()
    tensor = (sample((4, 33, 31), torch.float32) * scale).clamp(-HALF_MAX, HALF_MAX).to(dtype)
    require_bounded(codec, tensor)
    if not codec.lossless and variant.fields.get("dtype") != "float32" and dtype == torch.float32:
        assert not torch.equal(through(codec, tensor), tensor), "a lossy codec that loses nothing is not what it says"


@pytest.mark.parametrize("variant", [variant for variant in CODEC_VARIANTS if variant.name in ("identity", "cast")], ids=repr)
def test_the_declared_bound_is_that_of_the_type(variant: Variant) -> None:
    relative, absolute = ERROR_BOUNDS[variant.name, variant.fields.get("dtype", "")]
    tensor = torch.cat([sample((500,)), torch.tensor([0.0, 1e-8, 2.0**-26, 1e-38, 6e-42])])
    bound = variant.build().error_bound(tensor)
    assert bool((bound <= torch.maximum(relative * tensor.double().abs(), torch.tensor(absolute, dtype=torch.float64))).all())


@every_codec
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_equal_tiny_or_huge_stay_within_the_bound(variant: Variant, dtype: torch.dtype) -> None:
    codec: Codec = variant.build()
    most = HALF_MAX if torch.float16 in (dtype, getattr(torch, variant.fields.get("dtype", "float32"))) else 3.38e38
    below_normal = [0.0, -0.0, 1e-8, -3e-7, 2.0**-24, 2.0**-26, 1e-30, -1e-38, 6e-42, -1.5e-45]
    for values in ([0.0] * 7, [-3.7] * 5, below_normal, [most, -most, 1.0], [most] * 3, [most, 0.0, 1e-30], [1000.0, 1000.5, 1001.0]):
        require_bounded(codec, torch.tensor([values, values[::-1]]).to(dtype))


@pytest.mark.parametrize("variant", [variant for variant in CODEC_VARIANTS if variant.build().lossless], ids=repr)
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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [[3, 3, 3, 3], [5, 1, 0, 9], [0, 0], [7]], ids=str)
@pytest.mark.parametrize("width", [16, 7, 1, 0])
def test_a_batch_equals_one_by_one_to_the_bit(variant: Variant, counts: list[int], width: int, dtype: torch.dtype) -> None:
    """The rows of a whole cohort, as many for each client as it has."""
    codec: Codec = variant.build()
    packets_of = range(len(counts))
    single, batch = [codec.init() for _ in counts], [codec.init() for _ in counts]
    receivers, batch_receivers = [codec.init() for _ in counts], [codec.init() for _ in counts]
    for turn in range(2):
        rows = sample((sum(counts), width), dtype, turn)
        packets, batch = codec.encode_batch(rows, counts, batch, [draw(codec, k) for k in packets_of])
        decoded, batch_receivers = codec.decode_batch(packets, batch_receivers)
        assert decoded.dtype == dtype
        assert decoded.shape == rows.shape
        for k, (part, found) in enumerate(zip(rows.split(counts), decoded.split(counts), strict=True)):
            packet, single[k] = codec.encode(part, single[k], draw(codec, k))
            alone, receivers[k] = codec.decode(packet, receivers[k])
            assert packet.header() == packets[k].header()
            assert bytes(packet.payload) == bytes(packets[k].payload)
            assert torch.equal(alone, found)


@every_codec
def test_a_batch_is_decoded_from_its_bytes(variant: Variant) -> None:
    """Payloads are copied and one exchanged: only its rows change, whatever has become of the tensor that was sent."""
    codec: Codec = variant.build()
    rows, counts, states = sample((12, 8)), [4, 2, 6], [codec.init()] * 3
    sent, _ = codec.encode_batch(rows, counts, states, [draw(codec, k) for k in range(3)])
    copies = [Packet(one.codec, one.dtype, one.shape, bytes(one.payload)) for one in sent]
    expected, _ = codec.decode_batch(sent, states)
    expected = expected.clone()
    rows.zero_()
    plain, _ = codec.decode_batch(copies, states)
    assert torch.equal(plain, expected)
    mixed, _ = codec.decode_batch([copies[0], encode(codec, sample((2, 8), seed=5)), copies[2]], states)
    assert torch.equal(mixed[:4], expected[:4])
    assert torch.equal(mixed[6:], expected[6:])
    assert not torch.equal(mixed[4:6], expected[4:6])


@every_codec
def test_packets_of_different_widths_do_not_come_together(variant: Variant) -> None:
    codec: Codec = variant.build()
    packets = [encode(codec, sample((2, 8))), encode(codec, sample((2, 6)))]
    with pytest.raises((CodecError, RuntimeError)):
        codec.decode_batch(packets, [codec.init()] * 2)


@every_codec
def test_sender_and_receiver_states_stay_in_step(variant: Variant) -> None:
    codec: Codec = variant.build()
    sender, receiver = codec.init(), codec.init()
    for turn in range(3):
        tensor = sample((2, 4, 16), seed=turn)
        packet, sender = codec.encode(tensor, sender, draw(codec, turn))
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
        encode(codec, tensor)
    with pytest.raises(CodecError, match=rf"2 of 60 values are {word}"):
        codec.encode_batch(tensor.reshape(12, 5), [4, 1, 7], [codec.init() for _ in range(3)], [draw(codec, k) for k in range(3)])


@every_codec
def test_received_values_that_are_not_finite_are_refused(variant: Variant) -> None:
    codec: Codec = variant.build()
    packet = encode(codec, torch.ones(4))
    damaged = Packet(packet.codec, packet.dtype, packet.shape, b"\xff" * len(packet.payload))
    with pytest.raises(CodecError, match="NaN"):
        codec.decode(damaged, codec.init())


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
            codec.decode(Packet(number, packet.dtype, packet.shape, packet.payload), codec.init())


def test_codec_numbers_tell_them_apart_on_the_wire() -> None:
    numbers = {variant.name: variant.build().number for variant in CODEC_VARIANTS}
    assert len(set(numbers.values())) == len(numbers)
    assert all(1 <= number <= 255 for number in numbers.values()), "0 is the labels' packet"


def test_codecs_of_the_catalogue_declare_a_bound() -> None:
    """Unless they are named here, since none can hold element by element."""
    unbounded: set[str] = set()
    for variant in CODEC_VARIANTS:
        assert (variant.build().error_bound(torch.ones(2, 3)) is None) == (variant.name in unbounded), variant
