"""compress/entropy.py: the inner codec's values bit for bit, fewer bytes where there is something to save, and no bombs."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import torch
import zstandard

from splitft.compress.base import Codec, Packet
from splitft.compress.cast import Cast
from splitft.compress.entropy import Entropy
from splitft.compress.identity import Identity
from splitft.compress.quantize import Quantize
from splitft.compress.topk import TopK
from splitft.errors import CodecError, ConfigError
from splitft.rng import torch_stream

INNERS: dict[str, Codec] = {
    "bfloat16": Cast(),
    "float16": Cast("float16"),
    "float32": Identity(),
    "int8": Quantize(),
    "int2": Quantize(bits=2, per="channel", symmetric=False),
    "topk": TopK(),
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch_stream(seed, "entropy-test"))


def sent(codec: Codec, tensor: torch.Tensor) -> Packet:
    return codec.encode(tensor, codec.init())[0]


@pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS.keys())
@pytest.mark.parametrize("item_bytes", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(64, 48), (1, 1), (3, 7), (5, 1)])
def test_what_arrives_is_the_inner_codec_s_to_the_bit(inner: Codec, item_bytes: int, shape: tuple[int, int]) -> None:
    codec, tensor = Entropy(inner=inner, item_bytes=item_bytes), random(*shape)
    packet, plain = sent(codec, tensor), sent(inner, tensor)
    assert len(packet.payload) <= len(plain.payload) + 1 <= codec.payload_bytes(*shape, torch.float32)
    decoded, expected = codec.decode(packet, codec.init())[0], inner.decode(plain, inner.init())[0]
    assert torch.equal(decoded.view(torch.int32), expected.view(torch.int32))
    assert packet.facts["stage_entropy_bytes"] == len(packet.payload)
    assert packet.facts["stage_entropy_saved_bytes"] == len(plain.payload) - len(packet.payload)


def test_noise_of_one_scale_has_the_entropy_that_theory_says() -> None:
    """Of normal values sign and mantissa are noise; only the exponent has less than its eight bits. Nothing lossless is better
    by more than chance; Zstandard looks for repeats where there are none, which costs a few in a hundred."""
    tensor = random(512, 256)
    exponents = torch.frexp(tensor.bfloat16().float()).exponent.flatten()
    shares = exponents.unique(return_counts=True)[1].double() / exponents.numel()
    exponent_bits = float(-(shares * shares.log2()).sum())
    for name, bits in (("bfloat16", 16), ("float32", 32)):
        plain, packed = len(sent(INNERS[name], tensor).payload), len(sent(Entropy(inner=INNERS[name]), tensor).payload)
        most = bits / (bits - 8 + exponent_bits)
        assert 0.94 * most < plain / packed < 1.002 * most
    assert len(sent(Entropy(), tensor).payload) < 0.9 * len(sent(Entropy(item_bytes=1), tensor).payload), "what the order of bytes is for"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_pattern_of_bits_comes_back(dtype: torch.dtype) -> None:
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    bits = words.to(torch.int16).view(torch.bfloat16) if dtype == torch.bfloat16 else (words * 65537).view(torch.float32)
    tensor = bits[torch.isfinite(bits)].sort().values[:, None]
    codec = Entropy(inner=Identity())
    packet = sent(codec, tensor)
    assert bytes(packet.payload[:1]) == b"\x01"
    decoded = codec.decode(packet, codec.init())[0]
    assert torch.equal(decoded.view(torch.uint8), tensor.view(torch.uint8))


def test_what_cannot_become_smaller_travels_as_it_is() -> None:
    tensor = torch.randint(-127, 128, (1, 64), generator=torch_stream(0, "noise")).float()
    packet = sent(Entropy(inner=Quantize()), tensor)
    assert bytes(packet.payload) == b"\x00" + bytes(sent(Quantize(), tensor).payload)


def test_exponents_lie_together_behind_what_comes_before_the_values() -> None:
    tensor = torch.tensor([[1.0, -1.5] * 64])
    payload = bytes(sent(Entropy(), tensor).payload)
    assert payload[0] == 1
    assert zstandard.ZstdDecompressor().decompress(payload[1:]) == b"\x80\xc0" * 64 + b"\x3f\xbf" * 64
    odd = torch.cat([tensor, torch.zeros(1, 8)], 1)
    payload = bytes(sent(Entropy(inner=TopK(share=128 / 136)), odd).payload)
    positions = b"\xff" * 16 + b"\x00"
    shuffled = zstandard.ZstdDecompressor().decompress(payload[1:])
    assert shuffled == positions[:1] + positions[1::2] + b"\x80\xc0" * 64 + positions[2::2] + b"\x3f\xbf" * 64


def test_it_says_of_itself_what_the_inner_codec_is() -> None:
    tensor = random(3, 5)
    for inner in INNERS.values():
        codec = Entropy(inner=inner)
        assert (codec.lossless, codec.floating, codec.draws, codec.keyed) == (inner.lossless, inner.floating, inner.draws, inner.keyed)
        assert (codec.error_bound(tensor) is None) == (inner.error_bound(tensor) is None)
    whole = torch.arange(600, dtype=torch.int32).reshape(20, 30)
    exact = Entropy(inner=Identity())
    assert torch.equal(exact.decode(sent(exact, whole), exact.init())[0], whole)
    assert Entropy(inner=TopK(share=0.2), level=3).scaled(2.0) == Entropy(inner=TopK(share=0.1), level=3)


def test_plans_count_on_the_typical_ratio() -> None:
    assert Entropy().expected_bytes(30, 100, torch.float32) == 1 + 6000 / 1.5
    assert Entropy(inner=Quantize()).expected_bytes(30, 100, torch.float32) == 1 + 3060 / 1.14
    assert Entropy(inner=Identity()).expected_bytes(30, 100, torch.bfloat16) == 1 + 6000 / 1.5
    assert Entropy().payload_bytes(30, 100, torch.float32) == 6001


def frame(data: bytes, **fields: Any) -> bytes:
    return b"\x01" + zstandard.ZstdCompressor(**fields).compress(data)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x00",
        b"\x01",
        b"\x02" + bytes(64),
        b"\x00" + bytes(63),
        b"\x00" + bytes(65),
        frame(bytes(63)),
        frame(bytes(65)),
        frame(bytes(64), write_content_size=False),
        frame(bytes(64))[:-1],
        frame(bytes(64)) + b"\x00",
        frame(bytes(64)) + frame(bytes(64))[1:],
        frame(bytes(32)) + frame(bytes(32))[1:],
        b"\x01" + bytes(40),
        b"\x01\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + bytes(4),
    ],
)
def test_damaged_payloads_are_refused(payload: bytes) -> None:
    with pytest.raises(CodecError):
        Entropy().decode(Packet(11, torch.float32, (4, 8), payload), Entropy().init())


def test_a_frame_that_holds_more_than_the_tensor_is_refused_before_memory_is_taken() -> None:
    bomb = frame(bytes(200_000_000), level=3)
    assert len(bomb) < 40_000
    packet = Packet(11, torch.float32, (200, 100), bomb)
    tracemalloc.start()
    with pytest.raises(CodecError, match="at most 40000"):
        Entropy().decode(packet, Entropy().init())
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1_000_000


def test_two_stages_are_one_too_many_but_work() -> None:
    codec, tensor = Entropy(inner=Entropy()), random(64, 32)
    packet = sent(codec, tensor)
    assert torch.equal(codec.decode(packet, codec.init())[0], tensor.bfloat16().float())
    once = sent(Entropy(), tensor)
    assert packet.facts["stage_entropy_saved_bytes"] == once.facts["stage_entropy_saved_bytes"] - 1


@pytest.mark.parametrize(
    "fields", [{"level": 0}, {"level": 23}, {"level": 1.0}, {"item_bytes": -1}, {"item_bytes": 9}, {"item_bytes": True}]
)
def test_wrong_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="entropy has wrong fields") as caught:
        Entropy(**fields)
    assert next(iter(fields)) in str(caught.value.problems if hasattr(caught.value, "problems") else caught.value)
