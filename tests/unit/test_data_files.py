from __future__ import annotations

import gzip
import io
import re
from pathlib import Path

import pytest

from splitft.data import files
from splitft.data.files import Budget, find_files, read_lines, read_text, stem
from splitft.errors import DataError

BUDGET_BYTES = 10_000_000


def lines(path: Path) -> list[tuple[int, str]]:
    return list(read_lines(path, Budget(BUDGET_BYTES)))


def test_lines_of_plain_and_compressed_files(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    data = "\ufeffone\r\ntwo é\n\nlast".encode()
    plain.write_bytes(data)
    packed.write_bytes(gzip.compress(data))
    assert lines(plain) == lines(packed) == [(1, "one"), (2, "two é"), (3, ""), (4, "last")]
    assert read_text(plain, Budget(100)) == read_text(packed, Budget(100)) == "one\ntwo é\n\nlast"


def test_the_nearest_existing_name_is_offered(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.txt").touch()
    with pytest.raises(DataError, match=r"no such file or folder \('tran.txt'.*Did you mean .*corpus/train.txt\?"):
        find_files(str(tmp_path / "corpus" / "tran.txt"), (".txt",))
    with pytest.raises(DataError, match=r"'corpsu' is not in .*Did you mean .*corpus\?"):
        find_files(str(tmp_path / "corpsu" / "train.txt"), (".txt",))
    with pytest.raises(DataError, match=r"holds: train.txt\."):
        find_files(str(tmp_path / "corpus" / "zzz"), (".txt",))
    with pytest.raises(DataError, match="is not a folder"):
        find_files(str(tmp_path / "corpus" / "train.txt" / "x"), (".txt",))


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(DataError, match="empty path"):
        find_files("", (".txt",))


def test_folders_are_searched_below_and_sorted_and_owned(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt.gz", "sub/b.txt", ".hidden/c.txt", "d.bin", "sub/.e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [file.owner for file in find_files(str(tmp_path), (".txt",))] == ["a", "b", "sub/b"]
    assert [file.owner for file in find_files(str(tmp_path / "*.txt"), (".txt",))] == ["b"]
    assert [file.owner for file in find_files(str(tmp_path / "**/*.txt"), (".txt",))] == ["b", "sub/b"]
    assert [file.owner for file in find_files(str(tmp_path / "d.bin"), (".txt",))] == ["d"]


def test_a_folder_or_pattern_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.pdf").touch()
    with pytest.raises(DataError, match=r"no file in this folder ends in \.txt.*it holds: notes\.pdf"):
        find_files(str(tmp_path), (".txt",))
    with pytest.raises(DataError, match="no file matches"):
        find_files(str(tmp_path / "*.txt"), (".txt",))


def test_invalid_utf8_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"fine\nfine\ncaf\xe9\n")
    for read in (lines, lambda path: read_text(path, Budget(100))):
        with pytest.raises(DataError, match=r"latin\.txt:3: not valid UTF-8 \(byte 0xe9\)\. Convert"):
            read(path)


def test_truncated_damaged_and_false_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    data = gzip.compress("".join(f"{number}\n" for number in range(2000)).encode())
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 0xFF
    for bad in (data[: len(data) // 2], bytes(damaged), b"plain text", data + b"tail"):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"a\.txt\.gz: the compressed data are damaged or cut short after line \d+"):
            lines(path)
        with pytest.raises(DataError, match=r"damaged or cut short after \d+ bytes"):
            read_text(path, Budget(BUDGET_BYTES))


def test_a_folder_where_a_file_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read after line 0"):
        lines(tmp_path)


def test_a_compressed_bomb_is_refused_before_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "bomb.txt.gz"
    path.write_bytes(gzip.compress(b"x\n" * 1_500_000))
    budget = Budget(1_000_000)
    with pytest.raises(DataError, match="larger than 1000000 bytes"):
        read_text(path, budget)
    assert budget.used_bytes < 3_000_000
    with pytest.raises(DataError, match=r"larger than 1000000 bytes.*maximum_bytes"):
        list(read_lines(path, Budget(1_000_000)))


def test_the_budget_is_over_all_files(tmp_path: Path) -> None:
    budget = Budget(10)
    (tmp_path / "a").write_text("12345678")
    assert read_text(tmp_path / "a", budget) == "12345678"
    with pytest.raises(DataError, match="larger than 10 bytes"):
        read_text(tmp_path / "a", budget)


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Careful(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            assert 0 < size <= 101, "the line must not be held whole to be measured"
            return super().readline(size)

    monkeypatch.setattr(files, "LINE_BYTES", 100)
    monkeypatch.setattr(files, "_open", lambda path: Careful(path.read_bytes()))
    path = tmp_path / "long.txt"
    path.write_bytes(b"a" * 99 + b"\n" + b"b" * 101)
    with pytest.raises(DataError, match=re.escape("long.txt:2: the line is longer than 100 bytes")):
        lines(path)


@pytest.mark.parametrize(("name", "wanted"), [("a.txt", "a"), ("a.v1.jsonl.gz", "a.v1"), ("plain", "plain")])
def test_stem(name: str, wanted: str) -> None:
    assert stem(name) == wanted
