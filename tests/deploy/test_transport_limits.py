"""What hostile or broken clients send: refused with a named code before memory is taken, while others are served as before."""

from __future__ import annotations

import queue
import random
import socket
import struct
import time
import zlib
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import msgspec
import pytest
from deploy.transport_liars import MIB, PATH, raw, resident_bytes, sealed, served
from deploy.transport_scenes import CALM, ECHO, client, echo_server, take, wait_until

from splitft.transport.framing import CHECKSUM, HEADER, Form, Hello, Welcome, encode, pack_note
from splitft.transport.values import Admitted, Message

pytestmark = pytest.mark.timeout(60)


LIES = {
    "a kind of its own": (sealed(kind=200), "kind 200"),
    "too large": (sealed(total=65 * MIB), "allowed now is"),
    "far too large": (sealed(total=2**32 - 1), "allowed now is"),
    "other magic": (sealed(magic=b"SFS2"), "begins with"),
    "unknown form": (sealed(form=77), "form 77"),
    "more than it announced": (sealed(total=2), "of 2"),
    "nothing of something": (sealed(piece=b""), "of 3"),
    "acknowledges what was not sent": (sealed(received=5), "acknowledged"),
    "acknowledges an absurd number": (sealed(received=2**64 - 1), "acknowledged"),
    "releases what it did not receive": (sealed(released=1), "released"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_ends_the_session(name: str) -> None:
    data, says = LIES[name]
    with served() as (server, _), raw(server.port) as liar:
        liar.greet()
        before = resident_bytes()
        liar.send(data)
        refusal = liar.refusal()
        assert refusal.code == "protocol"
        assert says in refusal.text
        assert liar.read() is None
        assert server.closed() == ["protocol"]
        assert server.arrived.empty()
        assert server.listener.buffered_bytes == 0
        assert resident_bytes() - before < 8 * MIB


def test_a_message_that_changes_on_the_way() -> None:
    with served() as (server, _), raw(server.port) as liar:
        liar.greet()
        liar.send(sealed(total=6))
        liar.send(sealed(total=7, offset=3))
        assert "changed its kind or length" in liar.refusal().text
        wait_until(lambda: server.listener.buffered_bytes == 0)


def test_a_refused_client_stays_refused_with_its_session() -> None:
    with served() as (server, _):
        with raw(server.port) as liar:
            known = liar.greet().server
            liar.send(sealed(kind=255))
            assert liar.refusal().code == "protocol"
        with raw(server.port) as liar:
            liar.send(encode(Form.HELLO, pack_note(Hello(b"raw".ljust(16, b"-"), known, 0, 0, b"raw"))))
            assert liar.refusal().code == "protocol"


GREETINGS = {
    "not a hello": encode(Form.DATA, b"abc", kind=1, sequence=1),
    "a welcome": encode(Form.WELCOME, pack_note(Welcome(b"s" * 16, 1, 0, 0, b"", 5.0))),
    "other magic": sealed(magic=b"SFS9", form=Form.HELLO),
    "no note": encode(Form.HELLO, b"\xc1\xc1\xc1"),
    "no text": encode(Form.HELLO, b""),
    "a note of another form": encode(Form.HELLO, msgspec.msgpack.encode({"process": b"p" * 16})),
    "a deep note": encode(Form.HELLO, b"\x91" * 5000),
    "a short name": encode(Form.HELLO, pack_note(Hello(b"p", b"", 0, 0, b"raw"))),
    "a negative number": encode(Form.HELLO, msgspec.msgpack.encode([b"p" * 16, b"", -1, 0, b"raw"])),
    "has received what was never sent": encode(Form.HELLO, pack_note(Hello(b"p" * 16, b"", 7, 0, b"raw"))),
    "too long": encode(Form.HELLO, pack_note(Hello(b"p" * 16, b"", 0, 0, bytes(64 << 10)))),
    "in pieces": encode(Form.HELLO, pack_note(Hello(b"p" * 16, b"", 0, 0, b"raw"))[:10], total=40),
}


@pytest.mark.parametrize("name", GREETINGS)
def test_a_bad_greeting_is_refused(name: str) -> None:
    with served() as (server, _), raw(server.port) as liar:
        liar.send(GREETINGS[name])
        assert liar.refusal().code == "protocol"
        assert set(server.listener.sessions) == {"honest"}


def test_garbage_at_the_door_and_later_ends_the_stream() -> None:
    with served() as (server, _):
        for data in (b"", b"GET / HTTP/1.1", random.Random(1).randbytes(1000)):
            with raw(server.port) as liar:
                liar.send(data)
                assert liar.read() is None
                assert liar.call.code() is grpc.StatusCode.DATA_LOSS
            with raw(server.port) as liar:
                liar.greet()
                liar.send(data)
                assert liar.read() is None
                assert liar.call.code() is grpc.StatusCode.ABORTED
                assert "damaged" in liar.call.details()
        assert server.arrived.empty()


def test_old_messages_are_passed_over() -> None:
    """A replay of captured bytes, in the same session: the message is not delivered again, and the next one is."""
    heard: list[bytes] = []

    def listen(session: Any, message: Message) -> None:
        heard.append(bytes(message.payload))
        message.release()

    with echo_server(answer=listen) as server, raw(server.port) as replayer:
        replayer.greet()
        first, second = encode(Form.DATA, b"first", kind=1, sequence=1), encode(Form.DATA, b"second", kind=1, sequence=2)
        for data in (first, first, first, second, first, second):
            replayer.send(data)
        wait_until(lambda: server.session("raw").counts.duplicates == 4)
        assert heard == [b"first", b"second"]
        replayer.send(encode(Form.DATA, b"fourth", kind=1, sequence=4))
        assert replayer.read() is None
        assert "message 3 is missing" in replayer.call.details()


def test_captured_bytes_do_not_open_the_session_of_another() -> None:
    """The name of the process is asked for within the identity that the door has found: it opens nobody else's session."""
    with echo_server() as server, client(server.port, "a") as link, raw(server.port) as thief:
        link.open(10.0)
        stolen = server.session("a").process
        assert thief.greet("b", process=stolen).epoch == 1
        assert set(server.listener.sessions) == {"a", "b"}
        link.send(ECHO, b"mine")
        assert take(link).payload == b"mine"


def test_a_thousand_mutations_hurt_nobody() -> None:
    draw = random.Random(11)
    good = [encode(Form.HELLO, pack_note(Hello(b"p" * 16, b"", 0, 0, b"raw"))), encode(Form.DATA, b"abcdef", kind=1, sequence=1)]
    with served() as (server, _):
        before = resident_bytes()
        for _ in range(40):
            with raw(server.port) as liar:
                if draw.random() < 0.5:
                    liar.greet()
                for _ in range(25):
                    data = bytearray(draw.choice(good))
                    for _ in range(draw.randint(1, 4)):
                        data[draw.randrange(len(data))] = draw.randrange(256)
                    header = bytes(data[: HEADER.size])
                    if draw.random() < 0.8:
                        piece = bytes(data[HEADER.size + 4 :])
                        data = bytearray(header + CHECKSUM.pack(zlib.crc32(piece, zlib.crc32(header))) + piece)
                    liar.send(bytes(data))
                liar.send(sealed(kind=222))
                while liar.read() is not None:
                    continue
        assert resident_bytes() - before < 64 * MIB


def test_compressed_messages_are_refused() -> None:
    with served() as (server, _), raw(server.port, compression=grpc.Compression.Gzip) as bomber:
        before = resident_bytes()
        bomber.send(encode(Form.HELLO, bytes(MIB)))
        assert bomber.read() is None
        assert bomber.call.code() is grpc.StatusCode.UNIMPLEMENTED
        assert resident_bytes() - before < 16 * MIB


def test_unknown_methods_are_refused_before_the_body() -> None:
    with served() as (server, _), grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        for path in ("/splitft.Federation/Other", "/other.Service/Session", "/"):
            with pytest.raises(grpc.RpcError) as caught:
                next(channel.stream_stream(path)(iter([b"x"]), timeout=5.0))
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def http2(port: int, more_headers: list[tuple[str, str]], body: bytes) -> dict[str, str]:
    """One gRPC call by hand, which is begun and not ended; returns the headers that the server answers with."""
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    connection.initiate_connection()
    headers = [(":method", "POST"), (":scheme", "http"), (":path", PATH), (":authority", "x"), ("te", "trailers")]
    found: dict[str, str] = {}
    with socket.create_connection(("127.0.0.1", port), 5.0) as end:
        end.settimeout(2.0)
        end.sendall(connection.data_to_send())
        connection.receive_data(end.recv(1 << 16))  # gRPC holds a client to its limits from when it has confirmed them
        connection.send_headers(1, [*headers, ("content-type", "application/grpc"), *more_headers])
        connection.send_data(1, body)
        while True:
            end.sendall(connection.data_to_send())
            data = end.recv(1 << 16)
            events = connection.receive_data(data) if data else []
            for event in events:
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    found |= {name.decode(): value.decode() for name, value in event.headers or []}
            if not data or any(isinstance(event, h2.events.StreamEnded | h2.events.StreamReset) for event in events):
                return found


def test_an_oversize_grpc_message_is_refused_at_its_prefix() -> None:
    with served() as (server, _):
        before = resident_bytes()
        for length in (256 * MIB, MIB + (4 << 10) + 1, 2**32 - 1):
            found = http2(server.port, [], struct.pack(">BI", 0, length))
            assert found.get("grpc-status") == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]), found
        assert resident_bytes() - before < 8 * MIB


