"""What surrounds a command: the process's environment before torch is imported, and errors as people read them.

The only place that sets environment variables. Importing this module imports neither torch nor rich.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from splitft.errors import ConfigError, Interrupted, ResourceError, SplitftError

if TYPE_CHECKING:
    from rich.console import Console

UNEXPECTED_EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")


class Threads(NamedTuple):
    """Threads a process computes with, and who decided: "configuration", "OMP_NUM_THREADS" or "cores"."""

    number: int
    source: str

    def describe(self) -> str:
        return f"{self.number} thread{'s' if self.number != 1 else ''} (by {self.source})"


def usable_cores(quota_file: Path = _QUOTA_FILE) -> int:
    """Cores this process may use: its affinity, and a container's quota where there is one (Linux control groups, version 2)."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    try:
        quota, period = quota_file.read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def choose_threads(configured: int = 0) -> Threads:
    """The thread count: the configuration's if it names one, else the user's OMP_NUM_THREADS, else the cores."""
    if configured > 0:
        return Threads(configured, "configuration")
    wished = os.environ.get("OMP_NUM_THREADS", "")
    if wished.isdigit() and int(wished) > 0:
        return Threads(int(wished), "OMP_NUM_THREADS")
    return Threads(usable_cores(), "cores")


# mallopt's numbers for: blocks from this size are mapped one by one; the heap's free end is given back from this size; it grows by this.
MAPPED_FROM, TRIMMED_FROM, GROWN_BY = -3, -1, -2


def prepare_process(configured_threads: int = 0) -> Threads:
    """Set the environment that torch and the Hugging Face libraries read when they are imported. Call it before importing them.

    Waiting threads spin for some ten microseconds and then sleep (OMP_WAIT_POLICY, GOMP_SPINCOUNT). Spinning for long, the default, makes
    two processes on the same cores take three times as long as sleeping at once does; sleeping at once makes one alone take 1.7 times as
    long. What the user has set stays, except the thread count where the configuration names one.
    """
    threads = choose_threads(configured_threads)
    os.environ["OMP_NUM_THREADS"] = str(threads.number)
    waiting = {} if "OMP_WAIT_POLICY" in os.environ else {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
    for name, value in {
        **waiting,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what CUDA needs for repeatable matrix products
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "GRPC_VERBOSITY": "ERROR",  # else it reports every connection that ends
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }.items():
        os.environ.setdefault(name, value)
    keep_memory()
    return threads


def keep_memory() -> None:
    """Let glibc keep what a step frees for the next one. By default it gives large blocks back to the system at once, and every pass pays
    for fresh pages again: a tenth to a sixth of a step. Other C libraries, and settings of the user's, stay as they are."""
    if any(name.startswith("MALLOC_") for name in os.environ) or "LD_PRELOAD" in os.environ or not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        tune = ctypes.CDLL("libc.so.6").mallopt
        for option, limit in ((MAPPED_FROM, 32 << 20), (TRIMMED_FROM, (1 << 31) - 1), (GROWN_BY, 64 << 20)):
            tune(option, limit)


@contextmanager
def starting(freeze: bool = False) -> Iterator[None]:
    """Collect no garbage meanwhile: imports and data make hundreds of thousands of objects and nearly all stay, so that every collection
    walks them in vain. That was a third of the time to the first step.

    `freeze`: leave what was made out of later collections as well; for a process that is ours alone.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if freeze:
            gc.freeze()
        if collecting:
            gc.enable()


def error_console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def known_fault(error: BaseException) -> SplitftError | None:
    """`error` itself if it is ours, or ours in place of a lack of memory or disk space; None for what nobody foresaw."""
    if isinstance(error, SplitftError):
        return error
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        detail = f" ({str(error).splitlines()[0]})" if str(error) else ""
        return ResourceError(
            f"There is not enough memory{detail}.",
            "Lower train.batch_size, tokens.block_tokens or engine.cohort_size, or set model.gradient_checkpointing = true.",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" at {error.filename}" if error.filename else ""
        return ResourceError(f"The disk is full{where}.", "Free some space, or set run.folder to another disk; the run can be resumed.")
    return None


def show_fault(error: SplitftError, console: Console | None = None) -> int:
    """Print what was wrong and what to do next; returns the exit code. Texts are shown as they are, never read as markup."""
    from rich.panel import Panel
    from rich.text import Text

    console = console or error_console()
    paused = isinstance(error, Interrupted)
    body = Text(error.message, style="bold")
    for problem in error.problems if isinstance(error, ConfigError) else ():
        body.append(f"\n  • {problem}", style="not bold")
    if error.remedy:
        body.append(f"\n→ {error.remedy}", style="not bold")
    colour = "yellow" if paused else "red"
    title = f"{type(error).__name__}, exit code {error.exit_code}"
    if console.is_terminal:
        console.print(Panel(body, title=Text(title), title_align="left", border_style=colour))
    else:
        console.print(Text(f"{title}: ") + body, soft_wrap=True)
    return error.exit_code


def show_unexpected(error: BaseException, arguments: list[str], console: Console | None = None) -> int:
    """Print that splitft itself failed and how to see where; returns the exit code."""
    from rich.text import Text

    console = console or error_console()
    console.print(Text(f"Unexpected {type(error).__name__}: {error}", style="bold red"), soft_wrap=True)
    command = " ".join(["splitft", "--debug", *arguments])
    console.print(Text(f"→ This is a fault of splitft. For the traceback: {command}"), soft_wrap=True)
    return UNEXPECTED_EXIT_CODE
