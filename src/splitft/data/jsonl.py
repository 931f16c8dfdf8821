"""JSON lines as documents: plain text, prompt and completion, or chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from splitft.data.base import Document
from splitft.data.files import SOURCE_BYTES, Budget, DataFile, find_files, read_lines
from splitft.data.records import Form, Located, RecordFields
from splitft.errors import DataError

ENDINGS = (".jsonl", ".ndjson")


def parse_line(line: str, origin: str) -> dict[str, Any]:
    """One JSON object; DataError with the position otherwise."""
    remedy = "Every line must be one JSON object; a file that is one JSON list has to be rewritten, one record a line."
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: not valid JSON ({error.msg} at character {error.colno}).", remedy) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: JSON that cannot be read ({error}).", remedy) from None
    if not isinstance(record, dict):
        raise DataError(f"{origin}: a JSON {type(record).__name__}, not an object.", remedy)
    return record


def json_documents(file: DataFile, fields: RecordFields, budget: Budget) -> Iterator[Document]:
    """The records of one file as documents; its first record decides which form they have. Blank lines and texts are skipped."""
    form: Form | None = None
    empty = True
    for number, line in read_lines(file.path, budget):
        if not line.strip():
            continue
        origin = f"{file.path}:{number}"
        record = parse_line(line, origin)
        form = form or fields.form(record, origin)
        document = fields.document(record, form, origin, file.owner)
        if document is not None:
            empty = False
            yield document
    if empty:
        raise DataError(f"{file.path}: the file holds no record with text.", "Remove it or fill it.")


@dataclass(frozen=True)
class JsonLines(RecordFields, Located):
    """JSON lines (.jsonl, .ndjson, also with .gz), one record a line.

    The first record of each file tells its form: a list under `messages` (chat: loss on the assistant's answers), `prompt` and
    `completion` (loss on the completion), or `text`; the field names are yours to set. `joint` goes between prompt and
    completion where neither has white space, as context. `owner` names the field that tells whose record it is (default: the
    file). All scalar fields are kept as columns for partitions. `maximum_bytes` bounds what is read, after decompression.
    """

    name: ClassVar[str] = "jsonl"

    maximum_bytes: int = SOURCE_BYTES

    def documents(self) -> Iterator[Document]:
        budget = Budget(self.maximum_bytes)
        for file in find_files(self.path, ENDINGS):
            yield from json_documents(file, self, budget)
