"""engine/batches.py: rows become padded tensors with shifted labels, labels become packets and come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitft.compress.base import HEADER_BYTES, Packet
from splitft.data.base import ClientData, TokenRows
from splitft.data.order import BatchOrder
from splitft.engine.batches import (
    LABEL_CODEC,
    alike,
    assemble,
    gather,
    label_bytes,
    label_packet,
    length_mask,
    read_labels,
    require_targets,
)
from splitft.engine.exchange import packet_bytes, parse_packet
from splitft.errors import DataError, ProtocolError
from splitft.rng import numpy_stream
from splitft.types import IGNORE_LABEL

CPU = torch.device("cpu")


def client(number: int, rows: list[list[int]], prompt: int = 0) -> ClientData:
    pairs = [(np.array(row, np.int32), np.arange(len(row)) >= prompt) for row in rows]
    return ClientData(number, f"client-{number}", len(rows), TokenRows.build(pairs), TokenRows.build([]))


def test_sessions_are_padded_to_the_longest_row_of_all() -> None:
    clients = [client(0, [[11, 12, 13], [14, 15]]), client(1, [[21, 22, 23, 24], [25, 26]])]
    orders = [BatchOrder(2, 2, 0, one.client) for one in clients]
    batch = gather(clients, orders, [0, 0], CPU)
    rows = {tuple(row[:length]) for row, length in zip(batch.ids.tolist(), batch.lengths.reshape(-1).tolist(), strict=True)}
    assert rows == {(11, 12, 13), (14, 15), (21, 22, 23, 24), (25, 26)}
    assert batch.ids.shape == batch.labels.shape == (4, 4)
    assert batch.lengths.shape == (2, 2)
    assert batch.tokens == [5, 6]
    assert batch.targets.tolist() == [3, 4]
    assert {int(value) for value in batch.ids[0:2].flatten()} <= {0, 11, 12, 13, 14, 15}, "session 0 comes first"
    assert batch.mask is not None
    assert torch.equal(batch.mask.sum(1), batch.lengths.reshape(-1))
    assert batch.padded_lengths is batch.lengths


def test_full_rows_need_no_mask() -> None:
    clients = [client(0, [[1, 2, 3], [4, 5, 6]])]
    batch = gather(clients, [BatchOrder(2, 2, 0, 0)], [0], CPU)
    assert batch.mask is None
    assert batch.padded_lengths is None


def test_labels_are_the_next_token_and_never_cross_the_end() -> None:
    ids = np.array([[5, 6, 7, 0], [8, 9, 3, 4]])
    trained = np.array([[True] * 3 + [False], [True] * 4])
    batch = assemble(ids, trained, np.array([[3, 4]]), CPU)
    assert batch.labels.tolist() == [[6, 7, IGNORE_LABEL, IGNORE_LABEL], [9, 3, 4, IGNORE_LABEL]]
    assert batch.targets.tolist() == [5]


def test_the_prompt_is_context_only() -> None:
    clients = [client(0, [[1, 2, 3, 4, 5]], prompt=3)]
    batch = gather(clients, [BatchOrder(1, 1, 0, 0)], [0], CPU)
    assert batch.labels.tolist() == [[IGNORE_LABEL, IGNORE_LABEL, 4, 5, IGNORE_LABEL]]
    assert batch.targets.tolist() == [2]
    assert batch.tokens == [5]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_a_mask_is_there_only_where_something_is_padded(lengths: list[int]) -> None:
    width = max(lengths)
    mask = length_mask(torch.tensor(lengths), width)
    if set(lengths) == {width}:
        assert mask is None
    else:
        assert mask is not None
        assert mask.sum(1).tolist() == lengths
        assert all(row == sorted(row, reverse=True) for row in mask.tolist()), "padding is on the right"


def test_a_step_without_a_target_names_the_client() -> None:
    clients = [client(0, [[1, 2]]), client(1, [[1, 2]])]
    require_targets(torch.tensor([1, 5]), clients)
    with pytest.raises(DataError, match="'client-1' drew a step without a single target"):
        require_targets(torch.tensor([3, 0]), clients)


@given(
    labels=st.lists(st.one_of(st.just(IGNORE_LABEL), st.integers(0, 99)), max_size=30),
    vocabulary=st.sampled_from([100, 65_534, 65_535, 200_000]),
)
def test_labels_survive_their_packet(labels: list[int], vocabulary: int) -> None:
    packet = label_packet(torch.tensor(labels, dtype=torch.int64), vocabulary)
    assert packet.size_bytes == HEADER_BYTES + len(labels) * (2 if vocabulary < 65_535 else 4)
    found = read_labels(parse_packet(packet_bytes(packet)), vocabulary, len(labels))
    assert found.tolist() == labels
    assert found.dtype == torch.int64


@pytest.mark.parametrize("vocabulary", [65_534, 65_535, 151_936])
def test_the_last_token_of_a_vocabulary_is_no_missing_label(vocabulary: int) -> None:
    labels = torch.tensor([vocabulary - 1, IGNORE_LABEL, 0])
    assert read_labels(label_packet(labels, vocabulary), vocabulary, 3).tolist() == labels.tolist()


@pytest.mark.parametrize("label", [100, 5000, 65_534])
def test_a_label_outside_the_vocabulary_is_refused(label: int) -> None:
    packet = label_packet(torch.tensor([1, label]), 65_000)
    with pytest.raises(ProtocolError, match=f"label {label} is outside the vocabulary of 100"):
        read_labels(packet, 100, 2)


@pytest.mark.parametrize("label", [-1, -101, 2**31 - 2])
def test_a_wide_label_outside_the_vocabulary_is_refused(label: int) -> None:
    packet = Packet(LABEL_CODEC, torch.int32, (1,), np.array([label], np.int32).tobytes())
    with pytest.raises(ProtocolError, match="outside the vocabulary"):
        read_labels(packet, 100_000, 1)


@pytest.mark.parametrize(
    "packet",
    [
        Packet(1, torch.uint16, (2,), b"\x01\x00\x02\x00"),
        Packet(LABEL_CODEC, torch.float32, (2,), bytes(8)),
        Packet(LABEL_CODEC, torch.uint16, (3,), bytes(6)),
        Packet(LABEL_CODEC, torch.uint16, (2, 1), bytes(4)),
        Packet(LABEL_CODEC, torch.uint16, (2,), bytes(6)),
        Packet(LABEL_CODEC, torch.uint16, (2,), b""),
    ],
    ids=["codec", "dtype", "count", "axes", "long", "empty"],
)
def test_packets_that_are_not_these_labels_are_refused(packet: Packet) -> None:
    with pytest.raises(ProtocolError, match="labels"):
        read_labels(packet, 100, 2)


def test_sessions_of_like_width_share_a_pass() -> None:
    """Equal widths: groups of the budget, in order. Unequal: every session once, none over the budget, little padding in large groups."""
    assert alike([10] * 7, 30) == [[0, 1, 2], [3, 4, 5], [6]]
    assert alike([], 30) == []
    assert alike([500], 30) == [[0]]  # a session over the budget goes alone
    widths = [int(width) for width in numpy_stream(0, "widths").integers(20, 400, 300)]
    groups = alike(widths, 8192)
    assert sorted(place for group in groups for place in group) == list(range(300))
    for group in groups:
        widest = max(widths[place] for place in group)
        assert len(group) * widest <= 8192
        assert min(widths[place] for place in group) >= 0.8 * widest or len(group) * widest < 1024 + widest
    padded = sum(len(group) * max(widths[place] for place in group) for group in groups)
    assert padded < 1.12 * sum(widths) < 300 * max(widths) / 1.7


@pytest.mark.parametrize("vocabulary", [96, 65_534, 65_535, 128_256])
@pytest.mark.parametrize("count", [0, 1, 77])
def test_the_bytes_of_labels_are_those_of_their_packet(vocabulary: int, count: int) -> None:
    assert label_bytes(count, vocabulary) == label_packet(torch.zeros(count, dtype=torch.int64), vocabulary).size_bytes
