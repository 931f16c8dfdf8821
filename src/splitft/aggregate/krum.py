"""Krum and multi-Krum over any rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from splitft.aggregate.base import Merged, State, Updates, require_finite
from splitft.aggregate.wrapper import (
    Wrapper,
    chosen,
    require_count,
    require_enough,
    require_equal_ranks,
    require_whole_uploads,
    with_metrics,
)
from splitft.errors import AdapterError

CHUNK = 1 << 14  # columns whose distances are taken at a time


@dataclass(frozen=True)
class Krum(Wrapper):
    """Keeps the `keep` updates that lie closest to their neighbours (Blanchard et al. 2017) and hands them, with their tokens, to the
    rule inside.

    The score of an update is the sum of its squared distances to the participants - attackers - 2 nearest others. Withstands
    `attackers` hostile clients of at least 2 attackers + 3 that trained; fewer are refused with AdapterError, since nothing could be
    promised. keep 1 is Krum, more is multi-Krum; at most participants - attackers - 2 are kept. Whole updates of honest clients with
    unusual data are thrown away too: with skewed data prefer trimmed_mean, or keep many. Distances are between factors, not products
    (our reading), so unequal ranks are refused with AdapterError, and rules that ask for uploads in segments with ConfigError.
    """

    references: ClassVar[tuple[str, ...]] = ("1703.02757",)
    attackers: int = 1
    keep: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("attackers", self.attackers, 0, "Choose how many hostile clients to withstand; 2 attackers + 3 must take part.")
        require_count("keep", self.keep, 1, "Choose 1 for Krum, more for multi-Krum.")
        require_whole_uploads("krum", self.rule)
        require_enough("krum", self.rule, self.keep)
        object.__setattr__(self, "unequal_ranks", False)
        object.__setattr__(self, "partial_uploads", False)

    @property
    def least_participants(self) -> int:
        return 2 * self.attackers + 3

    def merge(self, before: Tensor, updates: Updates, state: State) -> Merged:
        require_finite(updates)
        updates.weights()  # refuses a round without tokens
        require_equal_ranks("krum", updates)
        trained = chosen(updates, [row for row, tokens in enumerate(updates.tokens) if tokens > 0])
        count, least = len(trained.clients), self.least_participants
        if count < least:
            raise AdapterError(
                f"krum with aggregator.attackers = {self.attackers} needs {least} participants that trained, and the round has {count}.",
                "lower aggregator.attackers, or raise clients.minimum and clients.participation.",
            )
        scores = self._scores(trained.values)
        order = sorted(range(count), key=lambda row: (scores[row], trained.clients[row]))
        kept = sorted(order[: min(self.keep, count - self.attackers - 2)])
        return with_metrics(self.inner(before, chosen(trained, kept), state), {"rejected_clients": float(count - len(kept))})

    def _scores(self, values: Tensor) -> list[float]:
        """Sum of squared distances of each update [n p] to its nearest others, differences first: updates share most of their length."""
        distances = torch.zeros(len(values), len(values), dtype=torch.float64)
        for start in range(0, values.shape[1], CHUNK):  # by columns, so that no second matrix of this size is made
            part = values[:, start : start + CHUNK].double()
            distances += torch.cdist(part, part, compute_mode="donot_use_mm_for_euclid_dist").square()
        neighbours = len(values) - self.attackers - 2
        others = distances.fill_diagonal_(torch.inf).sort(1).values[:, :neighbours]
        return [float(score) for score in others.sum(1)]
