"""A data set of the Hugging Face hub, or a local one that its library can open."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from splitft.data.base import Document
from splitft.data.records import Form, Located, RecordFields
from splitft.errors import DataError, MissingExtraError


@dataclass(frozen=True)
class HubDataset(RecordFields, Located):
    """A data set opened with the library `datasets` (extra "data"); the one source that may use the network.

    `path`, `config_name`, `split` and `revision` go to `load_dataset`. Fields and forms are those of source "jsonl". Code of the
    data set is never run.
    """

    name: ClassVar[str] = "hub"

    split: str = "train"
    config_name: str = ""
    revision: str = ""

    def documents(self) -> Iterator[Document]:
        form: Form | None = None
        empty = True
        for number, record in enumerate(self._load(), start=1):
            origin = f"{self.path}[{self.split}]:{number}"
            form = form or self.form(record, origin)
            document = self.document(record, form, origin, self.path)
            if document is not None:
                empty = False
                yield document
        if empty:
            raise DataError(f"{self.path}: split {self.split!r} holds no record with text.", "Choose another split or data set.")

    def _load(self) -> Any:
        try:
            datasets = importlib.import_module("datasets")
        except ImportError as error:
            raise MissingExtraError(
                "Data source 'hub' needs the package `datasets`, which is not installed.", 'Run: pip install "splitft[data]"'
            ) from error
        try:
            return datasets.load_dataset(self.path, self.config_name or None, split=self.split, revision=self.revision or None)
        except Exception as error:  # the library has no common error class: network, name, split and format all differ
            shown = f"{self.path} (config {self.config_name or 'default'}, split {self.split})"
            reason = (str(error).splitlines() or [""])[0]
            raise DataError(
                f"{shown}: cannot be opened: {type(error).__name__}: {reason}",
                'Check name, config, split and network, or download the data and use source "jsonl".',
            ) from error
