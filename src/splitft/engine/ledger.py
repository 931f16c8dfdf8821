"""Every byte that crosses between a client and the server: by client, direction and kind, headers included."""

from __future__ import annotations

from splitft.messages import PACKET_KINDS, Frame
from splitft.types import DIRECTIONS, KINDS, Direction, Kind

Counts = dict[str, dict[str, int]]


def empty_counts() -> Counts:
    return {direction: dict.fromkeys(KINDS, 0) for direction in DIRECTIONS}


class Ledger:
    """Counts bytes; a value that a round fills and the journal records."""

    def __init__(self) -> None:
        self.clients: dict[int, Counts] = {}

    def add(self, client: int, direction: Direction, kind: Kind, count: int) -> None:
        # Called for every packet: zeros are made for a client's first only.
        counts = self.clients.get(client)
        if counts is None:
            counts = self.clients[client] = empty_counts()
        counts[direction][kind] += count

    def add_frame(self, client: int, direction: Direction, frame: Frame) -> None:
        """Count one message: each packet under its kind, the rest as control."""
        self.add(client, direction, "control", frame.overhead_bytes)
        for kind, packet in zip(PACKET_KINDS[frame.kind], frame.packets, strict=False):
            self.add(client, direction, kind, len(packet))

    def of(self, client: int) -> Counts:
        """The counts of one client (zeros for one that sent nothing)."""
        return self.clients.get(client, empty_counts())

    def total(self, client: int, direction: Direction) -> int:
        return sum(self.of(client)[direction].values())


def merge_counts(counts: list[Counts]) -> Counts:
    """The sum of several clients' or rounds' counts."""
    merged = empty_counts()
    for one in counts:
        for direction, kinds in one.items():
            for kind, count in kinds.items():
                merged[direction][kind] += count
    return merged
