"""Policy `combined`: the quality rule of `splitft` inside what the round's time allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from splitft.adapt.balance import Table, Window, tables, windows
from splitft.adapt.base import Policy, State, check_choice, check_number
from splitft.adapt.cost import CostModel
from splitft.adapt.measured import Measured, one_block, planning
from splitft.adapt.quality import Quality, moved
from splitft.adapt.search import Cuts, Measure, best_plan
from splitft.adapt.state import Fleet, cuts_of, list_of, recall
from splitft.types import ModelShape, Observation, Profile


@dataclass(frozen=True)
class Combined(Measured, Quality, Policy):
    """The fastest plan of `search`, and around it the preference of `splitft`: learnt better, more blocks; learnt worse, fewer.

    Each client's wanted cut is that of the fastest plan times its quality weight, within the cuts whose step alone takes at most
    (1 + `slack`) times the fastest round; at most one block a round. Then the whole plan is played on the virtual clock: if the round
    would take longer than (1 + `slack`) times the fastest, the quality moves that cost most are undone until it does not. So, by the
    model and with the same clients in every round, quality never costs more time than `slack`; with `gamma` 0 it is `search`, a block
    at a time. After the company or a device has changed, cuts come back to the fastest plan by a block a round; a client's first
    round has no such limit.

    `prefer`: "fastest" begins at the fastest plan. "shallowest" begins at that plan with its deep cuts capped, as low as the round stays
    within (1 + `slack`) times the fastest: with one set of server adapters for all (split.server "shared", "alternating",
    "sequential") every block on the server is trained on everybody's batches, one on a client is averaged once a round, so
    shallow cuts learn faster there. The cap is one number for all, so that finding it costs a play per block.

    `evaluations` as in `search`; `smoothing`, `tolerance`, `every_rounds` as in `resource`; `gamma`, `averaging`, `dead_band`,
    `noise_nats`, `cool_down`, `decide_every` as in `splitft`. Bounds are split.minimum_cut, split.maximum_cut and half of a device's
    memory.

    The SplitFT paper (Shan et al. 2026, arXiv 2604.26388) claims cuts by resources and by performance and leaves open how they meet; this
    is our reconstruction. Prefer it to `splitft` always, and to `search` where a shared set of server adapters makes quality depend
    on the cut.
    """

    slack: float = 0.1
    evaluations: int = 200
    prefer: str = "fastest"

    references: ClassVar[tuple[str, ...]] = ("2604.26388", "2403.13101")

    def __post_init__(self) -> None:
        Measured.__post_init__(self)
        Quality.__post_init__(self)
        check_number("slack", self.slack, 0.0)
        check_number("evaluations", self.evaluations, 1, whole=True)
        check_choice("prefer", self.prefer, ("fastest", "shallowest"))

    def init(self, shape: ModelShape, profiles: Sequence[Profile], costs: Sequence[CostModel]) -> State:
        fleet, everyone = Fleet(tuple(costs), tuple(profiles)), range(len(profiles))
        planned = self._planned(planning(0, everyone, [1.0] * len(profiles)), fleet, None)
        state = self.first_state(profiles, costs, planned["best"])
        quality = self.first_quality(len(profiles))
        return {**state, "planned": planned, "starts": planned["best"], "bounds": planned["bounds"], "quality": quality}

    def plan(
        self, round_index: int, participants: Sequence[int], observations: Sequence[Observation], state: State
    ) -> tuple[dict[int, int], State]:
        cuts, company = cuts_of(state, participants), sorted(participants)
        starts, bounds, taken_part = (list_of(state, name) for name in ("starts", "bounds", "taken_part"))
        fleet = recall(state)
        slowness = self.slowness(state, fleet, observations)
        quality: Any = state["quality"]
        quality, _ = self.judge(round_index, observations, starts, [Window(*bound) for bound in bounds], quality)
        planned: Any = state["planned"]
        if self.is_due(round_index, company, slowness, planned):
            in_use = tuple(planned["best"]) if planned["company"] == company else None
            planned = self._planned(planning(round_index, company, slowness), fleet.company(company), in_use)
        for client, best, bound in zip(company, planned["best"], planned["bounds"], strict=True):
            starts[client], bounds[client] = best, bound
            cuts[client] = cuts[client] if taken_part[client] else best
            taken_part[client] = True
        before = list(cuts)
        for client, cut in zip(company, self._choose(round_index, cuts, planned, quality, fleet.company(company)), strict=True):
            cuts[client] = cut
        after = {
            **state,
            "cuts": cuts,
            "slowness": slowness,
            "taken_part": taken_part,
            "planned": planned,
            "starts": starts,
            "bounds": bounds,
            "quality": moved(quality, before, cuts, round_index),
        }
        return {client: cuts[client] for client in participants}, after

    def _planned(self, planned: dict[str, Any], fleet: Fleet, in_use: Cuts | None) -> dict[str, Any]:
        """`planned` with the fastest plan of its company (`fleet`), its seconds, and the cuts each client may have beside it."""
        clients = tables(fleet.costs, fleet.profiles, planned["slowness"])
        measure = Measure(fleet.slower(planned["slowness"]), self.evaluations)
        best = best_plan(measure, clients, in_use)
        best_s = measure.seconds(best) if best else 0.0
        if self.prefer == "shallowest":
            best = _capped(measure, clients, best, (1.0 + self.slack) * best_s)
        # Only what each client alone can bear; what all of them ask of the server is played in every round.
        bounds = windows(clients, (1.0 + self.slack) * best_s, math.inf)
        return {**planned, "best": list(best), "best_s": best_s, "bounds": [list(bound) for bound in bounds]}

    def _choose(
        self, round_index: int, cuts: Sequence[int], planned: Mapping[str, Any], quality: Mapping[str, Any], fleet: Fleet
    ) -> tuple[int, ...]:
        """The next cut of every client of the company, as the time of the round allows. `cuts` are of the whole fleet."""
        company, best = planned["company"], planned["best"]
        clients = tables(fleet.costs, fleet.profiles, planned["slowness"])
        measure = Measure(fleet.slower(planned["slowness"]), self.evaluations)
        limit_s = (1.0 + self.slack) * planned["best_s"] * (1.0 + 1e-9)
        plain, wanted = [], []
        for client, start, bound in zip(company, best, (Window(*bound) for bound in planned["bounds"]), strict=True):
            inside = one_block(cuts[client], bound.clip(cuts[client]))
            is_free = inside == cuts[client]
            plain.append(inside)
            wanted.append(self.towards(client, inside, start, bound, round_index, quality) if is_free else inside)
        costly = _by_cost(clients, plain, wanted)

        def without(undone: int) -> tuple[int, ...]:
            skipped = set(costly[:undone])
            return tuple(plain[index] if index in skipped else wanted[index] for index in range(len(wanted)))

        def holds(undone: int) -> bool:
            return not company or measure.seconds(without(undone)) <= limit_s

        if holds(0):
            return without(0)
        if not holds(len(costly)):  # other clients or other devices than before: back to the fastest plan
            return tuple(one_block(cuts[client], start) for client, start in zip(company, best, strict=True))
        too_few, enough = 0, len(costly)
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            too_few, enough = (too_few, middle) if holds(middle) else (middle, enough)
        return without(enough)


def _capped(measure: Measure, clients: Sequence[Table], best: Cuts, limit_s: float) -> Cuts:
    """The plan with all cuts above some depth brought down to it: the lowest depth at which the round still takes at most `limit_s`."""
    found = best
    for depth in range(max(best, default=0) - 1, 0, -1):
        tried = tuple(min(cut, table.clip(depth)) for cut, table in zip(best, clients, strict=True))
        if tried == found:
            continue
        if measure.seconds(tried) > limit_s:
            break
        found = tried
    return found


def _by_cost(clients: Sequence[Table], before: Sequence[int], after: Sequence[int]) -> list[int]:
    """The positions whose cut changes, the costliest first: by the seconds it adds to the client's own step and the server's work."""

    def added_s(index: int) -> float:
        table, old, new = clients[index], before[index], after[index]
        own_s, server_s = table.alone_at(new) - table.alone_at(old), table.server_at(new) - table.server_at(old)
        return max(0.0, own_s) + max(0.0, server_s)

    changed = [index for index, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    return sorted(changed, key=lambda index: (-added_s(index), index))
