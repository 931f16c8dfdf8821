"""Rank policy `uniform`: the configured rank everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from splitft.adapt.cost import CostModel
from splitft.lora import Layout
from splitft.ranks.base import RankPolicy, State
from splitft.types import Profile


@dataclass(frozen=True)
class Uniform(RankPolicy):
    """Every adapter of every client has rank `lora.rank`. The default, and what stock federated LoRA does."""

    references: ClassVar[tuple[str, ...]] = ("2106.09685",)
    uniform: ClassVar[bool] = True

    def init(self, layout: Layout, profiles: Sequence[Profile], costs: Sequence[CostModel]) -> State:
        return {}

    def plan(
        self, round_index: int, cuts: Mapping[int, int], importance: Sequence[float], layout: Layout, state: State
    ) -> tuple[dict[int, tuple[int, ...]], State]:
        own = tuple(entry.rank for entry in layout.entries)
        return dict.fromkeys(cuts, own), state
