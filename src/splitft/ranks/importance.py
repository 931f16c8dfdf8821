"""Rank policy `importance`: the same parameters for each client, more of them where the model changes most.

Axes: e entries of the layout.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from splitft.adapt.cost import CostModel
from splitft.errors import CheckpointError, ConfigError, ResourceError
from splitft.lora import Entry, Layout
from splitft.ranks.base import RankPolicy, State
from splitft.ranks.budget import on_client
from splitft.ranks.splitft import end_in, server_end
from splitft.types import Profile

# Scores and sums that differ by less are equal: rounding must not break ties, nor 0.7 x 10 fall short of 7.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class ImportanceRanks(RankPolicy):
    """Higher ranks for the adapters that matter, within a budget per client (after HSplitLoRA, arXiv 2505.02795).

    The paper describes a weight's importance as its size times its gradient's, over its cost, smoothed in time; ranks from a set,
    higher for important weights, within each client's budget; and changes only when importance has moved enough. Its formula, ranks
    and thresholds are unpublished; what follows is our reconstruction.

    Score of an entry: moving average of its importance (the engine's: norm of the frozen weight times the norm of what the round
    changed in the global product), over inputs + outputs, its parameters per rank. Budget: `share` of what `lora.rank` everywhere
    would take in the client's own blocks; the server's entries keep `lora.rank`. Every own entry starts at the lowest rank of
    `rank_set`; then the step to the next rank goes, again and again, to the entry with the largest

        score x (log2(next) - log2(rank)) / (next - rank),

    importance gained per parameter if each doubling of a rank is worth the same: so a rank grows about in proportion to its score.
    Entries of equal score move together or not at all, and none passes one with a higher score, so equal scores give one rank, and a
    remainder too small for the next step stays unspent. Before any importance is known all scores count as equal.

    Fields: `rank_set`, ascending, at most `lora.rank`; empty: 1, 2, 4, 8, .. and `lora.rank`. `smoothing`: weight of the past in the
    average. Ranks are planned anew only when more than `dead_band` of all pairs of entries have changed their order since the last
    time (a pair that was tied and is not counts half), and at least `cool_down_rounds` rounds after it. Every change costs a
    truncation, so both are worth having. An entry of low rank can change less and so seem less important than it is; a `rank_set`
    that starts higher guards against that. Needs an aggregation rule for unequal ranks.
    """

    share: float = 0.5
    rank_set: tuple[int, ...] = ()
    smoothing: float = 0.5
    dead_band: float = 0.05
    cool_down_rounds: int = 5

    references: ClassVar[tuple[str, ...]] = ("2505.02795",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank_set", tuple(self.rank_set))  # configuration files hand over a list
        _check("share", self.share, 0 < _number(self.share) <= 1, "numbers above 0, up to 1")
        _check("smoothing", self.smoothing, 0 <= _number(self.smoothing) < 1, "numbers from 0, below 1")
        _check("dead_band", self.dead_band, 0 <= _number(self.dead_band) < 1, "numbers from 0, below 1")
        _check("cool_down_rounds", self.cool_down_rounds, _whole(self.cool_down_rounds, 0), "whole numbers from 0")
        ranks = list(self.rank_set)
        _check("rank_set", ranks, all(_whole(rank, 1) for rank in ranks) and ranks == sorted(set(ranks)), "ascending whole numbers from 1")

    def init(self, layout: Layout, profiles: Sequence[Profile], costs: Sequence[CostModel]) -> State:
        ladder, end = self._ladder(layout), server_end(costs)
        largest = max(entry.rank for entry in layout.entries)
        if ladder[-1] > largest:
            raise ConfigError(
                f"ranks.rank_set has {ladder[-1]}; allowed is at most lora.rank, {largest}.", "Leave it out, or raise lora.rank."
            )
        shares = [_lowest_share(layout, cut, end, ladder[0]) for cut in range(costs[0].shallowest_cut, costs[0].deepest_cut + 1)]
        if max(shares) > self.share * (1 + TOLERANCE):
            raise ResourceError(
                f"ranks.share {self.share} of rank {largest} does not hold rank {ladder[0]} everywhere, the lowest in ranks.rank_set.",
                f"Set ranks.share to {math.ceil(1000 * max(shares)) / 1000} or more, or raise lora.rank.",
            )
        return {"server_end": end, "average": [], "planned": [], "planned_round": 0}

    def plan(
        self, round_index: int, cuts: Mapping[int, int], importance: Sequence[float], layout: Layout, state: State
    ) -> tuple[dict[int, tuple[int, ...]], State]:
        end, average, planned = end_in(state), _numbers(state, "average", layout), _numbers(state, "planned", layout)
        since = state.get("planned_round")
        last_round = since if isinstance(since, int) else 0
        # A round that diverged says nothing about importance.
        if importance and all(math.isfinite(value) and value >= 0 for value in importance):
            old = average or list(importance)
            average = [self.smoothing * past + (1 - self.smoothing) * new for past, new in zip(old, importance, strict=True)]
        scores = [value / (entry.inputs + entry.outputs) for value, entry in zip(average, layout.entries, strict=False)]
        rested = round_index - last_round >= self.cool_down_rounds
        if scores and rested and reordered(planned or [0.0] * len(scores), scores) > self.dead_band:
            planned, last_round = scores, round_index
        ranks = {cut: self._ranks(planned, layout, cut, end) for cut in sorted(set(cuts.values()))}
        after: State = {"server_end": end, "average": average, "planned": planned, "planned_round": last_round}
        return {client: ranks[cut] for client, cut in cuts.items()}, after

    def _ladder(self, layout: Layout) -> tuple[int, ...]:
        if self.rank_set:
            return self.rank_set
        largest = max(entry.rank for entry in layout.entries)
        return (*(1 << power for power in range((largest - 1).bit_length())), largest)

    def _ranks(self, scores: Sequence[float], layout: Layout, cut: int, end: int) -> tuple[int, ...]:
        """Ranks [e] for a client with this cut."""
        own = [position for position, entry in enumerate(layout.entries) if on_client(entry.key.block, cut, end)]
        entries = [layout.entries[position] for position in own]
        budget = self.share * sum(entry.rank * (entry.inputs + entry.outputs) for entry in entries)
        given = allocate([scores[position] if scores else 0.0 for position in own], entries, self._ladder(layout), budget)
        ranks = [entry.rank for entry in layout.entries]
        for position, rank in zip(own, given, strict=True):
            ranks[position] = rank
        return tuple(ranks)


def allocate(scores: Sequence[float], entries: Sequence[Entry], ladder: Sequence[int], budget: float) -> list[int]:
    """Ranks of `entries` from the ascending `ladder` for at most `budget` parameters, by the rule of `ImportanceRanks`.

    An entry's rank is never above its own in the layout. The lowest rank is given in any case.
    """
    classes = _equal_scores(scores)
    level = [0] * len(classes)
    ceiling = [len(ladder) - 1] * len(classes)

    def parameters(one: int, step: int) -> int:
        return sum(min(ladder[step], entries[e].rank) * (entries[e].inputs + entries[e].outputs) for e in classes[one])

    def offer(one: int) -> tuple[float, int]:
        low, high = ladder[level[one]], ladder[level[one] + 1]
        return -scores[classes[one][0]] * (math.log2(high) - math.log2(low)) / (high - low), one

    spent = sum(parameters(one, 0) for one in range(len(classes)))
    waiting = [offer(one) for one in range(len(classes))] if len(ladder) > 1 else []
    heapq.heapify(waiting)
    while waiting:
        _, one = heapq.heappop(waiting)
        if level[one] >= ceiling[one]:
            continue
        more = parameters(one, level[one] + 1) - parameters(one, level[one])
        if spent + more > budget * (1 + TOLERANCE):
            for lower in range(one, len(classes)):  # nobody passes an entry with a higher score
                ceiling[lower] = min(ceiling[lower], level[one])
            continue
        spent += more
        level[one] += 1
        if level[one] < ceiling[one]:
            heapq.heappush(waiting, offer(one))
    ranks = [0] * len(entries)
    for one, members in enumerate(classes):
        for member in members:
            ranks[member] = min(ladder[level[one]], entries[member].rank)
    return ranks


def reordered(before: Sequence[float], after: Sequence[float]) -> float:
    """Share (0..1) of all pairs whose order differs between two rankings; a pair tied in one of them only counts half."""
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    pairs = len(first) * (len(first) - 1)
    if pairs == 0:
        return 0.0
    moved = np.abs(np.sign(first[:, None] - first) - np.sign(second[:, None] - second))
    return float(moved.sum()) / 2 / pairs


def _equal_scores(scores: Sequence[float]) -> list[list[int]]:
    """Positions grouped by equal score, the highest first."""
    classes: list[list[int]] = []
    for position in sorted(range(len(scores)), key=lambda index: (-scores[index], index)):
        if classes and scores[position] >= scores[classes[-1][0]] * (1 - TOLERANCE):
            classes[-1].append(position)
        else:
            classes.append([position])
    return classes


def _lowest_share(layout: Layout, cut: int, end: int, lowest: int) -> float:
    """The share of the layout's own ranks that the lowest rank everywhere takes in a client's blocks."""
    own = [entry for entry in layout.entries if on_client(entry.key.block, cut, end)]
    whole = sum(entry.rank * (entry.inputs + entry.outputs) for entry in own)
    return sum(min(lowest, entry.rank) * (entry.inputs + entry.outputs) for entry in own) / whole if whole else 0.0


def _numbers(state: State, name: str, layout: Layout) -> list[float]:
    """One number per entry from the state, or none yet."""
    values = state.get(name)
    if not isinstance(values, list) or len(values) not in (0, len(layout.entries)):
        raise CheckpointError(
            f"the state of rank policy 'importance' has no {name} for {len(layout.entries)} adapters: {values!r}.",
            "The checkpoint belongs to a run with another rank policy or other adapters; start a new run.",
        )
    return values


def _number(value: object) -> float:
    """The value as a number; nan, which no range holds, if it is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check(name: str, value: object, good: bool, allowed: str) -> None:
    if not good:
        raise ConfigError(f"ranks.{name} is {value!r}; allowed are {allowed}.", "Correct the value.")
