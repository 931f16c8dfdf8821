"""The Ray engine = the in-process engine: bit for bit with the same threads and cohorts, for any number of actors, whoever is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'splitft[ray]'")

import numpy as np
import ray
import torch

from splitft.aggregate.average import Average
from splitft.aggregate.base import Updates
from splitft.aggregate.fed_avgm import FedAvgM
from splitft.aggregate.freeze_a import FreezeA
from splitft.aggregate.median import Median
from splitft.aggregate.zero_pad import ZeroPad
from splitft.engine.merging import merge, updates_of
from splitft.engine.ray_executor import Crew, RayExecutor
from splitft.engine.ray_rows import KeptRows
from splitft.engine.settings import Federation, RoundResult, same_start
from splitft.errors import AdapterError
from splitft.types import RoundPlan

from .ray_scenes import blueprint, five_clients, in_one_process, plans, rows_of, same, trained

pytestmark = pytest.mark.usefixtures("local_ray")


def start(given: Federation, actors: int, in_place: bool = True, in_order: bool = True, folds: bool = False) -> RayExecutor:
    return RayExecutor(given, blueprint(given, folds), Crew(actors, 1, 0.4), in_place, in_order)


@pytest.fixture(scope="module")
def given() -> Federation:
    return five_clients()


@pytest.fixture(scope="module")
def two(given: Federation) -> Iterator[RayExecutor]:
    made = start(given, 2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def kept(given: Federation, two: RayExecutor) -> RoundResult:
    return trained(two, given)[0]


def test_rounds_are_those_of_one_process(given: Federation, two: RayExecutor) -> None:
    """Moments are kept, so the second round also shows that states come and go whole."""
    same(trained(two, given, rounds=2), in_one_process(given, rounds=2))


def test_unequal_steps_and_rows_brought_here(given: Federation, two: RayExecutor) -> None:
    steps = (1, 3, 2, 3, 1)
    result = trained(two, given, steps=steps)
    same(result, in_one_process(given, steps=steps))
    two.in_place = False
    (fetched,) = trained(two, given, steps=steps)
    two.in_place = True
    assert fetched.kept is None
    same([fetched], result)


@pytest.mark.parametrize("rule", [Average(), FreezeA(), ZeroPad(), FedAvgM(momentum=0.5), Median()], ids=lambda rule: type(rule).__name__)
def test_merges_are_those_of_one_process(given: Federation, kept: RoundResult, rule: Average) -> None:
    """Linear rules on sums made where the rows lie, others on the rows; both bit for bit, also without a client that was lost."""
    (wanted,) = in_one_process(given)
    for contributes in ([True] * 5, [True, False, True, True, False]):
        state = rule.init(given.layout)
        here, there = (updates_of(given, one, contributes) for one in (wanted, kept))
        assert here is not None
        assert there is not None
        assert there.kept is not None
        assert there.values.shape[0] == 0
        found, expected = (merge(rule, given.start, one, state, given.split) for one in (there, here))
        assert torch.equal(found.adapters, expected.adapters)
        assert found.metrics == expected.metrics


@pytest.mark.slow
def test_a_tree_rounds_the_same_for_any_number_of_actors(given: Federation, kept: RoundResult) -> None:
    one = start(given, 1)
    (alone,) = trained(one, given)
    assert isinstance(kept.kept, KeptRows)
    assert isinstance(alone.kept, KeptRows)
    weights = [0.11, 0.23, 0.31, 0.15, 0.2]
    in_order = kept.kept.weighted_sum(weights)
    trees = [replace(rows, in_order=False).weighted_sum(weights) for rows in (kept.kept, alone.kept)]
    assert torch.equal(alone.kept.weighted_sum(weights), in_order)
    assert torch.equal(*trees)
    torch.testing.assert_close(trees[0], in_order, rtol=1e-12, atol=1e-15)
    values = rows_of(kept).double()
    leaves = [weights[0] * values[0] + weights[1] * values[1], weights[2] * values[2] + weights[3] * values[3], weights[4] * values[4]]
    torch.testing.assert_close(trees[0], leaves[0] + leaves[1] + leaves[2], rtol=1e-14, atol=1e-16)
    one.close()


def test_a_value_that_is_not_finite_is_reported_with_its_client(given: Federation, kept: RoundResult) -> None:
    class Broken:
        def __len__(self) -> int:
            return 2

        def chosen(self, rows: object) -> Broken:
            return self

        def weighted_sum(self, weights: object) -> torch.Tensor:
            return torch.full((given.layout.parameters,), float("nan"), dtype=torch.float64)

        def fetch(self) -> torch.Tensor:
            return torch.stack([given.start, given.start * float("nan")])

    updates = Updates((3, 8), (1, 1), torch.zeros(0, given.layout.parameters), given.layout, kept=Broken())
    with pytest.raises(AdapterError, match="client 8"):
        Average().merge(given.start, updates, {})


def command_of(pid: int) -> bytes:
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_bytes() if path.exists() else b""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks up processes as Linux shows them")
def test_a_killed_actor_changes_nothing_but_the_notices(given: Federation, two: RayExecutor) -> None:
    """Killed in the middle of a round: its cohort is trained again by another, and a fresh one takes its place."""
    steps, killed = (120,) * 5, list[int]()

    def on_step(count: int) -> None:
        alive = [pid for pid, _ in two.pool.built if not killed and b"CohortWorker" in command_of(pid)]
        for pid in alive[:1]:
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    result = two.train(RoundPlan(1, plans(steps)), 0, same_start(given.start), {}, on_step)
    same([result], in_one_process(given, steps=steps))
    (notice,) = result.notices
    assert notice.startswith("the cohort of client")
    assert "met the end of its Ray actor and was done again by another, with the same numbers" in notice


def until_lost(reference: object) -> None:
    """Ray takes a moment to notice."""
    for _ in range(600):
        try:
            ray.get(reference)
        except ray.exceptions.ObjectLostError:
            return
        time.sleep(0.05)
    raise AssertionError("the object is still there")


@pytest.mark.slow
def test_rows_lost_with_their_machine_are_trained_again(given: Federation, two: RayExecutor) -> None:
    """The object of an owner that is gone is lost, as one on a machine that is gone."""

    class Owner:
        def make(self) -> list[object]:
            return [ray.put(np.zeros((2, 100_000), np.float32))]

    owner = ray.remote(Owner).options(num_cpus=0).remote()
    (orphan,) = ray.get(owner.make.remote())
    ray.kill(owner)
    until_lost(orphan)
    (result,) = trained(two, given)
    assert isinstance(result.kept, KeptRows)
    wanted = result.kept.weighted_sum([0.2] * 5)
    result.kept.finished[1] = replace(result.kept.finished[1], array=orphan)
    assert torch.equal(result.kept.weighted_sum([0.2] * 5), wanted)
    assert any("machine was lost" in text for text in two.pool.take_notices())


@pytest.mark.slow
def test_folded_weights_reach_the_actors() -> None:
    mine, other = five_clients(), five_clients()
    executor = start(mine, 1, folds=True)
    before = trained(executor, mine)
    for federation in (mine, other):
        with torch.no_grad():
            for entry in federation.layout.entries:
                federation.split.weight(entry.key).add_(0.01)
    after, wanted = trained(executor, mine), in_one_process(other)
    same(after, wanted)
    assert not torch.equal(rows_of(before[0]), rows_of(after[0]))
    executor.close()
