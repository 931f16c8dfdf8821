"""Balancing a round: the shortest time its clients can share, and which cuts each may have within it. Arithmetic, no simulation.

For client i at cut c let T_i(c) be the seconds of a step that has the server to itself, with its share of the round's transfers of
adapters (adapt/schedule.py), and S_i(c) the seconds of server work in it. A round whose steps take t seconds needs every T_i <= t,
since a client cannot be faster than alone, and sum S_i <= t x slots, since the server has so many processors. The smallest t both can
hold for is

    t* = min over all choices of cuts of max(max_i T_i(c_i), sum_i S_i(c_i) / slots),

a lower bound of what any schedule reaches (queueing comes on top: adapt/search.py measures it). The first bound alone decides which
cuts a client may have, and of these the deepest leaves the server least; so t* needs no search over combinations: it is found
by bisection over the values T_i(c), between two of which the sum is constant. Balancing the slowest client's time over the choice of
cuts is what adaptive split federated learning does with other objectives besides (Lin Z. et al. 2024, arXiv 2403.13101); this form is ours.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from splitft.adapt.choose import fitting_cuts
from splitft.adapt.cost import CostModel, PlanCost
from splitft.adapt.schedule import adapter_share, step_seconds
from splitft.types import Observation, Profile

# A factor of slowness beyond this is an interruption, not a property of the device.
SLOWEST = 100.0


@dataclass(frozen=True)
class Table:
    """One client at cut `first`, `first` + 1, ... as deep as its memory allows: seconds of a step alone, and of server work in it."""

    first: int
    alone_s: tuple[float, ...]
    server_s: tuple[float, ...]

    @property
    def last(self) -> int:
        """The deepest cut that fits."""
        return self.first + len(self.alone_s) - 1

    def clip(self, cut: int) -> int:
        """The nearest cut that fits."""
        return min(max(cut, self.first), self.last)

    def alone_at(self, cut: int) -> float:
        """T at this cut."""
        return self.alone_s[cut - self.first]

    def server_at(self, cut: int) -> float:
        """S at this cut."""
        return self.server_s[cut - self.first]

    def fastest(self) -> int:
        """The cut with the shortest step alone; of equal ones the deepest."""
        return self.first + min(range(len(self.alone_s)), key=lambda index: (self.alone_s[index], -index))


class Window(NamedTuple):
    """The cuts a client may have, both ends included."""

    shallowest: int
    deepest: int

    def clip(self, cut: int) -> int:
        """The nearest cut inside."""
        return min(max(cut, self.shallowest), self.deepest)


def tables(costs: Sequence[CostModel], profiles: Sequence[Profile], slowness: Sequence[float] = ()) -> tuple[Table, ...]:
    """Every client's table. Its computing and transfers take `slowness` times as long (one factor per client; empty: 1), the server's
    work does not. Clients that are alike share one table. Raises ResourceError naming a device that no cut fits."""
    clients = list(zip(costs, profiles, slowness or [1.0] * len(costs), strict=True))
    timed = {pair: _timed(*pair) for pair in dict.fromkeys((cost, profile) for cost, profile, _ in clients)}
    made = {client: _table(timed[client[:2]], client[2]) for client in dict.fromkeys(clients)}
    return tuple(made[client] for client in clients)


def optimum_s(clients: Sequence[Table], slots: int = 1) -> float:
    """t* of these clients, exactly; 0 for none."""
    groups = Counter(clients)
    candidates = sorted({seconds for table in groups for seconds in table.alone_s})
    if not candidates:
        return 0.0

    def work_s(limit_s: float) -> float:
        return math.fsum(count * _least_work_s(table, limit_s) for table, count in groups.items()) / slots

    holds = bisect_left(candidates, True, key=lambda seconds: work_s(seconds) <= seconds)
    # Between the candidate before and this one the least work stays as it is, so the server alone decides.
    before_s = work_s(candidates[holds - 1]) if holds else math.inf
    return min(before_s, candidates[holds]) if holds < len(candidates) else before_s


def windows(clients: Sequence[Table], limit_s: float, slots: float = 1) -> tuple[Window, ...]:
    """Each client's cuts of which ANY choice keeps max T within `limit_s` and sum S within `limit_s` x `slots`.

    `limit_s` must be at least t* of these clients and slots. The deep end is the deepest cut whose T is within the limit. From there
    the window reaches up without a gap, but not so far that the server would be overloaded if all clients used it: no window is
    shallower than one common cut, save those that end before it. With `slots` infinite only T counts. Equal clients get equal windows.
    """
    groups = Counter(clients)
    reach = {table: _reach(table, limit_s) for table in groups}

    def work_s(level: int) -> float:
        return math.fsum(count * table.server_at(reach[table].clip(level)) for table, count in groups.items())

    levels = range(
        min((window.shallowest for window in reach.values()), default=1), max((w.deepest for w in reach.values()), default=1) + 1
    )
    # Deeper is never more work; the deepest level is always allowed, even where rounding says it is a hair too much.
    level = levels[min(bisect_left(levels, True, key=lambda one: work_s(one) <= limit_s * slots), len(levels) - 1)]
    return tuple(Window(reach[table].clip(level), reach[table].deepest) for table in clients)


def measured_slowness(
    before: Sequence[float],
    observations: Sequence[Observation],
    cuts: Sequence[int],
    costs: Sequence[CostModel],
    profiles: Sequence[Profile],
    smoothing: float,
) -> list[float]:
    """How many times slower than described each client's device is: `before` (one factor per client) moved towards what was seen.

    `smoothing` is the weight of the newest round in the moving average. busy_s / predicted_s also counts the server's part of a step at the
    client's cut, which is not slower, so that part is taken out first. Rounds without both figures change nothing.
    """
    after = list(before)
    for seen in observations:
        if not (0.0 < seen.busy_s < math.inf and 0.0 < seen.predicted_s < math.inf) or not 0 <= seen.client < len(after):
            continue
        ratio, client = seen.busy_s / seen.predicted_s, seen.client
        if abs(ratio - 1.0) > 1e-9:
            cost = costs[client]
            own_s, server_s = _parts(cost.cost(cost.plan(cuts[client])), cost, profiles[client])
            ratio = (ratio * (own_s + server_s) - server_s) / own_s if own_s > 0.0 else 1.0
        else:
            ratio = 1.0
        after[client] += smoothing * (min(max(ratio, 1.0 / SLOWEST), SLOWEST) - after[client])
    return after


def _timed(cost: CostModel, profile: Profile) -> tuple[int, tuple[tuple[float, float], ...]]:
    """First cut, and (own seconds, server seconds) of it and the deeper ones that fit."""
    options = fitting_cuts(cost, profile)
    return options[0].plan.cut, tuple(_parts(option, cost, profile) for option in options)


def _parts(option: PlanCost, cost: CostModel, profile: Profile) -> tuple[float, float]:
    """A client's own seconds of a step, its share of the transfers of adapters among them, and the server's."""
    step, (adapters,) = step_seconds(option, profile, cost.server), adapter_share(option, profile, cost.local_steps)
    return step.client_s + step.link_s + adapters.total_s, step.server_s


def _table(timed: tuple[int, tuple[tuple[float, float], ...]], factor: float) -> Table:
    first, seconds = timed
    return Table(first, tuple(factor * own_s + server_s for own_s, server_s in seconds), tuple(server_s for _, server_s in seconds))


def _least_work_s(table: Table, limit_s: float) -> float:
    within = (server_s for alone_s, server_s in zip(table.alone_s, table.server_s, strict=True) if alone_s <= limit_s)
    return min(within, default=math.inf)


def _reach(table: Table, limit_s: float) -> Window:
    """From the deepest cut within the limit up as far as every cut is within it."""
    within = [cut for cut in range(table.first, table.last + 1) if table.alone_at(cut) <= limit_s]
    if not within:
        return Window(table.fastest(), table.fastest())
    shallowest = within[-1]
    while shallowest - 1 >= table.first and table.alone_at(shallowest - 1) <= limit_s:
        shallowest -= 1
    return Window(shallowest, within[-1])
