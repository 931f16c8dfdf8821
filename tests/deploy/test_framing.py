"""The bytes of a chunk: what goes in comes out, no flipped bit gets past, and nonsense with a right checksum is told apart from damage."""

from __future__ import annotations

import contextlib
import random
import struct
import zlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitft.errors import ProtocolError
from splitft.transport.framing import (
    CHECKSUM,
    HEADER,
    MAGIC,
    OVERHEAD_BYTES,
    Close,
    Damaged,
    Form,
    Hello,
    Welcome,
    decode,
    encode,
    pack_note,
    pieces,
    read_note,
)

NUMBER = st.integers(0, 2**64 - 1)


@given(st.sampled_from(list(Form)), st.binary(max_size=300), st.integers(0, 255), st.integers(0, 2**31), NUMBER, NUMBER, NUMBER)
def test_what_goes_in_comes_out(form: Form, piece: bytes, kind: int, offset: int, sequence: int, received: int, released: int) -> None:
    total = offset + len(piece) + (1 if piece else -offset)
    offset = offset if piece else 0
    data = encode(form, piece, kind=kind, total=total, offset=offset, sequence=sequence, received=received, released=released)
    chunk = decode(data)
    assert len(data) == OVERHEAD_BYTES + len(piece)
    assert (chunk.form, chunk.kind, chunk.total, chunk.offset) == (form, kind, total, offset)
    assert (chunk.sequence, chunk.received, chunk.released, bytes(chunk.piece)) == (sequence, received, released, piece)


def test_no_flipped_bit_gets_past() -> None:
    draw = random.Random(3)
    data = encode(Form.DATA, draw.randbytes(500), kind=4, sequence=9)
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(Damaged):
            decode(bytes(flipped))


def test_over_tls_the_header_is_checked_and_the_piece_is_left_to_tls() -> None:
    piece = random.Random(3).randbytes(500)
    data = encode(Form.DATA, piece, kind=4, sequence=9, sealed=True)
    assert bytes(decode(data, sealed=True).piece) == piece
    assert decode(encode(Form.DATA, piece, kind=4, sequence=9), sealed=True).piece == piece
    with pytest.raises(Damaged):  # where nothing else looks after the piece, nobody may leave it out
        decode(data)
    for bit in range(OVERHEAD_BYTES * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(Damaged):
            decode(bytes(flipped), sealed=True)


@pytest.mark.parametrize("form", [form for form in Form if form is not Form.DATA])
def test_only_data_may_leave_its_piece_to_tls(form: Form) -> None:
    with pytest.raises(Damaged):
        decode(encode(form, b"a greeting", sealed=True), sealed=True)


def test_no_cut_gets_past() -> None:
    data = encode(Form.DATA, b"some bytes", kind=4, sequence=9)
    for length in range(len(data)):
        with pytest.raises(Damaged):
            decode(data[:length])


def sealed(*fields: object, piece: bytes = b"") -> bytes:
    """A chunk with any header and a right checksum."""
    header = HEADER.pack(*fields)
    return header + CHECKSUM.pack(zlib.crc32(piece, zlib.crc32(header))) + piece


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (sealed(b"SFS2", 3, 0, 0, 0, 0, 1, 0, 0), "begins with"),
        (sealed(MAGIC, 0, 0, 0, 0, 0, 1, 0, 0), "form 0"),
        (sealed(MAGIC, 99, 0, 0, 0, 0, 1, 0, 0), "form 99"),
        (sealed(MAGIC, 3, 0, 5, 0, 0, 1, 0, 0), "form 3"),
        (sealed(MAGIC, 3, 0, 0, 4, 0, 1, 0, 0, piece=b"12345"), "of 4"),
        (sealed(MAGIC, 3, 0, 0, 4, 2, 1, 0, 0, piece=b"123"), "of 4"),
        (sealed(MAGIC, 3, 0, 0, 4, 0, 1, 0, 0), "of 4"),
    ],
)
def test_nonsense_with_a_right_checksum_is_a_lie(data: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        decode(data)


def test_notes_come_back() -> None:
    for note in (Hello(b"p" * 16, b"", 3, 4, b"hi"), Welcome(b"s" * 16, 2, 7, 0, b"", 5.0), Close("busy", "text", "remedy", True)):
        assert read_note(type(note), pack_note(note)) == note


@given(st.binary(max_size=60))
def test_other_notes_are_refused_or_read(data: bytes) -> None:
    for form in (Hello, Welcome, Close):
        with contextlib.suppress(ProtocolError):
            assert isinstance(read_note(form, data), form)


def test_a_note_in_pieces() -> None:
    note = bytes(range(256)) * 5
    chunks = [decode(data) for data in pieces(Form.WELCOME, note, 100)]
    assert len(chunks) == 13
    assert b"".join(chunk.piece for chunk in chunks) == note
    assert [chunk.offset for chunk in chunks] == list(range(0, 1280, 100))
    assert {chunk.total for chunk in chunks} == {1280}


def test_the_header_is_as_documented() -> None:
    assert OVERHEAD_BYTES == struct.calcsize("<4sBBHIIQQQI") == 44


@pytest.mark.parametrize(
    ("note", "more"),
    [
        (Hello(b"p" * 16, b"", 0, 0, b"g"), ["of a later minor version", 7]),
        (Welcome(b"s" * 16, 1, 0, 0, b"w", 8.0), [{"later": True}]),
        (Close("full", "the server is full.", "Try again.", lost=True), [None]),
    ],
)
def test_what_a_later_version_adds_to_the_handshake_is_passed_over(note: msgspec.Struct, more: list[object]) -> None:
    fields = msgspec.msgpack.decode(pack_note(note))
    assert read_note(type(note), msgspec.msgpack.encode(fields + more)) == note
    with pytest.raises(ProtocolError, match=type(note).__name__):  # what is missing is not
        read_note(type(note), msgspec.msgpack.encode(fields[:1]))
