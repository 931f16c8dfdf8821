"""The seam of aggregation rules: the participants' adapters become the next global adapter.

Axes: n participants, p adapter parameters (columns as the layout names them).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from splitft.errors import AdapterError
from splitft.lora import Layout

# Named tensors, so that a checkpoint can hold them; empty for a rule without memory.
State: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class Updates:
    """What the participants of a round contribute: all their adapters, front from the client and back from its session.

    `clients` ascending, `tokens` [n] the trained tokens behind each, `values` [n p] float32 on the CPU.
    """

    clients: tuple[int, ...]
    tokens: tuple[int, ...]
    values: Tensor
    layout: Layout

    def weights(self) -> Tensor:
        """Each participant's share of the tokens [n], float64. Raises AdapterError when nothing was trained."""
        tokens = torch.tensor(self.tokens, dtype=torch.float64)
        if len(self.tokens) == 0 or bool((tokens < 0).any()) or float(tokens.sum()) <= 0:
            raise AdapterError(
                f"the round's token counts are {list(self.tokens)}.", "at least one participant must train at least one token."
            )
        return tokens / tokens.sum()


class Aggregator(ABC):
    """A rule as a value: `init` gives its state, `merge` takes and returns it. Independent of the order of participants."""

    references: ClassVar[tuple[str, ...]] = ()

    def init(self, layout: Layout) -> State:
        """The state before the first round."""
        return {}

    @abstractmethod
    def merge(self, before: Tensor, updates: Updates, state: State) -> tuple[Tensor, State]:
        """The next global adapter [p] from the one the round started with and the updates. Raises AdapterError for values not finite."""


def require_finite(updates: Updates) -> None:
    """AdapterError naming the first client whose adapters hold NaN or infinity."""
    good = torch.isfinite(updates.values).all(1)
    if not bool(good.all()):
        client = updates.clients[int((~good).nonzero()[0])]
        raise AdapterError(f"the update of client {client} holds NaN or infinity.", "lower train.learning_rate, or set train.clip_norm.")
