"""The seam of aggregation rules: the participants' adapters become the next global adapter.

Axes: n participants, p adapter parameters (columns as the layout names them).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from splitft.errors import AdapterError
from splitft.lora import Layout
from splitft.lowrank import truncate
from splitft.types import Factors, Key

# Named tensors, so that a checkpoint can hold them; empty for a rule without memory.
State: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class Updates:
    """What the participants of a round contribute: all their adapters, front from the client and back from its session.

    `clients` ascending, `tokens` [n] the trained tokens behind each, `values` [n p] float32 on the CPU. A rank below the layout's is
    padded with zeros: `ranks` [n entries] int64 says how many rows of A and columns of B are a client's own (None: all). `sent` [n p]
    says which values arrived (None: all); a value that did not arrive must not count.
    """

    clients: tuple[int, ...]
    tokens: tuple[int, ...]
    values: Tensor
    layout: Layout
    ranks: Tensor | None = None
    sent: Tensor | None = None

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
    """

    references: ClassVar[tuple[str, ...]] = ()
    unequal_ranks: ClassVar[bool] = False
    folds: ClassVar[bool] = False
    partial_uploads: ClassVar[bool] = False
    resets: ClassVar[bool] = False

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


def require_finite(updates: Updates) -> None:
    """AdapterError naming the first client whose adapters hold NaN or infinity."""
    good = torch.isfinite(updates.values).all(1)
    if not bool(good.all()):
        client = updates.clients[int((~good).nonzero()[0])]
        raise AdapterError(f"the update of client {client} holds NaN or infinity.", "lower train.learning_rate, or set train.clip_norm.")
