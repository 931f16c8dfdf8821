"""Finding and reading data files within fixed limits. Every failure is a DataError with file, line and remedy."""

from __future__ import annotations

import codecs
import difflib
import glob
import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple, cast

from splitft.errors import DataError

LINE_BYTES = 64 * 2**20
SOURCE_BYTES = 2**30
_CHUNK_BYTES = 2**20
_SEE_LIMIT = "Raise `maximum_bytes` of the data source if this is meant, or use less data."


class DataFile(NamedTuple):
    """A file of a source. `owner` is its path below the source's folder without endings."""

    path: Path
    owner: str


class Budget:
    """Counts (decompressed) bytes over all files of one source and refuses before the limit is passed, so that a small
    compressed file cannot fill the memory."""

    def __init__(self, maximum_bytes: int) -> None:
        self.maximum_bytes = maximum_bytes
        self.used_bytes = 0

    def take(self, count: int, path: Path) -> None:
        self.used_bytes += count
        if self.used_bytes > self.maximum_bytes:
            raise DataError(f"{path}: the data are larger than {self.maximum_bytes} bytes when read.", _SEE_LIMIT)


def _missing(path: Path) -> DataError:
    """Which part of the path is missing, and the nearest name that exists."""
    known = path
    while not known.exists() and known != known.parent:
        known = known.parent
    rest = path.parts[len(known.parts) :]
    wanted = rest[0] if rest else path.name
    if not known.is_dir():
        return DataError(f"{path}: no such file; {known} is not a folder.", "Correct the path.")
    names = _listing(known)
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(str(known / name) for name in near)}?" if near else f"{known} holds: {_some(names)}."
    return DataError(f"{path}: no such file or folder ({wanted!r} is not in {known}).", hint)


def _listing(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:  # only used to help; the error at hand says what failed
        return []


def _some(names: Sequence[str]) -> str:
    """At most eight names for an error message."""
    shown = ", ".join(names[:8]) or "nothing"
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown


def stem(name: str) -> str:
    """File name without its ending, and without .gz before that."""
    return Path(name.removesuffix(".gz")).stem


def find_files(path: str, endings: tuple[str, ...]) -> list[DataFile]:
    """The files behind `path`, sorted: itself, all files below a folder with one of the `endings` (also .gz), or a glob's matches.

    Hidden files are skipped in folders. DataError if there is none.
    """
    if not path:
        raise DataError("The data source has an empty path.", "Set `path` to a file, a folder or a pattern such as data/*.txt.")
    start = Path(path)
    if start.is_dir():
        found = [item for item in start.rglob("*") if item.is_file() and item.name.removesuffix(".gz").endswith(endings)]
        found = [item for item in found if not any(part.startswith(".") for part in item.relative_to(start).parts)]
        if not found:
            names = _some(_listing(start))
            raise DataError(
                f"{path}: no file in this folder ends in {', '.join(endings)} (or these with .gz); it holds: {names}.",
                "Point `path` at the right folder, name one file, or use a pattern such as folder/*.log.",
            )
        return _with_owners(found, start)
    if start.exists():
        return [DataFile(start, stem(start.name))]
    if glob.has_magic(path):
        found = [Path(item) for item in glob.glob(path, recursive=True) if Path(item).is_file()]
        if not found:
            raise DataError(f"{path}: no file matches this pattern.", "Correct the pattern; ** matches folders of any depth.")
        return _with_owners(found, Path(os.path.commonpath([item.parent for item in found])))
    raise _missing(start)


def _with_owners(paths: Sequence[Path], root: Path) -> list[DataFile]:
    ordered = sorted(set(paths), key=lambda item: item.as_posix())
    return [DataFile(item, (item.relative_to(root).parent / stem(item.name)).as_posix()) for item in ordered]


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _failure(path: Path, error: Exception, place: str) -> DataError:
    if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
        return DataError(f"{path}: the compressed data are damaged or cut short {place} ({error}).", "Fetch or write the file again.")
    return DataError(f"{path}: cannot be read {place} ({error}).", "Check that it is a file you may read.")


def _decode(data: bytes, path: Path, first_line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line}: not valid UTF-8 (byte 0x{data[error.start]:02x}).",
            "Convert the file to UTF-8, for example with iconv; a compressed file must end in .gz.",
        ) from None


def read_lines(path: Path, budget: Budget) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of a text file, plain or .gz; a byte order mark is dropped.

    A line longer than LINE_BYTES is refused before it is held whole. DataError on anything unreadable.
    """
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(LINE_BYTES + 1):
                number += 1
                if len(line) > LINE_BYTES:
                    raise DataError(f"{path}:{number}: the line is longer than {LINE_BYTES} bytes.", "Break the text into lines.")
                budget.take(len(line), path)
                text = _decode(line, path, number)
                yield number, (text.removeprefix("\ufeff") if number == 1 else text).rstrip("\r\n")
    except (OSError, EOFError, zlib.error) as error:
        raise _failure(path, error, f"after line {number}") from error


def read_text(path: Path, budget: Budget) -> str:
    """The whole text of a file, plain or .gz, line ends as \\n. DataError on anything unreadable."""
    chunks: list[bytes] = []
    try:
        with _open(path) as file:
            while chunk := file.read(_CHUNK_BYTES):
                budget.take(len(chunk), path)
                chunks.append(chunk)
    except (OSError, EOFError, zlib.error) as error:
        raise _failure(path, error, f"after {sum(map(len, chunks))} bytes") from error
    data = b"".join(chunks).removeprefix(codecs.BOM_UTF8)
    return _decode(data, path, 1).replace("\r\n", "\n")
