"""compress/topk.py against a sort in Python, by hand, and with random places."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from splitft.compress.base import HEADER_BYTES, Codec, Packet
from splitft.compress.cast import Cast
from splitft.compress.entropy import Entropy
from splitft.compress.error_bounded import ErrorBounded
from splitft.compress.feedback import Feedback
from splitft.compress.identity import Identity
from splitft.compress.positions import kept_channels, position_bytes
from splitft.compress.quantize import Quantize
from splitft.compress.residual import Residual
from splitft.compress.topk import TopK
from splitft.errors import CodecError, ConfigError
from splitft.rng import torch_stream

EXACT = Identity()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch_stream(seed, "topk-test"))


def through(codec: TopK, tensor: torch.Tensor, seed: int = 0) -> torch.Tensor:
    packet, _ = codec.encode(tensor, codec.init(), torch_stream(seed, "draw") if codec.draws else None)
    return codec.decode(packet, codec.init())[0]


def largest(tensor: torch.Tensor, kept: int) -> torch.Tensor:
    """The oracle: by magnitude, then by channel, with Python's sort."""
    result = torch.zeros_like(tensor)
    for found, row in zip(result, tensor, strict=True):
        for channel in sorted(range(len(row)), key=lambda c: (-abs(row[c].item()), c))[:kept]:
            found[channel] = row[channel]
    return result


def test_one_row_by_hand() -> None:
    tensor = torch.tensor([[0.5, -4.0, 0.0, 3.0, 1.0, -1.0, 0.25, 0.0, 2.0, 0.0]])
    packet, _ = TopK(share=0.3).encode(tensor, TopK().init())
    values = np.array([-4.0, 3.0, 2.0], dtype=np.float32).view(np.uint32) >> 16
    positions = bytes([0b00001010, 0b00000001])
    assert bytes(packet.payload) == positions + values.astype("<u2").tobytes()
    assert through(TopK(share=0.3), tensor).tolist() == [[0.0, -4.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0]]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.34, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_what_sorting_gives_ties_and_all(share: float, dtype: torch.dtype) -> None:
    codec = TopK(inner=EXACT, share=share)
    ties = torch.randint(-2, 3, (40, 31), generator=torch_stream(0, "ties")).to(dtype)
    for tensor in (random(40, 31).to(dtype), ties, torch.zeros(3, 31, dtype=dtype), torch.full((2, 31), -1.5, dtype=dtype)):
        assert torch.equal(through(codec, tensor), largest(tensor, kept_channels(share, 31)))


