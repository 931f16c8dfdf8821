"""The seam of rank policies: before every round a policy says how large a rank each adapter of each participant has.

Policies are values, as cut policies are (adapt/base.py): plain JSON state in, plain JSON state out. A rank is at most that of the
layout (`lora.rank`); 0 leaves a projection without an adapter for that client and round.

Axes: e entries of the layout (adapted projections, sorted by block).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeAlias

from splitft.adapt.cost import CostModel
from splitft.lora import Layout
from splitft.types import Profile

State: TypeAlias = Mapping[str, object]


class RankPolicy(ABC):
    """Decides every participant's ranks, round by round. Final subclasses are frozen dataclasses; fields are their configuration.

    `uniform`: every client always has the layout's own ranks, so any aggregation rule will do.
    """

    references: ClassVar[tuple[str, ...]] = ()
    uniform: ClassVar[bool] = False

    @abstractmethod
    def init(self, layout: Layout, profiles: Sequence[Profile], costs: Sequence[CostModel]) -> State:
        """The state before the first round; `profiles` and `costs` have one entry per client, in client order.

        Raises ConfigError for fields that do not suit this layout, ResourceError when a budget holds no adapter at all.
        """

    @abstractmethod
    def plan(
        self, round_index: int, cuts: Mapping[int, int], importance: Sequence[float], layout: Layout, state: State
    ) -> tuple[dict[int, tuple[int, ...]], State]:
        """Ranks [e] of every participant (the keys of `cuts`, which has their cuts in this round), and the next state.

        `importance` [e] is what the round before gave (empty in the first): Frobenius norm of the frozen weight times the norm of
        what the round changed in the global product B A of that entry. Equal arguments give equal answers.
        """
