"""The bytes of a session's stream: every chunk is one header and a piece of a message, and is checked before it is believed.

    chunk = b"SFS1" | u8 form | u8 kind | u16 0 | u32 total | u32 offset | u64 sequence | u64 received | u64 released | u32 crc | piece

`total` and `offset` are of the message that the piece belongs to. `received` and `released` acknowledge the other direction in every
chunk. The checksum (CRC-32) covers all that comes before it and the piece: a chunk with a wrong one is damage of the way, after which
the connection is made anew; a chunk with a right one that makes no sense is a lie, which ends the session. Over TLS, which authenticates
every byte by itself, the checksum of DATA may be of the header alone.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from splitft.errors import ProtocolError

MAGIC = b"SFS1"
HEADER = struct.Struct("<4sBBHIIQQQ")
CHECKSUM = struct.Struct("<I")
OVERHEAD_BYTES = HEADER.size + CHECKSUM.size
MAX_MESSAGE_BYTES = (1 << 32) - 1
FAULT = "this is a fault of the sender, or bytes of somebody else."
SAME = "run the same splitft version on both sides."


class Form(enum.IntEnum):
    """What a chunk is. BEAT: `sequence` is the last message sent whole; CLOSE: the server ends the session; BYE: the client does."""

    HELLO = 1
    WELCOME = 2
    DATA = 3
    BEAT = 4
    CLOSE = 5
    BYE = 6


class Damaged(Exception):  # noqa: N818 - it never leaves the transport
    """Bytes arrived that nobody sent: the connection cannot be trusted any more, the session can."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk, checked in itself."""

    form: Form
    kind: int
    total: int
    offset: int
    sequence: int
    received: int
    released: int
    piece: memoryview


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """A client's first chunk. `process`: the nonce of its session; `server`: that of the server it knows (empty: it wants a new session);
    `received` and `filled`: the last message it has whole, and how much of the next."""

    process: bytes
    server: bytes
    received: int
    filled: int
    greeting: bytes


class Welcome(msgspec.Struct, frozen=True, array_like=True):
    """The server's answer; `greeting` is empty where a session is resumed. `heartbeat_s`: how often the server gives a sign of life, and
    wants one."""

    server: bytes
    epoch: int
    received: int
    filled: int
    greeting: bytes
    heartbeat_s: float


class Close(msgspec.Struct, frozen=True, array_like=True):
    """Why the server ends a session or refuses it. `lost`: it does not know the session."""

    code: str
    text: str
    remedy: str = ""
    lost: bool = False


NoteT = TypeVar("NoteT", bound=msgspec.Struct)


def pack_note(note: msgspec.Struct) -> bytes:
    """A handshake's fields as bytes."""
    return msgspec.msgpack.encode(note)


def read_note(form: type[NoteT], data: memoryview | bytes | bytearray) -> NoteT:
    """A handshake's fields from bytes. Raises ProtocolError for others."""
    try:
        return msgspec.msgpack.decode(data, type=form)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as problem:
        raise ProtocolError(
            f"a {form.__name__} of the transport is malformed: {problem}.", "run the same version on both sides."
        ) from problem


def encode(
    form: Form,
    piece: bytes | bytearray | memoryview = b"",
    *,
    kind: int = 0,
    total: int | None = None,
    offset: int = 0,
    sequence: int = 0,
    received: int = 0,
    released: int = 0,
    sealed: bool = False,
) -> bytes:
    """A chunk as bytes; `total` is the length of the piece where it is not given. `sealed`: the way authenticates what it carries, so
    that the checksum is of the header alone."""
    header = HEADER.pack(MAGIC, form, kind, 0, len(piece) if total is None else total, offset, sequence, received, released)
    checksum = zlib.crc32(header)
    return b"".join((header, CHECKSUM.pack(checksum if sealed else zlib.crc32(piece, checksum)), piece))


def decode(data: bytes, sealed: bool = False) -> Chunk:
    """A chunk from bytes; `sealed`: of a way that authenticates them, where the checksum of DATA may leave the piece out. Raises Damaged
    where the checksum is wrong, ProtocolError where it is right and the rest makes no sense."""
    if len(data) < OVERHEAD_BYTES:
        raise Damaged(f"a chunk of {len(data)} bytes")
    piece = memoryview(data)[OVERHEAD_BYTES:]
    (checksum,) = CHECKSUM.unpack_from(data, HEADER.size)
    found = zlib.crc32(memoryview(data)[: HEADER.size])
    if not (sealed and found == checksum and data[len(MAGIC)] == Form.DATA) and zlib.crc32(piece, found) != checksum:
        raise Damaged("a chunk with a wrong checksum")
    magic, form, kind, zero, total, offset, sequence, received, released = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ProtocolError(f"a chunk begins with {magic!r} and not with {MAGIC!r}.", SAME)
    if form not in Form.__members__.values() or zero:
        raise ProtocolError(f"a chunk has the form {form} ({zero}).", SAME)
    if offset + len(piece) > total or (total and not len(piece)):
        raise ProtocolError(f"a chunk holds bytes {offset} to {offset + len(piece)} of {total}.", FAULT)
    return Chunk(Form(form), kind, total, offset, sequence, received, released, piece)


def pieces(form: Form, note: bytes, chunk_bytes: int) -> Iterator[bytes]:
    """A handshake's note as chunks."""
    view = memoryview(note)
    for start in range(0, len(view), chunk_bytes):
        yield encode(form, view[start : start + chunk_bytes], total=len(view), offset=start)
