"""What this process holds of the machine: memory, descriptors, threads."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc/self")


def process_facts() -> dict[str, int | None]:
    """Resident memory, open descriptors and Python threads; None where the system does not say (it is read from /proc)."""
    rss_bytes = descriptors = None
    with suppress(OSError, ValueError, IndexError):
        rss_bytes = int((_PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):
        descriptors = len(os.listdir(_PROC / "fd"))
    return {"rss_bytes": rss_bytes, "descriptors": descriptors, "threads": threading.active_count()}
