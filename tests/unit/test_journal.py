"""engine/journal.py: appended lines read back exactly, a torn tail is cut off, a journal that lost committed bytes is refused."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitft.engine.journal import NAME, Journal, finite
from splitft.errors import CheckpointError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / NAME).read_text("utf-8").splitlines()]


def test_events_are_lines_in_order_and_bytes_is_the_length(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"event": "a", "x": 0.1}, {"event": "b", "text": "Zeile\nzwei ü"})
    journal.append({"event": "c", "nested": {"list": [1, 2.5, None]}})
    assert read(tmp_path) == [
        {"event": "a", "x": 0.1},
        {"event": "b", "text": "Zeile\nzwei ü"},
        {"event": "c", "nested": {"list": [1, 2.5, None]}},
    ]
    assert journal.bytes == (tmp_path / NAME).stat().st_size


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_read_back_exactly(number: float) -> None:
    assert json.loads(json.dumps(finite(number))) == number


@given(VALUES)
def test_what_is_not_finite_becomes_null_and_nothing_else_changes(value: Any) -> None:
    clean = finite(value)
    json.dumps(clean, allow_nan=False)

    def same(before: Any, after: Any) -> bool:
        if isinstance(before, float) and not math.isfinite(before):
            return after is None
        if isinstance(before, dict):
            return set(before) == set(after) and all(same(before[key], after[key]) for key in before)
        if isinstance(before, list):
            return len(before) == len(after) and all(map(same, before, after))
        return bool(before == after)

    assert same(value, clean)


@pytest.mark.parametrize("torn", [b'{"event": "half', b"\x00" * 100, b'{"event": "whole but not committed"}\n', b"\xff\xfe"])
def test_what_a_crash_left_behind_the_committed_bytes_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    journal = Journal(tmp_path)
    journal.append({"event": "kept"})
    committed = journal.bytes
    with (tmp_path / NAME).open("ab") as file:
        file.write(torn)
    resumed = Journal(tmp_path, committed)
    assert read(tmp_path) == [{"event": "kept"}]
    resumed.append({"event": "next"})
    assert read(tmp_path) == [{"event": "kept"}, {"event": "next"}]
    assert resumed.bytes == (tmp_path / NAME).stat().st_size


def test_a_journal_shorter_than_its_checkpoint_says_is_refused_and_left_alone(tmp_path: Path) -> None:
    Journal(tmp_path).append({"event": "a"})
    before = (tmp_path / NAME).read_bytes()
    with pytest.raises(CheckpointError, match=f"has {len(before)} bytes, the checkpoint was made at {len(before) + 1}") as caught:
        Journal(tmp_path, len(before) + 1)
    assert str(tmp_path / NAME) in str(caught.value)
    assert (tmp_path / NAME).read_bytes() == before


def test_events_are_forced_to_the_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    journal = Journal(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size) or real(handle))
    journal.append({"event": "a"})
    assert synced == [journal.bytes]


def test_a_fresh_journal_begins_empty_even_where_bytes_lie(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("left over\n")
    assert Journal(tmp_path).bytes == 0
    assert read(tmp_path) == []
