from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from splitft.data.base import Ints, Partition
from splitft.data.partitions.by_column import ByColumn
from splitft.data.partitions.dirichlet import Dirichlet
from splitft.data.partitions.draw import column_values
from splitft.data.partitions.files import Files
from splitft.data.partitions.iid import Iid
from splitft.data.partitions.length_dirichlet import LengthDirichlet, length_buckets
from splitft.errors import ConfigError, DataError

LENGTHS: Ints = np.arange(1, 301)
LABELS = [{"label": "abc"[index % 3]} for index in range(300)]
OWNERS = [f"file{index % 7}" for index in range(300)]


def split(partition: Partition, clients: int = 5, seed: int = 0) -> list[list[int]]:
    return [part.tolist() for part in partition.split(LENGTHS, LABELS, OWNERS, clients, seed)]


def spread(parts: list[list[int]], label_of: Callable[[int], int], labels: int) -> float:
    """Mean total-variation distance between a part's label shares and equal shares."""
    shares = [np.bincount([label_of(index) for index in part], minlength=labels) / len(part) for part in parts]
    return float(np.mean([np.abs(share - 1 / labels).sum() / 2 for share in shares]))


def test_iid_gives_equal_numbers() -> None:
    assert sorted(map(len, split(Iid(), clients=7))) == [42] * 1 + [43] * 6


@pytest.mark.parametrize("partition", [Iid(), Dirichlet("label"), LengthDirichlet()])
def test_drawn_partitions_follow_the_seed(partition: Partition) -> None:
    assert split(partition, seed=1) == split(partition, seed=1)
    assert split(partition, seed=1) != split(partition, seed=2)


@pytest.mark.parametrize("partition", [ByColumn("label"), Files()])
def test_dealt_partitions_draw_nothing(partition: Partition) -> None:
    assert split(partition, clients=3, seed=1) == split(partition, clients=3, seed=2)


def test_small_alpha_means_unequal_labels() -> None:
    def skew(alpha: float) -> float:
        return float(np.mean([spread(split(Dirichlet("label", alpha), seed=seed), lambda index: index % 3, 3) for seed in range(5)]))

    assert skew(0.05) > 0.4 > 0.2 > skew(1000) > 0


def test_small_alpha_means_unequal_lengths() -> None:
    buckets = length_buckets(LENGTHS, 10)

    def skew(alpha: float) -> float:
        parts = (split(LengthDirichlet(alpha), seed=seed) for seed in range(5))
        return float(np.mean([spread(part, lambda index: int(buckets[index]), 10) for part in parts]))

    assert skew(0.05) > 0.6 > 0.1 > skew(10_000)


def test_the_minimum_holds_even_when_draws_never_reach_it() -> None:
    parts = split(LengthDirichlet(alpha=0.001, minimum=9), clients=30)
    assert min(map(len, parts)) >= 9
    assert sorted(index for part in parts for index in part) == list(range(300))


def test_length_buckets_are_quantiles_and_keep_equal_lengths_together() -> None:
    assert np.bincount(length_buckets(LENGTHS, 10)).tolist() == [30] * 10
    assert length_buckets(np.array([5, 1, 5, 5, 5, 9]), 3).tolist() == [1, 0, 1, 1, 1, 2]
    assert len(set(length_buckets(np.array([5] * 50 + [9] * 2), 10).tolist())) == 2


def test_one_client_has_everything() -> None:
    for partition in (Iid(), Dirichlet("label"), LengthDirichlet(), ByColumn("label"), Files()):
        assert split(partition, clients=1) == [list(range(300))]


def test_owners_are_dealt_largest_first() -> None:
    lengths = np.array([10, 1, 6, 5, 4])
    parts = Files().split(lengths, [{}] * 5, ["big", "tiny", "b", "c", "d"], 2, 0)
    assert [part.tolist() for part in parts] == [[0, 4], [1, 2, 3]]


def test_without_a_number_every_owner_is_a_client() -> None:
    parts = ByColumn("label").split(LENGTHS, LABELS, OWNERS, 0, 0)
    assert ByColumn("label").client_names(parts, LABELS, OWNERS) == ("a", "b", "c")
    assert parts[1].tolist() == list(range(1, 300, 3))
    assert len(split(Files(), clients=0)) == 7


def test_names_tell_how_many_owners_share_a_client() -> None:
    owners = ["x", "x", "y", "z", ""]
    parts = (np.array([0, 1]), np.array([2, 3, 4]))
    assert Files().client_names(parts, [], owners) == ("x", "y and 2 others")
    assert Files().client_names((np.array([0, 2]), np.array([4])), [], owners) == ("x and 1 other", "(blank)")
    assert Iid().client_names(parts, [], owners) == ("client-0", "client-1")


@pytest.mark.parametrize("partition", [ByColumn("label"), Files()])
def test_more_clients_than_owners_are_refused(partition: Partition) -> None:
    with pytest.raises(DataError, match=r"10 clients, but only [37] different values of .*clients\.count to at most [37]"):
        split(partition, clients=10)


@pytest.mark.parametrize("partition", [Iid(), Dirichlet("label"), LengthDirichlet()])
def test_more_clients_than_documents_are_refused(partition: Partition) -> None:
    with pytest.raises(DataError, match="300 documents cannot give each of 301 clients at least"):
        split(partition, clients=301)
    with pytest.raises(ConfigError, match=r"clients\.count is 0"):
        split(partition, clients=0)


@pytest.mark.parametrize("partition", [Dirichlet("speaker"), ByColumn("speaker")])
def test_a_missing_column_is_named(partition: Partition) -> None:
    assert partition.required_column() == "speaker"
    with pytest.raises(DataError, match="Document 0 has no column 'speaker'; it has: label"):
        split(partition)
    with pytest.raises(DataError, match="Document 1 has no column 'speaker'; it has: none"):
        column_values([{"speaker": "x"}, {}], "speaker")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Dirichlet("label", alpha=0),
        lambda: Dirichlet("label", alpha=float("nan")),
        lambda: Dirichlet(""),
        lambda: ByColumn(""),
        lambda: LengthDirichlet(alpha=-1),
        lambda: LengthDirichlet(buckets=1),
        lambda: LengthDirichlet(minimum=0),
    ],
)
def test_fields_are_checked(make: Callable[[], Partition]) -> None:
    with pytest.raises(ConfigError, match=r"partition\.(alpha|column|buckets|minimum) is"):
        make()