def test_large_metadata_is_refused() -> None:
    with served() as (server, _):
        before = resident_bytes()
        found = http2(server.port, [(f"x-{number}", "y" * 4000) for number in range(16)], b"")
        assert found.get("grpc-status") == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]), found
        assert resident_bytes() - before < 8 * MIB


def test_more_streams_than_allowed_wait() -> None:
    """Of eight streams over one connection four are carried; the rest are not begun."""
    with served() as (server, _), grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        opened = []
        for number in range(8):
            note = pack_note(Hello(b"%d" % number * 16, b"", 0, 0, b"s%d" % number))
            ahead: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
            ahead.put(encode(Form.HELLO, note))
            opened.append((channel.stream_stream(PATH)(iter(ahead.get, None), timeout=20.0), ahead))
        wait_until(lambda: len(server.listener.sessions) == 5)
        time.sleep(0.2)
        assert len(server.listener.sessions) == 5
        for call, ahead in opened:
            ahead.put(None)
            call.cancel()


def test_the_door_may_fail_without_harm() -> None:
    def admit(peer: object, greeting: bytes) -> Admitted:
        if greeting != b"honest":
            raise RuntimeError("a fault of the door")
        return Admitted("honest", b"", MIB)

    with served(admit=admit, timing=CALM) as (server, _), raw(server.port) as one:
        one.send(encode(Form.HELLO, pack_note(Hello(b"p" * 16, b"", 0, 0, b"raw"))))
        assert one.read() is None
        assert set(server.listener.sessions) == {"honest"}
