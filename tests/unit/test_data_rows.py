from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitft.data.base import Document, Segment, TokenRows


def make(*rows: list[int], untrained: int = 0) -> TokenRows:
    """Rows whose first `untrained` tokens are context."""
    return TokenRows.build([(np.array(row, np.int32), np.arange(len(row)) >= untrained) for row in rows])


def test_batch_pads_on_the_right_and_trains_no_padding() -> None:
    ids, lengths, trained = make([5, 6, 7], [8, 9], [1]).batch([1, 0])
    assert ids.tolist() == [[8, 9, 0], [5, 6, 7]]
    assert lengths.tolist() == [2, 3]
    assert trained.tolist() == [[True, True, False], [True, True, True]]
    assert [str(part.dtype) for part in (ids, lengths, trained)] == ["int64", "int64", "bool"]


def test_padding_at_the_end_of_the_storage_stays_inside_it() -> None:
    ids, _, trained = make([1, 2, 3], [9]).batch([0, 1])
    assert ids[1].tolist() == [9, 0, 0]
    assert trained[1].tolist() == [True, False, False]


def test_targets_leave_out_the_first_token_of_each_row() -> None:
    rows = make([1, 2, 3], [4, 5])
    assert (rows.tokens, rows.target_tokens) == (5, 3)
    assert make([1, 2, 3], untrained=2).target_tokens == 1


def test_no_rows_are_fine() -> None:
    rows = TokenRows.build([])
    assert (len(rows), rows.tokens, rows.target_tokens, rows.lengths.tolist()) == (0, 0, 0, [])
    assert rows.batch([])[0].shape == (0, 0)
    assert len(TokenRows.concatenate([])) == 0
    assert len(make([1, 2]).select([])) == 0


def test_a_row_that_is_not_there_is_refused() -> None:
    with pytest.raises(IndexError):
        make([1, 2]).batch([1])


def test_empty_rows_and_wrong_types_are_refused() -> None:
    with pytest.raises(AssertionError, match="no row is empty"):
        TokenRows(np.zeros(1, np.int32), np.ones(1, np.bool_), np.array([0, 0, 1]))
    with pytest.raises(AssertionError, match="int64"):
        TokenRows(np.zeros(1, np.int64), np.ones(1, np.bool_), np.array([0, 1]))


def test_concatenate_adds_the_counts() -> None:
    parts = [TokenRows.build([(np.ones(2, np.int32), np.ones(2, np.bool_))], truncated=k, dropped_tokens=10 * k) for k in (1, 2)]
    whole = TokenRows.concatenate(parts)
    assert (len(whole), whole.truncated, whole.dropped_tokens) == (2, 3, 30)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=5), min_size=1, max_size=6), st.data())
def test_select_batch_and_concatenate_agree_with_lists(lists: list[list[int]], data: st.DataObject) -> None:
    rows = make(*lists)
    chosen = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=6))
    selected = rows.select(chosen)
    wanted = [lists[index] for index in chosen]
    assert [selected.ids[a:b].tolist() for a, b in zip(selected.offsets[:-1], selected.offsets[1:], strict=True)] == wanted
    ids, lengths, _ = rows.batch(chosen)
    assert [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)] == wanted
    twice = TokenRows.concatenate([rows, selected])
    assert twice.ids.tolist() == [token for row in lists + wanted for token in row]
    assert twice.lengths.tolist() == [len(row) for row in lists + wanted]


def test_digest_is_of_the_content_alone() -> None:
    one = Document((Segment("ab", True),), owner="x", columns={"a": "1"}, origin="f:1")
    assert one.digest() == Document((Segment("ab", True),), owner="y", origin="g:2").digest()
    others = [
        Document((Segment("ab", False),)),
        Document((Segment("a", True), Segment("b", True))),
        Document((), ({"role": "user", "content": "ab"},)),
        Document((), ({"role": "assistant", "content": "ab"},)),
    ]
    assert len({one.digest(), *(other.digest() for other in others)}) == 5
