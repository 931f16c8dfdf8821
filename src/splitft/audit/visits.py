"""What arrives of a private text at its visits, and the ways in which an attacker looks at each.

Axes: s sequences, t tokens, d hidden width, r directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from splitft.audit.base import FIRST, LATER, Attack, Case
from splitft.audit.bottom import Bottom
from splitft.audit.tap import MOST_PLAYED, Later, PublicTap, Reading, Span, Tap, directions_of
from splitft.lora import AdapterBank

OpenTap: TypeAlias = Callable[[Case, int], Tap]
# A cut, the visit, and whether public text has axes of its own.
Learnt: TypeAlias = tuple[int, str, bool]


def own_tap(case: Case, cut: int) -> Tap:
    """The run's own codecs at a cut."""
    return Tap(case.settings, case.plan, cut)


def bank_of(case: Case, row: Tensor) -> AdapterBank:
    """A bank with one row: the adapter [p]."""
    device = case.split.model.get_input_embeddings().weight.device
    assert isinstance(device, torch.device)
    bank = AdapterBank(case.layout, 1, device)
    with torch.no_grad():
        bank.values.copy_(row[None].to(device))
    return bank


def mean_of(visits: int) -> str:
    """The name of a look at several visits together."""
    return FIRST if visits == 1 else f"mean of {visits}"


@dataclass(frozen=True)
class View:
    """Along which directions [r d] guesses are compared (None: all); whether the attacker learns from public text along axes of its own;
    what tells the attacks' names apart."""

    directions: Tensor | None
    own: bool
    name: str


@dataclass(frozen=True)
class Visit:
    """What arrives [s t d] of the private sample at one of its visits, over which tap, and the directions that the wire seems to let
    through (None: all). `own`: the same tap for public text with axes of its own."""

    arrived: Tensor
    tap: PublicTap
    span: Span | None
    own: PublicTap

    def views(self, attacker: Attack) -> tuple[View, ...]:
        """Ways to attack it, likelier ones first.

        Where directions are guessed at, with all others too; and so for B, whose guesses are of other weights than the client's. A narrow
        wire's axes were fitted to the private text, so its own states lie in them almost whole and those of public text do not: what is
        learnt from public text along axes of *its* own is the better guide, or not, so both are tried (codec `projection`, 64 of 256
        channels, B: 0.83 of the tokens by one, 0.97 by the other).
        """
        if self.span is None:
            return (View(None, False, ""),)
        axes = self.span.axes
        views = View(axes, False, ""), View(axes, True, ", own axes"), View(None, True, ", own axes, all directions")
        return views[:2] if self.span.exact and attacker == "K" else views

    def taps(self, cut: int, name: str) -> Mapping[Learnt, PublicTap]:
        """What is to be learnt for its views."""
        return {(cut, name, False): self.tap} | ({} if self.span is None else {(cut, name, True): self.own})


def visits_of(case: Case, open_tap: OpenTap, now: AdapterBank, cut: int, visits: int) -> dict[str, Visit]:
    """What arrives of the private sample, by visit.

    Once; where random numbers are drawn, the mean of so many visits. Where the codec remembers, the last of so many (two at least) and
    their mean beside the first: what a codec leaves out at one visit it may bring at the next.
    """

    def opened() -> Tap:
        tap = open_tap(case, cut)
        if tap.draws and not tap.remembers:
            tap.come_by(visits)
        return tap

    ids, tap = case.private, opened()
    states = Bottom(case.split, now, cut, now).hidden(ids)
    first = mean_of(tap.looked)
    found = {first: _visit(tap, tap.private(states), opened())}
    if tap.remembers:
        earlier = bank_of(case, case.earlier)
        before = Bottom(case.split, earlier, cut, earlier).hidden(ids)
        count = max(2, min(visits, MOST_PLAYED))
        again, own = Later(opened(), count), Later(opened(), count)
        last, mean = again.private(before, states)
        spans = directions_of(last), directions_of(mean)
        if any(spans):
            again.tap.follow()
        found[LATER] = Visit(last, Reading(again, False), spans[0], Reading(own, False))
        if count > 2:
            found[mean_of(count)] = Visit(mean, Reading(again, True), spans[1], Reading(own, True))
    return found


def _visit(tap: Tap, arrived: Tensor, own: Tap) -> Visit:
    span = directions_of(arrived)
    if span is not None:
        # The axes are those of the private text, and the server has them: it tries its public text along the same.
        tap.follow()
    return Visit(arrived, tap, span, own)
