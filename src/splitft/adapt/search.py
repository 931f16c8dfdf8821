"""Policy `search`: the fastest round the cost model knows, queueing for the server included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from splitft.adapt.balance import Table, optimum_s, tables, windows
from splitft.adapt.base import Policy, State, check_number
from splitft.adapt.cost import CostModel
from splitft.adapt.measured import Measured, planning
from splitft.adapt.schedule import adapter_share, step_stages
from splitft.adapt.state import Fleet, cuts_of, recall
from splitft.clock import ClientSchedule, Step, simulate_round
from splitft.types import ModelShape, Observation, Profile

Cuts = tuple[int, ...]

STEPS = 3
MANY, LEAST = 100, 30
SLACKS = (0.0, 0.1, 0.3)
UNIFORM_CUTS = 16
DESCENTS = 3
# Few enough clients to try every cut of each one, not only the neighbours.
FEW = 12
# A new plan replaces the one in use only if it is better by more than this: moves are not free.
WORTHWHILE = 0.01


@dataclass
class Measure:
    """`schedule.round_seconds` as a function of the cuts of one company, where every plan and every client's stages are worked out once.

    `limit` is how many plans a search may play for 100 clients or fewer; for more clients proportionally fewer, 30 at least if
    the limit allows, so that the work stays bounded.
    """

    fleet: Fleet
    limit: int
    known: dict[Cuts, float] = field(default_factory=dict)
    _kinds: list[int] = field(default_factory=list)
    _steps: dict[tuple[int, int], tuple[Step, Step]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        clients = list(zip(self.fleet.costs, self.fleet.profiles, strict=True))
        number: dict[tuple[CostModel, Profile], int] = {}
        self._kinds = [number.setdefault(client, index) for index, client in enumerate(clients)]
        if len(clients) > MANY:
            self.limit = max(min(self.limit, LEAST), self.limit * MANY // len(clients))

    @property
    def is_spent(self) -> bool:
        """Whether no further plan may be played."""
        return len(self.known) >= self.limit

    def seconds(self, cuts: Cuts) -> float:
        """Seconds of an optimizer step of the round."""
        if cuts not in self.known:
            stages = [self._step(client, cut) for client, cut in enumerate(cuts)]
            played = [ClientSchedule(client, (step,) * STEPS, after=share) for client, (step, share) in enumerate(stages)]
            self.known[cuts] = simulate_round(played, timeline_steps=0, network=self.fleet.costs[0].network).duration_s / STEPS
        return self.known[cuts]

    def _step(self, client: int, cut: int) -> tuple[Step, Step]:
        """The stages of a client's step, and what its adapters add to so many; equal clients share them."""
        place = self._kinds[client], cut
        if place not in self._steps:
            cost = self.fleet.costs[client]
            own, profile = cost.cost(cost.plan(cut)), self.fleet.profiles[client]
            self._steps[place] = step_stages(own, profile, cost.server), adapter_share(own, profile, cost.local_steps, STEPS)
        return self._steps[place]


def best_plan(measure: Measure, clients: Sequence[Table], in_use: Cuts | None = None) -> Cuts:
    """Cuts of the shortest round found: balanced and uniform plans, the best of them improved by moving clients together and alone.

    Deterministic. The first plan is played even if the limit is 0. `in_use` stays unless another one is clearly better.
    """
    if not clients:
        return ()
    slots = measure.fleet.costs[0].network.server_slots
    ranked: dict[Cuts, tuple[float, float]] = {}
    for cuts in _starts(clients, slots):
        if ranked and measure.is_spent:
            break
        ranked[cuts] = _value(measure, clients, cuts)
    order = sorted(ranked, key=lambda cuts: ranked[cuts])  # stable: of equal plans the one named first
    found = [_descend(measure, clients, cuts) for cuts in order[:DESCENTS]]
    best = min([*found, order[0]], key=lambda cuts: _value(measure, clients, cuts))
    if in_use is not None and all(table.clip(cut) == cut for table, cut in zip(clients, in_use, strict=True)):
        return best if measure.seconds(best) < (1.0 - WORTHWHILE) * measure.seconds(in_use) else in_use
    return best


