"""The documentation of the running Python itself: text that is on every machine, so a demonstration needs no download."""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

from splitft.data.base import Document, Segment, Source
from splitft.errors import ConfigError, DataError

# Tests hold no prose, the others bundled, generated or foreign code.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload", "_bundled"})
SKIPPED_FOLDERS |= {"lib2to3", "encodings", "turtledemo", "idlelib", "distutils"}
TOPICS = "pydoc_data/topics.py"


@dataclass(frozen=True)
class PythonDocs(Source):
    """Docstrings and language reference of the running Python's standard library (PSF licence), read from its source files.

    Nothing is imported or run, only parsed. A document is one docstring or one topic of `pydoc_data`, its owner the top-level
    module or package, so partition "files" gives natural clients. Docstrings shorter than `min_characters` are skipped, longer
    texts cut at `max_characters_per_document`. At most `max_documents` are taken: a quarter of them topics, the rest from
    modules in an order that is mixed but the same on every machine with the same Python; other versions give other texts.
    """

    name: ClassVar[str] = "python_docs"

    max_documents: int = 1000
    min_characters: int = 200
    max_characters_per_document: int = 8000

    def __post_init__(self) -> None:
        for field in ("max_documents", "min_characters", "max_characters_per_document"):
            if getattr(self, field) < 1:
                raise ConfigError(f"data.{field} is {getattr(self, field)}.", "Give a whole number of at least 1.")

    def documents(self) -> Iterator[Document]:
        root = Path(sysconfig.get_path("stdlib"))
        seen: set[str] = set()
        documents: list[Document] = []
        for path in _modules(root):
            topics = path == TOPICS
            limit = max(1, self.max_documents // 4) if topics else self.max_documents - len(documents)
            documents.extend(islice(self._of_module(root, path, seen), limit))
            if len(documents) >= self.max_documents:
                break
        if not documents:
            raise DataError(
                f"{root}: no documentation in the standard library's source files.",
                'This Python comes without sources or docstrings; use data source "text" with files of your own.',
            )
        yield from documents

    def _of_module(self, root: Path, path: str, seen: set[str]) -> Iterator[Document]:
        owner = path.split("/")[0].removesuffix(".py")
        for line, text in _texts(root, path):
            clean = inspect.cleandoc(text)[: self.max_characters_per_document].rstrip()
            if len(clean) >= self.min_characters and clean not in seen:
                seen.add(clean)
                yield Document((Segment(clean, trained=True),), owner=owner, columns={"module": owner}, origin=f"{path}:{line}")


def _modules(root: Path) -> list[str]:
    """Paths below `root`: the topics first, then all modules in the order of their names' digests, so that the first few
    hundred documents are not all from modules that begin with "a"."""
    paths: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith(("config-", "."))]
        below = Path(folder).relative_to(root)
        paths += [(below / name).as_posix() for name in files if name.endswith(".py")]
    return sorted(paths, key=lambda path: (path != TOPICS, hashlib.sha256(path.encode()).digest()))


def _texts(root: Path, path: str) -> Iterator[tuple[int, str]]:
    """(line, text) of the docstrings of one module in source order, or of the topics; an unreadable module gives none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes and `is` with literals in the library are not ours to report
            tree = ast.parse((root / path).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return
    if path == TOPICS:
        yield from _topics(tree)
        return
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield node.body[0].lineno, text
        # Only statements can hold definitions; expressions are most of the tree and are not walked.
        for field in ("finalbody", "orelse", "handlers", "body"):
            pending.extend(reversed(getattr(node, field, None) or []))


def _topics(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The values of the one dictionary of `pydoc_data.topics`."""
    for statement in tree.body:
        value = getattr(statement, "value", None)
        if isinstance(value, ast.Dict):
            for item in value.values:
                if isinstance(item, ast.Constant) and isinstance(item.value, str):
                    yield item.lineno, item.value
