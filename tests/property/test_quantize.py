"""Laws of quantised tensors for any fields, shape, type and values: bound, size, one by one as together, damaged bytes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitft.compress.base import Packet
from splitft.compress.quantize import Quantize
from splitft.errors import CodecError
from splitft.rng import torch_stream

FIELDS = st.builds(
    Quantize,
    bits=st.sampled_from([8, 4, 2]),
    per=st.sampled_from(["token", "channel", "block"]),
    block=st.integers(2, 40),
    symmetric=st.booleans(),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    outliers=st.sampled_from([0.0, 0.01, 0.2, 0.5]),
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def rows(draw: st.DrawFn, count: int, width: int) -> torch.Tensor:
    """Values of any magnitude that the type holds: normal, offset, with outliers, with zeros, constant."""
    dtype = draw(DTYPES)
    generator = torch_stream(draw(st.integers(0, 10**6)), "quantize-property")
    values = torch.randn(count, width, generator=generator) * draw(st.sampled_from([1.0, 1e-6, 1e-30, 1e-41, 1e4, 1e38]))
    values += draw(st.sampled_from([0.0, 0.0, 1.0, -3000.0]))
    if draw(st.booleans()) and width:
        values[:, draw(st.integers(0, width - 1))] *= 1000.0
    if draw(st.booleans()):
        values[torch.rand(count, width, generator=generator) < 0.5] = draw(st.sampled_from([0.0, -0.0, 7.25]))
    return values.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)


@settings(max_examples=400)
@given(codec=FIELDS, data=st.data())
def test_bound_size_and_one_by_one_as_together(codec: Quantize, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    tensor = data.draw(rows(sum(counts), data.draw(st.integers(1, 37))))

    def generators() -> list[torch.Generator | None]:
        return [torch_stream(5, "noise", k) if codec.draws else None for k in range(len(counts))]

    packets, _ = codec.encode_batch(tensor, counts, [None] * len(counts), generators())
    decoded, _ = codec.decode_batch(packets, [None] * len(counts))
    assert decoded.dtype == tensor.dtype
    for part, packet, found, generator in zip(tensor.split(counts), packets, decoded.split(counts), generators(), strict=True):
        alone, _ = codec.encode(part, None, generator)
        assert bytes(alone.payload) == bytes(packet.payload)
        assert alone.size_bytes == codec.packet_bytes(part.shape, part.dtype)
        assert torch.equal(codec.decode(alone, None)[0], found)
        assert bool(((found.double() - part.double()).abs() <= codec.error_bound(part)).all())


@settings(max_examples=300)
@given(codec=FIELDS, data=st.data())
def test_any_bytes_of_the_right_length_give_finite_numbers_or_a_codec_error(codec: Quantize, data: st.DataObject) -> None:
    shape, dtype = (data.draw(st.integers(1, 5)), data.draw(st.integers(1, 20))), data.draw(DTYPES)
    length = codec.packet_bytes(shape, dtype) - codec.packet_bytes((0, 1), dtype)
    packet = Packet(codec.number, dtype, shape, data.draw(st.binary(min_size=length, max_size=length)))
    try:
        decoded, _ = codec.decode(packet, None)
    except CodecError:
        return
    assert decoded.shape == shape
    assert bool(torch.isfinite(decoded).all())
