"""Who waits for what: every blocking wait of a federation is listed here while it lasts, so that a hang names its cause."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from splitft.clock import monotonic_s


@dataclass(frozen=True)
class Wait:
    """One wait under way: for what, for whom (empty: nobody in particular), for how long so far."""

    what: str
    peer: str
    seconds: float


@dataclass
class Waits:
    """The waits of one process's side of a federation."""

    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _open: dict[int, tuple[str, str, float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def waiting(self, what: str, peer: str = "") -> Iterator[None]:
        """List the block below as a wait for `what` from `peer`."""
        with self._lock:
            number = next(self._numbers)
            self._open[number] = (what, peer, monotonic_s())
        try:
            yield
        finally:
            with self._lock:
                del self._open[number]

    def now(self) -> list[Wait]:
        """The waits under way, the longest first."""
        with self._lock:
            found, now_s = list(self._open.values()), monotonic_s()
        return sorted((Wait(what, peer, now_s - since_s) for what, peer, since_s in found), key=lambda one: -one.seconds)
