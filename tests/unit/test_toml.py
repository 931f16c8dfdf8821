"""toml.py: what is written reads back equal, faults name their place, overrides are TOML where they can be."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitft.errors import ConfigError
from splitft.toml import MAX_FILE_BYTES, format_value, nearest, parse_value, read_toml, write_toml

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SCALARS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXTS
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=12
)


@given(st.dictionaries(TEXTS, VALUES, max_size=4))
def test_written_values_read_back_equal(values: dict[str, Any]) -> None:
    assert tomllib.loads(write_toml(values)) == values


@given(VALUES)
def test_a_written_value_parses_as_an_override(value: Any) -> None:
    assert parse_value(format_value(value)) == value


def test_floats_keep_their_value_and_kind() -> None:
    numbers = [1e-5, 1e16, -0.0, 3.0, math.inf, -math.inf]
    back = tomllib.loads(write_toml({"numbers": numbers}))["numbers"]
    assert [(repr(number), type(number)) for number in back] == [(repr(number), float) for number in numbers]
    assert math.isnan(tomllib.loads(write_toml({"number": math.nan}))["number"])


def test_plain_keys_come_before_tables() -> None:
    assert write_toml({"table": {"inner": {"x": 1}}, "plain": 2}) == "plain = 2\n\n[table.inner]\nx = 1\n"


def test_value_without_a_place_in_toml_is_refused() -> None:
    with pytest.raises(TypeError, match="NoneType None"):
        format_value(None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("[2, 3]", [2, 3]),
        ("true", True),
        ('"8"', "8"),
        ("first", "first"),
        ("", ""),
        ("[2,", "[2,"),
        ("1\nother = 2", "1\nother = 2"),
        ("2024-01-01", "2024-01-01"),
        ("{name = 'x'}", {"name": "x"}),
    ],
)
def test_override_values(text: str, value: object) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "place", "line"),
    [
        ("a = 1\n[train\nb = 2\n", ":2:7: ", "[train"),
        ("a = 1\n\n\nname = first\n", ":4:8: ", "name = first"),
        ("a = [1,\n2", ":2:", "2"),
        ("a = 1\na = 2\n", ":2:", "a = 2"),
    ],
)
def test_syntax_error_names_file_and_line(tmp_path: Path, text: str, place: str, line: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_toml(file)
    assert f"{file}{place}" in caught.value.message
    assert repr(line) in caught.value.remedy


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "experiment.toml").write_text("")
    with pytest.raises(ConfigError, match=r"Did you mean .*experiment\.toml"):
        read_toml(tmp_path / "experimnt.toml")
    with pytest.raises(ConfigError, match=r"Files there: experiment\.toml"):
        read_toml(tmp_path / "zzz")
    with pytest.raises(ConfigError, match="There is no folder"):
        read_toml(tmp_path / "nowhere" / "x.toml")
    with pytest.raises(ConfigError, match="directory"):
        read_toml(tmp_path)


def test_what_is_no_text_or_too_large_is_refused(tmp_path: Path) -> None:
    binary, large = tmp_path / "binary.toml", tmp_path / "large.toml"
    binary.write_bytes(b"a = '\xff'")
    large.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 5\)"):
        read_toml(binary)
    with pytest.raises(ConfigError, match=f"at most {MAX_FILE_BYTES}"):
        read_toml(large)


def test_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(b"\xef\xbb\xbfseed = 1\n")
    assert read_toml(file) == {"seed": 1}


def test_nearest() -> None:
    assert nearest("lerning_rate", ["rank", "learning_rate"]) == "learning_rate"
    assert nearest("qqq", ["rank"]) == ""
