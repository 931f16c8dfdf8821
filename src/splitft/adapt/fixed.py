"""Policy `fixed`: the same cuts in every round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from splitft.adapt.base import Policy, State
from splitft.adapt.choose import choose_cuts
from splitft.adapt.cost import CostModel
from splitft.errors import CheckpointError, ConfigError
from splitft.types import ModelShape, Observation, Profile


@dataclass(frozen=True)
class Fixed(Policy):
    """Every client keeps its cut for the whole run.

    `cuts`: one number for all clients, or one per client in client order. Empty: each client's cut is derived once from the cost
    model (`adapt/choose.py`; `splitft plan` shows the figures behind it). Prefer it as the baseline of every comparison, and
    whenever devices do not change during a run.
    """

    cuts: tuple[int, ...] = ()

    references: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "cuts", tuple(self.cuts))  # configuration files hand over a list
        for position, cut in enumerate(self.cuts):
            if isinstance(cut, bool) or not isinstance(cut, int):
                raise ConfigError(f"policy.cuts[{position}] is {cut!r}; allowed are whole numbers.", "Write cuts such as [2] or [1, 2, 4].")

    def init(self, shape: ModelShape, profiles: Sequence[Profile], costs: Sequence[CostModel]) -> State:
        clients = len(profiles)
        if not self.cuts:
            return {"cuts": [choice.cut for choice in choose_cuts(costs, profiles)]}
        if len(self.cuts) not in (1, clients):
            raise ConfigError(
                f"policy.cuts has {len(self.cuts)} entries for {clients} clients; allowed are one for all or one per client.",
                f"Give 1 or {clients} cuts, or leave policy.cuts empty to have them derived.",
            )
        shallowest, deepest, tail_blocks = costs[0].shallowest_cut, costs[0].deepest_cut, costs[0].tail_blocks  # the same for every client
        problems = tuple(
            f"policy.cuts[{position}] is {cut}; allowed is {shallowest}..{deepest}"
            for position, cut in enumerate(self.cuts)
            if not shallowest <= cut <= deepest
        )
        if problems:
            tail = f", of which {tail_blocks} stay behind the server on the client" if tail_blocks else ""
            bounded = (shallowest, deepest) != (1, len(shape.blocks) - tail_blocks)
            remedy = f"Choose cuts from {shallowest} to {deepest}"
            raise ConfigError(
                f"policy.cuts does not suit {shape.name}, which has {len(shape.blocks)} blocks{tail}: {problems[0]}.",
                f"{remedy}, or change split.minimum_cut and split.maximum_cut." if bounded else f"{remedy}.",
                problems,
            )
        return {"cuts": list(self.cuts if len(self.cuts) == clients else self.cuts * clients)}

    def plan(
        self, round_index: int, participants: Sequence[int], observations: Sequence[Observation], state: State
    ) -> tuple[dict[int, int], State]:
        cuts = state.get("cuts")
        if not isinstance(cuts, list) or any(not 0 <= client < len(cuts) for client in participants):
            raise CheckpointError(
                f"the state of policy 'fixed' has no cut for every participant of {list(participants)}: {dict(state)}.",
                "The checkpoint belongs to a run with another policy or other clients; start a new run.",
            )
        return {client: int(cuts[client]) for client in participants}, state
