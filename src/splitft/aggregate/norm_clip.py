"""A bound on how far one client can move the adapter, over any rule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from splitft.aggregate.base import Merged, State, Updates, require_finite
from splitft.aggregate.wrapper import Wrapper, require_number, starts_of, with_metrics


@dataclass(frozen=True)
class NormClip(Wrapper):
    """Shortens every client's change to the norm `limit` before the rule inside sees it (Sun et al. 2019). limit 0: the median of this
    round's norms (our addition, for who has no figure: fewer than half of the participants cannot raise it above the honest norms).

    The change is counted from what the client started with, over the values that arrived. One client moves the mean by at most its
    weight times the limit; direction and weight are not checked, so it tempers boosted updates and stops no patient majority. The
    cheapest of the robust rules, and the one for unequal ranks. A participant without tokens has no say in the median.
    """

    references: ClassVar[tuple[str, ...]] = ("1911.07963",)
    limit: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("limit", self.limit, "a number from 0", lambda value: value >= 0, "Choose a norm, or 0 for the median of the norms.")

    def merge(self, before: Tensor, updates: Updates, state: State) -> Merged:
        require_finite(updates)
        heard, rows = updates.weights() > 0, range(len(updates.clients))
        starts = starts_of(self, before, updates)
        norms = torch.stack([torch.linalg.vector_norm(_change(updates, starts, row)) for row in rows])
        limit = self.limit or float(torch.quantile(norms[heard], 0.5))
        # Where all are within the limit there is nothing to write, and the rows are left where they are.
        values = updates.values.clone() if bool((norms > limit).any()) else updates.values
        for row, norm in enumerate(norms.tolist()):
            if norm > limit:  # a change within the limit is left alone to the last bit
                values[row] = (updates.values[row].double() - _change(updates, starts, row) * (1 - limit / norm)).float()
        figures = {"clip_limit": limit, "clipped_clients": float((norms[heard] > limit).sum())}
        return with_metrics(self.inner(before, replace(updates, values=values), state), figures)


def _change(updates: Updates, starts: list[Tensor], row: int) -> Tensor:
    """What a client changed [p] float64; zero where nothing arrived."""
    change = updates.values[row].double() - starts[row].double()
    return change if updates.sent is None else change * updates.sent[row]
