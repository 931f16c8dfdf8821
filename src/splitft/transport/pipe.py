"""One gRPC stream as chunks of bytes: reads and writes that never raise, but say why the stream is over."""

from __future__ import annotations

from typing import Any

from splitft.transport.values import Counts

# gRPC puts a flag and a length before every message.
PREFIX_BYTES = 5


class Pipe:
    """A stream, of either end: a client's call or a server's context. `sealed`: TLS authenticates every byte of it."""

    def __init__(self, grpc: Any, stream: Any, sealed: bool = False) -> None:
        self._grpc, self._stream, self.sealed = grpc, stream, sealed
        self.counts = Counts()
        self.why = ""

    async def read(self) -> bytes | None:
        """The next chunk; None: the stream is over, `why` says by what."""
        try:
            data = await self._stream.read()
        except Exception as problem:  # gRPC raises some ten classes here, its internal ones included; each means the end of the stream.
            self._over(problem)
            return None
        if not isinstance(data, bytes):
            self.why = self.why or "the other side ended the stream"
            return None
        self.counts.bytes_received += len(data) + PREFIX_BYTES
        return data

    async def write(self, data: bytes) -> bool:
        """Send a chunk once there is room for it; False: the stream is over."""
        try:
            await self._stream.write(data)
        except Exception as problem:  # as above
            self._over(problem)
            return False
        self.counts.bytes_sent += len(data) + PREFIX_BYTES
        return True

    def _over(self, problem: Exception) -> None:
        if not self.why:
            if isinstance(problem, self._grpc.aio.AioRpcError):
                self.why = f"{problem.code().name.lower()}: {problem.details()}"
            else:
                self.why = f"{type(problem).__name__}: {problem}"
