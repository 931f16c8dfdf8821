"""Uploads by turns: every client sends one segment of its adapter a round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from splitft.aggregate.base import Merged, State, Updates
from splitft.aggregate.wrapper import Wrapper, require_count, with_metrics
from splitft.errors import ConfigError


@dataclass(frozen=True)
class Segments(Wrapper):
    """A client uploads one of `count` segments of its blocks' adapter a round, the cohort's segments rotate, and every value is merged
    from those who sent it by the rule inside (the segments of EcoLoRA, Liu et al. 2025; its sparsity and Golomb coding are codecs'
    work, and its mixing of stale local values is left out).

    About 1 / count of the adapter's uplink. Weights are made to sum to one among a value's senders; a value nobody sent stays as it was,
    so with fewer participants than segments it learns only when its turn comes. The server's own blocks always take part whole. A
    rule that works on products needs whole factors and is refused with ConfigError. Worth it where adapters are the traffic: with plain
    activations at the cut they are a few percent.
    """

    references: ClassVar[tuple[str, ...]] = ("2506.02001",)
    count: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("count", self.count, 1, "Choose 1 for whole uploads, or a few segments.")
        if not self.partial_uploads:
            raise ConfigError(
                f"aggregator.rule is {type(self.rule).__name__}, which needs whole uploads; segments cannot work over it.",
                'Set aggregator.rule to "average", "median", "trimmed_mean" or "norm_clip", or let that rule work over segments.',
            )
        if self.rule.segments > 1:
            raise ConfigError("aggregator.rule divides uploads into segments already.", "Use segments once.")

    @property
    def segments(self) -> int:
        return self.count

    def merge(self, before: Tensor, updates: Updates, state: State) -> Merged:
        merged = self.inner(before, updates, state)
        covered = 1.0 if updates.sent is None else float(updates.sent[updates.weights() > 0].any(0).double().mean())
        return with_metrics(merged, {"values_sent": covered})
