"""What a rule over another rule has in common: it answers for the rule inside and keeps that rule's state under a prefix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from splitft.aggregate.average import Average
from splitft.aggregate.base import Aggregator, Merged, State, Updates
from splitft.errors import AdapterError, ConfigError
from splitft.lora import Layout

PREFIX = "rule."


@dataclass(frozen=True)
class Wrapper(Aggregator):
    """A rule that works over `rule`. What clients train, start from and upload, and whether weights are folded, is the inner rule's to say.

    A subclass changes the updates before the inner rule sees them, or the adapter it returns; it hands on by `inner`. `hands_on_whole`:
    it leaves the updates as they are.
    """

    hands_on_whole: ClassVar[bool] = False
    rule: Aggregator = field(default_factory=Average)

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Aggregator):
            raise ConfigError(
                f"aggregator.rule is {self.rule!r}; allowed is an aggregation rule.",
                'Write rule = "average", or a table with a name and that rule\'s fields.',
            )
        if self.rule.guarded and not self.hands_on_whole:
            raise ConfigError(
                f"aggregator.rule is {type(self.rule).__name__}, whose claim holds for clients' own updates, and "
                f"{type(self).__name__} would change or choose them first.",
                "put a server optimizer outside, or nothing.",
            )
        for name in ("unequal_ranks", "folds", "partial_uploads", "resets", "guarded"):  # facts of a class in the seam, of an instance here
            object.__setattr__(self, name, getattr(self.rule, name))

    @property
    def segments(self) -> int:
        return self.rule.segments

    @property
    def least_participants(self) -> int:
        """The smallest cohort that this rule and those inside it can work with."""
        return self.rule.least_participants

    def init(self, layout: Layout) -> State:
        return self.joined({}, self.rule.init(layout))

    def trained(self, layout: Layout) -> Tensor | None:
        return self.rule.trained(layout)

    def distribute(self, layout: Layout, row: Tensor, ranks: Tensor) -> tuple[Tensor, float]:
        return self.rule.distribute(layout, row, ranks)

    def joined(self, own: State, inner: State) -> State:
        """This rule's tensors beside those of the rule inside."""
        return {**own, **{PREFIX + name: tensor for name, tensor in inner.items()}}

    def inner(self, before: Tensor, updates: Updates, state: State) -> Merged:
        """What the rule inside makes of the updates, with its state under the prefix; this rule's own tensors stay as they are."""
        own = {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}
        merged = self.rule.merge(
            before, updates, {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}
        )
        return replace(merged, state=self.joined(own, merged.state))


def starts_of(rule: Aggregator, before: Tensor, updates: Updates) -> list[Tensor]:
    """What each client started from [p]: of smaller ranks, its own share of the global adapter as the rule distributes it."""
    if updates.ranks is None:
        return [before] * len(updates.clients)
    known: dict[tuple[int, ...], Tensor] = {}
    for ranks in updates.ranks:
        if (name := tuple(ranks.tolist())) not in known:
            known[name] = rule.distribute(updates.layout, before, ranks)[0]
    return [known[tuple(ranks.tolist())] for ranks in updates.ranks]


def require_number(name: str, value: object, allowed: str, fits: Callable[[float], bool], remedy: str) -> None:
    """ConfigError unless `value` is a finite number that fits; `allowed` says in words which do."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not fits(value):
        raise ConfigError(f"aggregator.{name} is {value!r}; allowed is {allowed}.", remedy)


def require_count(name: str, value: object, least: int, remedy: str) -> None:
    """ConfigError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"aggregator.{name} is {value!r}; allowed are whole numbers from {least}.", remedy)


def least_participants(rule: Aggregator) -> int:
    """The smallest cohort a rule can work with."""
    return rule.least_participants


def require_enough(name: str, rule: Aggregator, handed: int) -> None:
    """ConfigError when the rule called `name` hands on fewer updates than the rule inside needs."""
    if (least := least_participants(rule)) > handed:
        raise ConfigError(
            f"aggregator {name} hands on {handed} update{'s' if handed > 1 else ''}, and its rule {type(rule).__name__} needs {least}.",
            "put that rule outside, or take one of the two.",
        )


def require_whole_uploads(name: str, rule: Aggregator) -> None:
    """ConfigError when the rule inside asks for uploads in segments, which the rule called `name` cannot compare."""
    if rule.segments > 1:
        raise ConfigError(
            f"aggregator {name} compares whole adapters, and its rule asks for uploads in {rule.segments} segments.",
            "take segments away, or use median, trimmed_mean or norm_clip over it.",
        )


def require_equal_ranks(name: str, updates: Updates) -> None:
    """AdapterError when two participants trained one projection at different ranks: their factors are no points of one space."""
    ranks = updates.ranks
    if ranks is None or len(ranks) == 0:
        return
    different = (ranks != ranks[:1]).any(0)
    if bool(different.any()):
        entry = int(different.nonzero()[0])
        found = sorted(set(ranks[:, entry].tolist()))
        raise AdapterError(
            f"{updates.layout.entries[entry].key}: participants trained at ranks {', '.join(map(str, found))}, and {name} compares factors "
            "of one rank.",
            'use ranks.name = "uniform", or aggregator norm_clip.',
        )


def chosen(updates: Updates, rows: list[int]) -> Updates:
    """The updates of these participants only; where they are all, the same value and no copy."""
    if rows == list(range(len(updates.clients))):
        return updates
    index = torch.tensor(rows, dtype=torch.long)
    return replace(
        updates,
        clients=tuple(updates.clients[row] for row in rows),
        tokens=tuple(updates.tokens[row] for row in rows),
        values=updates.values[index],
        ranks=None if updates.ranks is None else updates.ranks[index],
        sent=None if updates.sent is None else updates.sent[index],
    )


def with_metrics(merged: Merged, figures: Mapping[str, float]) -> Merged:
    """The same outcome with these figures beside those of the rule inside."""
    return replace(merged, metrics={**merged.metrics, **figures})
