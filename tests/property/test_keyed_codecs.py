"""Laws of codecs that remember by sample, for any samples in any order: ends agree, sizes are bounded, one by one is all together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitft.compress.base import Samples, State
from splitft.compress.lowrank import LowRank
from splitft.compress.quantize import Quantize
from splitft.compress.temporal import Temporal
from splitft.errors import CodecError
from splitft.rng import torch_stream

CODECS: list[Temporal | LowRank] = [
    Temporal(cache_mb=0.0002, evict="oldest", dimensions=3),
    Temporal(Quantize(rounding="stochastic"), cache_mb=0.0002),
    Temporal(LowRank(rank=2, bits=8, cache_mb=0.0001, evict="oldest"), cache_mb=0.0003),
    LowRank(rank=2, cache_mb=0.0002, evict="oldest"),
    LowRank(Quantize(bits=4), rank=200, bits=8, energy=0.99, cache_mb=0.0002, cache_dtype="float16"),
]
IDS = ["temporal", "temporal-quantize", "temporal-lowrank", "lowrank", "lowrank-energy"]
# Of one visit: which samples (an id has 1 + id % 4 rows), and what their rows look like.
VISITS = st.lists(
    st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.sampled_from(["same", "near", "new", "zero", "huge"])),
    min_size=1,
    max_size=12,
)


def rows_for(ids: list[int], kind: str, width: int, turn: int) -> torch.Tensor:
    parts = []
    for one in ids:
        base = torch.randn((1 + one % 4, width), generator=torch_stream(one, "keyed-base"))
        other = torch.randn(base.shape, generator=torch_stream(one, "keyed-other", turn))
        parts.append({"same": base, "near": base + 0.01 * other, "new": other, "zero": 0 * base, "huge": 1e37 * other}[kind])
    return torch.cat(parts)


@pytest.mark.parametrize("codec", CODECS, ids=IDS)
@settings(max_examples=60, deadline=None)
@given(visits=VISITS, width=st.integers(1, 9), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_ends_agree_whatever_is_sent(
    codec: Temporal | LowRank, visits: list[tuple[list[int], str]], width: int, dtype: torch.dtype
) -> None:
    sender: State = codec.init()
    receiver: State = codec.init()
    for turn, (ids, kind) in enumerate(visits):
        samples = Samples(tuple(ids), tuple(1 + one % 4 for one in ids))
        rows = rows_for(ids, kind, width, turn).to(dtype)
        packet, sender = codec.encode(rows, sender, torch_stream(turn, "keyed"), samples)
        assert len(packet.payload) <= codec.payload_bytes(len(rows), width, dtype)
        decoded, receiver = codec.decode(packet, receiver, samples)
        assert decoded.shape == rows.shape
        assert bool(torch.isfinite(decoded).all())
        assert packet.facts["samples"] == len(ids)
        ours, theirs = codec.flatten(sender), codec.flatten(receiver)
        names = ("noted", "samples") if isinstance(codec, Temporal) else ("samples", "samples")
        assert torch.equal(ours.get(names[0], torch.empty(0)), theirs.get(names[1], torch.empty(0))), "who is held, and in which order"
        if codec.mirrored:
            assert torch.equal(ours.get("values", torch.empty(0)), theirs.get("values", torch.empty(0)))


@pytest.mark.parametrize("codec", CODECS, ids=IDS)
@settings(max_examples=150, deadline=None)
@given(payload=st.binary(max_size=80), seen=st.booleans())
def test_hostile_bytes_raise_codec_errors_alone(codec: Temporal | LowRank, payload: bytes, seen: bool) -> None:
    samples, state = Samples((1, 2), (2, 3)), codec.init()
    rows = rows_for([1, 2], "same", 4, 0)
    packet, _ = codec.encode(rows, state, torch_stream(0, "keyed"), samples)
    if seen:
        _, state = codec.decode(packet, state, samples)
    try:
        found, _ = codec.decode(type(packet)(packet.codec, packet.dtype, packet.shape, payload), state, samples)
    except CodecError:
        return
    assert found.shape == rows.shape
    assert bool(torch.isfinite(found).all())
