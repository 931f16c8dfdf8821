"""What every partition promises: disjoint, complete, ascending, repeatable, and a name for every client."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from splitft.data.base import Partition
from splitft.data.partitions.by_column import ByColumn
from splitft.data.partitions.dirichlet import Dirichlet
from splitft.data.partitions.files import Files
from splitft.data.partitions.iid import Iid
from splitft.data.partitions.length_dirichlet import LengthDirichlet
from splitft.errors import DataError

ALPHAS = st.sampled_from([1e-3, 0.1, 1.0, 100.0, 1e6])
MINIMA = st.integers(1, 3)
PARTITIONS: st.SearchStrategy[Partition] = st.one_of(
    st.just(Iid()),
    st.just(Files()),
    st.just(ByColumn("kind")),
    st.builds(Dirichlet, st.just("kind"), ALPHAS, MINIMA),
    st.builds(LengthDirichlet, ALPHAS, st.integers(2, 12), MINIMA),
)
DOCUMENTS = st.lists(st.tuples(st.integers(1, 50), st.sampled_from("abcde"), st.sampled_from("xyz")), min_size=1, max_size=40)


@settings(deadline=None)
@given(PARTITIONS, DOCUMENTS, st.integers(1, 6), st.integers(0, 3))
def test_parts_are_disjoint_complete_and_repeatable(
    partition: Partition, documents: list[tuple[int, str, str]], clients: int, seed: int
) -> None:
    lengths = np.array([length for length, _, _ in documents], np.int64)
    columns = [{"kind": kind} for _, kind, _ in documents]
    owners = [owner for _, _, owner in documents]
    try:
        parts = partition.split(lengths, columns, owners, clients, seed)
    except DataError:
        values = {"files": owners, "by_column": [kind for _, kind, _ in documents]}.get(partition.name)
        available = len(set(values)) if values else len(documents) // getattr(partition, "minimum", 1)
        assert available < clients, "refused though there is enough"
        return
    assert len(parts) == clients
    assert sorted(index for part in parts for index in part.tolist()) == list(range(len(documents)))
    assert all(len(part) >= getattr(partition, "minimum", 1) and (np.diff(part) > 0).all() for part in parts)
    again = partition.split(lengths, columns, owners, clients, seed)
    assert [part.tolist() for part in parts] == [part.tolist() for part in again]
    names = partition.client_names(parts, columns, owners)
    assert len(set(names)) == clients
    for values, name in ((owners, "files"), ([kind for _, kind, _ in documents], "by_column")):
        if partition.name == name:
            assert all(len({client for client, part in enumerate(parts) for i in part if values[i] == value}) == 1 for value in set(values))
