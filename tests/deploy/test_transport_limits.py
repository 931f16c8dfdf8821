"""What hostile or broken clients send: refused with a named code before memory is taken, while others are served as before."""

from __future__ import annotations

import contextlib
import queue
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import msgspec
import psutil
import pytest
from deploy.transport_scenes import CALM, ECHO, QUICK, Echo, client, echo_server, take, wait_until

from splitft.transport.framing import CHECKSUM, HEADER, MAGIC, Close, Form, Hello, Welcome, decode, encode, pack_note, read_note
from splitft.transport.link import Link
from splitft.transport.listener import Broken
from splitft.transport.values import Admitted, Limits, Message, Timing

pytestmark = pytest.mark.timeout(60)
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
    "a welcome": encode(Form.WELCOME, pack_note(Welcome(b"s" * 16, 1, 0, 0, b""))),
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


def test_a_flood_that_does_not_wait_for_room_is_cut() -> None:
    kept: list[Message] = []
    with echo_server(answer=lambda session, message: kept.append(message)) as server, raw(server.port) as flooder:
        flooder.greet()
        before = resident_bytes()
        for number in range(1, 20_000):
            flooder.send(encode(Form.DATA, b"tiny", kind=1, sequence=number))
        assert "the window is 8" in flooder.refusal().text
        assert len(kept) <= 8
        wait_until(lambda: server.listener.buffered_bytes == 0)
        assert resident_bytes() - before < 16 * MIB


def test_a_flood_that_waits_for_room_costs_no_memory() -> None:
    with served() as (server, _), client(server.port, "flood") as link:
        link.open(10.0)
        done = threading.Event()

        def drain() -> None:
            while not done.is_set():
                if message := link.receive(0.1):
                    message.release()

        reader = threading.Thread(target=drain)
        reader.start()
        for number in range(20_000):
            if number == 5_000:
                before = resident_bytes()
            link.send(ECHO, b"tiny")
            if number % 1000 == 0:
                assert server.listener.buffered_bytes <= 8 * 4
        wait_until(lambda: link.counts.messages_received == 20_000)
        done.set()
        reader.join(10.0)
        assert resident_bytes() - before < 4 * MIB


def test_memory_of_all_clients_is_bounded_and_they_take_turns() -> None:
    """Six clients send 600 KiB each into a budget of 1 MiB that holds one: the others wait, none breaks, all arrive."""
    kept: list[Message] = []
    limits = Limits(buffer_bytes=MIB, chunk_bytes=64 << 10)
    with (
        echo_server(answer=lambda session, message: kept.append(message), limits=limits, timing=QUICK) as server,
        contextlib.ExitStack() as stack,
    ):
        links = [stack.enter_context(client(server.port, f"c{number}", timing=QUICK, limits=limits)) for number in range(6)]
        for link in links:
            link.open(10.0)
            link.send(ECHO, bytes(600 << 10))
        for number in range(6):
            wait_until(lambda: len(kept) == number + 1)  # noqa: B023 - called at once
            time.sleep(2 * QUICK.liveness_s if number == 0 else 0.02)
            assert len(kept) == number + 1
            assert server.listener.buffered_bytes <= MIB
            kept[number].release()
        wait_until(lambda: server.listener.buffered_bytes == 0)
        assert [event.text for event in server.events if isinstance(event, Broken)] == []


def test_an_unfinished_message_of_a_dead_client_gives_its_memory_back() -> None:
    with echo_server(timing=QUICK) as server, raw(server.port) as dying:
        dying.greet()
        dying.send(encode(Form.DATA, bytes(1000), kind=1, total=30 * MIB, sequence=1))
        wait_until(lambda: server.listener.buffered_bytes == 30 * MIB)
        wait_until(lambda: server.closed() == ["gone"], QUICK.forget_s + 5.0)
        assert server.listener.buffered_bytes == 0


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


def test_half_open_connections_are_cut_while_others_are_served() -> None:
    timing = Timing(heartbeat_s=0.5, liveness_s=2.0, connect_s=1.5)
    with (
        echo_server(True, timing=timing) as server,
        client(server.port, secure=True, timing=timing) as link,
        contextlib.ExitStack() as stack,
    ):
        link.open(10.0)
        begun_s = time.monotonic()
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 5.0)) for _ in range(500)]
        for number, one in enumerate(idle):
            if number % 2:
                one.sendall(b"\x16\x03\x01")  # the first bytes of a TLS greeting
        slowest_s = 0.0
        while time.monotonic() - begun_s < timing.connect_s + 2.0:
            sent_s = time.monotonic()
            link.send(ECHO, bytes(1024))
            take(link)
            slowest_s = max(slowest_s, time.monotonic() - sent_s)
            time.sleep(0.02)
        assert slowest_s < 1.0
        for one in idle:
            one.settimeout(0.5)
            with contextlib.suppress(ConnectionError):
                while one.recv(4096):
                    continue
        assert link.counts.reconnects == 0


def test_streams_without_a_greeting_are_cut() -> None:
    timing = Timing(heartbeat_s=0.5, liveness_s=2.0, connect_s=0.7)
    with served(timing=timing) as (server, _), contextlib.ExitStack() as stack:
        begun_s = time.monotonic()
        silent = [stack.enter_context(raw(server.port)) for _ in range(40)]
        for one in silent:
            assert one.read() is None
            assert one.call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - begun_s < timing.connect_s + 2.0


def test_a_trickle_is_cut() -> None:
    with echo_server(timing=QUICK) as server, raw(server.port) as trickler:
        trickler.greet()
        begun_s = time.monotonic()
        for offset in range(0, 200, 5):
            trickler.send(encode(Form.DATA, b"12345", kind=1, total=200_000, offset=offset, sequence=1))
            if any(isinstance(event, Broken) for event in server.events):
                break
            time.sleep(0.05)
        assert time.monotonic() - begun_s < 3 * QUICK.liveness_s
        assert trickler.read() is None
        assert "less than 1024 bytes/s" in trickler.call.details()


def test_silence_is_cut() -> None:
    with echo_server(timing=QUICK) as server, raw(server.port) as silent:
        silent.greet()
        begun_s = time.monotonic()
        assert silent.read() is None
        assert "nothing came for" in silent.call.details()
        assert QUICK.liveness_s - 0.1 < time.monotonic() - begun_s < QUICK.liveness_s + 1.0


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
