"""What surrounds a command: the process's environment before torch is imported, and errors as people read them.

The only place that sets environment variables. Importing this module imports neither torch nor rich.
"""

from __future__ import annotations

import errno
import math
import os
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


def prepare_process(configured_threads: int = 0) -> Threads:
    """Set the environment that torch and the Hugging Face libraries read when they are imported. Call it before importing them.

    Waiting threads sleep instead of spinning (OMP_WAIT_POLICY): as soon as two processes compute on the same cores, spinning costs
    more than it saves. What the user has set stays, except the thread count where the configuration names one.
    """
    threads = choose_threads(configured_threads)
    os.environ["OMP_NUM_THREADS"] = str(threads.number)
    for name, value in {
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what CUDA needs for repeatable matrix products
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }.items():
        os.environ.setdefault(name, value)
    return threads


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
