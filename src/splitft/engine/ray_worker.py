"""What runs inside an actor: a federation of its own, rebuilt from shared arrays, that trains one cohort after another.

Nothing here knows Ray: arguments come as values, with arrays that may be mapped read-only, and results go back as values. An actor keeps
no state between cohorts but the model, so a cohort gives the same numbers wherever, and however often, it is trained.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from splitft.aggregate.base import weighted_sum
from splitft.data.base import ClientData
from splitft.data.order import BatchOrder
from splitft.engine.adapters import Facts
from splitft.engine.closing import restore_weights
from splitft.engine.cohort import CohortExecutor
from splitft.engine.ledger import Counts, Ledger
from splitft.engine.ray_weights import Stored, Weights, place
from splitft.engine.settings import ClientState, Federation, RoundResult, TrainSettings
from splitft.engine.streams import flattened, unflattened
from splitft.lora import Layout
from splitft.split import SplitModel
from splitft.types import Plan, RoundPlan

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
# A client's state with arrays for tensors.
State = Mapping[str, Any]


@dataclass(frozen=True)
class Blueprint:
    """All of a federation but its weights. `skeleton` builds the split model without tensors, or refuses to. `writable`: the rule folds
    changes into the adapted weights, so an actor has its own copy of those."""

    skeleton: Callable[[], SplitModel]
    layout: Layout
    clients: tuple[ClientData, ...]
    orders: tuple[BatchOrder, ...]
    settings: TrainSettings
    vocabulary: int
    device: str
    start: Tensor
    trained: Tensor | None
    cohort_size: int
    writable: bool

    @classmethod
    def of(cls, federation: Federation, skeleton: Callable[[], SplitModel], cohort_size: int, writable: bool) -> Blueprint:
        return cls(
            skeleton,
            federation.layout,
            federation.clients,
            federation.orders,
            federation.settings,
            federation.vocabulary,
            federation.device.type,
            federation.start,
            federation.trained,
            cohort_size,
            writable,
        )


@dataclass(frozen=True)
class Task:
    """One cohort of a round. `starts`: for each plan, which of the rows that come with the task it begins with. `size`: how many clients
    go through the model together (0: as the blueprint says)."""

    round: int
    first_step: int
    plans: tuple[Plan, ...]
    starts: tuple[int, ...]
    states: Mapping[int, State]
    size: int = 0


@dataclass(frozen=True)
class Done:
    """What a cohort's training gave, adapters apart."""

    plans: tuple[Plan, ...]
    tokens: list[int]
    targets: list[int]
    step_losses: list[list[float]]
    bytes: dict[int, Counts]
    states: dict[int, State]
    facts: dict[int, Facts]

    def result(self, values: Tensor) -> RoundResult:
        """As the in-process engine has it, with these adapters."""
        ledger = Ledger()
        ledger.clients = self.bytes
        states = {client: unpacked(state) for client, state in self.states.items()}
        return RoundResult(self.plans, values, self.tokens, self.step_losses, ledger, states, self.targets, facts=self.facts)


@dataclass(frozen=True)
class Folded:
    """The adapted weights as an aggregation rule has left them, by key; `version` 0 is as they were loaded."""

    version: int
    weights: Mapping[str, Stored]


def packed(state: ClientState) -> State:
    """A client's state with arrays for tensors, which travel without another copy."""
    fields = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in vars(state).items()}
    if state.streams is not None:
        fields["streams"] = dict(state.streams.forms), {name: array_of(value) for name, value in flattened(state.streams).items()}
    return fields


def unpacked(state: State) -> ClientState:
    """A client's state; the arrays are copied, since they may lie in memory that is not to be written to."""
    fields: dict[str, Any] = {name: torch.tensor(value) if isinstance(value, np.ndarray) else value for name, value in state.items()}
    if fields.get("streams") is not None:
        forms, arrays = fields["streams"]
        fields["streams"] = unflattened(forms, {name: tensor_of(*array) for name, array in arrays.items()})
    return ClientState(**fields)


def array_of(tensor: Tensor) -> tuple[npt.NDArray[np.uint8], str, tuple[int, ...]]:
    """A tensor of any type as bytes, its type and its shape: NumPy has no bfloat16."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def tensor_of(data: npt.NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `array_of`, in memory of its own."""
    return torch.tensor(data).view(getattr(torch, dtype)).reshape(shape)


class CohortWorker:
    """An actor's inside. `build` first; then any of the others, any number of times."""

    def build(self, blueprint: Blueprint, weights: Weights, threads: int) -> tuple[int, int]:
        """Set up the federation; this process's id, and the bytes of weights it holds a copy of."""
        torch.set_num_threads(threads)
        device = torch.device(blueprint.device)
        split = blueprint.skeleton()
        place(split, weights, device)
        copied = 0 if device.type == "cpu" else weights.size_bytes
        if blueprint.writable and not copied:
            for entry in blueprint.layout.entries:
                weight = split.weight(entry.key)
                weight.data = weight.data.clone()
                copied += weight.numel() * weight.element_size()
        self.federation = Federation(
            split,
            blueprint.layout,
            blueprint.clients,
            blueprint.orders,
            blueprint.settings,
            blueprint.vocabulary,
            device,
            blueprint.start,
            blueprint.trained,
        )
        self.executor = CohortExecutor(self.federation, blueprint.cohort_size)
        self.folded = 0
        return os.getpid(), copied

    def train(self, task: Task, rows: Floats, folded: Folded) -> tuple[Done, Floats]:
        """All local steps of a cohort that starts from `rows` [u p]; its adapters [k p] apart, since they may stay where they are."""
        if folded.version != self.folded:
            restore_weights(self.federation, {key: stored.tensor() for key, stored in folded.weights.items()})
            self.folded = folded.version
        self.executor.size = task.size or self.executor.size
        given = torch.tensor(rows)
        row_of = {plan.client: given[number] for plan, number in zip(task.plans, task.starts, strict=True)}
        states = {client: unpacked(state) for client, state in task.states.items()}
        plan = RoundPlan(task.round, task.plans)
        result = self.executor.train_cohort(task.plans, plan, task.first_step, lambda one: row_of[one.client], states, lambda count: None)
        after = {client: packed(state) for client, state in result.states.items()}
        done = Done(result.plans, result.tokens, result.targets, result.step_losses, result.ledger.clients, after, result.facts)
        return done, result.values.numpy()

    def weigh(self, values: Floats, rows: Sequence[int], weights: Sequence[float], before: Doubles | None) -> tuple[None, Doubles]:
        """The weighted sum [p] of some of a cohort's adapters [k p], by itself or added row by row to the one `before` it."""
        total = None if before is None else torch.tensor(before)
        return None, weighted_sum(weights, torch.tensor(values[list(rows)]), total).numpy()

    def add(self, left: Doubles, right: Doubles) -> tuple[None, Doubles]:
        """Two sums [p] in one."""
        return None, left + right
