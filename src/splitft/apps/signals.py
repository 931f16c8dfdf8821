"""Ctrl-C and SIGTERM as a question a loop can ask, so that work stops between two steps and not in the middle of one."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType


@contextmanager
def asked_to_stop(acknowledge: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Yields "was it asked?". The first signal is acknowledged, the second one raises KeyboardInterrupt; afterwards all is as before."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        acknowledge()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
