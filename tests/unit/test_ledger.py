"""engine/ledger.py: every byte of a frame is counted once, under its kind."""

from __future__ import annotations

import pytest

from splitft.engine.ledger import Ledger, empty_counts, merge_counts
from splitft.messages import PACKET_KINDS, Frame, Type
from splitft.types import DIRECTIONS, KINDS


@pytest.mark.parametrize("kind", list(Type))
def test_a_frame_is_counted_to_the_last_byte_under_its_kinds(kind: Type) -> None:
    packets = tuple(bytes(10 + k) for k in range(len(PACKET_KINDS[kind])))
    frame = Frame(kind, b"fields", (3, 4), packets)
    ledger = Ledger()
    ledger.add_frame(5, "up", frame)
    counts = ledger.of(5)
    assert sum(counts["up"].values()) == frame.size_bytes == len(frame.encode()) == ledger.total(5, "up")
    assert counts["up"]["control"] == frame.size_bytes - sum(map(len, packets))
    for packet, name in zip(packets, PACKET_KINDS[kind], strict=True):
        assert counts["up"][name] == len(packet)
    assert ledger.total(5, "down") == 0


def test_counts_add_up_and_clients_stay_apart() -> None:
    ledger = Ledger()
    for _ in range(3):
        ledger.add(1, "up", "activations", 10)
    ledger.add(2, "down", "gradients", 7)
    assert ledger.total(1, "up") == 30
    assert ledger.of(2)["down"]["gradients"] == 7
    assert ledger.total(2, "up") == 0


def test_a_client_that_sent_nothing_has_zeros_and_is_not_listed() -> None:
    ledger = Ledger()
    assert ledger.of(9) == empty_counts()
    assert ledger.clients == {}
    ledger.of(9)["up"]["control"] = 5
    assert ledger.total(9, "up") == 0


def test_merged_counts_are_sums_and_leave_the_parts_alone() -> None:
    first, second = empty_counts(), empty_counts()
    first["up"]["labels"], second["up"]["labels"], second["down"]["control"] = 3, 4, 5
    merged = merge_counts([first, second])
    assert (merged["up"]["labels"], merged["down"]["control"]) == (7, 5)
    assert first["up"]["labels"] == 3
    assert merge_counts([]) == empty_counts()


def test_all_directions_and_kinds_are_always_there() -> None:
    assert {direction: set(kinds) for direction, kinds in empty_counts().items()} == {direction: set(KINDS) for direction in DIRECTIONS}
