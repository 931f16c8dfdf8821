"""Laws of codecs for any tensor, and decoders under hostile input: a CodecError or a tensor as large as its payload, nothing else."""

from __future__ import annotations

import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitft.compress.base import DTYPES, HEADER, HEADER_BYTES, VERSION, Codec, Packet, Samples, as_rows
from splitft.compress.quantize import Quantize
from splitft.errors import CodecError
from splitft.rng import torch_stream

from ..contract.codec_scenes import encode, samples_for
from ..contract.variants import CODEC_VARIANTS, Variant

CODECS: list[Codec] = [variant.build() for variant in CODEC_VARIANTS]
SMALL = st.integers(0, 9)
# Zero axes beside huge ones are left out: torch cannot make such tensors and names no codec.
SHAPE = st.one_of(
    st.tuples(SMALL, SMALL, SMALL, SMALL), st.tuples(*[st.integers(1, 2**32 - 1)] * 4), st.tuples(SMALL, SMALL, st.just(0), st.just(0))
)


@st.composite
def near_packets(draw: st.DrawFn) -> bytes:
    """Bytes that begin like a packet: a header whose fields may lie, and a payload that may not fit."""
    payload = draw(st.binary(max_size=200))
    length = draw(st.one_of(st.just(len(payload)), SMALL, st.integers(0, 2**64 - 1)))
    axes = draw(st.one_of(st.integers(0, 4), st.integers(0, 255)))
    shape = draw(SHAPE)
    if axes < 4 and draw(st.booleans()):
        shape = (*shape[:axes], *(0,) * (4 - axes))
    version = draw(st.sampled_from([VERSION] * 8 + [0, 255]))
    codec = draw(st.sampled_from([one.number for one in CODECS] * 3 + [0, 99]))
    dtype = draw(st.integers(0, len(DTYPES)))
    return HEADER.pack(version, codec, dtype, axes, 0, *shape, length) + payload


def decode_hostile(codec: Codec, data: bytes) -> None:
    try:
        packet, rest = Packet.parse(memoryview(data))
        tensor, _ = codec.decode(packet, codec.init(), told(packet))
    except CodecError:
        return
    assert tensor.shape == packet.shape
    if codec.fixed_rate:
        # float64 from bfloat16 is the most a cast can grow, float64 from two bits the most of quantised values.
        assert tensor.numel() * tensor.itemsize <= (32 if isinstance(codec, Quantize) else 4) * len(packet.payload)
    assert len(rest) + packet.size_bytes == len(data)
    assert not tensor.is_floating_point() or packet.dtype != torch.float32 or bool(torch.isfinite(tensor).all())


def told(packet: Packet) -> Samples:
    """The samples that a packet's rows are, of however many it says it has: one, where they are too many to name."""
    count = as_rows(packet.shape)[0]
    return samples_for(count) if count < 1000 else Samples((1,), (count,))


@pytest.mark.parametrize("codec", CODECS, ids=[repr(variant) for variant in CODEC_VARIANTS])
@settings(max_examples=80)
@given(data=st.one_of(st.binary(max_size=120), near_packets()))
def test_hostile_bytes_never_raise_anything_but_codec_errors(codec: Codec, data: bytes) -> None:
    decode_hostile(codec, data)


@pytest.mark.parametrize("codec", CODECS, ids=[repr(variant) for variant in CODEC_VARIANTS])
@settings(max_examples=80)
@given(data=st.data())
def test_flipped_and_truncated_packets_never_raise_anything_but_codec_errors(codec: Codec, data: st.DataObject) -> None:
    packet = encode(codec, torch.arange(24, dtype=torch.float32).reshape(2, 3, 4))
    good = bytearray(packet.header() + bytes(packet.payload))
    # The sixteen bytes of the shape are left alone: a zero axis beside a huge one is no tensor (see SHAPE above).
    places = [place for place in range(len(good)) if not 8 <= place < 24]
    for place in data.draw(st.lists(st.sampled_from(places), max_size=3)):
        good[place] ^= 1 << data.draw(st.integers(0, 7))
    decode_hostile(codec, bytes(good[: data.draw(st.integers(0, len(good)))]))


