"""The Dirichlet draw and the dealing of owners, shared by partitions. n documents, k labels."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from splitft import rng
from splitft.data.base import Ints
from splitft.errors import ConfigError, DataError

_DRAWS = 100


def check_clients(documents: int, clients: int, minimum: int = 1) -> None:
    """ConfigError without clients, DataError with fewer documents than they need."""
    if clients < 1:
        raise ConfigError(
            f"clients.count is {clients}.", 'Give at least 1; only partitions "by_column" and "files" find the number themselves.'
        )
    if documents < clients * minimum:
        raise DataError(
            f"{documents} documents cannot give each of {clients} clients at least {minimum}.",
            "Use fewer clients, a smaller minimum, more data, or shorter documents (for example split = paragraph).",
        )


def check_dirichlet(alpha: float, minimum: int) -> None:
    """ConfigError unless the fields of a Dirichlet partition make sense."""
    if not 1e-3 <= alpha <= 1e6:
        raise ConfigError(f"partition.alpha is {alpha}.", "Give a number from 0.001 (very unequal) to 1000000 (alike); 0.1 to 10 is usual.")
    if minimum < 1:
        raise ConfigError(f"partition.minimum is {minimum}.", "Give a whole number of documents, at least 1.")


def column_values(columns: Sequence[Mapping[str, str]], column: str) -> list[str]:
    """The value of `column` of every document; DataError if one has none."""
    for number, fields in enumerate(columns):
        if column not in fields:
            known = ", ".join(fields) or "none"
            raise DataError(f"Document {number} has no column {column!r}; it has: {known}.", "Set partition.column to one that all have.")
    return [fields[column] for fields in columns]


def dirichlet_parts(labels: Ints, clients: int, alpha: float, minimum: int, seed: int) -> tuple[Ints, ...]:
    """Documents of each label [n] dealt to clients by shares drawn from Dirichlet(alpha), label by label.

    Drawn anew, at most 100 times, until every client has `minimum` documents; if that never happens (small alpha, many
    clients), random documents of the largest clients fill the last draw up. Needs n >= clients * minimum.
    """
    generator = rng.numpy_stream(seed, "partition")
    for _ in range(_DRAWS):
        client_of = np.zeros(len(labels), np.int64)
        for label in np.unique(labels):
            members = generator.permutation(np.flatnonzero(labels == label))
            shares = generator.dirichlet(np.full(clients, alpha))
            ends = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            client_of[members] = np.searchsorted(ends, np.arange(len(members)), side="right")
        counts = np.bincount(client_of, minlength=clients)
        if counts.min() >= minimum:
            break
    while counts.min() < minimum:
        poor, rich = int(counts.argmin()), int(counts.argmax())
        moved = generator.choice(np.flatnonzero(client_of == rich))
        client_of[moved] = poor
        counts = np.bincount(client_of, minlength=clients)
    return tuple(np.flatnonzero(client_of == client) for client in range(clients))


def deal_owners(values: Sequence[str], lengths: Ints, clients: int, what: str) -> tuple[Ints, ...]:
    """All documents with the same value to the same client.

    With 0 clients every value has its own, in alphabetical order. Otherwise values are dealt by size in tokens, the largest
    first, each to the client that has least so far. DataError with fewer values than clients; `what` names them.
    """
    names, owner_of = np.unique(np.array(values, dtype=object), return_inverse=True)
    client_count = clients or len(names)
    if len(names) < client_count:
        raise DataError(
            f"{client_count} clients, but only {len(names)} different values of {what}.",
            f"Set clients.count to at most {len(names)}, or use another partition.",
        )
    client_of = np.arange(len(names))
    if clients:
        tokens = np.bincount(owner_of, weights=lengths)
        least = [(0.0, client) for client in range(clients)]
        for owner in np.argsort(-tokens, kind="stable"):
            load, client = heapq.heappop(least)
            client_of[owner] = client
            heapq.heappush(least, (load + tokens[owner], client))
    return tuple(np.flatnonzero(client_of[owner_of] == client) for client in range(client_count))


def owner_names(values: Sequence[str], parts: Sequence[Ints]) -> tuple[str, ...]:
    """Each client by the owner of most of its documents, and how many others it has."""
    names = []
    for part in parts:
        (first, _), *others = Counter(values[index] for index in part).most_common()
        shown = first or "(blank)"
        names.append(f"{shown} and {len(others)} other{'s' * (len(others) > 1)}" if others else shown)
    return tuple(names)
