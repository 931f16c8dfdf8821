"""Whole numbers [q d] as few bytes: asymmetric numeral systems (Duda, arXiv 1311.2540) under a model of rows and columns.

How large a number is on average is taken to be a row's share times a column's, so that quiet tokens and quiet channels cost next to
nothing. Rows and columns are put into classes, an octave and half an octave wide, which travel first; every number is then coded with the
two-sided geometric distribution of its class. Tables are made with additions, multiplications, divisions and square roots alone, in a
fixed order, so that both ends have the same on any hardware. The coder itself is the library `constriction`.

    payload = u8 how columns are centred | words u32 of the coder; the shape is known
    coded   = columns' middles (or none), columns' classes, rows' classes (each as differences, under a class for those), then the numbers
              class after class, then what is beyond the reach of each class's table

Channels of hidden states have middles of their own, often far from zero: a column's mean is taken away first where that pays.

Axes: q rows, d columns.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import constriction
import numpy as np
import numpy.typing as npt

from splitft.errors import CodecError

Codes = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.intp]
# Classes: class k is for numbers of mean magnitude 2^((k - ZERO) / 2); class 0 holds nothing but zeros.
CLASSES, UNIT = 56, 25
ROW_STEP = 2
MOST_REACH = 2000
LEAST_ROWS = 8
LARGEST_CODE = 1 << 29
_TORN = "the message is damaged, or both sides do not use the same codec with the same fields."


@lru_cache(maxsize=CLASSES)
def _reach(kind: int) -> int:
    """Largest magnitude in the table of a class; one beyond stands for all larger ones."""
    return min(MOST_REACH, 3 + int(14.0 * _mean(kind)))


@lru_cache(maxsize=CLASSES)
def _mean(kind: int) -> float:
    """Mean magnitude of a class, by products of exact constants."""
    half = 1.0
    for _ in range(abs(kind - UNIT)):
        half *= 1.4142135623730951 if kind > UNIT else 0.7071067811865476
    return half


@lru_cache(maxsize=CLASSES)
def _model(kind: int) -> constriction.stream.model.Categorical:
    """The distribution of a class over -reach..reach, counted from zero."""
    mean, reach = _mean(kind), _reach(kind)
    ratio = ((1.0 + mean * mean) ** 0.5 - 1.0) / mean  # two-sided geometric: the mean magnitude is 2 r / (1 - r^2)
    powers = np.cumprod(np.full(reach, ratio))
    powers[-1] /= 1.0 - ratio  # the last one is for all beyond
    table = np.concatenate([powers[::-1], [1.0], powers]) * ((1.0 - ratio) / (1.0 + ratio))
    return constriction.stream.model.Categorical(table.astype(np.float32), perfect=False)


_DIGIT = constriction.stream.model.Uniform(1 << 15)
_KIND = constriction.stream.model.Uniform(CLASSES)


def encode_codes(codes: Codes) -> bytes:
    """The numbers [q d], of magnitude at most LARGEST_CODE, as bytes."""
    middles = _middles(codes)
    coder = constriction.stream.stack.AnsCoder()
    # The coder is a stack: what is to be read first is written last.
    _write(coder, codes if middles is None else codes - middles)
    if middles is not None:
        _write(coder, middles)
    words: bytes = coder.get_compressed().astype("<u4").tobytes()
    return bytes([middles is not None]) + words


def decode_codes(data: bytes | memoryview, rows: int, columns: int) -> Codes:
    """The inverse of `encode_codes`. Raises CodecError for bytes that are no such numbers."""
    if len(data) % 4 != 1 or data[0] > 1:
        raise CodecError(f"{len(data)} bytes are no coded numbers.", _TORN)
    words = np.frombuffer(data, "<u4", offset=1).astype(np.uint32)
    if words.size and words[-1] == 0:
        raise CodecError("coded numbers end in a zero word.", _TORN)
    coder = constriction.stream.stack.AnsCoder(words)
    middles = _read(coder, 1, columns) if data[0] else None
    codes = _read(coder, rows, columns)
    if not coder.is_empty():
        raise CodecError("coded numbers are followed by something else.", _TORN)
    if middles is not None:
        codes += middles
    if codes.size and max(int(codes.max()), -int(codes.min())) > LARGEST_CODE:
        raise CodecError(f"a coded number is beyond {LARGEST_CODE}.", _TORN)
    return codes


def _middles(codes: Codes) -> Codes | None:
    """The mean of each column [1 d], rounded, if there are rows enough to share it and it is not zero throughout."""
    if codes.shape[0] < LEAST_ROWS:
        return None
    middles = np.round(_sums(codes, 0) / codes.shape[0]).astype(np.int32)[None]
    return middles if middles.any() else None


def _write(coder: constriction.stream.stack.AnsCoder, codes: Codes) -> None:
    rows, columns = _classes(np.abs(codes))
    order = _ordered(rows, columns)
    values = order.take(codes)
    far = [np.empty(0, np.int32)]
    parts = []
    for kind, begin, end in order.spans:
        reach, part = _reach(kind), values[begin:end]
        if part.max() >= reach or part.min() <= -reach:
            far.append(_beyond(part, kind))
            np.clip(part, -reach, reach, out=part)
        part += np.int32(reach)
        parts.append((kind, part))
    beyond = np.concatenate(far)
    for digit in (beyond & 0x7FFF, beyond >> 15):
        coder.encode_reverse(digit.astype(np.int32), _DIGIT)
    for kind, part in reversed(parts):
        coder.encode_reverse(part, _model(kind))
    for classes in (rows, columns):
        _write_classes(coder, classes)


def _read(coder: constriction.stream.stack.AnsCoder, rows: int, columns: int) -> Codes:
    column_classes = _read_classes(coder, columns)
    row_classes = _read_classes(coder, rows)
    order = _ordered(row_classes, column_classes)
    values, far = np.empty(len(order.places), np.int32), [np.empty(0, np.intp)]
    for kind, begin, end in order.spans:
        reach, part = _reach(kind), values[begin:end]
        np.subtract(coder.decode(_model(kind), end - begin), np.int32(reach), out=part)
        if part.max() == reach or part.min() == -reach:
            far.append(begin + np.flatnonzero(np.abs(part) == reach))
    ends = np.concatenate(far)
    if ends.size:
        high, low = coder.decode(_DIGIT, len(ends)), coder.decode(_DIGIT, len(ends))
        values[ends] += np.sign(values[ends]) * ((high << 15) + low)
    return order.put(values, rows, columns)


def most_code_bytes(rows: int, columns: int) -> int:
    """An upper bound for what `encode_codes` makes of numbers of this shape."""
    return 64 + 9 * (rows + 1) * columns + 6 * (rows + 2 * columns)


def _classes(magnitudes: Codes) -> tuple[Bytes, Bytes]:
    """The class of each row [q] and of each column [d] of magnitudes: a number's class is the sum of both less UNIT."""
    total = _sums(magnitudes, 1)
    busy = total > 0
    columns_total = _sums(magnitudes, 0)
    width = max(1, int((columns_total > 0).sum()))
    with np.errstate(divide="ignore"):
        # Whatever the machine's log2 rounds to, the result is only a class, and it travels.
        rows = np.where(busy, np.clip(np.round(np.log2(total / width)) * ROW_STEP + UNIT, 1, CLASSES - 1), 0)
        scale = np.where(busy, 2.0 ** ((rows - UNIT) / 2), 0.0).sum() or 1.0
        columns = np.where(columns_total > 0, np.clip(np.round(2 * np.log2(columns_total / scale)) + UNIT, 1, CLASSES - 1), 0)
    return rows.astype(np.uint8), columns.astype(np.uint8)


