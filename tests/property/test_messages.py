"""Frames for any content, and `decode` under hostile input: a frame that re-encodes to the same bytes, or a ProtocolError."""

from __future__ import annotations

import resource

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitft.compress.base import Packet
from splitft.compress.identity import Identity
from splitft.engine.batches import LABEL_CODEC
from splitft.engine.exchange import packet_bytes
from splitft.errors import ProtocolError
from splitft.messages import (
    FRAME,
    FRAME_BYTES,
    MAGIC,
    PACKET_KINDS,
    Frame,
    RoundAccepted,
    RoundEnd,
    RoundStart,
    StepFields,
    Type,
    decode,
    round_frame,
    step_frame,
)

U32, REAL, SIGNED = st.integers(0, 2**32 - 1), st.floats(allow_nan=False), st.integers(-(2**63), 2**63 - 1)
STEPS = st.builds(StepFields, *[U32] * 6, REAL, REAL)
PACKETS = st.lists(
    st.binary(max_size=60).map(lambda payload: packet_bytes(Packet(LABEL_CODEC, torch.uint8, (len(payload),), payload))), max_size=4
)
STARTS = st.builds(
    RoundStart, round=SIGNED, client=SIGNED, cut=SIGNED, tail_blocks=SIGNED, exit_on_client=st.booleans(), local_steps=SIGNED,
    gradient_accumulation=SIGNED, batch_size=SIGNED, rank=SIGNED, clip_norm=REAL, first_step=SIGNED, rates=st.lists(REAL, max_size=9),
)  # fmt: skip
ENDS = st.builds(RoundEnd, round=SIGNED, client=SIGNED, tokens=SIGNED, squared_norm=REAL, loss_sum=REAL)
ROUNDS = st.one_of(STARTS, ENDS, st.builds(RoundAccepted, round=SIGNED, client=SIGNED))
FORMS: tuple[type[RoundStart] | type[RoundEnd] | type[RoundAccepted], ...] = (RoundStart, RoundEnd, RoundAccepted)


@given(fields=STEPS, lengths=st.lists(U32, max_size=9), packets=PACKETS, kind=st.sampled_from(Type))
def test_any_step_message_survives_its_bytes(fields: StepFields, lengths: list[int], packets: list[bytes], kind: Type) -> None:
    packets = packets[: len(PACKET_KINDS[kind])]
    frame = step_frame(kind, fields, lengths, packets)
    found = decode(frame.encode())
    assert found.step() == fields
    assert found.lengths == tuple(lengths)
    assert [bytes(one) for one in found.packets] == packets
    assert found.size_bytes == len(frame.encode())


@given(fields=ROUNDS, packets=PACKETS, kind=st.sampled_from(Type))
def test_any_round_message_survives_its_bytes(fields: RoundStart | RoundEnd | RoundAccepted, packets: list[bytes], kind: Type) -> None:
    packets = packets[: len(PACKET_KINDS[kind])]
    found = decode(round_frame(kind, fields, packets).encode())
    assert found.read(type(fields)) == fields
    for form in FORMS:
        if form is not type(fields):
            with pytest.raises(ProtocolError):
                found.read(form)


def decode_hostile(data: bytes) -> None:
    """`decode` and the fixed fields, under the rule of this file."""
    try:
        frame = decode(data)
    except ProtocolError:
        return
    assert frame.encode() == data
    try:
        frame.step()
    except ProtocolError:
        return


@st.composite
def near_frames(draw: st.DrawFn) -> bytes:
    """A header whose fields may lie in front of a body that may not fit."""
    body = draw(st.binary(max_size=150))
    small, length = st.integers(0, 3), st.one_of(st.just(len(body)), st.integers(0, 2**64 - 1))
    magic = draw(st.sampled_from([MAGIC] * 8 + [b"SFT2"]))
    return FRAME.pack(magic, draw(st.integers(0, 9)), draw(small), draw(small), draw(st.integers(0, 160)), draw(length)) + body


@settings(max_examples=500)
@given(st.one_of(st.binary(max_size=150), near_frames()))
def test_hostile_bytes_never_raise_anything_but_protocol_errors(data: bytes) -> None:
    decode_hostile(data)


def example_frames() -> list[bytes]:
    packet = packet_bytes(Identity().encode(torch.arange(4.0), None)[0])
    start = RoundStart(
        round=1, client=0, cut=2, tail_blocks=0, exit_on_client=False, local_steps=2, gradient_accumulation=1, batch_size=2, rank=4,
        clip_norm=1.0, first_step=0, rates=[0.1, 0.2],
    )  # fmt: skip
    end = RoundEnd(round=1, client=0, tokens=7, squared_norm=0.5, loss_sum=1.5)
    return [
        step_frame(Type.STEP_UP, StepFields(1, 0, 0, 0, 4, 4), (2, 3), (packet, packet)).encode(),
        round_frame(Type.ROUND_START, start, (packet,)).encode(),
        round_frame(Type.ROUND_END, end, (packet,)).encode(),
        round_frame(Type.ROUND_ACCEPTED, RoundAccepted(round=1, client=0)).encode(),
    ]


@settings(max_examples=500)
@given(data=st.data(), good=st.sampled_from(example_frames()))
def test_damaged_frames_never_raise_anything_but_protocol_errors(data: st.DataObject, good: bytes) -> None:
    bad = bytearray(good)
    for place in data.draw(st.lists(st.integers(0, len(good) - 1), max_size=4)):
        bad[place] ^= 1 << data.draw(st.integers(0, 7))
    decode_hostile(bytes(bad[: data.draw(st.one_of(st.just(len(bad)), st.integers(0, len(bad))))]))


JSON = st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=5), st.lists, max_leaves=5)


@settings(max_examples=300)
@given(name=st.sampled_from(["round", "client", "tokens", "squared_norm", "loss_sum", "x"]), value=JSON)
def test_a_field_of_any_other_type_is_refused(name: str, value: object) -> None:
    fields = {"round": 1, "client": 0, "tokens": 1, "squared_norm": 0.5, "loss_sum": 1.0, name: value}
    frame = Frame(Type.ROUND_END, msgspec.msgpack.encode(fields), (), ())
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = whole if name in ("round", "client", "tokens") else whole or isinstance(value, float)
    if fits and name != "x":
        frame.read(RoundEnd)
    else:
        with pytest.raises(ProtocolError):
            frame.read(RoundEnd)


def test_a_frame_that_claims_gigabytes_takes_none() -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind in Type:
        for packets, sequences, fields_bytes, body_bytes in [(0, 0, 2**32 - 1, 2**33), (255, 65535, 2**24, 2**32), (1, 0, 0, 2**63)]:
            with pytest.raises(ProtocolError):
                decode(FRAME.pack(MAGIC, kind, packets, sequences, fields_bytes, body_bytes) + bytes(FRAME_BYTES))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 100_000
