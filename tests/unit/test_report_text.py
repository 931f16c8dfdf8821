"""Numbers and names as people read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitft.apps import report_text as text


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (1536, "1.54 kB"), (105_300_000, "105 MB"), (2.5e12, "2.50 TB"), (12.25, "12.2 B")],
)
def test_bytes_text(value: float, expected: str) -> None:
    assert text.bytes_text(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0 s"),
        (0.0081, "8.10 ms"),
        (12.34, "12.3 s"),
        (59.97, "1 min 00 s"),
        (171, "2 min 51 s"),
        (4320, "1 h 12 min"),
        (273_600, "3 d 4 h"),
    ],
)
def test_seconds_text(value: float, expected: str) -> None:
    assert text.seconds_text(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "—"), (math.nan, "—"), (math.inf, "—"), (0, "0"), (12345.6, "12,346"), (0.012345, "0.0123"), (1e20, "1.00e+20")],
)
def test_number_text(value: float | None, expected: str) -> None:
    assert text.number_text(value) == expected


def test_change_has_a_real_minus_and_never_divides_by_zero() -> None:
    assert text.change_text(40.0, 30.0) == "−25 %"
    assert text.change_text(40.0, 41.0) == "+2.5 %"
    assert text.change_text(0.0, 1.0) == text.change_text(None, 1.0) == text.change_text(math.inf, 1.0) == "—"


def test_counts_and_plurals_and_moments() -> None:
    assert [text.count_text(value) for value in (12345, 3_412_480, 7e9)] == ["12,345", "3.41 M", "7.00 G"]
    assert [text.plural(count, "round") for count in (0, 1, 2000)] == ["0 rounds", "1 round", "2,000 rounds"]
    assert text.utc_text("2026-04-01T09:30:00+00:00") == "2026-04-01 09:30:00 UTC"
    assert [text.percent_text(value) for value in (0.0, 0.051, 0.5, None)] == ["0 %", "5.1 %", "50 %", "—"]


@given(st.text())
def test_escaped_text_has_nothing_a_parser_acts_on(value: str) -> None:
    escaped = text.escape(value)
    assert not set(escaped) & set("<>\"'\n\r\t\x1b\x00\u202e")


@given(st.text(), st.integers(min_value=3, max_value=40))
def test_shortened_text_fits_and_keeps_both_ends(value: str, limit: int) -> None:
    short = text.shorten(value, limit)
    assert len(short) <= limit
    if len(value) > limit:
        assert short[0] == text.clean(value)[0]
        assert short[-1] == text.clean(value)[-1]


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_every_number_has_a_text(value: float) -> None:
    for render in (text.number_text, text.percent_text):
        assert render(value)
    if not value < 0:
        assert text.bytes_text(value)
        assert text.seconds_text(value)
