"""The one event loop of a process that gRPC runs in: a background thread, started at first use and never restarted.

grpc.aio binds itself to the first event loop of a process, so every link and listener shares this one. Nothing may compute in it.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from splitft.errors import MissingExtraError

LEAST_GRPCIO = (1, 84)

ValueT = TypeVar("ValueT")


def load_grpc() -> Any:
    """The grpc package with its asyncio part. Raises MissingExtraError where it is absent or too old.

    Before 1.84 a message over the limit was kept in memory whole before it was refused.
    """
    try:
        import grpc
        import grpc.aio
    except ImportError as problem:
        raise MissingExtraError(f"grpcio cannot be imported: {problem}.", "Install grpcio 1.84 or later.") from problem
    found = tuple(int(part) for part in grpc.__version__.split(".")[:2])
    if found < LEAST_GRPCIO:
        raise MissingExtraError(f"grpcio is {grpc.__version__}; 1.84 or later is needed.", "Run: pip install --upgrade grpcio")
    return grpc


class LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="splitft-transport", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def submit(self, work: Coroutine[Any, Any, ValueT]) -> Future[ValueT]:
        """Run `work` in the loop, from any other thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)


class _Shared:
    """Makes the loop thread at first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: LoopThread | None = None

    def get(self) -> LoopThread:
        with self._lock:
            if self._made is None:
                self._made = LoopThread()
            return self._made


# The one thing of a whole process: gRPC allows no second loop.
_SHARED = _Shared()


def shared_loop() -> LoopThread:
    """The loop thread of this process."""
    return _SHARED.get()


class Mailbox:
    """Runs calls from any thread in the loop, in order; many at a time cost one wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[Callable[[], None]] = deque()
        self._scheduled = False

    def post(self, call: Callable[[], None]) -> None:
        """Queue `call`; never blocks."""
        self._calls.append(call)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        # Cleared first: a call that arrives from here on either is seen below or schedules another drain.
        self._scheduled = False
        while self._calls:
            self._calls.popleft()()
