"""The server's end of the transport: who may come in, whose session a connection belongs to, and when one is over."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from splitft.errors import ProtocolError, ResourceError
from splitft.rng import fresh_bytes
from splitft.transport.budget import Budget
from splitft.transport.flow import FAREWELL_S, Ending, Flow
from splitft.transport.framing import Close, Damaged, Form, Hello, Welcome, decode, pack_note, pieces, read_note
from splitft.transport.loop import load_grpc, shared_loop
from splitft.transport.pipe import Pipe
from splitft.transport.session import Arrived, Broken, Closed, Event, Opened, Resumed, Session, farewell
from splitft.transport.tls import ServerTls, refuse_plain_text, server_credentials, server_options
from splitft.transport.values import Admit, Admitted, Limits, Message, Peer, Timing

__all__ = ["Arrived", "Broken", "Closed", "Event", "Listener", "Opened", "Resumed", "Session"]

SERVICE, METHOD = "splitft.Federation", "Session"
NONCE_BYTES = 16
DOOR_THREADS = 4
REMEMBERED_ENDS = 1000
START_S = 30.0
# Connections of one certificate that may be without a greeting at a time: a quarter of all, between these bounds.
LEAST_GREETING, MOST_GREETING = 4, 64
WAIT_SLICE_S = 0.01
LOST = Close("gone", "the server does not know this session.", "Start a new one.", lost=True)

log = logging.getLogger(__name__)


class Listener:
    """Listens at one address. `admit` is called in a worker thread at every connection, resumed ones included; `deliver` in the event
    loop, where it must not block. Raises ConfigError for an address beyond loopback without TLS."""

    def __init__(
        self,
        address: str,
        tls: ServerTls | None,
        admit: Admit,
        deliver: Callable[[Event], None],
        limits: Limits,
        timing: Timing,
    ) -> None:
        if tls is None:
            refuse_plain_text(address)
        self._address, self._tls, self._admit, self._deliver = address, tls, admit, deliver
        self._limits, self._timing = limits, timing
        self._newer: ServerTls | None = None
        self._instance = fresh_bytes(NONCE_BYTES)
        self._budget = Budget(limits.buffer_bytes)
        self._sessions: dict[str, Session] = {}
        self._epochs: dict[str, int] = {}
        self._ends: OrderedDict[bytes, Close] = OrderedDict()
        self._streams = self._carried = 0
        self._greeting: Counter[bytes] = Counter()
        self._draining = False
        self._server: Any = None

    # From any thread

    @property
    def sessions(self) -> Mapping[str, Session]:
        """The sessions that are not over, by key: a snapshot."""
        return dict(self._sessions)

    @property
    def buffered_bytes(self) -> int:
        """Memory that unfinished and unreleased messages of all clients take."""
        return self._budget.used_bytes

    def start(self) -> int:
        """Listen; returns the port. Raises ResourceError where the address is taken."""
        self._grpc = load_grpc()
        self._thread = shared_loop()
        self._door = ThreadPoolExecutor(DOOR_THREADS, thread_name_prefix="splitft-door")
        return self._thread.submit(self._start()).result(START_S)

    def stop(self, grace_s: float) -> None:
        """Let nobody in, give queued messages `grace_s` to leave, then end every connection. Not from the loop's thread."""
        if self._server is not None:
            self._thread.submit(self._stop(grace_s)).result(grace_s + START_S)
            self._door.shutdown(wait=False, cancel_futures=True)
            self._server = None

    def renew(self, tls: ServerTls) -> None:
        """Show `tls` to clients that connect from now on; connections that stand are left alone."""
        self._newer = tls

    # In the loop

    async def _start(self) -> int:
        grpc = self._grpc
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        server = grpc.aio.server(options=server_options(self._limits, self._timing))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        try:
            if self._tls is None:
                port = server.add_insecure_port(self._address)
            else:
                port = server.add_secure_port(self._address, server_credentials(grpc, self._tls, self._take_newer))
        except RuntimeError as problem:
            raise ResourceError(f"{self._address} cannot be listened at: {problem}.", "Choose another port, or end its user.") from problem
        await server.start()
        self._server = server
        return int(port)

    def _take_newer(self) -> ServerTls | None:
        newer, self._newer = self._newer, None
        return newer

    async def _stop(self, grace_s: float) -> None:
        self._draining, loop = True, asyncio.get_running_loop()
        until_s = loop.time() + grace_s
        while any(not session.flow.outbox.idle for session in self._sessions.values()) and loop.time() < until_s:
            await asyncio.sleep(WAIT_SLICE_S)
        for session in list(self._sessions.values()):
            self._finish(session, Close("draining", "the server stops."), tell=False)
        # Streams end by themselves before gRPC is stopped: otherwise it tells every client of an internal error.
        until_s = loop.time() + FAREWELL_S
        while self._carried and loop.time() < until_s:
            await asyncio.sleep(WAIT_SLICE_S)
        await self._server.stop(0.0)

    async def _serve(self, _requests: Any, context: Any) -> None:
        """One stream, from its first chunk to its end."""
        pipe = Pipe(self._grpc, context, self._tls is not None)
        self._streams += 1
        try:
            if self._streams > self._limits.connections:
                await self._refuse(pipe, Close("full", f"the server has its {self._limits.connections} connections.", "Try again later."))
                return
            peer = self._peer(context)
            answer = await self._admitted(pipe, peer)
            if isinstance(answer, Close):
                await self._refuse(pipe, answer)
                return
            text = await self._carry(pipe, peer, *answer)
            if text:
                await context.abort(self._grpc.StatusCode.ABORTED, text)
        except Damaged as problem:
            await context.abort(self._grpc.StatusCode.DATA_LOSS, str(problem))
        except TimeoutError:
            await context.abort(self._grpc.StatusCode.DEADLINE_EXCEEDED, f"no greeting within {self._timing.connect_s} s")
        finally:
            self._streams -= 1

    async def _admitted(self, pipe: Pipe, peer: Peer) -> tuple[Hello, Admitted] | Close:
        """The greeting and the door's answer. One certificate may not fill the door with streams that say nothing."""
        holder = peer.certificate_pem
        if holder is None:
            return await self._greet(pipe, peer)
        if self._greeting[holder] >= min(MOST_GREETING, max(LEAST_GREETING, self._limits.connections // 4)):
            return Close("full", "too many connections of this certificate wait for their greeting.", "Try again later.")
        self._greeting[holder] += 1
        try:
            return await self._greet(pipe, peer)
        finally:
            self._greeting[holder] -= 1
            if not self._greeting[holder]:
                del self._greeting[holder]

    async def _refuse(self, pipe: Pipe, close: Close) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(pipe.write(farewell(close)), self._timing.connect_s)

    def _peer(self, context: Any) -> Peer:
        address = str(context.peer()).partition(":")[2]
        certificates = context.auth_context().get("x509_pem_cert") or [None]
        return Peer(address, certificates[0])

    async def _greet(self, pipe: Pipe, peer: Peer) -> tuple[Hello, Admitted] | Close:
        """Read the greeting and ask the door."""
        data = await asyncio.wait_for(pipe.read(), self._timing.connect_s)
        if data is None:
            raise Damaged(pipe.why)
        if len(data) > self._limits.greeting_bytes:
            return Close("protocol", f"the greeting has {len(data)} bytes; allowed is {self._limits.greeting_bytes}.")
        try:
            chunk = decode(data)
            if chunk.form is not Form.HELLO or chunk.offset or len(chunk.piece) != chunk.total:
                return Close("protocol", f"the first chunk is {chunk.form.name} and not a whole HELLO.")
            hello = read_note(Hello, chunk.piece)
            if len(hello.process) != NONCE_BYTES:
                return Close("protocol", f"the name of the process has {len(hello.process)} bytes.")
        except ProtocolError as problem:
            return Close("protocol", problem.message, problem.remedy)
        if self._draining:
            return Close("draining", "the server stops.", "Come back when it has been restarted.")
        answer = await asyncio.get_running_loop().run_in_executor(self._door, self._admit, peer, hello.greeting)
        if isinstance(answer, Admitted):
            return hello, answer
        return Close(answer.code, answer.text, answer.remedy)

    async def _carry(self, pipe: Pipe, peer: Peer, hello: Hello, admitted: Admitted) -> str:
        """Find or make the session, and carry it until the stream ends; returns why it broke, empty where it was ended properly."""
        session = self._enter(hello, admitted, peer)
        if isinstance(session, Close):
            await self._refuse(pipe, session)
            return ""
        flow, resumed = session.flow, bool(hello.server)
        if flow.pipe is not None:
            self._part(session, flow.pipe, "the client has connected anew")
        if session.forget is not None:
            session.forget.cancel()
            session.forget = None
        session.peer = peer
        words, heartbeat_s = b"" if resumed else admitted.welcome, float(self._timing.heartbeat_s)
        welcome = Welcome(self._instance, session.epoch, flow.inbox.received, flow.inbox.filled, words, heartbeat_s)
        # Attached before the welcome is written, so that nobody else takes the session meanwhile; the flow writes it first.
        flow.attach(pipe, hello.received, hello.filled, list(pieces(Form.WELCOME, pack_note(welcome), self._limits.chunk_bytes)))
        if resumed:
            flow.resumed()
            self._tell(Resumed(session))
        ended = flow.ended
        self._carried += 1
        try:
            ending = await ended
            if ending.what == "lie":
                self._finish(session, Close("protocol", ending.text, "Run the same splitft version on both sides."))
                await flow.ended
            return ending.text if ending.what == "broken" else ""
        finally:
            self._carried -= 1
            # gRPC cancels this coroutine when the client hangs up, perhaps just after its last word.
            known = ended.done() and not ended.cancelled()
            self._conclude(session, pipe, ended.result() if known else Ending("broken", "the connection was lost"))

    def _conclude(self, session: Session, pipe: Pipe, ending: Ending) -> None:
        if ending.what == "left":
            self._finish(session, Close("closed", ending.text), tell=False)
        self._part(session, pipe, ending.text)

    def _enter(self, hello: Hello, admitted: Admitted, peer: Peer) -> Session | Close:
        """The session that this greeting is for: the one it names, or a new one where nobody holds the key."""
        found = self._sessions.get(admitted.key)
        if found is not None and found.process == hello.process:
            return found if found.flow.outbox.can_resume(hello.received, hello.filled) else LOST
        if hello.server:
            return self._ends.get(hello.process, LOST)
        if hello.received or hello.filled:
            return Close("protocol", "a new session begins with messages received.")
        if found is not None:
            held = found.connected and found.silent_s < self._timing.liveness_s
            if held and not admitted.takeover:
                text = f"{admitted.key} is connected already, from {found.peer.address}, since {found.age_s:.0f} s"
                return Close("busy", f"{text} (last heard of {found.silent_s:.1f} s ago).", "End that process, or take over from it.")
            self._finish(found, Close("superseded", "another process with this identity has taken over."))
        return self._make(hello, admitted, peer)

    def _make(self, hello: Hello, admitted: Admitted, peer: Peer) -> Session:
        epoch = self._epochs[admitted.key] = self._epochs.get(admitted.key, 0) + 1

        def arrived(message: Message) -> None:
            self._tell(Arrived(session, message))

        flow = Flow(asyncio.get_running_loop(), self._limits, self._timing, self._budget, arrived)
        flow.inbox.limit_bytes = admitted.limit_bytes
        session = Session(admitted.key, epoch, peer, hello.process, flow, self._finish)
        self._sessions[session.key] = session
        self._tell(Opened(session))
        return session

    def _part(self, session: Session, pipe: Pipe, text: str) -> None:
        """`pipe` carries the session no longer; nothing happens where it has another one by now."""
        if session.flow.pipe is not pipe:
            return
        session.flow.abandon(text)
        if session.over:
            session.flow.dispose()
            return
        session.forget = session.flow.loop.call_later(
            self._timing.forget_s, self._finish, session, Close("gone", "the client did not come back.", lost=True)
        )
        self._tell(Broken(session, text))

    def _finish(self, session: Session, close: Close, tell: bool = True) -> None:
        """The session is over."""
        if session.over:
            return
        session.over = True
        self._sessions.pop(session.key, None)
        self._ends[session.process] = close
        while len(self._ends) > REMEMBERED_ENDS:
            self._ends.popitem(last=False)
        if session.forget is not None:
            session.forget.cancel()
        if tell and session.connected:
            session.flow.say_farewell(farewell(close), Ending("closed", close.text, close))
        else:
            session.flow.abandon(close.text)
            session.flow.dispose()
        self._tell(Closed(session, close.code, close.text))

    def _tell(self, event: Event) -> None:
        try:
            self._deliver(event)
        except Exception:  # a fault of the receiver must not end the connections of others
            log.exception("an event was not taken: %s", type(event).__name__)
