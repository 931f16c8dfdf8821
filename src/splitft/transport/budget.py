"""How much memory unfinished and waiting messages may take: past it a reader waits, so that the sender does."""

from __future__ import annotations

import asyncio
from collections import deque


class Budget:
    """Bytes that many sessions share, first come, first served. A message larger than all of it is let in alone. For one event loop."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def contested(self) -> bool:
        """Whether somebody waits, or soon will."""
        return bool(self._waiting) or 2 * self.used_bytes > self.capacity_bytes

    def take(self, count: int) -> bool:
        """Take `count` bytes if they are there and nobody waits."""
        if self._waiting or not self._fits(count):
            return False
        self.used_bytes += count
        return True

    async def wait(self, count: int) -> None:
        """Take `count` bytes as soon as they are there."""
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (count, granted)
        self._waiting.append(entry)
        self._grant()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.give(count)
            elif entry in self._waiting:
                self._waiting.remove(entry)
                self._grant()
            raise

    def give(self, count: int) -> None:
        """Give `count` bytes back."""
        self.used_bytes -= count
        self._grant()

    def _fits(self, count: int) -> bool:
        return self.used_bytes == 0 or self.used_bytes + count <= self.capacity_bytes

    def _grant(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            count, granted = self._waiting.popleft()
            if not granted.cancelled():
                self.used_bytes += count
                granted.set_result(None)
