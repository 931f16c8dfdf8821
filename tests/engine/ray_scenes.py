"""What the tests of the Ray engine share: a federation, its plans, and a skeleton an actor can rebuild."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from splitft.engine.cohort import CohortExecutor
from splitft.engine.ray_worker import Blueprint
from splitft.engine.settings import ClientState, Federation, RoundResult, same_start
from splitft.models.base import Anatomy
from splitft.split import SplitModel
from splitft.types import Plan, RoundPlan

from ..support import federation, split_model

CUTS, COHORT = (1, 2, 3, 1, 2), 2


@dataclass(frozen=True)
class BareModel:
    """Builds a split GPT-2 without tensors from its configuration, as a process does that has none of the files."""

    config: Any
    anatomy: Anatomy

    def __call__(self) -> SplitModel:
        from transformers import GPT2LMHeadModel

        with torch.device("meta"):
            model = GPT2LMHeadModel(self.config)
        return SplitModel(model.eval(), self.anatomy)


def bare_model() -> BareModel:
    split = split_model()
    return BareModel(split.model.config, split.anatomy)


def five_clients(**changes: Any) -> Federation:
    return federation(clients=len(CUTS), keep_moments=True, **changes)


def blueprint(given: Federation, folds: bool = False) -> Blueprint:
    return Blueprint.of(given, bare_model(), COHORT, folds)


def plans(steps: tuple[int, ...] = (2, 2, 2, 2, 2)) -> tuple[Plan, ...]:
    return tuple(Plan(client, cut, count, 3) for client, (cut, count) in enumerate(zip(CUTS, steps, strict=True)))


def trained(executor: Any, given: Federation, rounds: int = 1, steps: tuple[int, ...] = (2, 2, 2, 2, 2)) -> list[RoundResult]:
    """The results of some rounds, each from the first client's adapter after the one before."""
    states: dict[int, ClientState] = {}
    row, results = given.start, []
    for index in range(1, rounds + 1):
        result = executor.train(RoundPlan(index, plans(steps)), 2 * (index - 1), same_start(row), states, lambda count: None)
        states.update(result.states)
        results.append(result)
        row = rows_of(result)[0].clone()
    return results


def in_one_process(given: Federation, rounds: int = 1, steps: tuple[int, ...] = (2, 2, 2, 2, 2)) -> list[RoundResult]:
    return trained(CohortExecutor(replace(given), COHORT), given, rounds, steps)


def rows_of(result: RoundResult) -> Tensor:
    return result.values if result.kept is None else result.kept.fetch()


def same(found: list[RoundResult], wanted: list[RoundResult]) -> None:
    """Bit for bit: adapters, losses, counts, bytes, states."""
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(rows_of(one), rows_of(other))
        assert (one.plans, one.tokens, one.targets, one.step_losses) == (other.plans, other.tokens, other.targets, other.step_losses)
        assert one.ledger.clients == other.ledger.clients
        assert sorted(one.states) == sorted(other.states)
        for client, state in one.states.items():
            for name, value in vars(state).items():
                expected = getattr(other.states[client], name)
                assert torch.equal(value, expected) if isinstance(value, Tensor) else value == expected, (client, name)
