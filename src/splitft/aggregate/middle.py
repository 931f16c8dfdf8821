"""The middle of the participants' values, column by column: what the median and the trimmed mean share.

Axes: n participants, p adapter parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from splitft.aggregate.base import Merged, State, Updates, require_finite
from splitft.aggregate.wrapper import Wrapper, chosen, require_enough, require_equal_ranks, with_metrics

CHUNK = 1 << 22  # values sorted at a time, whole columns: sorting takes ten times the memory of what is sorted


@dataclass(frozen=True)
class Middle(Wrapper):
    """Hands the rule inside one update, the middle of all, with the tokens of all. Token counts do not weigh: who lies about his adapter
    may lie about them as well; a participant without tokens is left out."""

    title: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        require_enough(self.title, self.rule, 1)
        object.__setattr__(self, "unequal_ranks", False)
        object.__setattr__(self, "partial_uploads", True)  # the rule inside sees one whole update

    def middle(self, before: Tensor, updates: Updates, trimmed: Callable[[Tensor], Tensor], state: State) -> Merged:
        """Merge with `trimmed`: of so many values [p] in each column, how many go at each end (less than half)."""
        require_finite(updates)
        updates.weights()  # refuses a round without tokens
        require_equal_ranks(self.title, updates)
        trained = chosen(updates, [row for row, tokens in enumerate(updates.tokens) if tokens > 0])
        width = max(1, CHUNK // len(trained.clients))
        pieces = [
            _trimmed_mean(before[part], trained.values[:, part], None if trained.sent is None else trained.sent[:, part], trimmed)
            for part in (slice(start, start + width) for start in range(0, len(before), width))
        ]
        row = torch.cat([piece for piece, _, _ in pieces])
        dropped = sum(piece[1] for piece in pieces) / max(1, sum(piece[2] for piece in pieces))
        whole = replace(
            chosen(trained, [0]), tokens=(sum(trained.tokens),), values=row.unsqueeze(0), sent=None
        )  # equal ranks, so the first participant's are everybody's
        return with_metrics(self.inner(before, whole, state), {"trimmed_values": dropped})


def _trimmed_mean(before: Tensor, values: Tensor, sent: Tensor | None, trimmed: Callable[[Tensor], Tensor]) -> tuple[Tensor, int, int]:
    """Mean [p] float32 of what is left of each column, `before` where nothing arrived; how many values were dropped, of how many."""
    sent = torch.ones_like(values, dtype=torch.bool) if sent is None else sent
    counts = sent.sum(0)
    ordered = values.masked_fill(~sent, torch.inf).sort(0).values  # what did not arrive goes behind everything
    ends, place = trimmed(counts), torch.arange(len(values)).unsqueeze(1)
    kept = (place >= ends) & (place < counts - ends)
    total = ordered.double().masked_fill(~kept, 0.0).sum(0)
    left = counts - 2 * ends
    mean = torch.where(left > 0, total / left.clamp(min=1), before.double()).float()
    return mean, int(2 * ends.sum()), int(counts.sum())
