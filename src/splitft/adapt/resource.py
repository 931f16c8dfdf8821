"""Policy `resource`: cuts that balance the round, by the cost model and by what rounds really take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from splitft.adapt.balance import Window, optimum_s, tables, windows
from splitft.adapt.base import Policy, State, check_choice, check_number
from splitft.adapt.cost import CostModel
from splitft.adapt.measured import Measured, one_block, planning
from splitft.adapt.state import Fleet, cuts_of, list_of, recall
from splitft.types import ModelShape, Observation, Profile


@dataclass(frozen=True)
class Resource(Measured, Policy):
    """Each client gets the deepest (or shallowest) cut that fits its memory and does not make the round longer than it must be.

    How long it must be is worked out for the clients of the round together (adapt/balance.py): nobody can be faster than alone at the best
    cut, and the server cannot do more than its processors do. Within (1 + `slack`) times that, every client has a window of cuts, of which
    `prefer` takes an end: "deepest" asks least of the server and makes what crosses the cut hardest to read back, "shallowest" asks
    least of the devices. So slow devices get the cuts that suit them and fast ones take blocks from the server. At most half of a
    device's memory is used. After its first round a client's cut moves by one block a round at most.

    `smoothing`, `tolerance`, `every_rounds`: how fast the observed slowness of a device replaces its description, and when the policy plans
    anew (tolerance is the relative change that makes it do so at once). Equal clients have equal cuts.

    Prefer it to `fixed` when devices differ, and to `search` with many clients: it takes no simulation. Queueing for the server is bounded
    by the server's total work only. Cuts by speed are the idea of S2FL (Yan et al. 2023, arXiv 2311.13163), the balance of the slowest
    client's time that of AdaptSFL (Lin Z. et al. 2024, arXiv 2403.13101); the rule itself is ours.
    """

    prefer: Literal["deepest", "shallowest"] = "deepest"
    slack: float = 0.1

    references: ClassVar[tuple[str, ...]] = ("2311.13163", "2403.13101")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("prefer", self.prefer, ("deepest", "shallowest"))
        check_number("slack", self.slack, 0.0)

    def init(self, shape: ModelShape, profiles: Sequence[Profile], costs: Sequence[CostModel]) -> State:
        ends = self._ends(Fleet(tuple(costs), tuple(profiles)))
        return self.first_state(profiles, costs, ends)

    def plan(
        self, round_index: int, participants: Sequence[int], observations: Sequence[Observation], state: State
    ) -> tuple[dict[int, int], State]:
        cuts, company = cuts_of(state, participants), sorted(participants)
        fleet = recall(state)
        slowness = self.slowness(state, fleet, observations)
        planned: Any = state["planned"]
        if self.is_due(round_index, company, slowness, planned):
            planned = planning(round_index, company, slowness)
            planned["ends"] = self._ends(fleet.company(company), planned["slowness"])
        taken_part = list_of(state, "taken_part")
        for client, end in zip(company, planned["ends"], strict=True):
            cuts[client] = one_block(cuts[client], end) if taken_part[client] else end
            taken_part[client] = True
        after = {**state, "cuts": cuts, "slowness": slowness, "taken_part": taken_part, "planned": planned}
        return {client: cuts[client] for client in participants}, after

    def _ends(self, fleet: Fleet, slowness: Sequence[float] = ()) -> list[int]:
        """The preferred end of every client's window."""
        if not fleet.costs:
            return []
        clients = tables(fleet.costs, fleet.profiles, slowness)
        slots = fleet.costs[0].network.server_slots
        return [self._end(window) for window in windows(clients, (1.0 + self.slack) * optimum_s(clients, slots), slots)]

    def _end(self, window: Window) -> int:
        return window.deepest if self.prefer == "deepest" else window.shallowest