def _sums(numbers: Codes, axis: int) -> npt.NDArray[np.signedinteger[Any]]:
    """Exact sums over an axis; without widening each number first where no sum can be too large."""
    most = max(int(numbers.max(initial=0)), -int(numbers.min(initial=0)))
    total: npt.NDArray[np.signedinteger[Any]] = numbers.sum(axis, dtype=np.int32 if most * numbers.shape[axis] < 1 << 31 else np.int64)
    return total


class _Order(NamedTuple):
    """Numbers class after class: where each number of busy rows and columns (None: all are) comes [m], and of each class there is,
    ascending, where it begins and ends."""

    busy: tuple[Places, Places] | None
    places: Places
    spans: list[tuple[int, int, int]]

    def take(self, codes: Codes) -> Codes:
        """The numbers [q d] in this order."""
        values = np.empty(len(self.places), np.int32)
        values[self.places] = (codes if self.busy is None else codes[np.ix_(*self.busy)]).reshape(-1)
        return values

    def put(self, values: Codes, rows: int, columns: int) -> Codes:
        """The inverse of `take`; zeros where nothing was taken."""
        left = values[self.places]
        if self.busy is None:
            return left.reshape(rows, columns)
        codes = np.zeros((rows, columns), np.int32)
        codes[np.ix_(*self.busy)] = left.reshape(len(self.busy[0]), len(self.busy[1]))
        return codes


