"""Policy `whole`: every client holds the whole model, so nothing is split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from splitft.adapt.base import Policy, State
from splitft.adapt.cost import CostModel
from splitft.errors import ConfigError
from splitft.types import ModelShape, Observation, Profile


@dataclass(frozen=True)
class Whole(Policy):
    """Plain federated fine-tuning: each client has every block and the exit, and only adapters travel.

    The baseline a split is compared with (FedLoRA, local training, centralised training); needs `split.labels = "client"`.
    """

    references: ClassVar[tuple[str, ...]] = ("1602.05629",)

    def init(self, shape: ModelShape, profiles: Sequence[Profile], costs: Sequence[CostModel]) -> State:
        if not costs[0].exit_on_client:
            raise ConfigError('policy "whole" keeps the exit on the client, split.labels is "server".', 'Set split.labels = "client".')
        every = len(shape.blocks) - costs[0].tail_blocks
        if costs[0].deepest_cut < every:
            raise ConfigError(
                f'policy "whole" puts all {len(shape.blocks)} blocks on the client, split.maximum_cut is {costs[0].maximum_cut}.',
                "Set split.maximum_cut = 0.",
            )
        return {"cuts": [every] * len(profiles)}

    def plan(
        self, round_index: int, participants: Sequence[int], observations: Sequence[Observation], state: State
    ) -> tuple[dict[int, int], State]:
        cuts = state["cuts"]
        assert isinstance(cuts, list)
        return {client: int(cuts[client]) for client in participants}, state
