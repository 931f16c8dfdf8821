"""Peers that say what they like: clients whose messages are bent on their way out, clients that never compute, servers that lie.

`Bent` is the link of an honest client whose messages pass a function first. `Liar` speaks the session protocol and nothing else.
`Raw` speaks chunks, or bytes that are none. `lying` makes a real server say something else than it means.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import grpc
import hypothesis
import psutil
import pytest
from hypothesis.strategies import SearchStrategy

from splitft.deploy.host import OFFERED
from splitft.deploy.letters import PROTOCOL_MAJOR, PROTOCOL_MINOR, Letter, Open, Opened, Ready, Welcome, pack, read
from splitft.deploy.letters import Refused as RefusedLetter
from splitft.messages import Frame, Type, decode
from splitft.transport import framing
from splitft.transport.link import Link
from splitft.transport.session import Session
from splitft.transport.tls import ClientTls
from splitft.transport.values import Limits, Message, Refused

from .federation_scenes import QUICK, Scene

PATH = "/splitft.Federation/Session"
MIB = 1 << 20
# How long a liar waits for the answer to a frame: one of another round has none.
ANSWER_S = 0.15
Said = tuple[int, bytes]
Tamper = Callable[[int, bytes], Iterable[Said]]
Lie = Callable[[int], Said]
READY = Ready(rows=10, tokens=160, documents=10, held_out_rows=0, data="0" * 64, memory_bytes=1 << 33, device="cpu")


def rss_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def hello(name: str, **fields: Any) -> bytes:
    """An honest greeting, but for `fields`."""
    honest = {"major": PROTOCOL_MAJOR, "minor": PROTOCOL_MINOR, "version": "test", "name": name, "takeover": False, "needs": list(OFFERED)}
    return pack(honest | fields)


class Bent(Link):
    """A link whose messages pass `tamper` before they leave: it returns what is sent instead."""

    def __init__(self, *positional: Any, tamper: Tamper = lambda kind, payload: [(kind, payload)], **named: Any) -> None:
        super().__init__(*positional, **named)
        self.tamper = tamper

    def send(self, kind: int, payload: bytes | bytearray | memoryview) -> None:
        for number, data in self.tamper(kind, bytes(payload)):
            super().send(number, data)


def bent(tamper: Tamper) -> Callable[..., Link]:
    """For `Scene.client(link_of=...)`."""
    return cast(Callable[..., Link], lambda *positional, **named: Bent(*positional, tamper=tamper, **named))


def in_frames(change: Callable[[Frame], bytes | None], *kinds: Type) -> Tamper:
    """Change the frames of these types; None leaves one as it is."""

    def tamper(kind: int, payload: bytes) -> list[Said]:
        if kind == Letter.FRAME and (frame := decode(payload)).kind in kinds and (changed := change(frame)) is not None:
            return [(kind, changed)]
        return [(kind, payload)]

    return tamper


def repacked(frame: Frame, index: int, packet: bytes) -> bytes:
    """The frame with another packet."""
    packets = [bytes(one) for one in frame.packets]
    packets[index] = packet
    return replace(frame, packets=tuple(packets)).encode()


def filled(frame: Frame, index: int, pattern: bytes) -> bytes:
    """The frame with the numbers of one packet overwritten by a pattern; its header stays true."""
    packet = bytes(frame.packets[index])
    count = len(packet) - 32
    return repacked(frame, index, packet[:32] + (pattern * (count // len(pattern) + 1))[:count])


class Liar(threading.Thread):
    """Comes in, says it is ready, and answers every round with the lies of the next of its `scripts` (given the number of the round)."""

    def __init__(self, port: int, name: str, scripts: Sequence[Sequence[Lie]], tls: ClientTls | None = None, ready: Ready = READY) -> None:
        super().__init__(daemon=True)
        self.link = Link(f"127.0.0.1:{port}", tls, lambda: hello(name), Limits(), QUICK)
        self.scripts, self.ready, self.told, self.heard, self.said = scripts, ready, 0, list[tuple[int, bytes]](), list[Said]()
        self.ahead: list[Message] = []
        self.end: Refused | None = None
        self.leaving = threading.Event()
        self.link.open(10.0)
        self.link.send(Letter.READY, pack(ready))

    def run(self) -> None:
        try:
            while not self.leaving.is_set():
                message = self.ahead.pop() if self.ahead else self.link.receive(0.1)
                if message is None:
                    continue
                message.release()
                if message.kind != Letter.PART:
                    self.heard.append((message.kind, bytes(message.payload[:4000])))
                if message.kind == Letter.FINISHED:
                    return
                if message.kind == Letter.OPEN:
                    self.answer(read(Open, message.payload))
        except Refused as refused:
            self.end = refused
        finally:
            self.link.close(0.0)

    def answer(self, opened: Open) -> None:
        self.link.send(Letter.OPENED, pack(Opened(opened.round)))
        refused = False
        for lie in self.scripts[self.told % len(self.scripts)] if self.scripts else ():
            kind, payload = lie(opened.round)
            self.said.append((kind, payload))
            self.link.send(kind, payload)
            if kind == Letter.FRAME and not refused:
                refused = self.answered()
        self.told += 1

    def answered(self) -> bool:
        """Wait a moment for what the server makes of a frame, which what follows would else push aside; whether it was refused."""
        message = self.link.receive(ANSWER_S)
        if message is None:
            return False
        if message.kind in (Letter.OPEN, Letter.FINISHED):
            self.ahead.append(message)
            return True
        message.release()
        self.heard.append((message.kind, bytes(message.payload[:4000])))
        return message.kind == Letter.REFUSED

    def refusals(self) -> list[str]:
        return [read(RefusedLetter, payload).text for kind, payload in self.heard if kind == Letter.REFUSED]

    def leave(self) -> None:
        self.leaving.set()
        self.join(10)


@contextlib.contextmanager
def liars(made: Iterable[Liar]) -> Iterator[list[Liar]]:
    """Liars at work; they leave with the block."""
    found = []
    try:
        for one in made:
            found.append(one)
            one.start()
        yield found
    finally:
        for one in found:
            one.leave()


class Raw:
    """A client that writes whatever bytes it is told to the stream, with or without TLS."""

    def __init__(self, port: int, tls: ClientTls | None = None, metadata: Sequence[tuple[str, Any]] = (), **options: Any) -> None:
        settings = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        if tls is None:
            self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=settings, **options)
        else:
            credentials = grpc.ssl_channel_credentials(tls.root_pem, tls.key_pem or None, tls.certificate_pem or None)
            self.channel = grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=settings, **options)
        self.ahead: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.call = self.channel.stream_stream(PATH)(iter(self.ahead.get, None), timeout=20.0, metadata=metadata)

    def send(self, data: bytes) -> None:
        self.ahead.put(data)

    def read(self) -> framing.Chunk | None:
        """The next chunk that is no sign of life; None: the stream is over."""
        try:
            while (chunk := framing.decode(next(self.call))).form is framing.Form.BEAT:
                continue
        except (StopIteration, grpc.RpcError):
            return None
        return chunk

    def greet(self, greeting: bytes, process: bytes = b"p" * 16) -> framing.Chunk | None:
        """Say HELLO; the first chunk of the answer."""
        self.send(framing.encode(framing.Form.HELLO, framing.pack_note(framing.Hello(process, b"", 0, 0, greeting))))
        return self.read()

    def refusal(self) -> framing.Close:
        """The server's last word."""
        chunk = self.read()
        assert chunk is not None, (self.call.code(), self.call.details())
        assert chunk.form is framing.Form.CLOSE, chunk
        return framing.read_note(framing.Close, chunk.piece)

    def close(self) -> None:
        self.ahead.put(None)
        self.call.cancel()
        self.channel.close()