def _starts(clients: Sequence[Table], slots: int) -> Iterator[Cuts]:
    """Plans worth a look before anything is known of the queue, the most promising first."""
    shortest_s = optimum_s(clients, slots)
    for slack in SLACKS:
        spans = windows(clients, (1.0 + slack) * shortest_s, slots)
        yield tuple(span.deepest for span in spans)
        yield tuple(span.shallowest for span in spans)
        yield tuple((span.shallowest + span.deepest) // 2 for span in spans)
    yield tuple(table.fastest() for table in clients)
    first, last = min(table.first for table in clients), max(table.last for table in clients)
    shown = min(last - first + 1, UNIFORM_CUTS)
    for index in range(shown):
        cut = first + (index * (last - first)) // max(1, shown - 1)
        yield tuple(table.clip(cut) for table in clients)


def _value(measure: Measure, clients: Sequence[Table], cuts: Cuts) -> tuple[float, float]:
    """What is to be small: the round, and where several clients share the blame for it, the sum of their own times."""
    return measure.seconds(cuts), sum(table.alone_at(cut) for table, cut in zip(clients, cuts, strict=True))


def _descend(measure: Measure, clients: Sequence[Table], cuts: Cuts) -> Cuts:
    """Move whatever makes the plan better until nothing does or the limit is reached."""
    value, groups = _value(measure, clients, cuts), _groups(clients)
    better = True
    while better:
        better = False
        for group in groups:
            for moved in _moves(clients, cuts, group):
                if measure.is_spent and moved not in measure.known:
                    return cuts
                if (seconds := _value(measure, clients, moved)) < value:
                    cuts, value, better = moved, seconds, True
    return cuts


def _groups(clients: Sequence[Table]) -> list[tuple[int, ...]]:
    """All clients, their halves, quarters, ... down to single ones, the ones most alike side by side."""
    order = sorted(range(len(clients)), key=lambda index: (clients[index].alone_s, clients[index].server_s, index))
    groups, size = [], len(order)
    while size:
        groups += [tuple(order[start : start + size]) for start in range(0, len(order), size)]
        size //= 2
    return list(dict.fromkeys(groups))


def _moves(clients: Sequence[Table], cuts: Cuts, group: tuple[int, ...]) -> Iterator[Cuts]:
    """The plan with this group one block deeper, one shallower; a single one of few clients also anywhere else."""
    ways: Sequence[int] = (1, -1)
    if len(group) == 1 and len(clients) <= FEW:
        table, cut = clients[group[0]], cuts[group[0]]
        ways = sorted((other - cut for other in range(table.first, table.last + 1) if other != cut), key=lambda way: (abs(way), -way))
    for way in ways:
        changed = list(cuts)
        for index in group:
            changed[index] = clients[index].clip(cuts[index] + way)
        if tuple(changed) != cuts:
            yield tuple(changed)


@dataclass(frozen=True)
class Search(Measured, Policy):
    """The plan with the shortest round on the virtual clock that a bounded search finds.

    Plans that balance the round (adapt/balance.py) and uniform plans are played, and the best are improved by moving groups of
    similar clients, and single clients, by a block, as long as the round gets shorter; of equal rounds the one that takes the clients
    least time of their own is better. `evaluations` bounds the plays of one planning for up to 100 clients, for more proportionally
    fewer. The search is deterministic and never worse than the best uniform cut among those it plays (16 at most), by the model.
    Cuts go at once to where the search wants them. At most half of a device's memory is used.

    `smoothing`, `tolerance`, `every_rounds`: how fast the observed slowness of a device replaces its description, and when the policy plans
    anew (tolerance is the relative change that makes it do so at once). A new plan is used if it is 1 % better or more.

    Prefer it where the server is the bottleneck and queueing decides, and as the yardstick of the other policies; with hundreds of
    clients each play takes a noticeable time. Exhaustive search over cuts with a delay model is known from SflLLM (arXiv 2504.14667); the
    local search is ours.
    """

    evaluations: int = 200

    references: ClassVar[tuple[str, ...]] = ("2504.14667",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("evaluations", self.evaluations, 1, whole=True)

    def init(self, shape: ModelShape, profiles: Sequence[Profile], costs: Sequence[CostModel]) -> State:
        fleet = Fleet(tuple(costs), tuple(profiles))
        cuts = best_plan(Measure(fleet, self.evaluations), tables(costs, profiles))
        planned = {**planning(0, range(len(profiles)), [1.0] * len(profiles)), "best": list(cuts)}
        return {**self.first_state(profiles, costs, cuts), "planned": planned}

    def plan(
        self, round_index: int, participants: Sequence[int], observations: Sequence[Observation], state: State
    ) -> tuple[dict[int, int], State]:
        cuts, company = cuts_of(state, participants), sorted(participants)
        fleet = recall(state)
        slowness = self.slowness(state, fleet, observations)
        planned: Any = state["planned"]
        if self.is_due(round_index, company, slowness, planned):
            in_use = tuple(planned["best"]) if planned["company"] == company else None
            planned = planning(round_index, company, slowness)
            here = fleet.company(company)
            clients = tables(here.costs, here.profiles, planned["slowness"])
            best = best_plan(Measure(here.slower(planned["slowness"]), self.evaluations), clients, in_use)
            planned["best"] = list(best)
        for client, cut in zip(company, planned["best"], strict=True):
            cuts[client] = cut
        after = {**state, "cuts": cuts, "slowness": slowness, "planned": planned}
        return {client: cuts[client] for client in participants}, after
