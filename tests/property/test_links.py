"""The shared link against the plainest possible model of it: every rate worked out anew at every event."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitft.links import FairLink, SerialLink, Transfer


@dataclass(frozen=True)
class Wish:
    """What a client wants to send, from when on, and how fast its own link is."""

    client: int
    at_s: float
    size_bytes: float
    bytes_per_s: float
    left_s: float = 0.0

    def transfer(self) -> Transfer[Wish]:
        return Transfer(self, self.client, self.size_bytes, self.size_bytes / self.bytes_per_s, self.left_s)


@st.composite
def wishes(draw: st.DrawFn) -> list[Wish]:
    """In order of time; a client has one link, so one rate."""
    rates = draw(st.lists(st.sampled_from((0.5, 1.0, 1.0, 3.0, 10.0, 1e12)), min_size=1, max_size=6))
    count = draw(st.integers(1, 12))
    eighths = st.integers(0, 80).map(lambda value: value / 8)
    clients = st.integers(0, len(rates) - 1)
    made = [(draw(clients), draw(eighths), draw(eighths) + 0.125) for _ in range(count)]
    return sorted((Wish(client, at_s, size, rates[client]) for client, at_s, size in made), key=lambda wish: (wish.at_s, wish.client))


def water_filling(rates: dict[int, float], capacity: float) -> dict[int, float]:
    shares: dict[int, float] = {}
    for count, client in enumerate(sorted(rates, key=lambda client: rates[client])):
        shares[client] = min(rates[client], (capacity - sum(shares.values())) / (len(rates) - count))
    return shares


def plain(wanted: list[Wish], capacity: float) -> dict[int, float]:
    """When each wish (by position) has been granted: fluid flow, one transfer of a client after the other."""
    left = {place: wish.size_bytes for place, wish in enumerate(wanted)}
    ends: dict[int, float] = {}
    now_s = 0.0
    while left:
        active: dict[int, int] = {}
        for place in left:
            if wanted[place].at_s <= now_s:
                active.setdefault(wanted[place].client, place)
        shares = water_filling({client: wanted[place].bytes_per_s for client, place in active.items()}, capacity)
        due_s = {place: now_s + left[place] / shares[client] for client, place in active.items()}
        next_s = min([*due_s.values(), *(wanted[place].at_s for place in left if wanted[place].at_s > now_s)])
        for client, place in active.items():
            left[place] -= shares[client] * (next_s - now_s)
            if due_s[place] <= next_s:
                ends[place] = next_s
                del left[place]
        now_s = next_s
    return ends


def driven(link: FairLink[Wish] | SerialLink[Wish], wanted: list[Wish]) -> list[Transfer[Wish]]:
    """The transfers of `wanted` after the link has done them all."""
    coming, transfers, last_s = list(wanted), [wish.transfer() for wish in wanted], 0.0
    while coming or link.due_s() < float("inf"):
        if coming and coming[0].at_s <= link.due_s():
            link.add(transfers[len(wanted) - len(coming)], coming.pop(0).at_s)
        else:
            assert link.due_s() >= last_s, "time went back"
            last_s = link.due_s()
            link.proceed()
    return transfers


@given(wishes(), st.sampled_from((0.3, 1.0, 2.5, 4.0, 1e6)))
def test_fair_link_is_max_min_fair(wanted: list[Wish], capacity: float) -> None:
    expected = plain(wanted, capacity)
    for place, transfer in enumerate(driven(FairLink(capacity), wanted)):
        assert transfer.end_s == pytest.approx(expected[place], rel=1e-9, abs=1e-9)
        assert transfer.start_s >= wanted[place].at_s


def test_slow_transfers_keep_their_rate_and_the_others_share_the_rest() -> None:
    # Own rates 1, 4 and 10 over a link of 9: they get 1, 4 and 4; when the second has ended, the third gets 8.
    sent = driven(FairLink(9.0), [Wish(0, 0.0, 10.0, 1.0), Wish(1, 0.0, 8.0, 4.0), Wish(2, 0.0, 16.0, 10.0)])
    assert [transfer.end_s for transfer in sent] == pytest.approx([10.0, 2.0, 3.0])


def test_a_wide_link_changes_no_transfer_not_even_in_rounding() -> None:
    wanted = [Wish(client, 0.1 * client, 0.7, 0.3) for client in range(20)]
    assert [one.end_s for one in driven(FairLink(1e3), wanted)] == [0.1 * client + 0.7 / 0.3 for client in range(20)]


@given(wishes(), st.sampled_from((0.3, 1.0, 4.0)), st.data())
def test_serial_link_never_overlaps_nor_idles_and_follows_its_order(wanted: list[Wish], capacity: float, data: st.DataObject) -> None:
    lefts = data.draw(st.lists(st.integers(0, 3), min_size=len(wanted), max_size=len(wanted)))
    wanted = [Wish(one.client, one.at_s, one.size_bytes, one.bytes_per_s, float(left)) for one, left in zip(wanted, lefts, strict=True)]
    sent = sorted(driven(SerialLink(capacity), wanted), key=lambda one: one.start_s)
    free_s = 0.0
    for place, one in enumerate(sent):
        waiting = [other for other in sent[place:] if other.owner.at_s <= one.start_s]
        assert one.start_s == max(free_s, min(other.owner.at_s for other in sent[place:]))
        assert one.left_s == max(other.left_s for other in waiting)
        assert one.end_s == one.start_s + max(one.seconds, one.bytes / capacity)
        free_s = one.end_s


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 20)), min_size=1, max_size=5))
def test_longest_first_is_the_best_order_when_all_wait(sizes: list[tuple[int, int]]) -> None:
    """Over all orders, against fair sharing too: clients' links no slower than the server's, and each has `left_s` of work of its own."""
    wanted = [Wish(client, 0.0, size, 4.0, float(left)) for client, (size, left) in enumerate(sizes)]
    spans = [max(one.end_s + one.left_s for one in driven(link, wanted)) for link in (SerialLink[Wish](2.0), FairLink[Wish](2.0))]
    best = min(
        max(sum(one.size_bytes / 2.0 for one in order[: place + 1]) + order[place].left_s for place in range(len(order)))
        for order in itertools.permutations(wanted)
    )
    assert spans[0] == pytest.approx(best)
    assert spans[0] <= spans[1] + 1e-9
