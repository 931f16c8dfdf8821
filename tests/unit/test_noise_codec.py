"""Noise at the cut: as large as it says, on rows no longer than they may be, the same when sent again, and never an epsilon for less."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from splitft.compress.base import Codec
from splitft.compress.entropy import Entropy
from splitft.compress.feedback import Feedback
from splitft.compress.identity import Identity
from splitft.compress.noise import Noise, noise_in
from splitft.compress.quantize import Quantize
from splitft.compress.residual import Residual
from splitft.compress.temporal import Temporal
from splitft.compress.topk import TopK
from splitft.errors import ConfigError
from splitft.rng import stream_seed, torch_stream
from splitft.wire import Stream, StreamName, open_streams

PLACE = "up activations"


def rows_of(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch_stream(seed, "noise-test"))


def sent(codec: Codec, rows: torch.Tensor, index: int = 0) -> torch.Tensor:
    packet, _ = codec.encode(rows, codec.init(), torch_stream(3, "noise-stream", index))
    return codec.decode(packet, codec.init())[0]


def payload(codec: Codec, rows: torch.Tensor, name: StreamName, skip: int = 0) -> bytes:
    stream = Stream.open(codec, name)
    for _ in range(skip):
        stream.send(rows)
    return bytes(stream.send(rows).payload)


def test_the_variance_of_the_noise_is_in_its_chi_square_interval() -> None:
    codec, rows = Noise(Identity(), clip=2.5, multiple=0.8), 0.01 * rows_of(400, 64)
    noise = (sent(codec, rows) - rows).double()
    count = noise.numel()
    assert abs(float((noise / (0.8 * 2.5)).square().sum()) - count) < 4.5 * math.sqrt(2 * count)
    assert abs(float(noise.mean())) < 4.5 * 2.0 / math.sqrt(count)
    per_channel = (noise / 2.0).square().sum(0)
    assert bool(((per_channel - 400).abs() < 5 * math.sqrt(800)).all()), "every channel has the same noise"


def test_no_row_goes_out_longer_than_the_clip_and_shorter_ones_go_as_they_are() -> None:
    codec, rows = Noise(Identity(), clip=3.0, multiple=0.0), rows_of(50, 16) * torch.linspace(0.01, 1e6, 50)[:, None]
    found, length = sent(codec, rows), rows.norm(dim=1)
    assert float(found.norm(dim=1).max()) <= 3.0 * (1 + 1e-6)
    assert torch.equal(found[length <= 3.0], rows[length <= 3.0])
    torch.testing.assert_close(found[length > 3.0], rows[length > 3.0] * (3.0 / length[length > 3.0])[:, None])


def test_without_a_clip_noise_is_in_root_mean_squares_of_the_row_and_has_no_epsilon() -> None:
    codec, rows = Noise(Identity(), multiple=2.0), rows_of(300, 32) * torch.linspace(0.1, 1000, 300)[:, None]
    scaled = (sent(codec, rows) - rows).double() / rows.double().square().mean(1, keepdim=True).sqrt()
    assert abs(float((scaled / 2).square().sum()) - scaled.numel()) < 4.5 * math.sqrt(2 * scaled.numel())
    assert not codec.claims
    assert codec.epsilon_of_rows(1e-5) is None
    assert replace(codec, clip=1.0, multiple=0.0).epsilon_of_rows(1e-5) is None
    assert codec.in_units_of_rms(32) == 2.0


@pytest.mark.parametrize(("epsilon", "sigma"), [(1, 3.73), (4, 1.08), (8, 0.60)])
def test_epsilon_of_a_row_is_that_of_twice_the_clip(epsilon: float, sigma: float) -> None:
    codec = Noise(clip=7.0, multiple=2 * sigma)
    assert codec.epsilon_of_rows(1e-5) == pytest.approx(epsilon, rel=0.02)
    assert codec.in_units_of_rms(768) == pytest.approx(2 * sigma * math.sqrt(768))


def test_more_rows_and_more_sends_cost_more_and_alike() -> None:
    codec = Noise(clip=1.0, multiple=10.0)
    found = [codec.epsilon_of_rows(1e-5, rows, sends) or 0.0 for rows, sends in ((1, 1), (8, 1), (1, 8), (64, 3))]
    assert found[0] < found[1] == found[2] < found[3]
    assert found[1] == pytest.approx(Noise(clip=1.0, multiple=10.0 / math.sqrt(8)).epsilon_of_rows(1e-5))


@pytest.mark.parametrize("inner", [Identity(), Quantize(rounding="stochastic"), Entropy(Identity())], ids=repr)
def test_what_is_sent_again_is_the_same_bytes_and_every_packet_has_noise_of_its_own(inner: Codec) -> None:
    codec, rows, name = Noise(inner, clip=1.0), rows_of(6, 8), StreamName(5, 2, 9, PLACE)
    first = payload(codec, rows, name)
    assert payload(codec, rows, name) == first
    assert payload(codec, rows, name, skip=1) != first
    for other in (replace(name, client=3), replace(name, round=10), replace(name, seed=6), replace(name, place="up gradients")):
        assert payload(codec, rows, other) != first


def test_other_values_in_a_repeated_round_never_meet_the_same_noise() -> None:
    """Else the difference of the two packets would be the values' own, without any noise."""
    codec, rows = Noise(Identity(), clip=1.0), 1e-3 * rows_of(100, 64)
    changed = rows.clone()
    changed[0, 0] += 1e-4
    one, other = sent(codec, rows).double() - rows, sent(codec, changed).double() - changed
    correlation = float((one * other).sum() / (one.norm() * other.norm()))
    assert abs(correlation) < 4.5 / math.sqrt(one.numel())


