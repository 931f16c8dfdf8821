"""The status page's server: read-only HTTP for `/`, `/status.json`, `/metrics`, `/health` and `/ready`.

On a loopback address it speaks plain HTTP. On any other it speaks TLS 1.3 only, to holders of a certificate of the federation, and
without certificates it does not start. It is one thread with an event loop of its own: a slow peer holds a connection and nothing
else, and when connections run out the one that has kept silent longest makes room.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import logging
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from splitft.clock import monotonic_s
from splitft.deploy.logs import log
from splitft.deploy.metrics import CONTENT_TYPE, Metrics
from splitft.deploy.page_document import Document, page_document
from splitft.deploy.page_request import Answer, Asked, BadRequest, read_request
from splitft.deploy.status import ServerStatus
from splitft.errors import ConfigError, IdentityError, ResourceError
from splitft.transport.tls import ServerTls

JSON_TYPE, TEXT_TYPE, HTML_TYPE = "application/json", "text/plain; charset=utf-8", "text/html; charset=utf-8"
START_S, STOP_S = 10.0, 5.0
_LOGGER = logging.getLogger(__name__)
# A peer that takes longer to read its answer may lose its place to another.
SLOW_S = 1.0


@dataclass(frozen=True)
class PageLimits:
    """Bounds of the status page's server. `fresh_s`: how long one snapshot answers everybody who asks."""

    connections: int = 48
    head_s: float = 5.0
    idle_s: float = 20.0
    write_s: float = 10.0
    handshake_s: float = 5.0
    fresh_s: float = 0.4


