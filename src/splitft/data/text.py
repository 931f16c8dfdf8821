"""Plain text files as documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from splitft.data.base import Document, Segment, Source
from splitft.data.files import SOURCE_BYTES, Budget, DataFile, find_files, read_lines, read_text
from splitft.errors import ConfigError, DataError

Split = Literal["file", "line", "paragraph", "separator"]
ENDINGS = (".txt", ".text", ".md", ".rst")


def text_pieces(file: DataFile, split: Split, separator: str, budget: Budget) -> Iterator[tuple[int, str]]:
    """(first line, text) of the pieces of one file that are not blank."""
    if split in ("file", "separator"):
        whole, line = read_text(file.path, budget), 1
        for piece in whole.split(separator) if split == "separator" else (whole,):
            if piece.strip():
                blank = piece[: len(piece) - len(piece.lstrip())]
                yield line + blank.count("\n"), piece
            line += piece.count("\n") + separator.count("\n")
        return
    gathered: list[str] = []
    first = 1
    for number, text in read_lines(file.path, budget):
        if split == "line":
            if text.strip():
                yield number, text
        elif text.strip():
            first = first if gathered else number
            gathered.append(text)
        elif gathered:
            yield first, "\n".join(gathered)
            gathered = []
    if gathered:
        yield first, "\n".join(gathered)


def text_documents(file: DataFile, split: Split, separator: str, budget: Budget) -> Iterator[Document]:
    """The pieces of one file as documents owned by the file; DataError if it holds no text."""
    empty = True
    for line, text in text_pieces(file, split, separator, budget):
        empty = False
        yield Document((Segment(text, trained=True),), owner=file.owner, columns={"file": file.owner}, origin=f"{file.path}:{line}")
    if empty:
        raise DataError(f"{file.path}: the file holds no text.", "Remove it or fill it.")


@dataclass(frozen=True)
class TextFiles(Source):
    """Plain UTF-8 text, also compressed (.gz).

    `path` is a file, a folder (all .txt, .text, .md and .rst files below it) or a pattern. `split` says what a document is:
    "file", "line", "paragraph" (separated by blank lines) or "separator" (the text between two `separator`s). Blank pieces
    are skipped. A document's owner is its file. `maximum_bytes` bounds what is read, after decompression.
    """

    name: ClassVar[str] = "text"

    path: str
    split: Split = "paragraph"
    separator: str = ""
    maximum_bytes: int = SOURCE_BYTES

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise ConfigError(f"data.split is {self.split!r}.", f"Choose one of {', '.join(get_args(Split))}.")
        if (self.split == "separator") != bool(self.separator):
            raise ConfigError(
                f"data.split is {self.split!r} and data.separator is {self.separator!r}.",
                'Set `separator` to the text between documents together with split = "separator", and leave it out otherwise.',
            )

    def documents(self) -> Iterator[Document]:
        budget = Budget(self.maximum_bytes)
        for file in find_files(self.path, ENDINGS):
            yield from text_documents(file, self.split, self.separator, budget)
