"""What runs inside an actor, called without one: the in-process engine's numbers, bit for bit. Ray is not needed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from splitft.aggregate.base import weighted_sum
from splitft.engine.closing import restore_weights
from splitft.engine.cohort import CohortExecutor
from splitft.engine.ray_weights import store, weights_of
from splitft.engine.ray_worker import CohortWorker, Folded, Task, packed, unpacked
from splitft.engine.settings import ClientState, same_start
from splitft.types import RoundPlan

from .ray_scenes import COHORT, blueprint, five_clients, in_one_process, plans, same

UNTOUCHED = Folded(0, {})


def read_only(row: torch.Tensor) -> np.ndarray:
    array = row[None].numpy().copy()
    array.flags.writeable = False
    return array


def worker(folds: bool = False) -> CohortWorker:
    given = five_clients()
    made = CohortWorker()
    _, copied = made.build(blueprint(given, folds), weights_of(given.split), 1)
    weights = [given.split.weight(entry.key) for entry in given.layout.entries]
    assert copied == (sum(one.numel() * 4 for one in weights) if folds else 0)
    return made


def test_a_cohort_alone_is_the_cohort_of_the_round() -> None:
    given, made = five_clients(), worker()
    group = CohortExecutor(given, COHORT).groups(plans())[0]
    done, values = made.train(Task(1, 0, tuple(group), (0,) * len(group), {}), read_only(given.start), UNTOUCHED)
    wanted = CohortExecutor(given, COHORT).train(RoundPlan(1, tuple(group)), 0, same_start(given.start), {}, lambda count: None)
    same([done.result(torch.tensor(values))], [wanted])


def test_a_worker_remembers_nothing() -> None:
    given, made = five_clients(), worker()
    group = plans()[:2]
    task = Task(1, 0, group, (0, 0), {})
    first, again = (made.train(task, read_only(given.start), UNTOUCHED)[1] for _ in range(2))
    assert np.array_equal(first, again)


def test_each_client_begins_with_its_own_row_and_state() -> None:
    given, made = five_clients(), worker()
    (before,) = in_one_process(given)
    group = plans()[:2]
    rows = before.values[:2].numpy()
    states = {client: packed(state) for client, state in before.states.items()}
    _, values = made.train(Task(2, 2, group, (1, 0), states), rows, UNTOUCHED)
    row_of = {0: before.values[1], 1: before.values[0]}
    wanted = CohortExecutor(given, COHORT).train(
        RoundPlan(2, group), 2, lambda plan: row_of[plan.client], dict(before.states), lambda count: None
    )
    assert torch.equal(torch.tensor(values), wanted.values)


def test_folded_weights_reach_a_worker_and_leave_the_shared_ones_alone() -> None:
    given, made = five_clients(), worker(folds=True)
    changed = {str(entry.key): given.split.weight(entry.key) + 0.01 for entry in given.layout.entries}
    group = plans()[:2]
    folded = Folded(1, {key: store(weight) for key, weight in changed.items()})
    _, values = made.train(Task(1, 0, group, (0, 0), {}), read_only(given.start), folded)
    other = five_clients()
    restore_weights(other, changed)
    wanted = CohortExecutor(other, COHORT).train(RoundPlan(1, group), 0, same_start(given.start), {}, lambda count: None)
    assert torch.equal(torch.tensor(values), wanted.values)
    assert not torch.equal(torch.tensor(values), in_one_process(given)[0].values[:2])


def test_sums_go_on_from_the_sum_before() -> None:
    made, values = CohortWorker(), torch.randn(5, 7)
    weights = [0.1, 0.2, 0.3, 0.25, 0.15]
    _, head = made.weigh(values[:3].numpy(), [0, 1, 2], weights[:3], None)
    _, total = made.weigh(values[3:].numpy(), [0, 1], weights[3:], head)
    assert torch.equal(torch.tensor(total), weighted_sum(weights, values))
    _, tail = made.weigh(values[3:].numpy(), [0, 1], weights[3:], None)
    torch.testing.assert_close(torch.tensor(made.add(head, tail)[1]), torch.tensor(total), rtol=1e-14, atol=1e-16)


def test_a_state_survives_the_journey() -> None:
    state = ClientState(3, 2, torch.ones(4), torch.zeros(4), None, 2, 1, 2)
    back = unpacked(packed(state))
    assert torch.equal(back.first, torch.ones(4))  # type: ignore[arg-type]
    assert replace(back, first=None, second=None) == replace(state, first=None, second=None)
