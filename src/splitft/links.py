"""The server's own link on the virtual clock: one direction, one capacity, and two ways to divide it among the clients' transfers.

A link is told of transfers in the order of time (`add`), says when it will next do something (`due_s`), and does it (`proceed`).
Times are seconds since the start of the round.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_left, bisect_right
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Transfer(Generic[T]):
    """What `owner` sends for its client: more than 0 bytes, in `seconds` if the client's own link were the only one.

    `left_s` is the client's work after it. The link sets `start_s`, and `end_s` once it is known.
    """

    __slots__ = ("bytes", "client", "end_s", "left_s", "mark", "metered", "owner", "rate", "seconds", "start_s")

    def __init__(self, owner: T, client: int, byte_count: float, seconds: float, left_s: float = 0.0) -> None:
        self.owner, self.client, self.bytes, self.seconds, self.left_s = owner, client, byte_count, seconds, left_s
        self.rate = byte_count / seconds if seconds > 0.0 else math.inf
        self.start_s = self.end_s = self.mark = math.nan
        self.metered = False


class FairLink(Generic[T]):
    """Max-min fair sharing: each transfer has its client's rate or, if that is less, an equal share of what the slower ones leave.

    A client sends its own transfers one after the other. Those slower than the fair share end at a known time. The others all have
    the same rate, so a meter of the bytes each of them has got says when they end. A start or an end thus moves the few transfers
    that change from one kind to the other, and not all of them.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s, self.now_s, self.meter_bytes, self.level = bytes_per_s, 0.0, 0.0, math.inf
        self.rates: list[float] = []  # of all transfers under way, ascending; the first `slow` of them are not metered
        self.transfers: list[Transfer[T]] = []
        self.slow = 0
        # (time or meter reading of the end, ticket, transfer) by kind; one that has changed its kind leaves an entry behind.
        self.ends: tuple[list[tuple[float, int, Transfer[T]]], ...] = ([], [])
        self.tickets = itertools.count()
        self.waiting: dict[int, deque[Transfer[T]]] = {}

    def add(self, transfer: Transfer[T], at_s: float) -> None:
        """Start it, or queue it behind its client's own."""
        mine = self.waiting.setdefault(transfer.client, deque())
        mine.append(transfer)
        if len(mine) == 1:
            self._begin(transfer, at_s)

    def due_s(self) -> float:
        """When the next transfer ends."""
        return min(self._due_s(False), self._due_s(True))

    def proceed(self) -> Transfer[T]:
        """Go to that moment and return the transfer."""
        metered = self._due_s(True) < self._due_s(False)
        self._pass(self._due_s(metered))
        transfer = heapq.heappop(self.ends[metered])[-1]
        transfer.end_s, transfer.mark = self.now_s, math.nan
        place = self.transfers.index(transfer, bisect_left(self.rates, transfer.rate))
        del self.rates[place], self.transfers[place]
        self.slow -= place < self.slow
        self._share()
        mine = self.waiting[transfer.client]
        mine.popleft()
        if mine:
            self._begin(mine[0], self.now_s)
        return transfer

    def _begin(self, transfer: Transfer[T], at_s: float) -> None:
        self._pass(at_s)
        transfer.start_s = at_s
        place = bisect_right(self.rates, transfer.rate)
        self.rates.insert(place, transfer.rate)
        self.transfers.insert(place, transfer)
        if place <= self.slow:
            self.slow += 1
            self._mark(transfer, False, at_s + transfer.seconds)
        else:
            self._mark(transfer, True, self.meter_bytes + transfer.bytes)
        self._share()

    def _pass(self, to_s: float) -> None:
        if self.slow < len(self.rates):
            self.meter_bytes += self.level * (to_s - self.now_s)
        self.now_s = to_s

    def _mark(self, transfer: Transfer[T], metered: bool, mark: float) -> None:
        transfer.metered, transfer.mark = metered, mark
        heapq.heappush(self.ends[metered], (mark, next(self.tickets), transfer))

    def _due_s(self, metered: bool) -> float:
        ends = self.ends[metered]
        while ends and (ends[0][-1].mark != ends[0][0] or ends[0][-1].metered != metered):
            heapq.heappop(ends)
        if not ends:
            return math.inf
        return self.now_s + max(0.0, ends[0][0] - self.meter_bytes) / self.level if metered else ends[0][0]

    def _share(self) -> None:
        """Find anew who is slower than the fair share, and the rate of the others."""
        while self.slow and self.rates[self.slow - 1] > self._level(self.slow - 1):
            self.slow -= 1
            one = self.transfers[self.slow]
            left_bytes = one.bytes if one.start_s == self.now_s else max(0.0, one.mark - self.now_s) * one.rate
            self._mark(one, True, self.meter_bytes + left_bytes)
        while self.slow < len(self.rates) and self.rates[self.slow] <= self._level(self.slow):
            one = self.transfers[self.slow]
            self._mark(one, False, self.now_s + max(0.0, one.mark - self.meter_bytes) / one.rate)
            self.slow += 1
        self.level = self._level(self.slow)

    def _level(self, slow: int) -> float:
        """The rate of the others if the `slow` slowest kept their own."""
        others = len(self.rates) - slow
        return (self.bytes_per_s - math.fsum(self.rates[:slow])) / others if others else math.inf


class SerialLink(Generic[T]):
    """One transfer at a time, at the client's rate or the link's; of those that wait, first the one whose client has most work left."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.waiting: list[tuple[float, int, int, Transfer[T]]] = []
        self.tickets = itertools.count()
        self.sending: Transfer[T] | None = None
        self.free_s = 0.0

    def add(self, transfer: Transfer[T], at_s: float) -> None:
        """Queue it; ties go to the smaller client number."""
        if not self.waiting and self.sending is None:
            self.free_s = at_s
        heapq.heappush(self.waiting, (-transfer.left_s, transfer.client, next(self.tickets), transfer))

    def due_s(self) -> float:
        """When the transfer under way ends, else when the next is chosen: after all requests of the same moment have come."""
        if self.sending is not None:
            return self.sending.end_s
        return self.free_s if self.waiting else math.inf

    def proceed(self) -> Transfer[T] | None:
        """Go to that moment and return the transfer that has ended, None if one was begun."""
        sent, self.sending = self.sending, None
        if sent is not None:
            self.free_s = sent.end_s
            return sent
        chosen = heapq.heappop(self.waiting)[-1]
        chosen.start_s = self.free_s
        chosen.end_s = self.free_s + max(chosen.seconds, chosen.bytes / self.bytes_per_s)
        self.sending = chosen
        return None