class StatusPage:
    """Serves `status` and `metrics` at `address` ("host:port"). `tls` is used on other than loopback addresses; `accept`, if given, is
    shown the client's certificate (PEM) there and says whether its holder is still on the roster; it runs in a worker thread."""

    def __init__(
        self,
        address: str,
        status: ServerStatus,
        metrics: Metrics,
        tls: ServerTls | None = None,
        accept: Callable[[bytes], bool] | None = None,
        limits: PageLimits | None = None,
    ) -> None:
        self.host, self._asked_port = split_address(address)
        self.loopback = is_loopback(self.host)
        if tls is None and not self.loopback:
            raise ConfigError(
                f"the status page would be readable by anybody at {address}; without certificates only a loopback address is allowed.",
                'Set federation.status_address to "127.0.0.1:7480", or create certificates with "splitft enroll init".',
            )
        self._context = None if self.loopback or tls is None else tls_context(tls)
        self._status, self._metrics, self._accept = status, metrics, accept
        self._limits = limits or PageLimits()
        self._document: Document = page_document()
        self._fresh: tuple[float, bytes] = (float("-inf"), b"")
        self._talks: dict[asyncio.Task[None], _Talk] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._up = threading.Event()
        self.port = 0

    @property
    def url(self) -> str:
        """Where to look."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self._context else 'http'}://{host}:{self.port}/"

    def renew(self, tls: ServerTls) -> None:
        """Show another certificate from the next connection on."""
        if self._context is not None:
            self._context = tls_context(tls)

    def start(self) -> int:
        """Listen; returns the port. Raises ResourceError when the address cannot be had."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            listener = socket.create_server((self.host, self._asked_port), family=family, backlog=64)
        except OSError as problem:
            raise ResourceError(
                f"the status page cannot listen at {self.host}:{self._asked_port}: {problem.strerror or problem}.",
                'Choose another federation.status_address, or "off".',
            ) from problem
        listener.setblocking(False)
        self.port = int(listener.getsockname()[1])
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(listener)), name="status-page", daemon=True)
        self._thread.start()
        self._up.wait(START_S)
        return self.port

    def stop(self) -> None:
        """Close every connection and the port."""
        if self._thread is None or self._loop is None or self._stopping is None:
            return
        with suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(STOP_S)

    async def _serve(self, listener: socket.socket) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        self._up.set()
        accepting = asyncio.create_task(self._accept_all(listener))
        await self._stopping.wait()
        tasks = [accepting, *self._talks]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=STOP_S)
        listener.close()

    async def _accept_all(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError:  # out of descriptors: they come back
                await asyncio.sleep(0.1)
                continue
            if len(self._talks) >= self._limits.connections and not self._make_room():
                connection.close()
                continue
            talk = _Talk(monotonic_s())
            task = asyncio.create_task(self._talk(connection, talk))
            self._talks[task] = talk
            task.add_done_callback(functools.partial(self._ended, connection, talk))

    def _ended(self, connection: socket.socket, talk: _Talk, task: asyncio.Task[None]) -> None:
        self._talks.pop(task, None)
        if not talk.begun:  # made room for another before it ran at all
            connection.close()

    def _make_room(self) -> bool:
        """End the connection whose peer has said nothing for longest, else one that takes its answer slowly; False when there is none."""
        now_s = monotonic_s()
        idle = [(not talk.waits, talk.since_s, task) for task, talk in self._talks.items() if talk.waits or now_s - talk.since_s > SLOW_S]
        if not idle:
            return False
        _, _, task = min(idle, key=lambda one: one[:2])
        self._talks.pop(task)
        task.cancel()
        return True

    async def _talk(self, connection: socket.socket, talk: _Talk) -> None:
        """One connection from its handshake to its end."""
        talk.begun = True
        loop, limits = asyncio.get_running_loop(), self._limits
        reader = asyncio.StreamReader(limit=1 << 14, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        handshake_s = limits.handshake_s if self._context else None
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol, connection, ssl=self._context, ssl_handshake_timeout=handshake_s
            )
        except (OSError, TimeoutError, asyncio.CancelledError):
            connection.close()
            return
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        try:
            if await self._known(writer):
                await self._answer_all(reader, writer, talk)
            writer.close()
            async with asyncio.timeout(limits.write_s):
                await writer.wait_closed()
        except (OSError, TimeoutError, EOFError):
            pass  # the peer went, or was too slow
        finally:
            transport.abort()

    async def _known(self, writer: asyncio.StreamWriter) -> bool:
        """Whether the certificate's holder may look; on a loopback address there is none."""
        tls = writer.get_extra_info("ssl_object")
        if tls is None or self._accept is None:
            return True
        shown = tls.getpeercert(binary_form=True)
        if shown and await asyncio.to_thread(self._accept, ssl.DER_cert_to_PEM_cert(shown).encode("ascii")):
            return True
        await self._write(writer, Answer(403, b"this certificate is not on the roster\n", TEXT_TYPE), Asked("GET", "/", ""), False)
        return False

    async def _answer_all(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, talk: _Talk) -> None:
        wait_s = self._limits.head_s
        while True:
            talk.since_s, talk.waits = monotonic_s(), True
            try:
                asked = await read_request(reader, wait_s, self._limits.head_s)
            except BadRequest as problem:
                talk.waits = False
                await self._write(writer, Answer(problem.code, f"{problem}\n".encode(), TEXT_TYPE), Asked("GET", "/", ""), False)
                return
            talk.since_s, talk.waits, wait_s = monotonic_s(), False, self._limits.idle_s
            await self._write(writer, self._answer(asked), asked, asked.again)
            if not asked.again:
                return

    async def _write(self, writer: asyncio.StreamWriter, answer: Answer, asked: Asked, again: bool) -> None:
        writer.write(answer.encode(asked.method == "HEAD", again, self._document.policy))
        async with asyncio.timeout(self._limits.write_s):
            await writer.drain()

    def _answer(self, asked: Asked) -> Answer:
        try:
            return self._found(asked)
        except Exception as problem:  # whatever the figures are: the page must not go down with them
            log(_LOGGER, "status page cannot answer", logging.ERROR, path=asked.path, error=problem)
            return Answer(500, b"the figures cannot be had now\n", TEXT_TYPE)

    def _found(self, asked: Asked) -> Answer:
        if self.loopback and not is_own_host(asked.host, self.host):
            return Answer(421, b"this host name is not served here\n", TEXT_TYPE)
        if asked.method not in ("GET", "HEAD"):
            return Answer(405, b"only GET and HEAD are answered\n", TEXT_TYPE, {"Allow": "GET, HEAD"})
        if asked.path == "/":
            return Answer(200, self._document.html, HTML_TYPE)
        if asked.path == "/health":
            return Answer(200, b"live\n", TEXT_TYPE)
        if asked.path == "/ready":
            return Answer(200 if self._status.ready else 503, f"{self._status.phase}\n".encode(), TEXT_TYPE)
        if asked.path == "/status.json":
            return Answer(200, self._snapshot(), JSON_TYPE)
        if asked.path == "/metrics":
            return Answer(200, self._metrics.text(), CONTENT_TYPE)
        return Answer(404, b"nothing here\n", TEXT_TYPE)

    def _snapshot(self) -> bytes:
        """The status as JSON, made at most once in `fresh_s` however many look."""
        made_s, data = self._fresh
        now_s = monotonic_s()
        if now_s - made_s > self._limits.fresh_s:
            data = msgspec.json.encode(self._status.snapshot())
            self._fresh = now_s, data
        return data


@dataclass
class _Talk:
    """A connection: since when it is as it is, whether it waits for its peer, whether its task has run."""

    since_s: float
    waits: bool = True
    begun: bool = False


def split_address(address: str, field: str = "federation.status_address") -> tuple[str, int]:
    """Host and port of "host:port" or "[address]:port" in a `field` of the configuration. Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or (":" in bare and bare == host) or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise ConfigError(f"{field} is {address!r}.", 'Write host:port, such as "127.0.0.1:7480" or "[::1]:7480".')
    return ("127.0.0.1" if bare == "localhost" else bare), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. A name that is not an address does not count: what it means may change."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_own_host(shown: str, bound: str) -> bool:
    """Whether a request's Host names this machine. Else a page elsewhere has had its own name point here, to read across origins."""
    host = shown.rpartition(":")[0] if shown.rpartition(":")[2].isdigit() and not shown.endswith("]") else shown
    return host.lower() in ("localhost", "127.0.0.1", "[::1]", bound, f"[{bound}]")


def tls_context(tls: ServerTls) -> ssl.SSLContext:
    """TLS 1.3, and a client's certificate of the federation's authority required. Raises IdentityError for certificates that do not fit."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # a resumed session would skip the look at the certificate
    try:
        context.load_verify_locations(cadata=tls.root_pem.decode("ascii"))
        # The interface takes files only: a folder that nobody else can enter, gone before this returns.
        with tempfile.TemporaryDirectory(prefix="splitft-") as folder:
            file = Path(folder) / "server.pem"
            file.touch(0o600)
            file.write_bytes(tls.certificate_pem + b"\n" + tls.key_pem)
            context.load_cert_chain(file)
    except (ssl.SSLError, ValueError) as problem:
        reason = problem.reason if isinstance(problem, ssl.SSLError) else type(problem).__name__
        raise IdentityError(
            f"the server's certificates cannot be used for the status page ({reason}).", 'Renew them with "splitft enroll".'
        ) from None
    return context
