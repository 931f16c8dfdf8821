"""Files that must not be lost, torn or read by others: atomic writes, private folders, and a lock between processes."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from splitft.clock import monotonic_s
from splitft.errors import IdentityError, ResourceError

PRIVATE_FILE, PRIVATE_FOLDER, PUBLIC_FILE = 0o600, 0o700, 0o644
LOCK_POLL_S = 0.01
# What the system says where there is no room: the disk, the owner's share of it, or the largest file it may write.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, content: bytes, mode: int = PUBLIC_FILE) -> Path:
    """Write beside `path`, fsync, rename, fsync the folder: a reader sees the old file or the new one, never a half.

    The temporary file is private from its first byte on and is gone after a failure. Raises ResourceError (full, read-only, forbidden).
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.chmod(temporary, mode)
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as problem:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(problem, OSError):
            raise _unwritable(path, len(content), problem) from problem
        raise
    return path


def _unwritable(path: Path, size_bytes: int, problem: OSError) -> ResourceError:
    if problem.errno in NO_ROOM:
        text = f"storage is full: {path} needs {size_bytes} bytes, {_free_bytes(path.parent)} are free."
        return ResourceError(text, f"Free space where {path.parent} is.")
    return ResourceError(f"{path} cannot be written: {problem.strerror or problem}.", f"Check that {path.parent} exists and is writable.")


def shortage(problem: OSError, folder: Path, needed_bytes: int) -> str:
    """What a write into `folder` needed and what is free there, to be put behind a message; nothing where room is not the trouble."""
    return f"; about {needed_bytes} bytes are needed, {_free_bytes(folder)} are free" if problem.errno in NO_ROOM else ""


def _free_bytes(folder: Path) -> str:
    try:
        return str(shutil.disk_usage(folder).free)
    except OSError:
        return "an unknown number"


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_private(path: Path, content: bytes) -> Path:
    """`write_atomically`, readable by the owner alone."""
    return write_atomically(path, content, PRIVATE_FILE)


def private_folder(path: Path) -> Path:
    """Make `path` unless it is there; a new one is the owner's alone. Raises ResourceError."""
    try:
        path.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
    except OSError as problem:
        raise ResourceError(f"the folder {path} cannot be made: {problem.strerror}.", "Choose another folder.") from problem
    return path


def read_bounded(path: Path, limit_bytes: int, what: str) -> bytes:
    """The bytes of a small file called `what` in messages. Raises IdentityError if it is missing, unreadable or too large."""
    try:
        with path.open("rb") as stream:
            content = stream.read(limit_bytes + 1)
    except OSError as problem:
        raise IdentityError(
            f"{what} cannot be read at {path}: {problem.strerror}.", "Check the folder, or enrol (splitft enroll)."
        ) from problem
    if len(content) > limit_bytes:
        raise IdentityError(f"{what} at {path} is longer than {limit_bytes} bytes.", "It is another file: name the right one.")
    return content


def read_private(path: Path, limit_bytes: int, what: str) -> bytes:
    """`read_bounded` of a file nobody but its owner may read or write. Raises IdentityError naming the command that fixes it."""
    content = read_bounded(path, limit_bytes, what)
    if os.name == "posix" and (mode := path.stat().st_mode & 0o777) & 0o077:
        raise IdentityError(f"{what} {path} is open to other users (mode {mode:03o}).", f"Run: chmod 600 {path}")
    return content


@contextmanager
def locked(path: Path, timeout_s: float = 10.0) -> Iterator[None]:
    """Hold the lock file `path` against other processes and threads. Raises ResourceError after `timeout_s`.

    On Windows, where only clients run, it holds nobody off.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
    except OSError as problem:
        raise ResourceError(f"the lock {path} cannot be opened: {problem.strerror}.", f"Check {path.parent}.") from problem
    try:
        give_up_s, pause = monotonic_s() + timeout_s, threading.Event()
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if monotonic_s() > give_up_s:
                    raise ResourceError(
                        f"another process has held {path} for {timeout_s:g} s.", "Find it and wait for it or stop it."
                    ) from None
                pause.wait(LOCK_POLL_S)
        yield
    finally:
        os.close(handle)  # gives the lock back
