"""The seam of aggregation rules: the participants' adapters become the next global adapter.

Axes: n participants, p adapter parameters (columns as the layout names them).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from splitft.errors import AdapterError
from splitft.lora import Layout
from splitft.lowrank import truncate
from splitft.types import Factors, Key

# Named tensors, so that a checkpoint can hold them; empty for a rule without memory.
State: TypeAlias = Mapping[str, Tensor]
# How the tensor of a guarded rule's state is called that says how many releases of the merge to come may have left and were never
# committed: they are counted with it.
LEFT = "private.left"


class Rows(Protocol):
    """Adapters [n p] that lie where they were trained, on other machines perhaps: summed there, or brought here."""

    def __len__(self) -> int: ...

    def chosen(self, rows: Sequence[int]) -> Rows:
        """These rows, in this order."""

    def weighted_sum(self, weights: Sequence[float]) -> Tensor:
        """The sum [p] of weight times row, float64, in an order that does not depend on who adds."""

    def fetch(self) -> Tensor:
        """All rows [n p] float32."""


@dataclass(frozen=True)
class Updates:
    """What the participants of a round contribute: all their adapters, front from the client and back from its session.

    `clients` ascending, `tokens` [n] the trained tokens behind each, `values` [n p] float32 on the CPU. A rank below the layout's is
    padded with zeros: `ranks` [n entries] int64 says how many rows of A and columns of B are a client's own (None: all). `sent` [n p]
    says which values arrived (None: all); a value that did not arrive must not count. Where `kept` is given the rows lie elsewhere and
    `values` is [0 p] until they are `fetched`; only a rule that is `linear` is handed updates like that.
    """

    clients: tuple[int, ...]
    tokens: tuple[int, ...]
    values: Tensor
    layout: Layout
    ranks: Tensor | None = None
    sent: Tensor | None = None
    kept: Rows | None = None

    def fetched(self) -> Updates:
        """The same with the rows here."""
        return self if self.kept is None else replace(self, values=self.kept.fetch(), kept=None)

    def mean(self) -> Tensor:
        """The rows' mean [p], weighted by tokens: summed in float64, here in client order, and rounded to float32 once.

        Raises AdapterError for values that are not finite, and when nothing was trained.
        """
        if self.kept is None:
            require_finite(self)
            return weighted_sum(self.weights().tolist(), self.values).float()
        total = self.kept.weighted_sum(self.weights().tolist())
        if not bool(torch.isfinite(total).all()):
            require_finite(self.fetched())  # says whose they are; float32 values that are finite have a finite sum
        return total.float()

    def weights(self) -> Tensor:
        """Each participant's share of the tokens [n], float64. Raises AdapterError when nothing was trained."""
        tokens = torch.tensor(self.tokens, dtype=torch.float64)
        if len(self.tokens) == 0 or bool((tokens < 0).any()) or float(tokens.sum()) <= 0:
            raise AdapterError(
                f"the round's token counts are {list(self.tokens)}.", "at least one participant must train at least one token."
            )
        return tokens / tokens.sum()


@dataclass(frozen=True)
class Merged:
    """The outcome of a merge: the next global adapter [p] and the rule's state.

    `folded`: factors whose product, times the layout's scale of the key, is added to the frozen weight once and for all. `metrics` go
    into the journal as they are (`discarded_energy`: share of the squared norm of the exact mean that truncation lost).
    """

    adapters: Tensor
    state: State
    folded: Mapping[Key, Factors] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class Aggregator(ABC):
    """A rule as a value: `init` gives its state, `merge` takes and returns it. Independent of the order of participants.

    `unequal_ranks`: clients may train at different ranks. `folds`: the rule changes the frozen weights.
    `partial_uploads`: it understands `Updates.sent`. `resets`: every merge leaves fresh adapters that clients can make themselves.
    `linear`: of whole uploads it needs nothing but their `Updates.mean`, so rows may stay where they were trained.
    `guarded`: what it promises holds for the clients' own updates only, so no rule that changes or compares updates may stand outside it;
    and it has a budget, of which every release takes its part, whether its round is committed or not (LEFT in its state).
    """

    references: ClassVar[tuple[str, ...]] = ()
    unequal_ranks: ClassVar[bool] = False
    folds: ClassVar[bool] = False
    partial_uploads: ClassVar[bool] = False
    resets: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    guarded: ClassVar[bool] = False

    @property
    def segments(self) -> int:
        """Into how many segments an upload is divided; a client uploads one of them a round, in turn."""
        return 1

    @property
    def least_participants(self) -> int:
        """The fewest updates with trained tokens that this rule can work with."""
        return 1

    def init(self, layout: Layout) -> State:
        """The state before the first round."""
        return {}

    def trained(self, layout: Layout) -> Tensor | None:
        """Which columns [p] (bool) clients train; the others stay as they were before the first round and never travel. None: all."""
        return None

    def distribute(self, layout: Layout, row: Tensor, ranks: Tensor) -> tuple[Tensor, float]:
        """What a client with these ranks [entries] starts from: the global adapter [p] brought down to them, and the share of its energy
        that is lost. The best approximation of every key's product unless a rule says otherwise."""
        return truncate(layout, row, ranks)

    @abstractmethod
    def merge(self, before: Tensor, updates: Updates, state: State) -> Merged:
        """The next global adapter from the one [p] the round started with and the updates.

        Raises AdapterError for values that are not finite, and when nothing was trained.
        """


def weighted_sum(weights: Sequence[float], values: Tensor, before: Tensor | None = None) -> Tensor:
    """The sum [p] of weight times row of `values` [n p], in float64 and in their order; `before` [p] is what it goes on from."""
    total = torch.zeros(values.shape[1], dtype=torch.float64) if before is None else before.clone()
    wide = torch.empty_like(total)  # one for all rows: fresh memory for each would take longer than the sum
    for weight, row in zip(weights, values, strict=True):
        total.add_(wide.copy_(row), alpha=weight)
    return total


def require_finite(updates: Updates) -> None:
    """AdapterError naming the first client whose adapters hold NaN or infinity."""
    for client, row in zip(updates.clients, updates.values, strict=True):
        # A norm that is finite is the quicker proof; one that is not may have overflowed.
        if not math.isfinite(float(torch.linalg.vector_norm(row))) and not bool(torch.isfinite(row).all()):
            raise AdapterError(
                f"the update of client {client} holds NaN or infinity.", "lower train.learning_rate, or set train.clip_norm."
            )