@pytest.mark.parametrize("outer", [Feedback, Residual, TopK, Temporal])
def test_a_codec_outside_that_would_undo_the_noise_is_refused(outer: type[Codec]) -> None:
    with pytest.raises(ConfigError, match=r"inner is noise"):
        outer(inner=Noise())  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"inner is entropy"):
        outer(inner=Entropy(Noise()))  # type: ignore[call-arg]


def test_the_noise_of_a_codec_is_found() -> None:
    noise = Noise(clip=1.0)
    assert noise_in(noise) is noise
    assert noise_in(Entropy(noise)) is noise
    assert noise_in(Entropy(Identity())) is None


@pytest.mark.parametrize("fields", [{"clip": -1.0}, {"multiple": math.nan}, {"clip": True}, {"multiple": math.inf}])
def test_fields_that_mean_nothing_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="noise: "):
        Noise(**fields)  # type: ignore[arg-type]


def low_bits(name: StreamName) -> int:
    """What PyTorch's generator makes of the seed of a stream's first packet."""
    return stream_seed(name.seed, f"codec {name.place}", name.client, name.round, 0) & 0xFFFFFFFF


def test_keys_that_a_generator_of_32_bits_cannot_tell_apart_give_different_noise() -> None:
    """Else whoever tries out four thousand million seeds has the noise of every client, however long its key is."""
    seen: dict[int, StreamName] = {}
    for number in range(400_000):
        name = StreamName(number, 0, 1, PLACE)
        if (other := seen.setdefault(low_bits(name), name)) is not name:
            break
    else:
        pytest.fail("no two names collide")
    assert torch.equal(*(torch.randn(9, generator=Stream.open(Noise(), one).generator()) for one in (name, other)))
    codec, rows = Noise(Identity(), clip=1.0), 1e-3 * rows_of(100, 8)
    one, two = payload(codec, rows, name), payload(codec, rows, other)
    assert one == payload(codec, rows, name)
    assert one != two
    apart = [torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(100, 8).double() - rows for data in (one, two)]
    assert abs(float(torch.nn.functional.cosine_similarity(apart[0].reshape(1, -1), apart[1].reshape(1, -1)))) < 4.5 / math.sqrt(800)


@pytest.mark.parametrize("bit", [0, 31, 32, 63, 64, 200, 255])
def test_every_bit_of_a_client_s_secret_counts(bit: int) -> None:
    secret, rows = int.from_bytes(bytes(range(100, 132)), "big"), rows_of(3, 8)

    def noisy(key: int) -> bytes:
        up, *_ = open_streams([Noise(clip=1.0)] * 4, 1, 0, 1, secret=key)
        return bytes(up.send(rows).payload)

    assert noisy(secret) == noisy(secret)
    assert noisy(secret ^ (1 << bit)) != noisy(secret)


def test_noise_asks_for_a_key_and_takes_no_plain_generator() -> None:
    with pytest.raises(AssertionError, match="a generator with a key"):
        Noise().encode(rows_of(2, 4), Noise().init(), torch.Generator().manual_seed(1))
