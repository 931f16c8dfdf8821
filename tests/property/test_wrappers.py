"""Laws of the sparse, feedback and entropy codecs over others: together as one by one, both ends in step, damaged bytes refused."""

from __future__ import annotations

import math
import resource
from dataclasses import dataclass

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from splitft.compress.base import Codec, Packet, Samples, State
from splitft.compress.cast import Cast
from splitft.compress.entropy import Entropy
from splitft.compress.error_bounded import ErrorBounded
from splitft.compress.feedback import Feedback
from splitft.compress.identity import Identity
from splitft.compress.quantize import Quantize
from splitft.compress.randk import RandK
from splitft.compress.residual import Residual
from splitft.compress.topk import TopK
from splitft.errors import CodecError
from splitft.rng import torch_stream

CHANGES = Residual(inner=Cast("float32"), cache_dtype="float32")
CODECS: dict[str, Codec] = {
    "topk": TopK(share=0.3),
    "topk-random": TopK(share=0.3, random=0.4, inner=Quantize(bits=4, rounding="stochastic")),
    "topk-error-bounded": TopK(share=0.3, inner=ErrorBounded(0.1)),
    "randk": RandK(share=0.3),
    "randk-error-bounded": RandK(share=0.3, unbiased=False, inner=ErrorBounded(0.1)),
    "feedback": Feedback(),
    "feedback-int2": Feedback(inner=Quantize(bits=2, rounding="stochastic")),
    "feedback-randk": Feedback(inner=RandK(unbiased=False), decay=0.9),
    "feedback-residual": Feedback(inner=Residual(inner=TopK(share=0.3, inner=Quantize(bits=4)))),
    "entropy": Entropy(),
    "entropy-identity": Entropy(inner=Identity(), level=3),
    "entropy-topk-entropy": Entropy(inner=TopK(share=0.3, inner=Entropy(item_bytes=3))),
    "entropy-feedback-residual": Entropy(inner=Feedback(inner=CHANGES)),
}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())


@dataclass(frozen=True)
class Turn:
    """What the packets of a cohort hold: rows, how many of each, whose."""

    rows: torch.Tensor
    counts: list[int]
    samples: list[Samples]


@st.composite
def turns(draw: st.DrawFn) -> list[Turn]:
    """Some turns of one cohort, whose samples come again."""
    width, dtype, clients = draw(st.integers(1, 40)), draw(DTYPES), draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, 4), min_size=4, max_size=4))
    found = []
    for turn in range(draw(st.integers(1, 3))):
        ids = [draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)) for _ in range(clients)]
        samples = [Samples(tuple(one), tuple(lengths[k] for k in one)) for one in ids]
        counts = [sum(one.rows) for one in samples]
        generator = torch_stream(draw(st.integers(0, 10**6)), "wrappers-property", turn)
        rows = torch.randn(sum(counts), width, generator=generator) * draw(st.sampled_from([1.0, 1e-3, 1000.0]))
        if draw(st.booleans()):
            rows = rows.round()
        found.append(Turn(rows.to(dtype), counts, samples))
    return found


def generator_of(codec: Codec, turn: int, client: int) -> torch.Generator | None:
    return torch_stream(turn, "wrappers-draw", client) if codec.draws else None


def same(codec: Codec, one: State, other: State) -> bool:
    found, expected = codec.flatten(one), codec.flatten(other)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@every_codec
