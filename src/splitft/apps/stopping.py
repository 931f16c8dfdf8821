"""How a long-lived command of a federation is stopped, and how it says where it hangs."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from splitft.clock import monotonic_s
from splitft.errors import Interrupted


class Stopped(Interrupted):
    """Stopped by SIGTERM, as a service manager does: nothing has gone wrong."""

    exit_code = 0


class Stopping:
    """Ctrl-C and SIGTERM. The first lets what is under way end within the grace time, the second ends the process at once.

    The handler only takes note: it may have interrupted whoever holds a lock that everything else here needs.
    """

    def __init__(self, grace_s: float, say: Callable[[str], None]) -> None:
        self.grace_s, self.say = grace_s, say
        self.asked_s: float | None = None
        self.number = 0
        self.on_ask: Callable[[], None] = lambda: None
        self._said = False

    @contextmanager
    def heard(self) -> Iterator[Stopping]:
        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked_s is not None:
                os._exit(128 + number)  # what is on the disk is whole at any moment
            self.asked_s, self.number = monotonic_s(), number

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether it was asked to stop; the first time this is seen, it is acknowledged."""
        if self.asked_s is None:
            return False
        if not self._said:
            self._said = True
            within = f" within {self.grace_s:g} s" if self.grace_s else ""
            self.say(f"stopping{within}; once more to stop at once")
            self.on_ask()
        return True

    def check(self) -> None:
        """Raise Interrupted when the grace time is over."""
        if self.asked() and self.asked_s is not None and monotonic_s() - self.asked_s >= self.grace_s:
            raise Interrupted("Stopped; everything up to the last finished round is on disk.", "start the same command again to go on.")

    def as_asked(self, stop: Interrupted) -> Interrupted:
        """The interruption with the exit code of the signal: 130 for Ctrl-C, 0 for SIGTERM."""
        return Stopped(stop.message, stop.remedy) if self.number == signal.SIGTERM else stop


def name_hangs() -> None:
    """SIGUSR1 prints where every thread stands."""
    if hasattr(signal, "SIGUSR1"):
        with suppress(ValueError, OSError, AttributeError, RuntimeError):
            faulthandler.register(signal.SIGUSR1, all_threads=True)
