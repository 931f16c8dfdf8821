"""A folder with one file per client."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from splitft.data import jsonl, text
from splitft.data.base import Document, Source
from splitft.data.files import SOURCE_BYTES, Budget, find_files
from splitft.data.records import RecordFields
from splitft.errors import DataError


@dataclass(frozen=True)
class ClientFolder(Source):
    """A folder with one file per client: .jsonl as in source "jsonl" with its usual field names, .txt by paragraphs.

    Both may be compressed (.gz). The owner of a document is its file's name without ending, so partition "files" gives every
    file to one client. `maximum_bytes` bounds what is read, after decompression.
    """

    name: ClassVar[str] = "folder"

    path: str
    maximum_bytes: int = SOURCE_BYTES

    def documents(self) -> Iterator[Document]:
        if Path(self.path).is_file():
            raise DataError(f"{self.path}: a file, but one folder with a file per client is needed.", 'Use source "text" or "jsonl".')
        budget = Budget(self.maximum_bytes)
        seen: dict[str, Path] = {}
        for file in find_files(self.path, text.ENDINGS + jsonl.ENDINGS):
            if file.owner in seen:
                raise DataError(f"{file.path}: the same client name as {seen[file.owner]}.", "Give every client's file its own name.")
            seen[file.owner] = file.path
            if file.path.name.removesuffix(".gz").endswith(jsonl.ENDINGS):
                yield from jsonl.json_documents(file, RecordFields(), budget)
            else:
                yield from text.text_documents(file, "paragraph", "", budget)