@settings(max_examples=40)
@given(cohort=turns())
def test_together_is_one_by_one_both_ends_in_step_and_states_restored(codec: Codec, cohort: list[Turn]) -> None:
    clients = len(cohort[0].counts)
    senders, receivers, alone, reader = ([codec.init() for _ in range(clients)] for _ in range(4))
    for turn, now in enumerate(cohort):
        draws = [generator_of(codec, turn, k) for k in range(clients)]
        packets, senders = codec.encode_batch(now.rows, now.counts, senders, draws, now.samples)
        decoded, receivers = codec.decode_batch(packets, receivers, samples=now.samples)
        assert decoded.dtype == now.rows.dtype
        assert bool(torch.isfinite(decoded).all())
        for k, (part, found) in enumerate(zip(now.rows.split(now.counts), decoded.split(now.counts), strict=True)):
            packet, alone[k] = codec.encode(part, alone[k], generator_of(codec, turn, k), now.samples[k])
            data = packet.header() + bytes(packet.payload)
            assert data == packets[k].header() + bytes(packets[k].payload)
            assert dict(packet.facts) == dict(packets[k].facts)
            assert len(data) <= codec.packet_bytes(part.shape, part.dtype)
            single, reader[k] = codec.decode(Packet.parse(memoryview(data))[0], reader[k], now.samples[k])
            assert torch.equal(single, found)
            assert same(codec, alone[k], senders[k])
            assert same(codec, reader[k], receivers[k])
            assert not codec.mirrored or same(codec, senders[k], receivers[k])
            alone[k] = codec.restore(codec.flatten(alone[k]))
            reader[k] = codec.restore(codec.flatten(reader[k]))


@every_codec
@settings(max_examples=100)
@given(data=st.data(), cohort=turns())
def test_damaged_payloads_are_refused_or_read_as_finite_rows(codec: Codec, data: st.DataObject, cohort: list[Turn]) -> None:
    now, shape = cohort[0], cohort[0].rows[: cohort[0].counts[0]].shape
    packet, _ = codec.encode(now.rows[: shape[0]], codec.init(), generator_of(codec, 0, 0), now.samples[0])
    good = bytearray(packet.payload)
    for place in data.draw(st.lists(st.integers(0, len(good) - 1), max_size=4)):
        good[place] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.one_of(st.just(len(good)), st.integers(0, len(good))))
    payload = data.draw(st.one_of(st.just(bytes(good[:cut])), st.binary(max_size=60)))
    try:
        decoded, _ = codec.decode(Packet(codec.number, packet.dtype, packet.shape, payload), codec.init(), now.samples[0])
    except CodecError:
        return
    assert decoded.shape == shape
    assert decoded.dtype == packet.dtype
    assert bool(torch.isfinite(decoded).all())


@every_codec
def test_every_truncation_is_refused(codec: Codec) -> None:
    samples = Samples((1, 2), (2, 3))
    packet, _ = codec.encode(torch.randn(5, 24, generator=torch_stream(1, "cut")), codec.init(), generator_of(codec, 0, 0), samples)
    for end in range(len(packet.payload)):
        with pytest.raises(CodecError):
            codec.decode(Packet(packet.codec, packet.dtype, packet.shape, bytes(packet.payload)[:end]), codec.init(), samples)


@every_codec
@pytest.mark.parametrize("shape", [(2**29,), (2**29, 1), (1, 2**29), (2**14, 2**15), (2, 3, 2**26)], ids=str)
def test_a_packet_that_claims_gigabytes_takes_none(codec: Codec, shape: tuple[int, ...]) -> None:
    count = math.prod(shape[:-1])
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for payload in (b"", bytes(64), b"\x01" + bytes(64), b"\xff" * 100, b"\x01" + zstandard.ZstdCompressor().compress(bytes(4096))):
        with pytest.raises(CodecError):
            codec.decode(Packet(codec.number, torch.bfloat16, shape, payload), codec.init(), Samples((1,), (count,)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 200_000


@every_codec
def test_what_is_asked_of_the_inner_codec_is_asked_of_the_outer(codec: Codec) -> None:
    inner: Codec = codec.inner  # type: ignore[attr-defined]
    assert codec.keyed == inner.keyed
    assert codec.hears_samples == (inner.hears_samples or isinstance(codec, Feedback))
    assert codec.mirrored == (inner.mirrored and not isinstance(codec, Feedback))
    assert codec.draws or not inner.draws
    plain, known = codec.init(), {f"inner.{name}" for name in inner.flatten(inner.init())}
    assert set(codec.flatten(plain)) == known
