"""The seam of synchronisation: whether a round ends with an aggregation, or the clients go on from where they are.

Axes: n participants, p adapter parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from torch import Tensor

State: TypeAlias = Mapping[str, object]


@dataclass(frozen=True)
class Decision:
    """Whether to aggregate now, the next state (plain JSON), and figures for the journal."""

    aggregate: bool
    state: State
    metrics: Mapping[str, float]


class Synchronisation(ABC):
    """A rule as a value. `report_bytes` is what each client sends for the decision (0: nothing)."""

    references: ClassVar[tuple[str, ...]] = ()
    always: ClassVar[bool] = False

    @property
    def report_bytes(self) -> int:
        """Bytes of a client's report in a round."""
        return 0

    def init(self) -> State:
        """The state before the first round."""
        return {}

    @abstractmethod
    def decide(self, drifts: Tensor, weights: Tensor, state: State) -> Decision:
        """From the drift of every participant [n p] since the last aggregation and its share of the tokens [n] (float64, sums to one).

        A rule that works on sketches makes them here from `drifts`; only what `report_bytes` declares may be used of a client's front.
        """
