"""The client's end of the transport: one connection that makes itself anew until the session is over."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import nullcontext
from functools import partial

from splitft.clock import monotonic_s
from splitft.errors import FederationError, ProtocolError, UnreachableError
from splitft.rng import fresh_bytes
from splitft.transport.budget import Budget
from splitft.transport.flow import Ending, Flow
from splitft.transport.framing import Close, Damaged, Form, Hello, Welcome, decode, encode, pack_note, read_note
from splitft.transport.listener import METHOD, NONCE_BYTES, SERVICE
from splitft.transport.loop import load_grpc, shared_loop
from splitft.transport.pipe import Pipe
from splitft.transport.tls import ClientTls, client_credentials, client_options, refuse_plain_text
from splitft.transport.values import Counts, Limits, Message, Refused, SessionClosed, SessionLost, Timing
from splitft.waits import Waits

# How long a blocking wait sleeps at most before it looks again whether its session is over.
SLICE_S = 1.0
LEAVE_S = 5.0
# Refusals that pass by themselves: while a session stands they are waited out.
PASSING = frozenset({"full", "draining"})


class _Conversation:
    """One session of a link: made by `open`, over for good once `end` is set."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: Limits, timing: Timing) -> None:
        self.process, self.server, self.epoch = fresh_bytes(NONCE_BYTES), b"", 0
        self.inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.room = threading.Condition()
        self.posted = 0
        self.end: FederationError | None = None
        self.welcome: Future[bytes] = Future()
        self.flow = Flow(loop, limits, timing, Budget(limits.buffer_bytes), self.inbox.put, self.wake, leads=False)
        self.task: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Something has changed for those who wait to send."""
        with self.room:
            self.room.notify_all()

    def finish(self, end: FederationError) -> None:
        """The session is over; whoever waits is told, after the messages that came before."""
        if self.end is None:
            self.end = end
            if not self.welcome.done():
                self.welcome.set_exception(end)
            self.inbox.put(None)
            self.wake()


class Link:
    """A client's connection to `address`. `hello` makes the greeting, in a worker thread, at every connection; `on_change` is called in
    the event loop with what the connection does ("connecting", "connected", "broken: why"). Only loopback may go without TLS."""

    def __init__(
        self,
        address: str,
        tls: ClientTls | None,
        hello: Callable[[], bytes],
        limits: Limits,
        timing: Timing,
        on_change: Callable[[str], None] = lambda state: None,
        waits: Waits | None = None,
    ) -> None:
        if tls is None:
            refuse_plain_text(address)
        self._address, self._tls, self._hello = address, tls, hello
        self._limits, self._timing, self._on_change, self._waits = limits, timing, on_change, waits
        self._limit_bytes = limits.buffer_bytes
        # Called while `send` waits for room; what it raises ends the wait.
        self.look: Callable[[], None] = lambda: None
        self._conversation: _Conversation | None = None

    # From any thread

    @property
    def limit_bytes(self) -> int:
        """The largest message the server may send now."""
        return self._limit_bytes

    @limit_bytes.setter
    def limit_bytes(self, value: int) -> None:
        self._limit_bytes = value
        if self._conversation is not None:
            self._conversation.flow.inbox.limit_bytes = value

    @property
    def counts(self) -> Counts:
        """What the present session has moved."""
        return self._conversation.flow.counts() if self._conversation is not None else Counts()

    @property
    def connected(self) -> bool:
        """Whether a connection stands now."""
        return self._conversation is not None and self._conversation.flow.pipe is not None

    @property
    def epoch(self) -> int:
        """How many sessions this identity has had at the server, this one included; 0 before the first."""
        return self._conversation.epoch if self._conversation is not None else 0

    def renew(self, tls: ClientTls | None) -> None:
        """Show `tls` from the next connection on."""
        self._tls = tls

    def open(self, give_up_s: float = 0.0) -> bytes:
        """Begin a new session and return the server's welcome; 0: try for ever, with back-off.

        Raises UnreachableError after `give_up_s`, Refused where the server does not let this client in.
        """
        if self._conversation is not None and self._conversation.end is None:
            raise FederationError("the link has a session already.", "Close it first.")
        self._grpc = load_grpc()
        thread = shared_loop()
        made = self._conversation = _Conversation(thread.loop, self._limits, self._timing)
        made.flow.inbox.limit_bytes = self._limit_bytes
        thread.loop.call_soon_threadsafe(self._begin, made, give_up_s)
        try:
            with self._waits.waiting("the server's welcome", self._address) if self._waits else nullcontext():
                while True:
                    try:
                        return made.welcome.result(SLICE_S)
                    except NotYet:
                        continue
        except BaseException:
            thread.loop.call_soon_threadsafe(self._abandon, made)
            raise

    def send(self, kind: int, payload: bytes | bytearray | memoryview) -> None:
        """Queue a message, waiting while a window of them is out; `payload` must not change afterwards.

        Raises SessionLost, Refused or SessionClosed when the session is over.
        """
        held = self._held()
        with held.room:
            if held.posted - held.flow.outbox.credit >= self._limits.window and held.end is None:
                with self._waits.waiting("room to send", self._address) if self._waits else nullcontext():
                    while held.posted - held.flow.outbox.credit >= self._limits.window and held.end is None:
                        held.room.wait(SLICE_S)
                        self.look()
            if held.end is not None:
                raise held.end
            held.posted += 1
        # Outside: it wakes the event loop, which takes this lock when messages move.
        held.flow.mail.post(partial(held.flow.push, kind, payload))

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, None after `timeout_s`. Raises SessionLost, Refused or SessionClosed once all that came has been taken."""
        held = self._held()
        try:
            message = held.inbox.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None
        if message is not None:
            return message
        held.inbox.put(None)  # for the next caller
        assert held.end is not None
        raise held.end

    def close(self, grace_s: float = LEAVE_S) -> None:
        """Leave the server for good, after what was sent has arrived, or `grace_s`; a link without a session: nothing happens."""
        made = self._conversation
        if made is None:
            return
        until_s = monotonic_s() + grace_s
        with made.room:
            while made.end is None and self.connected and made.flow.outbox.acknowledged < made.posted and monotonic_s() < until_s:
                made.room.wait(0.05)
        leaving = shared_loop().submit(self._leave(made))
        leaving.result(LEAVE_S + self._timing.connect_s)

    def _held(self) -> _Conversation:
        if self._conversation is None:
            raise SessionClosed("the link has no session.", "Call open() first.")
        return self._conversation

    # In the loop

    def _begin(self, made: _Conversation, give_up_s: float) -> None:
        made.task = asyncio.get_running_loop().create_task(self._run(made, give_up_s))

    def _abandon(self, made: _Conversation) -> None:
        made.finish(SessionClosed("the link was closed.", "Open it again."))
        if made.task is not None:
            made.task.cancel()

    async def _leave(self, made: _Conversation) -> None:
        flow = made.flow
        if made.end is None and flow.pipe is not None:
            flow.say_farewell(encode(Form.BYE), Ending("left", "this client left"))
            if made.task is not None:
                await asyncio.wait([made.task], timeout=LEAVE_S)
        self._abandon(made)
        if made.task is not None:
            await asyncio.wait([made.task], timeout=LEAVE_S)

    async def _run(self, made: _Conversation, give_up_s: float) -> None:
        """Connect, carry, and again, until the session is over."""
        loop = asyncio.get_running_loop()
        until_s, attempt = loop.time() + give_up_s, 0
        try:
            while made.end is None:
                before = made.flow.progress
                self._tell("connecting")
                try:
                    why = await self._attempt(made)
                except FederationError as problem:
                    made.finish(problem)
                    break
                attempt = 0 if made.flow.progress > before else attempt + 1
                self._tell(f"broken: {why}")
                if give_up_s and not made.server and loop.time() >= until_s:
                    made.finish(UnreachableError(f"{self._address} does not answer: {why}", "Check the address and that the server runs."))
                    break
                await asyncio.sleep(self._pause_s(attempt, until_s - loop.time() if give_up_s and not made.server else float("inf")))
        finally:
            made.flow.dispose()
            made.finish(SessionClosed("the link was closed.", "Open it again."))

    def _pause_s(self, attempt: int, longest_s: float) -> float:
        first_s, most_s = self._timing.backoff_s
        bound_s = min(most_s, first_s * 2.0 ** min(attempt, 30))
        share = int.from_bytes(fresh_bytes(4), "little") / 2**32
        return max(0.0, min(bound_s * share, longest_s))

    def _tell(self, state: str) -> None:
        self._on_change(state)

    async def _attempt(self, made: _Conversation) -> str:
        """One connection, from its making to its end; returns why it broke. Raises FederationError where the session is over."""
        hello = await asyncio.get_running_loop().run_in_executor(None, self._hello)
        options = client_options(self._address, self._tls, self._limits, self._timing)
        aio = self._grpc.aio
        if self._tls is None:
            channel = aio.insecure_channel(self._address, options=options)
        else:
            channel = aio.secure_channel(self._address, client_credentials(self._grpc, self._tls), options=options)
        try:
            call = channel.stream_stream(f"/{SERVICE}/{METHOD}")()
            try:
                return await self._converse(made, Pipe(self._grpc, call, self._tls is not None), hello)
            finally:
                call.cancel()
        except Damaged as problem:
            return str(problem)
        except TimeoutError:
            return f"no welcome within {self._timing.connect_s} s"
        except ProtocolError as problem:
            raise Refused("protocol", problem.message, problem.remedy) from problem
        finally:
            made.flow.detach()
            await channel.close()

    async def _converse(self, made: _Conversation, pipe: Pipe, greeting: bytes) -> str:
        flow = made.flow
        hello = Hello(made.process, made.server, flow.inbox.received, flow.inbox.filled, greeting)
        if not await asyncio.wait_for(pipe.write(encode(Form.HELLO, pack_note(hello))), self._timing.connect_s):
            return pipe.why
        welcome = await self._welcome(pipe)
        if isinstance(welcome, Close):
            if made.server and welcome.code in PASSING:
                return welcome.text
            raise end_of(welcome)
        if not flow.outbox.can_resume(welcome.received, welcome.filled):
            raise SessionLost("the server has another idea of this session.", "Start a new one.")
        if made.server:
            flow.resumed()
        made.server, made.epoch = welcome.server, welcome.epoch
        flow.follow(welcome.heartbeat_s)
        flow.attach(pipe, welcome.received, welcome.filled)
        if not made.welcome.done():
            made.welcome.set_result(welcome.greeting)
        self._tell("connected")
        ending = await flow.ended
        if ending.what == "closed" and ending.close is not None:
            raise end_of(ending.close)
        if ending.what == "lie":
            raise Refused("protocol", f"the server broke the protocol: {ending.text}", "Run the same splitft version on both sides.")
        if ending.what == "left":
            raise SessionClosed("the link was closed.", "Open it again.")
        return ending.text

    async def _welcome(self, pipe: Pipe) -> Welcome | Close:
        """The server's answer, put together from its chunks."""
        note = bytearray()
        while True:
            data = await asyncio.wait_for(pipe.read(), self._timing.connect_s)
            if data is None:
                raise Damaged(pipe.why)
            chunk = decode(data)
            if chunk.form is Form.CLOSE:
                return read_note(Close, chunk.piece)
            if chunk.form is not Form.WELCOME:
                raise Damaged(f"{chunk.form.name} came before the welcome")
            if chunk.total > self._limits.welcome_bytes:
                raise ProtocolError(f"the welcome has {chunk.total} bytes; allowed is {self._limits.welcome_bytes}.", "")
            if chunk.offset > len(note):
                raise Damaged("a piece of the welcome is missing")
            if chunk.offset == len(note):
                note += chunk.piece
            if len(note) == chunk.total:
                return read_note(Welcome, note)


def end_of(close: Close) -> FederationError:
    """The server's last word as an error."""
    return SessionLost(close.text, close.remedy) if close.lost else Refused(close.code, close.text, close.remedy)
