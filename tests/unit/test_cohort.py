"""engine/cohort.py: who goes together, and how parts become one result without a second copy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from splitft.engine.cohort import CPU_COHORT_TOKENS, CohortExecutor, join
from splitft.engine.ledger import Ledger
from splitft.engine.settings import ClientState, RoundResult, same_start
from splitft.engine.shelf import MemoryShelf
from splitft.types import Plan, RoundPlan

from ..support import federation


def plans(*steps: int) -> list[Plan]:
    return [Plan(client, 1, count, 2) for client, count in enumerate(steps)]


def clients(groups: list[list[Plan]]) -> list[list[int]]:
    return [[one.client for one in group] for group in groups]


def test_cohorts_are_of_even_size_and_none_is_larger_than_allowed() -> None:
    executor = CohortExecutor(federation(), 4)
    assert clients(executor.groups(plans(1, 1, 1, 1, 1))) == [[0, 1], [2, 3, 4]]
    assert clients(executor.groups(plans(1, 1, 1, 1))) == [[0, 1, 2, 3]]
    assert clients(executor.groups([])) == []
    sizes = [len(group) for group in executor.groups(plans(*[1] * 1001))]
    assert (sum(sizes), set(sizes)) == (1001, {3, 4})


def test_clients_with_as_many_steps_go_together() -> None:
    assert clients(CohortExecutor(federation(), 2).groups(plans(1, 9, 1, 9))) == [[1, 3], [0, 2]]


def test_the_size_follows_from_the_tokens_of_a_pass_and_from_memory() -> None:
    fed = federation(length=16)
    by_tokens = CPU_COHORT_TOKENS // (16 * 2)
    assert CohortExecutor(fed).size == CohortExecutor(fed, largest=by_tokens + 1).size == by_tokens
    assert CohortExecutor(fed, largest=3).size == 3
    assert CohortExecutor(fed, 7, largest=3).size == 7  # who sets cohort_size knows


def part(numbers: list[int], states: bool = True) -> RoundResult:
    rows = torch.tensor([[float(number)] * 3 for number in numbers])
    kept = {number: ClientState(number, 1, torch.full((3,), 10.0 + number), torch.zeros(3)) for number in numbers}
    own = tuple(Plan(number, 1, 1, 2) for number in numbers)
    tokens, losses = [number + 1 for number in numbers], [[float(number)] for number in numbers]
    return RoundResult(own, rows, tokens, losses, Ledger(), kept if states else {}, [2 * number for number in numbers])


def test_parts_are_joined_in_client_order_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is put away before the next is made: what the first kept is on the shelf by then."""
    monkeypatch.setattr("splitft.engine.shelf.BLOCK_BYTES", 48)  # the usual block has millions of rows as small as these
    shelf, plan = MemoryShelf(3), RoundPlan(1, tuple(Plan(number, 1, 1, 2) for number in range(4)), lost=frozenset({2}))
    seen = []

    def parts() -> Iterator[RoundResult]:
        yield part([1, 2])
        seen.append(sorted(shelf.places))
        yield part([0, 3])

    joined = join(parts(), plan=plan, shelf=shelf)
    assert seen == [[("first", 1), ("second", 1)]]
    assert [one.client for one in joined.plans] == [0, 1, 2, 3]
    assert joined.values[:, 0].tolist() == [0, 1, 2, 3]
    assert (joined.tokens, joined.targets) == ([1, 2, 3, 4], [0, 2, 4, 6])
    assert joined.step_losses == [[0.0], [1.0], [2.0], [3.0]]
    assert joined.states[1].first is shelf.place("first", 1)
    assert joined.states[2].first is None  # it was lost
    together = join([part([1, 2]), part([0, 3])])
    assert torch.equal(together.values, joined.values)
    assert together.tokens == joined.tokens


def test_the_only_part_is_not_copied() -> None:
    whole = part([0, 1, 2])
    assert join(iter([whole]), plan=RoundPlan(1, whole.plans)).values is whole.values


@pytest.mark.parametrize("lost", range(3))
@pytest.mark.parametrize("server", ["per_client", "shared", "sequential"])
def test_rows_on_a_shelf_are_the_rows_of_old(server: str, lost: int) -> None:
    """Two rounds with kept moments, clients in two cohorts, one of them lost in the second round: as without a shelf."""
    fed = federation(server=server, keep_moments=True)
    found = []
    for shelf in (None, MemoryShelf(fed.layout.parameters)):
        own = type(fed)(**{**vars(fed), "shelf": shelf})
        states: dict[int, ClientState] = {}
        for index in (1, 2):
            chosen = tuple(Plan(client, 1 + client % 2, 2, 3) for client in range(3))
            plan = RoundPlan(index, chosen, lost=frozenset({lost} if index == 2 else ()))
            result = CohortExecutor(own, 2).train(plan, 2 * index - 2, same_start(fed.start), states, lambda count: None)
            states = {**states, **{client: one for client, one in result.states.items() if client not in plan.lost}}
        found.append((result.values, states))
    (values, states), (shelved_values, shelved_states) = found
    assert torch.equal(values, shelved_values)
    assert states.keys() == shelved_states.keys()
    for client, one in states.items():
        other = shelved_states[client]
        assert one.first is not None
        assert one.second is not None
        assert other.first is not None
        assert other.second is not None
        assert torch.equal(one.first, other.first)
        assert torch.equal(one.second, other.second)
        assert one.steps == other.steps
