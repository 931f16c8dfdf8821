"""wire.py: what crosses is bytes in both directions, row by row, padding stays at home, and every packet is recorded."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from splitft.compress.base import HEADER_BYTES, Codec, Packet
from splitft.compress.cast import Cast
from splitft.compress.identity import Identity
from splitft.compress.quantize import Quantize
from splitft.errors import CodecError
from splitft.rng import torch_stream
from splitft.wire import Stream, Wire, carry_together, cross, open_streams

SESSIONS, SEQUENCES, TOKENS, WIDTH = 3, 2, 5, 8
LENGTHS = torch.tensor([[5, 3], [4, 5], [1, 2]])


def state() -> Tensor:
    return torch.randn(SESSIONS * SEQUENCES, TOKENS, WIDTH, generator=torch_stream(1, "wire"))


def wire_of(sessions: list[int], up: Codec, down: Codec, padded: bool, log: list[tuple[int, bool, Packet]] | None = None) -> Wire:
    log = [] if log is None else log
    return Wire(
        sessions,
        SEQUENCES,
        LENGTHS if padded else None,
        [Stream.open(up) for _ in sessions],
        [Stream.open(down) for _ in sessions],
        lambda *entry: log.append(entry),
    )


def is_token() -> Tensor:
    return (torch.arange(TOKENS)[None, None] < LENGTHS[:, :, None]).reshape(SESSIONS * SEQUENCES, TOKENS)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sessions", [[0], [0, 2], [0, 1, 2]])
def test_a_lossless_wire_changes_no_token_in_either_direction(sessions: list[int], padded: bool) -> None:
    hidden = state().requires_grad_(True)
    out = cross(hidden * 1.0, wire_of(sessions, Identity(), Identity(), padded))
    weights = torch.randn(out.shape, generator=torch_stream(2, "weights"))
    crossing = torch.zeros(SESSIONS, SEQUENCES, TOKENS, dtype=torch.bool)
    crossing[sessions] = True
    padding = crossing.reshape(is_token().shape) & ~is_token() if padded else torch.zeros_like(is_token())
    (out * weights).sum().backward()
    assert torch.equal(out[~padding], state()[~padding])
    assert torch.equal(hidden.grad[~padding], weights[~padding])
    assert float(out.detach()[padding].abs().sum()) == 0.0
    assert float(hidden.grad[padding].abs().sum()) == 0.0, "padding never travels, so its gradient does not either"


@pytest.mark.parametrize("padded", [False, True])
def test_the_forward_uses_the_uplink_and_the_backward_the_downlink(padded: bool) -> None:
    hidden = state().requires_grad_(True)
    out = cross(hidden * 1.0, wire_of([0, 2], Cast("bfloat16"), Cast("float16"), padded))
    weights = torch.randn(out.shape, generator=torch_stream(2, "weights"))
    (out * weights).sum().backward()
    group = torch.zeros(SESSIONS, SEQUENCES, TOKENS, dtype=torch.bool)
    group[[0, 2]] = True
    inside, tokens = group.reshape(is_token().shape), is_token() if padded else torch.ones_like(is_token())
    assert torch.equal(out[~inside], state()[~inside]), "rows of another cut do not cross here"
    assert torch.equal(hidden.grad[~inside], weights[~inside])
    assert torch.equal(out[inside & tokens], state()[inside & tokens].bfloat16().float())
    assert torch.equal(hidden.grad[inside & tokens], weights[inside & tokens].half().float())
    assert not torch.equal(out[inside & tokens], state()[inside & tokens])


@pytest.mark.parametrize("padded", [False, True])
def test_every_packet_is_recorded_once_with_its_real_size(padded: bool) -> None:
    log: list[tuple[int, bool, Packet]] = []
    hidden = state().requires_grad_(True)
    cross(hidden * 1.0, wire_of([0, 2], Identity(), Cast("bfloat16"), padded, log)).sum().backward()
    assert [(session, forward) for session, forward, _ in log] == [(0, True), (2, True), (0, False), (2, False)]
    for session, forward, packet in log:
        tokens = int(LENGTHS[session].sum()) if padded else SEQUENCES * TOKENS
        assert packet.shape == (tokens, WIDTH)
        assert packet.size_bytes == HEADER_BYTES + tokens * WIDTH * (4 if forward else 2)


def test_padded_and_unpadded_ways_agree_where_nothing_is_padded() -> None:
    full = torch.full((SESSIONS, SEQUENCES), TOKENS)
    outs = []
    for lengths in (None, full):
        wire = wire_of([0, 1, 2], Cast("bfloat16"), Identity(), False)
        wire.lengths = lengths
        outs.append(cross(state(), wire))
    assert torch.equal(outs[0], outs[1])


def test_a_state_that_is_not_finite_is_refused_at_the_wire() -> None:
    bad = state()
    bad[0, 0, 0] = float("nan")
    with pytest.raises(CodecError, match="1 of 240 values are NaN"):
        cross(bad, wire_of([0, 1, 2], Identity(), Identity(), False))
    poisoned = state().requires_grad_(True)
    out = cross(poisoned * 1.0, wire_of([0, 1, 2], Identity(), Identity(), False))
    with pytest.raises(CodecError, match="infinite"):
        (out * float("inf")).sum().backward()


def test_a_stream_keeps_both_ends_and_returns_what_travelled() -> None:
    stream = Stream.open(Cast("bfloat16"))
    tensor = state()[0]
    decoded, packet = stream.carry(tensor)
    assert torch.equal(decoded, tensor.bfloat16().float())
    assert packet.size_bytes == Cast("bfloat16").packet_bytes(tuple(tensor.shape), tensor.dtype)


class Counted(Cast):
    """How often a cohort's codec is called is what is looked at here."""

    calls: ClassVar[list[str]] = []

    def encode_batch(self, rows: Tensor, counts: Any, *more: Any, **named: Any) -> Any:
        self.calls.append(f"encode {list(counts)}")
        return super().encode_batch(rows, counts, *more, **named)

    def decode_batch(self, packets: Any, *more: Any, **named: Any) -> Any:
        self.calls.append(f"decode {len(packets)}")
        return super().decode_batch(packets, *more, **named)


