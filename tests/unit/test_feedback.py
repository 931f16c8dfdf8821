"""compress/feedback.py: what is owed is paid in the end, by sample; training that plain sparsification stalls goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from splitft.compress.base import Codec, Samples, State
from splitft.compress.cast import Cast
from splitft.compress.entropy import Entropy
from splitft.compress.feedback import Feedback
from splitft.compress.identity import Identity
from splitft.compress.quantize import Quantize
from splitft.compress.randk import RandK
from splitft.compress.residual import Residual
from splitft.compress.topk import TopK
from splitft.errors import CodecError, ConfigError
from splitft.rng import torch_stream

EXACT = Identity()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch_stream(seed, "feedback-test"))


class Line:
    """A sender and a receiver with a real wire between them."""

    def __init__(self, codec: Codec) -> None:
        self.codec, self.turn = codec, 0
        self.sender: State = codec.init()
        self.receiver: State = codec.init()

    def send(self, tensor: torch.Tensor, samples: Samples | None = None) -> torch.Tensor:
        self.turn += 1
        generator = torch_stream(self.turn, "line") if self.codec.draws else None
        packet, self.sender = self.codec.encode(tensor, self.sender, generator, samples)
        decoded, self.receiver = self.codec.decode(packet, self.receiver, samples)
        return decoded


INNERS: dict[str, Codec] = {
    "int2": Quantize(bits=2),
    "int4-stochastic": Quantize(bits=4, rounding="stochastic"),
    "bfloat16": Cast(),
    "topk": TopK(inner=EXACT, share=0.1),
    "topk-int4": TopK(inner=Quantize(bits=4), share=0.25),
    "randk": RandK(inner=EXACT, share=0.25, unbiased=False),
}


@pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS.keys())
@pytest.mark.parametrize("told", [True, False])
def test_all_that_arrives_is_all_that_was_sent_less_what_is_owed(inner: Codec, told: bool) -> None:
    line, samples = Line(Feedback(inner=inner)), Samples((3, 8), (2, 1)) if told else None
    total, arrived = torch.zeros(3, 40, dtype=torch.float64), torch.zeros(3, 40, dtype=torch.float64)
    for turn in range(25):
        tensor = random(3, 40, seed=turn)
        total += tensor.double()
        arrived += line.send(tensor, samples).double()
    own = line.sender.own
    owed = own.samples.rows(samples, 40) if samples else own.stream
    assert float((total - arrived - owed.double()).abs().max()) < 1e-4, "float32's own roundings"


@pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS.keys())
def test_the_mean_of_a_constant_comes_to_within_one_bound(inner: Codec) -> None:
    """T sends are off by no more together than what is owed at last, and that does not grow with T."""
    tensor, line = random(2, 40), Line(Feedback(inner=inner))
    arrived, off = torch.zeros(2, 40), []
    for turn in range(1, 321):
        arrived += line.send(tensor)
        if turn in (40, 80, 160, 320):
            off.append(float((arrived - turn * tensor).abs().mean()))
    assert off[-1] < 2.0 * max(off[0], 0.002), "it does not grow"
    plain, once = Line(inner), torch.zeros(2, 40)
    for _ in range(320):
        once += plain.send(tensor)
    if not inner.draws:
        assert float((once - 320 * tensor).abs().mean()) > 3 * off[-1], "without feedback it does"


def test_the_mean_of_int2_is_within_one_step() -> None:
    """The largest magnitude is a step of two bits; what is owed stays below it, so T sends together are off by no more."""
    tensor, line = random(4, 16), Line(Feedback(inner=Quantize(bits=2)))
    total = sum((line.send(tensor).double() for _ in range(200)), torch.zeros(4, 16, dtype=torch.float64))
    step = tensor.double().abs().amax(1, keepdim=True) * 2 * (1 + 2.0**-7)
    assert bool(((total - 200 * tensor.double()).abs() <= step).all())


def descend(codec: Codec, told: bool) -> tuple[float, float]:
    """SGD on the mean of two quadratics, (w - a)^2 / 2 each, whose gradients quarrel over one coordinate: loss above the least, w[1]."""
    centres = torch.tensor([[10.0, 1.0, 1.0], [-10.0, 1.0, 1.0]])
    line, point = Line(codec), torch.zeros(3)
    for step in range(4000):
        one = step % 2
        point = point - 0.01 * line.send((point - centres[one])[None], Samples((one,), (1,)) if told else None)[0]
    excess = 0.5 * float((point - centres.mean(0)).square().sum())
    return excess, float(point[1])


@pytest.mark.parametrize("told", [True, False])
def test_sgd_with_one_coordinate_goes_on_where_plain_topk_stalls(told: bool) -> None:
    top = TopK(inner=EXACT, share=0.34)
    stalled, coordinate = descend(top, told)
    assert coordinate == 0.0, "the quarrelled coordinate is always the largest, so no other is ever sent"
    assert stalled > 0.99
    excess, coordinate = descend(Feedback(inner=top), told)
    assert excess < 0.05
    assert coordinate == pytest.approx(1.0, abs=0.1)
    exact, _ = descend(EXACT, told)
    assert exact < 0.01


def test_samples_owe_each_their_own() -> None:
    line, alone = Line(Feedback(inner=TopK(inner=EXACT, share=0.2))), Line(Feedback(inner=TopK(inner=EXACT, share=0.2)))
    tensor = random(3, 10)
    for turn in range(6):
        other = random(2, 10, seed=turn)
        together = line.send(torch.cat([other, tensor]), Samples((turn, 99), (2, 3)))
        assert torch.equal(together[2:], alone.send(tensor, Samples((99,), (3,))))


def test_a_sample_or_stream_of_another_shape_is_owed_nothing() -> None:
    codec = Feedback(inner=TopK(inner=EXACT, share=0.2))
    for told in (True, False):
        line = Line(codec)
        line.send(random(4, 10), Samples((1,), (4,)) if told else None)
        fresh, tensor = Line(codec), random(3, 10)
        samples = Samples((1,), (3,)) if told else None
        assert torch.equal(line.send(tensor, samples), fresh.send(tensor, samples))


def test_a_given_state_is_left_alone() -> None:
    codec, tensor = Feedback(), random(3, 20)
    _, once = codec.encode(tensor, codec.init())
    first, _ = codec.encode(tensor, once)
    again, _ = codec.encode(tensor, once)
    assert bytes(first.payload) == bytes(again.payload)
    assert bytes(first.payload) != bytes(codec.encode(tensor, codec.init())[0].payload)


def test_the_receiver_keeps_nothing() -> None:
    line = Line(Feedback())
    for turn in range(3):
        line.send(random(3, 20, seed=turn), Samples((turn,), (3,)))
        line.send(random(3, 20, seed=turn))
    assert not line.codec.mirrored
    assert line.codec.flatten(line.receiver) == {}
    assert set(line.codec.flatten(line.sender)) == {"samples", "values", "stream"}


def test_a_restored_sender_goes_on_as_if_nothing_had_happened() -> None:
    line = Line(Feedback(inner=TopK(share=0.2)))
    for turn in range(3):
        line.send(random(3, 20, seed=turn), Samples((turn % 2, 5), (1, 2)))
        line.send(random(3, 20, seed=turn))
    back = Line(line.codec)
    back.sender = line.codec.restore(line.codec.flatten(line.sender))
    for samples in (None, Samples((1, 5), (1, 2))):
        tensor = random(3, 20, seed=9)
        assert torch.equal(line.send(tensor, samples), back.send(tensor, samples))
        found, expected = back.codec.flatten(back.sender), line.codec.flatten(line.sender)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("commit", [True, False])
def test_the_sender_s_state_comes_without_commit_too(commit: bool) -> None:
    """No receiver has it, so nobody else can say what is owed."""
    codec, rows = Feedback(), random(5, 16)
    _, states = codec.encode_batch(rows, [2, 3], [codec.init()] * 2, [None] * 2, commit=commit)
    assert all(state.own.stream is not None for state in states)


def test_decay_forgets() -> None:
    codec = Feedback(inner=TopK(inner=EXACT, share=0.5), decay=0.25)
    packet, state = codec.encode(torch.tensor([[4.0, 1.0]]), codec.init())
    assert state.own.stream.tolist() == [[0.0, 0.25]]
    assert packet.facts["squared"] == 17.0
    assert packet.facts["squared_error"] == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_a_narrow_type_pay_what_rounding_took(dtype: torch.dtype) -> None:
    tensor = random(2, 8).to(dtype)
    line = Line(Feedback(inner=Quantize(bits=4)))
    total = sum((line.send(tensor).double() for _ in range(100)), torch.zeros(2, 8, dtype=torch.float64))
    assert float((total / 100 - tensor.double()).abs().max()) < 0.01
    most = torch.finfo(dtype).max
    huge = Line(Feedback(inner=TopK(inner=EXACT, share=0.5), cache_dtype="float16"))
    for _ in range(5):
        assert bool(torch.isfinite(huge.send(torch.full((1, 4), most, dtype=dtype))).all())


def test_the_cache_is_bounded() -> None:
    line = Line(Feedback(inner=TopK(inner=EXACT, share=0.1), cache_mb=0.001))
    for turn in range(20):
        line.send(random(5, 10, seed=turn), Samples((turn,), (5,)))
    assert line.sender.own.samples.held_bytes == 1000
    assert len(line.sender.own.samples.entries) == 5


def test_samples_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(CodecError, match="feedback"):
        Feedback().encode(random(3, 4), Feedback().init(), None, Samples((1,), (2,)))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"decay": 0.0}, "decay"),
        ({"decay": 1.5}, "decay"),
        ({"cache_mb": -1}, "cache"),
        ({"inner": Feedback()}, "feedback: inner is feedback"),
        ({"inner": RandK()}, "unbiased = false"),
        ({"inner": Entropy(inner=RandK(share=1.0))}, "unbiased = false"),
        ({"inner": Residual(inner=TopK(inner=RandK()))}, "unbiased = false"),
        ({"inner": RandK(unbiased=False, inner=RandK())}, "unbiased = false"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Feedback(**fields)


def test_a_biased_randk_inside_stays_one_whatever_the_dial() -> None:
    codec = Feedback(inner=Entropy(inner=RandK(unbiased=False)))
    assert codec.scaled(3.0) == Feedback(inner=Entropy(inner=RandK(share=0.1 / 3.0, unbiased=False)))
