"""Who hides what with whom: the columns of an adapter row, grouped by the set of clients that own them.

With mixed cuts a block lies at some clients and on the server for the others. A column's sum over one owner is that owner's value, and
over two each owner knows the other's: so a column is only ever opened with LEAST_COHORT owners or more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import msgspec

from splitft.errors import ConfigError

LEAST_COHORT = 3
# Columns [start, stop) of a row.
Range: TypeAlias = tuple[int, int]


class Cohort(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Clients, ascending, and the columns that exactly they own."""

    owners: tuple[int, ...]
    ranges: tuple[Range, ...]

    @property
    def size(self) -> int:
        """How many columns there are."""
        return sum(stop - start for start, stop in self.ranges)


def cohorts_of(owned: Mapping[int, Sequence[Range]]) -> tuple[Cohort, ...]:
    """The cohorts of clients with these columns each, in the order of their first columns. Ranges of one client must not overlap."""
    edges: dict[int, tuple[set[int], set[int]]] = {}
    for client, ranges in owned.items():
        for start, stop in joined(ranges):
            edges.setdefault(start, (set(), set()))[0].add(client)
            edges.setdefault(stop, (set(), set()))[1].add(client)
    found: dict[tuple[int, ...], list[Range]] = {}
    present: set[int] = set()
    position = 0
    for edge in sorted(edges):
        if present and edge > position:
            found.setdefault(tuple(sorted(present)), []).append((position, edge))
        begins, ends = edges[edge]
        present = (present - ends) | begins
        position = edge
    return tuple(Cohort(owners, joined(ranges)) for owners, ranges in found.items())


def joined(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Ranges in order, neighbours made one and empty ones left out."""
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def owned_by(cohorts: Sequence[Cohort], client: int) -> tuple[Range, ...]:
    """The columns of a client over all its cohorts."""
    return joined(part for cohort in cohorts if client in cohort.owners for part in cohort.ranges)


def covers(outer: Iterable[Range], inner: Iterable[Range]) -> bool:
    """Whether every column of `inner` is one of `outer`."""
    whole = joined(outer)
    return all(any(start <= one[0] and one[1] <= stop for start, stop in whole) for one in joined(inner))


def openable(cohort: Cohort, survivors: Iterable[int], minimum: int) -> bool:
    """Whether the cohort's sum may be seen when these clients' inputs came in: clients and server decide it by this rule alone."""
    return len(set(cohort.owners).intersection(survivors)) >= max(minimum, LEAST_COHORT)


def require_cuts(cuts: Sequence[int], minimum: int = LEAST_COHORT) -> None:
    """ConfigError where a block would lie at fewer clients than `minimum` and at one at least."""
    for block in range(max(cuts, default=0)):
        owners = [client for client, cut in enumerate(cuts) if cut > block]
        if len(owners) < minimum:
            raise ConfigError(
                f"block {block} lies at {len(owners)} client{'s' if len(owners) > 1 else ''} ({', '.join(map(str, owners))}); secure "
                f"aggregation hides an adapter among {minimum} or more.",
                f"give at least {minimum} clients the deepest cut, at most {levelled(dict(enumerate(cuts)), minimum).get(owners[0], 0)}.",
            )


def levelled(cuts: Mapping[int, int], minimum: int = LEAST_COHORT) -> dict[int, int]:
    """The same cuts with the deepest ones taken back as far as needed, so that no block lies at fewer clients than `minimum`: all are as
    deep as the `minimum`-th deepest at most. Empty for fewer clients."""
    if len(cuts) < minimum:
        return {}
    deepest = sorted(cuts.values(), reverse=True)[minimum - 1]
    return {client: min(cut, deepest) for client, cut in cuts.items()}