@pytest.mark.parametrize("sessions", [[0, 2], [0, 1, 2]])
def test_a_ragged_group_crosses_in_one_pass(sessions: list[int]) -> None:
    Counted.calls.clear()
    hidden = state().requires_grad_(True)
    cross(hidden * 1.0, wire_of(sessions, Counted(), Counted(), True)).sum().backward()
    counts = [int(LENGTHS[session].sum()) for session in sessions]
    assert Counted.calls == [f"encode {counts}", f"decode {len(counts)}"] * 2


@pytest.mark.parametrize(
    "codec", [Quantize(), Quantize(bits=4, per="channel", symmetric=False, rounding="stochastic", outliers=0.1)], ids=repr
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sessions", [[1], [2, 0], [0, 1, 2]])
def test_a_group_s_tokens_are_what_each_session_alone_would_get(codec: Codec, padded: bool, sessions: list[int]) -> None:
    def streams() -> list[Stream]:
        return [open_streams([codec] * 4, 7, session, 1)[0] for session in sessions]

    wire = Wire(sessions, SEQUENCES, LENGTHS if padded else None, streams(), streams(), lambda *entry: None)
    out = cross(state(), wire).reshape(SESSIONS, SEQUENCES, TOKENS, WIDTH)
    tokens = (is_token() if padded else torch.ones_like(is_token())).reshape(SESSIONS, SEQUENCES, TOKENS)
    for session, stream in zip(sessions, streams(), strict=True):
        alone, _ = stream.carry(state().reshape(out.shape)[session][tokens[session]])
        assert torch.equal(out[session][tokens[session]], alone)


STOCHASTIC = Quantize(bits=2, rounding="stochastic")


def carried(place: int, *name: int) -> list[Tensor]:
    """What two packets of the same tensor arrive as, over one of the four streams of this (seed, client, round)."""
    stream = open_streams([STOCHASTIC] * 4, *name)[place]
    return [stream.carry(state()[0])[0] for _ in range(2)]


def test_random_numbers_follow_from_seed_client_round_place_and_packet() -> None:
    first, second = carried(0, 1, 2, 3)
    assert not torch.equal(first, second), "the next packet has numbers of its own"
    again = carried(0, 1, 2, 3)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    for other in (
        carried(0, 9, 2, 3),
        carried(0, 1, 9, 3),
        carried(0, 1, 2, 9),
        carried(1, 1, 2, 3),
        carried(2, 1, 2, 3),
        carried(3, 1, 2, 3),
    ):
        assert not torch.equal(first, other[0])


def test_a_codec_that_draws_needs_a_named_stream_and_others_draw_nothing() -> None:
    with pytest.raises(AssertionError, match="Quantize draws random numbers"):
        Stream.open(STOCHASTIC).send(state()[0])
    for codec in (Cast(), Identity(), Quantize()):
        assert Stream.open(codec).generator() is None


def test_streams_that_cross_together_keep_their_own_count() -> None:
    streams = [open_streams([STOCHASTIC] * 4, 1, client, 1)[0] for client in range(2)]
    rows = torch.cat([state()[0], state()[0]])
    streams[1].carry(state()[0])  # one packet ahead
    together, _ = carry_together(streams, rows, [TOKENS, TOKENS])
    assert torch.equal(together[:TOKENS], carried(0, 1, 0, 1)[0])
    assert torch.equal(together[TOKENS:], carried(0, 1, 1, 1)[1])
