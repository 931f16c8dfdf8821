"""compress/randk.py: the channels are those of the seed on the wire, each as likely, and what arrives is right on average."""

from __future__ import annotations

import pytest
import torch

from splitft.compress.base import HEADER_BYTES, Codec, Packet
from splitft.compress.error_bounded import ErrorBounded
from splitft.compress.feedback import Feedback
from splitft.compress.identity import Identity
from splitft.compress.quantize import Quantize
from splitft.compress.randk import RandK
from splitft.compress.residual import Residual
from splitft.errors import CodecError, ConfigError
from splitft.rng import torch_stream

EXACT = Identity()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch_stream(seed, "randk-test"))


def sent(codec: RandK, tensor: torch.Tensor, seed: int = 0) -> Packet:
    return codec.encode(tensor, codec.init(), torch_stream(seed, "draw"))[0]


def through(codec: RandK, tensor: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return codec.decode(sent(codec, tensor, seed), codec.init())[0]


def test_the_channels_of_a_seed_are_the_same_for_ever() -> None:
    """A fixed packet: another NumPy or another machine must read the same channels from it."""
    payload = (12345).to_bytes(8, "little") + torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes()
    codec = RandK(inner=EXACT, share=0.3, unbiased=False)
    decoded, _ = codec.decode(Packet(9, torch.float32, (1, 10), payload), codec.init())
    assert decoded.tolist() == [[0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0]]


def test_a_packet_has_one_set_of_channels_and_its_values() -> None:
    codec, tensor = RandK(inner=EXACT, share=0.25, unbiased=False), random(50, 32)
    decoded = through(codec, tensor)
    kept = decoded != 0
    assert bool((kept == kept[0]).all())
    assert int(kept[0].sum()) == 8
    assert torch.equal(decoded, tensor * kept)
    assert torch.equal(through(RandK(inner=EXACT, share=0.25), tensor), tensor * kept * 4.0)
    assert not torch.equal(kept, through(codec, tensor, 1) != 0)


@pytest.mark.parametrize("inner", [EXACT, Quantize(bits=4)], ids=["identity", "quantize"])
def test_it_is_right_on_average(inner: Identity | Quantize) -> None:
    tensor, draws = random(1, 20), 4000
    codec = RandK(inner=inner, share=0.2)
    packets = [codec.encode(tensor, codec.init(), torch_stream(k, "mean"))[0] for k in range(draws)]
    decoded, _ = codec.decode_batch(packets, [codec.init()] * draws)
    shares = (decoded != 0).double().mean(0)
    if inner is EXACT:
        assert bool(((shares - 0.2).abs() < 5 * (0.2 * 0.8 / draws) ** 0.5).all()), "each channel is as likely, five standard deviations"
    slack = 0.0 if inner is EXACT else float(tensor.abs().max()) / 14 * 1.01
    deviation = tensor.double().abs()[0] * (4.0 / draws) ** 0.5
    assert bool(((decoded.double().mean(0) - tensor.double()[0]).abs() <= 5 * deviation + slack * 1.1).all())
    if inner is EXACT:
        error = (decoded.double() - tensor.double()).square().sum(1).mean()
        assert float(error / tensor.double().square().sum()) == pytest.approx(4.0, rel=0.1), "d/k - 1 times the energy"


def test_the_size_is_a_seed_and_the_values() -> None:
    codec, tensor = RandK(share=0.1), random(7, 100)
    packet = sent(codec, tensor)
    assert packet.size_bytes == HEADER_BYTES + 8 + 7 * 10 * 2 == codec.packet_bytes((7, 100), torch.float32)
    assert codec.expected_bytes(7, 100, torch.float32) == 148
    assert packet.facts == {"stage_positions_bytes": 8}


def test_all_channels_are_the_inner_codec_s_values() -> None:
    tensor = random(4, 6)
    assert torch.equal(through(RandK(inner=EXACT, share=1.0), tensor), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_would_be_beyond_the_type_is_its_largest(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    decoded = through(RandK(inner=EXACT, share=0.5), torch.full((2, 4), -most, dtype=dtype))
    assert sorted(decoded[0].tolist()) == [-most, -most, 0.0, 0.0]


def test_the_dial_changes_the_share() -> None:
    assert RandK(share=0.2).scaled(2.0) == RandK(share=0.1)
    assert RandK(share=0.2, unbiased=False).scaled(0.01) == RandK(share=1.0, unbiased=False)


def test_a_payload_without_its_seed_is_refused() -> None:
    codec = RandK(share=0.5)
    good = bytes(sent(codec, random(2, 4)).payload)
    for damaged in (b"", good[:7], good[:8], good[:-1]):
        with pytest.raises(CodecError):
            codec.decode(Packet(9, torch.float32, (2, 4), damaged), codec.init())


@pytest.mark.parametrize("fields", [{"share": 0.0}, {"share": 1.5}, {"unbiased": 1}, {"inner": None}])
def test_wrong_fields_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(fields))} is"):
        RandK(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(("share", "unbiased"), [(0.3, False), (1.0, False), (1.0, True)])
def test_facts_are_those_of_all_channels(share: float, unbiased: bool) -> None:
    codec, rows, counts = RandK(inner=ErrorBounded(0.1), share=share, unbiased=unbiased), random(12, 40), [5, 1, 6]
    packets, _ = codec.encode_batch(rows, counts, [codec.init()] * 3, [torch_stream(k, "draw") for k in range(3)])
    decoded, _ = codec.decode_batch(packets, [codec.init()] * 3)
    for packet, one, arrived in zip(packets, rows.double().split(counts), decoded.double().split(counts), strict=True):
        assert packet.facts["squared"] == pytest.approx(float(one.square().sum()), rel=1e-12)
        assert packet.facts["squared_error"] == pytest.approx(float((one - arrived).square().sum()), rel=1e-5)


def test_an_unbiased_one_tells_no_error_that_is_not_its_own() -> None:
    facts = sent(RandK(inner=ErrorBounded(0.1), share=0.3), random(5, 40)).facts
    assert not {"squared", "squared_error"} & facts.keys()
    assert facts["stage_codes_bytes"] > 0


@pytest.mark.parametrize("inner", [Residual(), Feedback()], ids=["residual", "feedback"])
def test_an_inner_codec_that_remembers_samples_is_refused(inner: Codec) -> None:
    with pytest.raises(ConfigError, match="put what remembers outside"):
        RandK(inner=inner)
    Residual(inner=RandK(share=0.3))
