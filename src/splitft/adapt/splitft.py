"""Policy `splitft`: the quality rule of the SplitFT paper, as far as it can be known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from splitft.adapt.balance import Window
from splitft.adapt.base import Policy, State, check_number
from splitft.adapt.choose import choose_cuts, fitting_cuts
from splitft.adapt.cost import CostModel
from splitft.adapt.quality import Quality, moved
from splitft.adapt.state import cuts_of, list_of
from splitft.errors import ConfigError
from splitft.types import ModelShape, Observation, Profile


@dataclass(frozen=True)
class SplitFT(Quality, Policy):
    """A client whose text is learnt better than the cohort's gets more blocks, one that is learnt worse gets fewer.

    The paper (Shan et al. 2026, arXiv 2604.26388) publishes no equation. From its abstract and two digests are known: the direction, the
    comparison with the clients' average after each round, a weight per client that changes, a strength gamma. Ours are: the signal
    (improvement over the base model on the client's held-out text, not perplexity), the robust standing in the cohort, the smoothing, the
    dead band, the cool-down, one block per decision, the bounds, the start, and every default. adapt/quality.py derives the rule.

    `start`: every client's first cut, 0 derives it from the cost model as `fixed` does. `gamma`: strength, in shares of the start cut a
    decision and unit of standing (start 6, gamma 0.1, standing 1: 0.6 blocks a decision); 0 never moves. `averaging`, `dead_band`,
    `noise_nats`, `cool_down`, `decide_every`: smoothing of the standing, the standing below which nothing changes, the spread between
    clients below which differences are noise, rounds of rest after a move, rounds between decisions. Decisions need
    evaluated rounds (`evaluate.every_rounds`) with two clients or more. Cuts stay within split.minimum_cut, split.maximum_cut and half of
    a device's memory.

    Prefer it to reproduce the paper. With a set of server adapters per client a cut is mere placement: this rule then costs time and
    changes nothing that is learnt. It can change quality in the other server modes only, where deep cuts have been found to harm
    (arXiv 2608.22188).
    """

    start: int = 0

    references: ClassVar[tuple[str, ...]] = ("2604.26388", "2608.22188")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("start", self.start, 0, whole=True)

    def init(self, shape: ModelShape, profiles: Sequence[Profile], costs: Sequence[CostModel]) -> State:
        fitting = {pair: fitting_cuts(*pair) for pair in dict.fromkeys(zip(costs, profiles, strict=True))}
        bounds = [(options[0].plan.cut, options[-1].plan.cut) for options in (fitting[pair] for pair in zip(costs, profiles, strict=True))]
        if self.start:
            starts = [min(self._allowed(costs[0]), deepest) for _, deepest in bounds]
        else:
            starts = [choice.cut for choice in choose_cuts(costs, profiles)]
        return {"cuts": starts, "starts": starts, "bounds": [list(bound) for bound in bounds], "quality": self.first_quality(len(profiles))}

    def plan(
        self, round_index: int, participants: Sequence[int], observations: Sequence[Observation], state: State
    ) -> tuple[dict[int, int], State]:
        before, starts = cuts_of(state, participants), list_of(state, "starts")
        bounds = [Window(*bound) for bound in list_of(state, "bounds")]
        quality: Any = state["quality"]
        quality, decided = self.judge(round_index, observations, starts, bounds, quality)
        cuts = list(before)
        for client in sorted(set(decided) & set(participants)):  # who sits this round out is not told of a new cut
            cuts[client] = self.towards(client, cuts[client], starts[client], bounds[client], round_index, quality)
        after = {**state, "cuts": cuts, "quality": moved(quality, before, cuts, round_index)}
        return {client: cuts[client] for client in participants}, after

    def _allowed(self, cost: CostModel) -> int:
        if not cost.shallowest_cut <= self.start <= cost.deepest_cut:
            raise ConfigError(
                f"policy.start is {self.start}; {cost.shape.name} allows {cost.shallowest_cut}..{cost.deepest_cut} here.",
                "Choose a cut in that range, or 0 to have it derived.",
            )
        return self.start