@pytest.mark.parametrize("inner", [Cast(), EXACT, Quantize(bits=4)], ids=["cast", "identity", "quantize"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_the_size_is_that_of_positions_and_values(inner: Cast | Identity | Quantize, share: float) -> None:
    codec, tensor = TopK(inner=inner, share=share), random(7, 100)
    packet, _ = codec.encode(tensor, codec.init())
    kept = round(share * 100)
    assert len(packet.payload) == 7 * position_bytes(100, kept) + inner.payload_bytes(7, kept, torch.float32)
    assert packet.size_bytes == codec.packet_bytes((7, 100), torch.float32)
    assert codec.expected_bytes(7, 100, torch.float32) == packet.size_bytes - HEADER_BYTES
    assert packet.facts == {"stage_positions_bytes": 7 * position_bytes(100, kept)}


@pytest.mark.parametrize("inner", [Cast(), Cast("float16"), EXACT, Quantize(bits=8)], ids=["bfloat16", "float16", "exact", "int8"])
def test_the_bound_holds_and_is_the_value_where_nothing_is_sent(inner: Cast | Identity | Quantize) -> None:
    codec, tensor = TopK(inner=inner, share=0.2), random(2, 9, 40)
    bound, decoded = codec.error_bound(tensor), through(codec, tensor)
    assert bound is not None
    assert bound.shape == tensor.shape
    assert bool(((decoded - tensor).double().abs() <= bound).all())
    dropped = decoded == 0
    assert torch.equal(bound[dropped], tensor[dropped].double().abs())
    assert bool((bound[~dropped] < 0.02 * tensor[~dropped].abs().max()).all())
    assert TopK(random=0.5).error_bound(tensor) is None


def test_no_choice_of_as_many_values_is_nearer() -> None:
    tensor, codec = random(6, 8), TopK(inner=EXACT, share=3 / 8)
    error = (through(codec, tensor) - tensor).square().sum(1)
    for mask in torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8):
        if mask.sum() == 3:
            assert bool(((tensor * mask - tensor).square().sum(1) >= error - 1e-6).all())


def test_random_places_are_as_many_as_said_and_spread_evenly() -> None:
    tensor = torch.arange(1.0, 21.0).repeat(4000, 1)
    codec = TopK(inner=EXACT, share=0.3, random=0.5)
    decoded = through(codec, tensor)
    kept = decoded != 0
    assert torch.equal(decoded, tensor * kept)
    assert bool((kept.sum(1) == 6).all())
    assert bool(kept[:, 17:].all()), "the three largest are not drawn"
    shares = kept[:, :17].double().mean(0)
    assert bool(((shares - 3 / 17).abs() < 5 * (3 / 17 * 14 / 17 / 4000) ** 0.5).all()), "five standard deviations"
    assert not torch.equal(decoded, through(codec, tensor, seed=1))
    assert torch.equal(through(TopK(inner=EXACT, share=1.0, random=1.0), tensor), tensor)


def test_the_dial_changes_the_share_alone() -> None:
    codec = TopK(inner=Quantize(bits=4), share=0.2, random=0.1)
    assert codec.scaled(4.0) == TopK(inner=Quantize(bits=4), share=0.05, random=0.1)
    assert codec.scaled(1e-3).scaled(1.0) == TopK(inner=Quantize(bits=4), share=1.0, random=0.1)
    tensor = random(30, 64)
    errors = [float((through(TopK().scaled(f), tensor) - tensor).square().sum()) for f in (0.1, 0.5, 1.0, 2.0, 10.0)]
    assert errors == sorted(errors)


def test_damaged_positions_are_refused() -> None:
    codec = TopK(share=0.3)
    packet, state = codec.encode(random(2, 10), codec.init())
    good = bytes(packet.payload)
    assert len(good) == 2 * 2 + 2 * 3 * 2
    for damaged in (b"\xff" + good[1:], good[:1] + b"\x84" + good[2:], good[:3], b"", good[:-1]):
        with pytest.raises(CodecError):
            codec.decode(Packet(packet.codec, packet.dtype, packet.shape, damaged), state)


def test_values_that_would_be_dropped_are_checked_too() -> None:
    tensor = torch.tensor([[float("nan"), 1.0, 100.0, 2.0]])
    with pytest.raises(CodecError, match="1 of 4 values are NaN"):
        TopK(share=0.25).encode(tensor, TopK().init())


@pytest.mark.parametrize("fields", [{"share": 0.0}, {"share": 2}, {"random": -0.1}, {"random": 1.5}, {"random": True}, {"inner": "cast"}])
def test_wrong_fields_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(fields))} is"):
        TopK(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("random_share", [0.0, 0.5])
@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_facts_are_those_of_all_channels(share: float, random_share: float) -> None:
    codec, rows, counts = TopK(inner=ErrorBounded(0.1), share=share, random=random_share), random(12, 40), [5, 1, 6]
    draws = [torch_stream(k, "draw") if codec.draws else None for k in range(3)]
    packets, _ = codec.encode_batch(rows, counts, [codec.init()] * 3, draws)
    decoded, _ = codec.decode_batch(packets, [codec.init()] * 3)
    for packet, sent, arrived in zip(packets, rows.double().split(counts), decoded.double().split(counts), strict=True):
        assert packet.facts["squared"] == pytest.approx(float(sent.square().sum()), rel=1e-12)
        # But for the rounding of what is decoded to float32.
        assert packet.facts["squared_error"] == pytest.approx(float((sent - arrived).square().sum()), rel=1e-5)


@pytest.mark.parametrize("inner", [Residual(), Feedback(), Entropy(inner=Residual())], ids=["residual", "feedback", "inside"])
def test_an_inner_codec_that_remembers_samples_is_refused(inner: Codec) -> None:
    with pytest.raises(ConfigError, match="put what remembers outside"):
        TopK(inner=inner)
    Residual(inner=TopK(share=0.3))
