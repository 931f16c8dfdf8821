"""The port where invited clients fetch their certificates: a few bounded threads beside the server, nothing of training in them."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from splitft.clock import monotonic_s
from splitft.deploy.authority import AUTHORITY_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY, Authority
from splitft.deploy.certificates import PEM_BYTES, read_request
from splitft.deploy.disk import read_bounded
from splitft.deploy.enrolment import WAIT_S, Answer, Greeting, Request, receive_message, send_message
from splitft.deploy.names import check_host, check_name
from splitft.deploy.roster import REFUSED_INVITATION, Roster, redeem
from splitft.errors import IdentityError, ResourceError, RosterError, SplitftError

LOG = logging.getLogger(__name__)
ASK_AGAIN = "Ask for a new one (splitft enroll invite)."


@dataclass
class Failures:
    """How often each address has failed lately; more than `most` in `window_s` and it is not heard."""

    most: int = 10
    window_s: float = 60.0
    addresses: int = 1024
    _times_s: dict[str, deque[float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, address: str) -> None:
        """A failure from `address`. The address heard of longest ago is forgotten when there are too many."""
        with self._lock:
            times_s = self._times_s.pop(address, deque(maxlen=self.most))
            times_s.append(monotonic_s())
            self._times_s[address] = times_s
            while len(self._times_s) > self.addresses:
                del self._times_s[next(iter(self._times_s))]

    def too_many(self, address: str) -> bool:
        """Whether `address` is to wait."""
        with self._lock:
            times_s = self._times_s.get(address)
            return times_s is not None and len(times_s) == self.most and monotonic_s() - times_s[0] < self.window_s


class EnrolmentServer:
    """Serves one federation's folder at `host`:`port` (0: chosen by the system); clients are told the training service's `service_port`.

    At most `connections` at a time, a quarter of them from one address; over that a connection is closed unheard.
    """

    def __init__(self, folder: Path, host: str, port: int, service_port: int = 0, connections: int = 64, wait_s: float = WAIT_S) -> None:
        self.folder, self.host, self.port, self.service_port = Path(folder), check_host(host), port, service_port
        self.connections, self.wait_s = connections, wait_s
        self.failures = Failures()
        self._open: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._listening: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> int:
        """Listen; the bound port. Raises ResourceError when the address is taken, IdentityError without a sound authority."""
        authority = Authority.load(self.folder)
        Roster.load(self.folder)
        self._greeting = Greeting(authority.federation, read_bounded(self.folder / AUTHORITY_CERTIFICATE, PEM_BYTES, "the authority"))
        self._context()
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            self._listening = socket.create_server((self.host, self.port), family=family, backlog=128)
        except OSError as problem:
            raise ResourceError(
                f"the enrolment port {self.host}:{self.port} cannot be opened: {problem.strerror}.",
                "Choose another one (federation.enroll_address).",
            ) from problem
        self._listening.settimeout(1.0)
        self.port = int(self._listening.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, args=(self._listening,), name="enrolment", daemon=True)
        self._thread.start()
        return self.port

    def stop(self) -> None:
        """Close the port; connections under way end within their own bounds."""
        self._stopping.set()
        if self._listening is not None:
            with suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)  # wakes accept
            if self._thread is not None:
                self._thread.join(5.0)
            self._listening.close()

    def _context(self) -> ssl.SSLContext:
        # Made for each connection, so that a renewed certificate is shown at once.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0
        context.load_cert_chain(self.folder / SERVER_CERTIFICATE, self.folder / SERVER_KEY)
        return context

    def _accept(self, listening: socket.socket) -> None:
        while not self._stopping.is_set():
            try:
                plain, remote = listening.accept()
            except TimeoutError:
                continue
            except OSError as problem:
                if not self._stopping.is_set():
                    LOG.warning("enrolment: no connection taken: %s", problem.strerror)
                self._stopping.wait(0.1)  # out of descriptors: they come back as connections end
                continue
            address = str(remote[0])
            if not self._enter(address):
                plain.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(plain, address), name="enrolment-client", daemon=True).start()
            except RuntimeError:  # no more threads
                self._leave(address)
                plain.close()

    def _enter(self, address: str) -> bool:
        with self._lock:
            full = self._open.total() >= self.connections or self._open[address] >= max(1, self.connections // 4)
            if not full:
                self._open[address] += 1
            return not full

    def _leave(self, address: str) -> None:
        with self._lock:
            self._open[address] -= 1
            if not self._open[address]:
                del self._open[address]

    def _serve(self, plain: socket.socket, address: str) -> None:
        """One connection, one attempt."""
        try:
            with plain:
                plain.settimeout(self.wait_s)
                with self._context().wrap_socket(plain, server_side=True) as stream:
                    send_message(stream, self._greeting, monotonic_s() + self.wait_s)
                    answer = self._answer(receive_message(stream, monotonic_s() + self.wait_s), address)
                    send_message(stream, answer, monotonic_s() + self.wait_s)
        except (OSError, SplitftError) as problem:
            # Half-open, trickling, oversize, or not TLS at all; nothing of it is trusted enough to be logged.
            LOG.info("enrolment: a connection from %s came to nothing (%s)", address, type(problem).__name__)
        except Exception:
            LOG.exception("enrolment: a connection from %s failed", address)
        finally:
            self._leave(address)

    def _answer(self, body: bytes, address: str) -> Answer:
        if self.failures.too_many(address):
            return Answer(refused="too many failed attempts from this address.", remedy="Wait a minute.")
        try:
            request = msgspec.msgpack.decode(body, type=Request)
            asked, key = read_request(request.request)
            if check_name(request.name) != asked:
                raise IdentityError("the request is for another name.")
        except (msgspec.MsgspecError, UnicodeDecodeError, IdentityError) as problem:
            return self._refuse(address, problem)
        try:
            certificate = redeem(self.folder, request.name, request.secret, key)
        except RosterError as problem:
            return self._refuse(address, problem)
        except SplitftError as problem:
            LOG.error("enrolment: %s", problem)
            return Answer(refused="the server cannot make certificates now.", remedy="Tell its operator, and try again later.")
        LOG.info("enrolment: %s has its certificate", request.name)
        return Answer(certificate=certificate, port=self.service_port)

    def _refuse(self, address: str, problem: Exception) -> Answer:
        """The same words whether the name, the secret, the date or the request was wrong."""
        self.failures.add(address)
        LOG.warning("enrolment: refused an attempt from %s (%s)", address, type(problem).__name__)
        return Answer(refused=REFUSED_INVITATION, remedy=ASK_AGAIN)
