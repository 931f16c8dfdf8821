"""What the tests of the transport share: certificates, a server that echoes, clients, and bounded waits."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trustme

from splitft.transport.link import Link
from splitft.transport.listener import Arrived, Closed, Event, Listener, Session
from splitft.transport.tls import ClientTls, ServerTls
from splitft.transport.values import Admit, Admitted, Limits, Message, Peer, Refusal, Timing

QUICK = Timing(heartbeat_s=0.1, liveness_s=0.5, connect_s=0.5, backoff_s=(0.02, 0.1))
CALM = Timing(heartbeat_s=1.0, liveness_s=10.0, connect_s=5.0, backoff_s=(0.02, 0.2))
LIMIT_BYTES = 64 << 20
ECHO = 7


@functools.cache
def authority() -> trustme.CA:
    """A certificate authority for this process."""
    return trustme.CA()


def server_tls(ca: trustme.CA | None = None) -> ServerTls:
    """A server's certificate for loopback; it believes the clients of `authority()`."""
    issued = (ca or authority()).issue_cert("localhost", "127.0.0.1")
    return ServerTls(authority().cert_pem.bytes(), issued.cert_chain_pems[0].bytes(), issued.private_key_pem.bytes())


def client_tls(name: str = "client-a", ca: trustme.CA | None = None, server_name: str = "") -> ClientTls:
    """A client's certificate; it believes the server of `authority()`."""
    issued = (ca or authority()).issue_cert(name)
    return ClientTls(authority().cert_pem.bytes(), issued.cert_chain_pems[0].bytes(), issued.private_key_pem.bytes(), server_name)


@functools.cache
def tls_pair(secure: bool) -> tuple[ServerTls | None, ClientTls | None]:
    """Both ends' TLS, or none."""
    return (server_tls(), client_tls()) if secure else (None, None)


def admit_by_greeting(peer: Peer, greeting: bytes) -> Admitted | Refusal:
    """Greeting `name` or `name!` (takes over); names that begin with x are refused."""
    name = greeting.decode()
    if name.startswith("x"):
        return Refusal("roster", f"{name} is not on the list.", "Ask for an invitation.")
    return Admitted(name.rstrip("!"), b"welcome " + greeting, LIMIT_BYTES, name.endswith("!"))


@dataclass
class Echo:
    """A server that sends every message back, in a thread of its own, and remembers every event."""

    listener: Listener
    port: int = 0
    events: list[Event] = field(default_factory=list)
    arrived: queue.SimpleQueue[Arrived | None] = field(default_factory=queue.SimpleQueue)
    answer: Callable[[Session, Message], None] | None = None

    def deliver(self, event: Event) -> None:
        if isinstance(event, Arrived):
            self.arrived.put(event)
        else:
            self.events.append(event)

    def work(self) -> None:
        while (event := self.arrived.get()) is not None:
            if self.answer is not None:
                self.answer(event.session, event.message)
            elif not event.session.over:
                event.session.send(event.message.kind, event.message.payload)
                event.message.release()

    def session(self, key: str = "a") -> Session:
        return self.listener.sessions[key]

    def closed(self) -> list[str]:
        return [event.code for event in self.events if isinstance(event, Closed)]


@contextmanager
def echo_server(
    secure: bool = False,
    admit: Admit = admit_by_greeting,
    limits: Limits | None = None,
    timing: Timing = CALM,
    port: int = 0,
    answer: Callable[[Session, Message], None] | None = None,
) -> Iterator[Echo]:
    """A listening Echo."""
    held: list[Echo] = []
    listener = Listener(f"127.0.0.1:{port}", tls_pair(secure)[0], admit, lambda event: held[0].deliver(event), limits or Limits(), timing)
    echo = Echo(listener, answer=answer)
    held.append(echo)
    echo.port = listener.start()
    worker = threading.Thread(target=echo.work, name="echo", daemon=True)
    worker.start()
    try:
        yield echo
    finally:
        listener.stop(0.0)
        echo.arrived.put(None)
        worker.join(10)


@contextmanager
def client(
    port: int,
    name: str = "a",
    secure: bool = False,
    limits: Limits | None = None,
    timing: Timing = CALM,
    states: list[str] | None = None,
) -> Iterator[Link]:
    """A link, not opened yet."""
    known = states if states is not None else []
    link = Link(f"127.0.0.1:{port}", tls_pair(secure)[1], name.encode, limits or Limits(), timing, known.append)
    try:
        yield link
    finally:
        link.close(0.0)


def take(link: Link, timeout_s: float = 20.0) -> Message:
    """The next message; it must come."""
    message = link.receive(timeout_s)
    assert message is not None, "no message came"
    message.release()
    return message


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0, what: str = "it") -> None:
    """Wait for `condition`, bounded."""
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.005)