@pytest.mark.parametrize("codec", CODECS, ids=[repr(variant) for variant in CODEC_VARIANTS])
def test_every_truncation_is_refused(codec: Codec) -> None:
    packet = encode(codec, torch.randn(3, 5, generator=torch_stream(1, "truncation")))
    whole = packet.header() + bytes(packet.payload)
    for end in range(len(whole)):
        with pytest.raises(CodecError):
            Packet.parse(memoryview(whole[:end]))


@pytest.mark.parametrize("codec", CODECS, ids=[repr(variant) for variant in CODEC_VARIANTS])
@pytest.mark.parametrize(
    ("shape", "length"),
    [
        ((2**29, 1, 1, 1), 64),
        ((2**32 - 1,) * 4, 64),
        ((2**29, 0, 0, 0), 2**31),
        ((16, 1, 1, 1), 2**31),
        ((16, 1, 1, 1), 2**63),
        ((2**28, 1, 1, 1), 2**30),
    ],
)
def test_a_packet_that_claims_gigabytes_takes_none(codec: Codec, shape: tuple[int, ...], length: int) -> None:
    axes = 4 if all(shape) else 1
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for dtype in range(len(DTYPES)):
        decode_refused(codec, HEADER.pack(VERSION, codec.number, dtype, axes, 0, *shape, length) + bytes(64))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 200_000


def decode_refused(codec: Codec, data: bytes) -> None:
    with pytest.raises(CodecError):
        codec.decode(Packet.parse(memoryview(data))[0], codec.init())


@pytest.mark.parametrize("limit", [0, 10, 95])
def test_the_limit_is_the_callers(limit: int) -> None:
    packet, _ = CODECS[0].encode(torch.zeros(24), None)
    data = memoryview(packet.header() + bytes(packet.payload))
    assert Packet.parse(data, 96)[0].shape == (24,)
    with pytest.raises(CodecError, match="limit"):
        Packet.parse(data, limit)


@given(st.integers(0, 2**32 - 1))
def test_reserved_bits_must_be_zero(reserved: int) -> None:
    data = memoryview(HEADER.pack(VERSION, 1, 0, 1, reserved, 1, 0, 0, 0, 4) + bytes(4))
    if reserved == 0:
        assert Packet.parse(data)[0].shape == (1,)
    else:
        with pytest.raises(CodecError):
            Packet.parse(data)


@given(axes=st.integers(0, 3), data=st.data())
def test_axes_beyond_the_count_must_be_zero(axes: int, data: st.DataObject) -> None:
    shape = [1] * axes + [0] * (4 - axes)
    shape[data.draw(st.integers(axes, 3))] = 1
    with pytest.raises(CodecError):
        Packet.parse(memoryview(HEADER.pack(VERSION, 1, 0, axes, 0, *shape, 4) + bytes(4)))


BOUNDED = [variant for variant in CODEC_VARIANTS if variant.build().error_bound(torch.ones(1, 1)) is not None]


@pytest.mark.parametrize("variant", BOUNDED, ids=repr)
@settings(max_examples=60)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-60000, max_value=60000), max_size=40),
    rows=st.integers(1, 3),
)
def test_the_error_bound_holds_for_any_float(variant: Variant, values: list[float], rows: int) -> None:
    codec = variant.build()
    tensor = torch.tensor(values[: len(values) // rows * rows], dtype=torch.float32).reshape(rows, -1)
    packet = encode(codec, tensor)
    decoded, _ = codec.decode(packet, codec.init(), samples_for(rows))
    bound = codec.error_bound(tensor)
    assert bool(((decoded.double() - tensor.double()).abs() <= bound).all())
    if variant.name in ("identity", "cast"):
        assert torch.equal(torch.signbit(decoded), torch.signbit(tensor))
    assert packet.size_bytes == HEADER_BYTES + len(packet.payload)
