from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from splitft.data.base import Document
from splitft.data.folder import ClientFolder
from splitft.data.text import Split, TextFiles
from splitft.errors import ConfigError, DataError

TEXT = "\nfirst line\nsecond\n\n \n\nthird\n---\nfourth\n"


def texts(documents: list[Document]) -> list[str]:
    return [document.segments[0].text for document in documents]


@pytest.mark.parametrize(
    ("split", "separator", "wanted", "first_lines"),
    [
        ("file", "", [TEXT], [2]),
        ("line", "", ["first line", "second", "third", "---", "fourth"], [2, 3, 7, 8, 9]),
        ("paragraph", "", ["first line\nsecond", "third\n---\nfourth"], [2, 7]),
        ("separator", "\n---\n", ["\nfirst line\nsecond\n\n \n\nthird", "fourth\n"], [2, 9]),
    ],
)
def test_splits(tmp_path: Path, split: Split, separator: str, wanted: list[str], first_lines: list[int]) -> None:
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    documents = list(TextFiles(str(path), split, separator).documents())
    assert texts(documents) == wanted
    assert [document.origin for document in documents] == [f"{path}:{line}" for line in first_lines]
    assert {document.owner for document in documents} == {"a"}
    assert all(segment.trained for document in documents for segment in document.segments)


def test_a_folder_of_compressed_and_plain_files(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one"))
    documents = list(TextFiles(str(tmp_path)).documents())
    assert [(document.owner, text) for document, text in zip(documents, texts(documents), strict=True)] == [("a", "one"), ("b", "two")]


@pytest.mark.parametrize("content", ["", " \n\n"])
@pytest.mark.parametrize("split", ["file", "line", "paragraph"])
def test_a_file_without_text_is_refused(tmp_path: Path, content: str, split: Split) -> None:
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(DataError, match=r"empty\.txt: the file holds no text\. Remove"):
        list(TextFiles(str(tmp_path), split).documents())


def test_the_limit_is_over_the_whole_source(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("12345")
    with pytest.raises(DataError, match=r"c\.txt: the data are larger than 12 bytes"):
        list(TextFiles(str(tmp_path), maximum_bytes=12).documents())


@pytest.mark.parametrize(("split", "separator"), [("word", ""), ("separator", ""), ("line", "---")])
def test_fields_that_make_no_sense(split: Split, separator: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.split is"):
        TextFiles("x", split, separator)


def test_client_folder_owns_by_file(tmp_path: Path) -> None:
    (tmp_path / "ann.txt").write_text("a\n\nb")
    (tmp_path / "bob.jsonl").write_text('{"text": "c"}\n')
    (tmp_path / "cat.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "q", "completion": "d"}'))
    documents = list(ClientFolder(str(tmp_path)).documents())
    assert [(document.owner, document.segments[-1].text) for document in documents] == [
        ("ann", "a"),
        ("ann", "b"),
        ("bob", "c"),
        ("cat", "d"),
    ]


def test_client_folder_refuses_a_file_and_two_files_of_one_client(tmp_path: Path) -> None:
    (tmp_path / "ann.txt").write_text("a")
    with pytest.raises(DataError, match="one folder with a file per client"):
        list(ClientFolder(str(tmp_path / "ann.txt")).documents())
    (tmp_path / "ann.jsonl").write_text('{"text": "c"}\n')
    with pytest.raises(DataError, match=r"same client name as .*ann\.jsonl"):
        list(ClientFolder(str(tmp_path)).documents())


def test_client_folder_without_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file in this folder ends in .*it holds: nothing"):
        list(ClientFolder(str(tmp_path)).documents())
