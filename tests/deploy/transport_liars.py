"""A client of the transport that sends whatever bytes it is told, and an honest one that must be served meanwhile."""

from __future__ import annotations

import contextlib
import queue
import time
import zlib
from collections.abc import Iterator
from typing import Any

import grpc
import psutil
from deploy.transport_scenes import ECHO, Echo, client, echo_server, take

from splitft.transport.framing import CHECKSUM, HEADER, MAGIC, Close, Form, Hello, Welcome, decode, encode, pack_note, read_note
from splitft.transport.link import Link

PATH = "/splitft.Federation/Session"
MIB = 1 << 20


class Raw:
    """A client that sends whatever bytes it is told."""

    def __init__(self, port: int, **options: Any) -> None:
        settings = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=settings, **options)
        self._ahead: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.call = self._channel.stream_stream(PATH)(iter(self._ahead.get, None), timeout=20.0)

    def send(self, data: bytes) -> None:
        self._ahead.put(data)

    def read(self) -> Any:
        """The next chunk that is no sign of life; None: the stream is over."""
        try:
            while (chunk := decode(next(self.call))).form is Form.BEAT:
                continue
        except (StopIteration, grpc.RpcError):
            return None
        return chunk

    def greet(self, name: str = "raw", **fields: Any) -> Welcome:
        hello = {"process": name.encode().ljust(16, b"-"), "server": b"", "received": 0, "filled": 0, "greeting": name.encode()} | fields
        self.send(encode(Form.HELLO, pack_note(Hello(**hello))))
        return read_note(Welcome, self.read().piece)

    def refusal(self) -> Close:
        """The server's last word."""
        chunk = self.read()
        assert chunk is not None, (self.call.code(), self.call.details())
        assert chunk.form is Form.CLOSE, chunk
        return read_note(Close, chunk.piece)

    def close(self) -> None:
        self._ahead.put(None)
        self.call.cancel()
        self._channel.close()


@contextlib.contextmanager
def raw(port: int, **options: Any) -> Iterator[Raw]:
    one = Raw(port, **options)
    try:
        yield one
    finally:
        one.close()


@contextlib.contextmanager
def served(**settings: Any) -> Iterator[tuple[Echo, Link]]:
    """A server and an honest client, who must be served as before whatever happens meanwhile."""
    with echo_server(**settings) as server, client(server.port, "honest") as link:
        link.open(10.0)
        yield server, link
        sent_s = time.monotonic()
        link.send(ECHO, bytes(1024))
        assert len(take(link, 2.0).payload) == 1024
        assert time.monotonic() - sent_s < 1.0
        assert link.counts.reconnects == 0
        assert server.session("honest").epoch == 1


def sealed(
    magic: bytes = MAGIC, form: int = Form.DATA, kind: int = 1, total: int = 3, offset: int = 0, piece: bytes = b"abc", **at: int
) -> bytes:
    """A chunk with any fields and a right checksum."""
    header = HEADER.pack(magic, form, kind, 0, total, offset, at.get("sequence", 1), at.get("received", 0), at.get("released", 0))
    return header + CHECKSUM.pack(zlib.crc32(piece, zlib.crc32(header))) + piece


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)