@contextlib.contextmanager
def raw(port: int, tls: ClientTls | None = None, **options: Any) -> Iterator[Raw]:
    one = Raw(port, tls, **options)
    try:
        yield one
    finally:
        one.close()


def lying(
    scene: Scene,
    monkeypatch: pytest.MonkeyPatch,
    welcome: Callable[[Welcome], Welcome] = lambda honest: honest,
    say: Tamper = lambda kind, payload: [(kind, payload)],
) -> list[Said]:
    """Make the real server of a scene lie; what clients say after the first lie is in the list that is returned."""
    host, send, deliver = scene.house.host, Session.send, scene.house.host.deliver
    greet, after, lied = host.greet, list[Said](), threading.Event()

    def greeted(seat: int, name: str) -> Welcome:
        honest = greet(seat, name)
        told = welcome(honest)
        if told != honest:
            lied.set()
        return told

    def sent(self: Session, kind: int, payload: Any) -> None:
        for number, data in say(kind, bytes(payload)):
            if (number, data) != (kind, bytes(payload)):
                lied.set()
            send(self, number, data)

    def delivered(event: Any) -> None:
        message = getattr(event, "message", None)
        if isinstance(message, Message) and lied.is_set():
            after.append((message.kind, bytes(message.payload)))
        deliver(event)

    host.greet = greeted
    listener = scene.house.listener
    assert listener is not None
    listener._deliver = delivered
    monkeypatch.setattr(Session, "send", sent)
    return after


def collected(strategy: SearchStrategy[Any], count: int) -> list[Any]:
    """The same `count` examples every time."""
    found: list[Any] = []

    @hypothesis.settings(
        max_examples=count,
        database=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def collect(one: Any) -> None:
        found.append(one)

    collect()
    return found[:count]
