"""The entropy coder of whole numbers: exact in both directions for any numbers, as short as their entropy, strict about what it reads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitft.compress.coding import LARGEST_CODE, Codes, decode_codes, encode_codes, most_code_bytes
from splitft.errors import CodecError
from splitft.rng import numpy_stream

EDGES = [0, 1, -1, 2000, 2001, -2003, (1 << 15) - 1, 1 << 15, LARGEST_CODE, -LARGEST_CODE]


def there_and_back(codes: Codes) -> bytes:
    data = encode_codes(codes)
    found = decode_codes(data, *codes.shape)
    assert found.dtype == np.int32
    assert np.array_equal(found, codes)
    assert len(data) <= most_code_bytes(*codes.shape)
    return data


@given(
    st.integers(1, 12),
    st.integers(1, 6),
    st.lists(st.one_of(st.sampled_from(EDGES), st.integers(-9, 9), st.integers(-LARGEST_CODE, LARGEST_CODE)), min_size=72, max_size=72),
)
def test_any_numbers_come_back(rows: int, columns: int, values: list[int]) -> None:
    there_and_back(np.array(values[: rows * columns], np.int32).reshape(rows, columns))


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (7, 33), (64, 48)], ids=str)
@pytest.mark.parametrize("spread", [0.0, 0.01, 0.3, 1.0, 30.0, 1e4, 1e8])
def test_numbers_of_any_spread_come_back(shape: tuple[int, int], spread: float) -> None:
    choice = numpy_stream(1, "coding-test")
    codes = np.rint(choice.standard_normal(shape) * spread * 2.0 ** choice.integers(-3, 4, (1, shape[1])))
    there_and_back(np.clip(codes, -LARGEST_CODE, LARGEST_CODE).astype(np.int32))


@pytest.mark.parametrize("value", [0, 1, -1, 17, LARGEST_CODE, -LARGEST_CODE])
def test_equal_numbers_take_next_to_nothing(value: int) -> None:
    """Columns are centred, so only their middles remain to be said."""
    assert len(there_and_back(np.full((256, 4), value, np.int32))) < 64


def test_opposite_extremes_around_a_middle_come_back() -> None:
    """The difference from a column's middle may be nearly twice the largest number."""
    codes = np.full((64, 2), -LARGEST_CODE, np.int32)
    codes[5] = LARGEST_CODE
    there_and_back(codes)


@pytest.mark.parametrize("spread", [0.6, 2.0, 20.0])
def test_the_length_is_near_the_entropy_of_a_two_sided_geometric_distribution(spread: float) -> None:
    choice, ratio = numpy_stream(2, "coding-test"), np.exp(-1 / spread)
    codes = (choice.geometric(1 - ratio, (512, 64)) - choice.geometric(1 - ratio, (512, 64))).astype(np.int32)
    values = np.arange(-4000, 4001)
    chances = (1 - ratio) / (1 + ratio) * ratio ** np.abs(values)
    chances = chances[chances > 0]
    entropy_bytes = codes.size * float(-(chances * np.log2(chances)).sum()) / 8
    assert 0.99 * entropy_bytes <= len(there_and_back(codes)) <= 1.07 * entropy_bytes


def test_quiet_rows_and_columns_cost_little() -> None:
    loud = np.rint(numpy_stream(3, "coding-test").standard_normal((64, 64)) * 50).astype(np.int32)
    quiet = loud.copy()
    quiet[:, 8:] = 0
    assert len(there_and_back(quiet)) < len(there_and_back(loud)) / 6


@pytest.mark.parametrize(
    "data", [b"", b"\x00\x01", b"\x02", b"\x00" + bytes(4), b"\x00" + b"\xff" * 3, b"\x01" + bytes(8), b"\xff" * 9], ids=repr
)
def test_what_is_no_coded_number_is_refused(data: bytes) -> None:
    with pytest.raises(CodecError):
        decode_codes(data, 3, 4)


def test_bytes_behind_the_last_number_are_refused() -> None:
    data = encode_codes(np.arange(12, dtype=np.int32).reshape(3, 4))
    with pytest.raises(CodecError):
        decode_codes(data + b"\x07\x00\x00\x00" * 40, 3, 4)


def test_the_same_numbers_have_the_same_bytes_wherever_they_lie() -> None:
    base = numpy_stream(4, "coding-test").integers(-40, 40, (40, 30)).astype(np.int32)
    for view in (base[::2, ::3], base.T, base[3:, 1:]):
        assert encode_codes(view) == encode_codes(np.ascontiguousarray(view))
