"""messages.py: every type survives its bytes; malformed frames and fields are refused with what is wrong."""

from __future__ import annotations

import struct

import msgspec
import pytest
import torch

from splitft.compress.identity import Identity
from splitft.engine.exchange import packet_bytes
from splitft.errors import ProtocolError
from splitft.messages import (
    FRAME,
    FRAME_BYTES,
    MAGIC,
    MAX_FIELDS_BYTES,
    MAX_SEQUENCES,
    PACKET_KINDS,
    STEP_BYTES,
    Frame,
    RoundAccepted,
    RoundEnd,
    RoundStart,
    ScoreEnd,
    ScoreStart,
    StepFields,
    Type,
    decode,
    round_frame,
    step_frame,
)
from splitft.types import KINDS

START = RoundStart(
    round=3, client=1, cut=2, tail_blocks=0, exit_on_client=False, local_steps=2, gradient_accumulation=1, batch_size=2, rank=4,
    clip_norm=1.0, first_step=6, rates=[0.1, 0.05],
)  # fmt: skip
END = RoundEnd(round=3, client=1, tokens=77, squared_norm=0.5, loss_sum=2.25)
ACCEPTED = RoundAccepted(round=3, client=1)
STEP = StepFields(3, 1, 5, 0, 40, 20, 0.25, 1.5)
SCORE_START = ScoreStart(3, 1, 2, 0, False, 8, 0)
SCORE_END = ScoreEnd(3, 1, 12.5, 4, 9)
STEP_TYPES = [Type.STEP_UP, Type.HIDDEN_DOWN, Type.GRADIENT_UP, Type.STEP_DOWN, Type.SCORE_UP, Type.SCORE_DOWN]
ROUND_FIELDS = {
    Type.ROUND_START: START,
    Type.ROUND_END: END,
    Type.ROUND_ACCEPTED: ACCEPTED,
    Type.SCORE_START: SCORE_START,
    Type.SCORE_END: SCORE_END,
}


def packet(count: int = 3) -> bytes:
    return packet_bytes(Identity().encode(torch.arange(count, dtype=torch.float32), None)[0])


def example(kind: Type) -> Frame:
    packets = [packet(2 + k) for k in range(len(PACKET_KINDS[kind]))]
    if kind in STEP_TYPES:
        return step_frame(kind, STEP, (5, 3) if kind == Type.STEP_UP else (), packets)
    return round_frame(kind, ROUND_FIELDS[kind], packets)


@pytest.mark.parametrize("kind", list(Type))
def test_every_type_survives_its_bytes(kind: Type) -> None:
    frame = example(kind)
    data = frame.encode()
    found = decode(data)
    assert len(data) == frame.size_bytes == found.size_bytes
    assert (found.kind, found.fields, found.lengths) == (frame.kind, frame.fields, frame.lengths)
    assert [bytes(one) for one in found.packets] == [bytes(one) for one in frame.packets]
    assert found.encode() == data
    assert found.overhead_bytes + sum(len(one) for one in found.packets) == len(data)


def test_fields_survive_exactly() -> None:
    assert decode(example(Type.STEP_UP).encode()).step() == STEP
    assert decode(example(Type.ROUND_START).encode()).read(RoundStart) == START
    assert decode(example(Type.ROUND_END).encode()).read(RoundEnd) == END
    assert decode(example(Type.ROUND_ACCEPTED).encode()).read(RoundAccepted) == ACCEPTED


def test_a_result_is_added_without_touching_the_rest() -> None:
    done = STEP.with_result(9.5, 4.0)
    assert (done.loss_sum, done.squared_norm) == (9.5, 4.0)
    assert (done.round, done.client, done.step, done.micro, done.normaliser, done.targets) == (3, 1, 5, 0, 40, 20)


def test_packets_are_views_not_copies() -> None:
    data = example(Type.STEP_UP).encode()
    assert all(isinstance(one, memoryview) and one.obj is data for one in decode(data).packets)


def test_every_type_names_its_packets_and_a_number_of_its_own() -> None:
    assert set(PACKET_KINDS) == set(Type)
    assert {kind for kinds in PACKET_KINDS.values() for kind in kinds} <= set(KINDS)
    assert sorted(Type) == list(range(1, len(Type) + 1))


@pytest.mark.parametrize("kind", list(Type))
def test_every_truncation_is_refused(kind: Type) -> None:
    data = example(kind).encode()
    for end in range(len(data)):
        with pytest.raises(ProtocolError):
            decode(data[:end])


@pytest.mark.parametrize("kind", list(Type))
def test_bytes_behind_the_frame_are_refused(kind: Type) -> None:
    with pytest.raises(ProtocolError, match="arrived"):
        decode(example(kind).encode() + b"\x00")


def test_bytes_behind_the_last_packet_are_refused() -> None:
    frame = example(Type.STEP_DOWN)
    data = bytearray(frame.encode() + b"\x00" * 5)
    struct.pack_into("<Q", data, FRAME_BYTES - 8, len(data) - FRAME_BYTES)
    with pytest.raises(ProtocolError, match="5 bytes follow the last packet"):
        decode(bytes(data))