def _ordered(rows: Bytes, columns: Bytes) -> _Order:
    """The order of numbers whose rows and columns have these classes, row after row within a class; those of class 0 hold none."""
    busy = None if rows.all() and columns.all() else (np.flatnonzero(rows), np.flatnonzero(columns))
    of_rows, of_columns = rows[rows > 0].astype(np.intp), columns[columns > 0].astype(np.intp)
    pairs = np.convolve(np.bincount(of_rows, minlength=CLASSES), np.bincount(of_columns, minlength=CLASSES))
    kinds = np.clip(np.arange(len(pairs)) - UNIT, 1, CLASSES - 1)
    sizes = np.zeros(CLASSES, np.intp)
    np.add.at(sizes, kinds, pairs)
    ends = np.cumsum(sizes)
    spans = [(kind, int(ends[kind] - sizes[kind]), int(ends[kind])) for kind in np.flatnonzero(sizes).tolist()]
    return _Order(busy, _places(of_rows, of_columns, ends - sizes), spans)


def _places(rows: Places, columns: Places, begins: Places) -> Places:
    """Where each number comes [q d], flat, when the numbers of each class begin at `begins`: row after row, within a row by column.

    The columns of one class are in any row of one class of numbers, next to each other: so where they begin follows from sums over the
    rows, and nothing as large as the numbers is sorted.
    """
    if not rows.size or not columns.size:
        return np.empty(0, np.intp)
    low, high, least = int(rows.min() + columns.min()) - UNIT, int(rows.max() + columns.max()) - UNIT, int(columns.min())
    if low < 1 or high >= CLASSES:  # cut off there, numbers of a row are of one class though their columns are of several
        kinds = np.clip(rows[:, None] + columns[None, :] - UNIT, 1, CLASSES - 1).astype(np.uint8).reshape(-1)
        places = np.empty(kinds.size, np.intp)
        places[np.argsort(kinds, kind="stable")] = np.arange(kinds.size)
        return places
    sizes = np.bincount(columns, minlength=2 * CLASSES)
    wanted = np.arange(low, high + 1) + UNIT - rows[:, None]  # the class of columns that makes up each class of numbers in each row
    held = np.where(wanted < 0, 0, sizes[wanted])
    begin = np.cumsum(held, 0) - held + begins[low : high + 1]
    by_column = np.take_along_axis(begin, rows[:, None] + np.arange(least, int(columns.max()) + 1) - UNIT - low, 1)
    order = np.argsort(columns, kind="stable")
    rank = np.empty(len(columns), np.intp)  # of a column among those of its class
    rank[order] = np.arange(len(columns)) - (np.cumsum(sizes) - sizes)[columns[order]]
    places = by_column.take(columns - least, 1)
    places += rank
    return places.reshape(-1)


def _beyond(part: Codes, kind: int) -> Codes:
    """How far numbers at or beyond their class's reach are beyond it."""
    magnitude = np.abs(part)
    return magnitude[magnitude >= _reach(kind)] - np.int32(_reach(kind))


def _write_classes(coder: constriction.stream.stack.AnsCoder, classes: Bytes) -> None:
    """Classes as differences from one to the next, and the class of those differences."""
    steps = np.diff(classes.astype(np.int32), prepend=np.int32(0)).astype(np.int32)
    kind = int(_classes(np.abs(steps)[None])[0][0]) or 1
    reach = _reach(kind)
    coder.encode_reverse(_beyond(steps, kind), _DIGIT)
    coder.encode_reverse(np.clip(steps, -reach, reach) + np.int32(reach), _model(kind))
    coder.encode_reverse(np.array([kind], np.int32), _KIND)


def _read_classes(coder: constriction.stream.stack.AnsCoder, count: int) -> Bytes:
    kind = int(coder.decode(_KIND, 1)[0]) or 1
    reach = _reach(kind)
    steps = coder.decode(_model(kind), count) - np.int32(reach)
    ends = np.flatnonzero(np.abs(steps) == reach)
    if ends.size:
        steps[ends] += np.sign(steps[ends]) * coder.decode(_DIGIT, len(ends))
    classes = np.cumsum(steps)
    if classes.size and (classes.min() < 0 or classes.max() >= CLASSES):
        raise CodecError(f"a class {int(classes.max())} of numbers is unknown, there are {CLASSES}.", _TORN)
    return classes.astype(np.uint8)
