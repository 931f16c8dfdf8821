"""Numbers are coded class after class: the order that is worked out from rows and columns alone is that of a stable sort of all numbers."""

from __future__ import annotations

import numpy as np
import pytest

from splitft.compress.coding import CLASSES, LARGEST_CODE, UNIT, Bytes, Places, _ordered, _sums, decode_codes, encode_codes


def sorted_order(rows: Bytes, columns: Bytes) -> tuple[Places, Places]:
    """Flat places of the numbers that are not of a quiet row or column, class after class, and the class of each: by sorting."""
    kinds = np.clip(rows.astype(int)[:, None] + columns.astype(int)[None, :] - UNIT, 1, CLASSES - 1)
    busy = np.flatnonzero((rows > 0)[:, None] & (columns > 0)[None, :])
    order = busy[np.argsort(kinds.reshape(-1)[busy], kind="stable")]
    return order, kinds.reshape(-1)[order]


@pytest.mark.parametrize(("low", "high"), [(20, 30), (0, 30), (0, 4), (45, CLASSES), (0, CLASSES), (0, 1)])
def test_order_is_that_of_a_stable_sort(low: int, high: int) -> None:
    draw = np.random.default_rng(low * CLASSES + high)
    for _ in range(60):
        shape = tuple(draw.integers(1, 30, 2))
        rows, columns = (draw.integers(low, high, size).astype(np.uint8) for size in shape)
        order = _ordered(rows, columns)
        places, kinds = sorted_order(rows, columns)
        numbers = np.arange(1, shape[0] * shape[1] + 1, dtype=np.int32).reshape(shape)
        taken = order.take(numbers)
        assert np.array_equal(taken, places + 1)
        told = [kind for kind, begin, end in order.spans for _ in range(end - begin)]
        assert told == kinds.tolist()
        kept = order.put(taken, *shape)
        assert np.array_equal(kept, np.where(np.isin(numbers, taken), numbers, 0))


def test_sums_are_exact_up_to_the_largest_numbers() -> None:
    for most in (100, 1 << 22, LARGEST_CODE):
        numbers = np.random.default_rng(most).integers(-most, most, (600, 3), endpoint=True).astype(np.int32)
        numbers[:, 0] = most
        for axis in (0, 1):
            assert np.array_equal(_sums(numbers, axis), numbers.sum(axis, dtype=np.int64))


@pytest.mark.parametrize("spread", [0.01, 1.0, 1e4, 1e8])
def test_numbers_of_all_sizes_come_back(spread: float) -> None:
    draw = np.random.default_rng(5)
    sizes = spread * 2.0 ** draw.uniform(-20, 10, (70, 1)) * 2.0 ** draw.uniform(-20, 10, (1, 90))
    codes = np.clip(np.rint(draw.laplace(size=(70, 90)) * sizes), -LARGEST_CODE, LARGEST_CODE).astype(np.int32)
    assert np.array_equal(decode_codes(encode_codes(codes), 70, 90), codes)
