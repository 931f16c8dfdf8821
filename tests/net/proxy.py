"""A TCP proxy on loopback whose faults a test turns on and off while it runs. Needs no root; one thread with an event loop of its own.

    with Proxy("127.0.0.1", server_port) as proxy:
        link = Link(f"127.0.0.1:{proxy.port}", ...)
        proxy.latency_s = 0.05           # each way; does not limit the rate
        proxy.bytes_per_s = 100_000      # each way and connection
        proxy.black_hole_up = True       # client to server: bytes are held back, connections stay open; False: they go on
        proxy.black_hole_down = True     # server to client
        proxy.slice_bytes = 7            # pass pieces of at most so many bytes
        proxy.flip_every_bytes = 50_000  # flip one bit of every so many bytes, each way
        proxy.cut_after_bytes = (1, 9)   # reset each new connection after a number of bytes (both ways together) drawn from that range
        proxy.refuse = True              # close new connections at once
        proxy.reset()                    # cut every connection now, with RST

`bytes_up` and `bytes_down` count what was passed on (up: from clients to the server), `connections` those accepted. What is drawn comes
from `seed`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from dataclasses import dataclass, field
from types import TracebackType

READ_BYTES = 1 << 16
POLL_S = 0.005
QUEUE_PIECES = 64


@dataclass
class Proxy:
    """See the head of the file. Fields may be changed from any thread at any time."""

    host: str
    target_port: int
    seed: int = 0
    latency_s: float = 0.0
    bytes_per_s: float = 0.0
    black_hole_up: bool = False
    black_hole_down: bool = False
    slice_bytes: int = 0
    flip_every_bytes: int = 0
    cut_after_bytes: tuple[int, int] | None = None
    refuse: bool = False
    port: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    connections: int = 0
    flips: int = 0
    _open: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = field(default_factory=set)
    _since_flip: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})

    def __enter__(self) -> Proxy:
        self._random = random.Random(self.seed)
        self._loop = asyncio.new_event_loop()
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._main(),), name="proxy", daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()

    def reset(self) -> None:
        """Cut every connection now."""
        done = threading.Event()

        def cut() -> None:
            for pair in list(self._open):
                self._cut(pair)
            done.set()

        self._loop.call_soon_threadsafe(cut)
        assert done.wait(10)

    async def _main(self) -> None:
        server = await asyncio.start_server(self._accept, self.host, 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for pair in list(self._open):
            self._cut(pair)
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    @staticmethod
    def _cut(pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter]) -> None:
        for writer in pair:
            end = writer.get_extra_info("socket")
            if end is not None and end.fileno() >= 0:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.refuse:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(self.host, self.target_port)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, far_writer)
        self._open.add(pair)
        left = [self._random.randint(*self.cut_after_bytes) if self.cut_after_bytes else -1]
        pumps = [
            asyncio.ensure_future(self._pump(reader, far_writer, True, left)),
            asyncio.ensure_future(self._pump(far_reader, writer, False, left)),
        ]
        try:
            with contextlib.suppress(asyncio.CancelledError):  # asyncio would log the end of the proxy as a fault
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._open.discard(pair)
            self._cut(pair)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: bool, left: list[int]) -> None:
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUE_PIECES)
        passing = asyncio.ensure_future(self._pass(waiting, writer, up, left))
        try:
            while data := await reader.read(self.slice_bytes or READ_BYTES):
                await waiting.put((self._loop.time() + self.latency_s, data))
                if passing.done():
                    return
            await waiting.put((0.0, b""))
            await passing
        except OSError:
            pass
        finally:
            passing.cancel()

    async def _pass(self, waiting: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, up: bool, left: list[int]) -> None:
        with contextlib.suppress(OSError):
            while True:
                due_s, data = await waiting.get()
                if not data:
                    return
                await asyncio.sleep(max(0.0, due_s - self._loop.time()))
                while self.black_hole_up if up else self.black_hole_down:
                    await asyncio.sleep(POLL_S)
                if left[0] >= 0:
                    data = data[: left[0]]
                    left[0] -= len(data)
                writer.write(self._flipped(data, up))
                if up:
                    self.bytes_up += len(data)
                else:
                    self.bytes_down += len(data)
                await writer.drain()
                if self.bytes_per_s:
                    await asyncio.sleep(len(data) / self.bytes_per_s)
                if left[0] == 0:
                    for pair in list(self._open):
                        if writer in pair:
                            self._cut(pair)
                    return

    def _flipped(self, data: bytes, up: bool) -> bytes:
        if not self.flip_every_bytes:
            return data
        since = self._since_flip[up] + len(data)
        self._since_flip[up] = since % self.flip_every_bytes
        if since < self.flip_every_bytes or not data:
            return data
        self.flips += 1
        damaged = bytearray(data)
        damaged[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
        return bytes(damaged)