def test_another_program_is_told_from_another_version() -> None:
    with pytest.raises(ProtocolError, match="not a splitft frame") as caught:
        decode(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert "another program" in str(caught.value)


@pytest.mark.parametrize("number", [0, len(Type) + 1, 255])
def test_unknown_types_are_refused(number: int) -> None:
    data = bytearray(example(Type.STEP_UP).encode())
    data[4] = number
    with pytest.raises(ProtocolError, match=f"type {number} is unknown"):
        decode(bytes(data))


@pytest.mark.parametrize("missing", [1, 2])
def test_a_frame_with_fewer_packets_than_it_names_is_refused(missing: int) -> None:
    data = bytearray(example(Type.STEP_UP).encode())
    data[5] += missing
    with pytest.raises(ProtocolError, match=f"names {2 + missing} packets"):
        decode(bytes(data))


def test_the_callers_limit_holds() -> None:
    frame = example(Type.STEP_UP)
    body = frame.size_bytes - FRAME_BYTES
    assert decode(frame.encode(), body).kind == Type.STEP_UP
    with pytest.raises(ProtocolError, match=str(body)):
        decode(frame.encode(), body - 1)


@pytest.mark.parametrize(
    ("packets", "sequences", "fields_bytes", "body_bytes"),
    [
        (0, 0, MAX_FIELDS_BYTES + 1, 64),
        (0, 0, 2**32 - 1, 64),
        (0, 65535, 0, 64),
        (0, 0, 65, 64),
        (0, 0, 0, 2**63),
        (0, 0, 0, 2**32),
        (255, 0, 0, 64),
        (1, 0, 33, 64),
    ],
)
def test_headers_that_lie_are_refused(packets: int, sequences: int, fields_bytes: int, body_bytes: int) -> None:
    head = FRAME.pack(MAGIC, Type.STEP_UP, packets, sequences, fields_bytes, body_bytes)
    with pytest.raises(ProtocolError):
        decode(head + bytes(64))


def test_a_packet_that_claims_more_than_is_left_is_refused() -> None:
    for claim in (2**40, 2**64 - 1, 13):
        liar = bytearray(packet(3))
        struct.pack_into("<Q", liar, 24, claim)
        with pytest.raises(ProtocolError, match="packet 1 of 1"):
            decode(step_frame(Type.STEP_DOWN, STEP, (), (bytes(liar),)).encode())


def test_more_sequences_than_a_frame_can_name_are_refused() -> None:
    assert len(decode(step_frame(Type.STEP_UP, STEP, [1] * MAX_SEQUENCES, ()).encode()).lengths) == MAX_SEQUENCES
    with pytest.raises(ProtocolError, match="65536"):
        step_frame(Type.STEP_UP, STEP, [1] * (MAX_SEQUENCES + 1), ())


@pytest.mark.parametrize("fields", [b"", b"\x00" * (STEP_BYTES - 1), b"\x00" * (STEP_BYTES + 1)])
def test_step_fields_have_one_size(fields: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"{len(fields)} bytes of fields"):
        Frame(Type.STEP_UP, fields, (), ()).step()


WRONG_FIELDS = {
    "missing": ({"round": 1, "client": 0, "tokens": 1, "squared_norm": 0.0}, "loss_sum"),
    "unknown": ({"round": 1, "client": 0, "tokens": 1, "squared_norm": 0.0, "loss_sum": 0.0, "extra": 1}, "extra"),
    "text for a number": ({"round": 1, "client": "0", "tokens": 1, "squared_norm": 0.0, "loss_sum": 0.0}, "client"),
    "fraction for a whole number": ({"round": 1, "client": 0, "tokens": 1.5, "squared_norm": 0.0, "loss_sum": 0.0}, "tokens"),
    "nothing for a number": ({"round": 1, "client": 0, "tokens": 1, "squared_norm": None, "loss_sum": 0.0}, "squared_norm"),
}


@pytest.mark.parametrize("case", WRONG_FIELDS)
def test_a_wrong_field_is_named(case: str) -> None:
    fields, word = WRONG_FIELDS[case]
    frame = decode(Frame(Type.ROUND_END, msgspec.msgpack.encode(fields), (), ()).encode())
    with pytest.raises(ProtocolError, match=f"ROUND_END: .*{word}"):
        frame.read(RoundEnd)


@pytest.mark.parametrize("position", [0, 1])
def test_a_wrong_learning_rate_is_named(position: int) -> None:
    fields = msgspec.to_builtins(START)
    fields["rates"][position] = "fast"
    with pytest.raises(ProtocolError, match="rates"):
        Frame(Type.ROUND_START, msgspec.msgpack.encode(fields), (), ()).read(RoundStart)


@pytest.mark.parametrize("fields", [b"", b"\xc1", b"\x91" * 5000, b"\x85\xa5round", msgspec.msgpack.encode([1, 2]), b"\xff" * 40])
def test_fields_that_are_no_record_are_refused(fields: bytes) -> None:
    with pytest.raises(ProtocolError, match="ROUND_END"):
        Frame(Type.ROUND_END, fields, (), ()).read(RoundEnd)
    with pytest.raises(ProtocolError, match="same splitft version"):
        Frame(Type.ROUND_END, fields, (), ()).read(RoundStart)
