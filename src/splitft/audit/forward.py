"""The forward attack: a shortlist of tokens at every position by ridge, verified by running them through the attacker's copy of the blocks.

Left to right, since causal attention makes a state depend on its own token and the ones before it: with the right weights and prefix the
right token gives the state that was sent, and no other does.

Axes: s sequences, t tokens, k candidates, d hidden width, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from splitft.audit.base import Options
from splitft.audit.bottom import Bottom, LanguageModel, Prefix
from splitft.audit.ridge import Inverter
from splitft.audit.tap import PublicTap, along
from splitft.clock import monotonic_s

# How a candidate is chosen: by distance alone, widening where none fits; by distance alone; by ridge and distance; the same with what a
# language model expects; several beginnings at once, by likelihood (beam.py).
Rule = Literal["exact", "nearest", "fused", "fused with prior", "beam"]
LEAST_THRESHOLD = 1e-3
TIMES_ERROR = 3.0
FUSED_SCORE = 10.0
FUSED_PRIOR = 0.3
FEW, WIDER = 8, 512
# A wire's error, in standard deviations, up to which a candidate that fits is the right one.
CLEAN = 0.1
CALIBRATION_ROUND = 1 << 20


@dataclass(frozen=True)
class Gauge:
    """The wire's own error, measured on public text: of each channel (`error` [d]), and relative to what was sent.

    Distances weigh channels by `weight` [d]; one below `threshold` of the state's own length is a fit. `relative`: rms error in standard
    deviations. `directions` [r d]: those that the wire lets through (None: all).
    """

    error: Tensor
    weight: Tensor
    threshold: float
    relative: float
    directions: Tensor | None = None


def measure(bottom: Bottom, tap: PublicTap, inverter: Inverter, ids: Tensor, directions: Tensor | None = None) -> Gauge:
    """Send public texts [s t] to oneself and compare what arrives with what the attacker's copy gives, token by token, along the
    directions [r d] that the wire lets through (None: all)."""
    arrived = tap.public(bottom.hidden(ids), CALIBRATION_ROUND).float().cpu()
    difference = arrived - along(bottom.replay(ids).cpu(), directions)
    error, deviation = difference.square().mean((0, 1)).sqrt(), inverter.deviation
    # A channel's weight is bounded, so that one without error does not count for all.
    weight = 1 / (error.square() + (0.02 * deviation).square()).sqrt()
    share = (difference * weight).norm(dim=-1) / ((arrived - inverter.mean) * weight).norm(dim=-1)
    relative = float((error / deviation).square().mean().sqrt())
    return Gauge(error, weight, max(LEAST_THRESHOLD, TIMES_ERROR * float(share.median())), relative, directions)


@dataclass(frozen=True)
class Search:
    """What a search found: tokens [s t], of which the first `positions` of each sequence were verified in time and the rest are the ridge's
    own; where no candidate came near enough [s t]."""

    found: Tensor
    unresolved: Tensor
    positions: int


@dataclass
class Verifier:
    """One attacker's search at one cut: its copy of the blocks, its inverter, the wire's error, what arrived [s t d] over which tap."""

    bottom: Bottom
    inverter: Inverter
    gauge: Gauge
    table: Tensor
    observed: Tensor
    options: Options
    unigram: Tensor
    sample: Tensor
    tap: PublicTap

    def __post_init__(self) -> None:
        self.observed = self.observed.float().cpu()
        self.scores = self.inverter.scores(self.observed, self.table)

    @property
    def by_ridge(self) -> Tensor:
        """The ridge's own first choices [s t]."""
        return self.scores.argmax(-1)

    def search(self, rule: Rule, until_s: float) -> Search:
        """Tokens from left to right, all sequences in step, the best prefix kept."""
        sequences, tokens = self.scores.shape[:2]
        count = min(self.options.candidates, self.scores.shape[2])
        order = self.scores.topk(count, dim=-1)
        found, unresolved = self.by_ridge.clone(), torch.zeros(sequences, tokens, dtype=torch.bool)
        prefix, model = self.bottom.start(sequences), self._model(rule)
        for place in range(tokens):
            if monotonic_s() > until_s:
                return Search(found, unresolved, place)
            if rule == "exact":
                chosen, unresolved[:, place] = self._nearest_fit(prefix, place, count, until_s)
            else:
                candidates = order.indices[:, place]
                value = self._value(rule, self.bottom.try_(prefix, candidates).float().cpu(), place, order.values[:, place])
                if model is not None:
                    value = value + FUSED_PRIOR * model.log_share.gather(1, candidates)
                chosen = candidates.gather(1, value.argmax(1, keepdim=True))[:, 0]
            found[:, place] = chosen
            if place + 1 < tokens:
                prefix, _ = self.bottom.extend(prefix, chosen)
                if model is not None:
                    model.accept(chosen)
        return Search(found, unresolved, tokens)

    def _value(self, rule: Rule, states: Tensor, place: int, scores: Tensor) -> Tensor:
        """How well the states [s k d] of candidates with these ridge scores [s k] fit, the larger the better: [s k]."""
        value = -self._distance(states, place, self.gauge.weight)
        if rule == "nearest":
            return value
        spread = value.std(1, keepdim=True).clamp_min(1e-9)
        return FUSED_SCORE * scores + (value - value.mean(1, keepdim=True)) / spread

    def _nearest_fit(self, prefix: Prefix, place: int, count: int, until_s: float) -> tuple[Tensor, Tensor]:
        """The nearest candidate [s] of each sequence and whether it is none that fits [s]; more candidates where none of the first does.

        Over a wire with little error the first few are enough to begin with: one that fits is the right one.
        """
        sequences, vocabulary = self.scores.shape[0], self.scores.shape[2]
        widest = min(self.options.widest or vocabulary, vocabulary)
        steps = sorted({min(one, widest) for one in ((FEW,) if self.gauge.relative <= CLEAN else ()) + (count, WIDER, widest)})
        ranked = self.scores[:, place].topk(widest, dim=-1).indices
        reach = self._reach(place)
        best, chosen = torch.full((sequences,), float("inf")), ranked[:, 0].clone()
        start = 0
        for end in steps:
            rows = (best > reach).nonzero()[:, 0]
            if not len(rows) or (start > 0 and monotonic_s() > until_s):
                break
            own = Prefix(prefix.ids[rows], tuple((keys[rows], values[rows]) for keys, values in prefix.kept))
            for at in range(start, end, WIDER):
                part = ranked[rows, at : min(at + WIDER, end)]
                distance = self._distance(self.bottom.try_(own, part).float().cpu(), place, self.gauge.weight, rows)
                nearest, which = distance.min(1)
                nearer = nearest < best[rows]
                chosen[rows] = torch.where(nearer, part.gather(1, which[:, None])[:, 0], chosen[rows])
                best[rows] = torch.minimum(best[rows], nearest)
            start = end
        return chosen, best > reach

    def _model(self, rule: Rule) -> LanguageModel | None:
        if rule != "fused with prior":
            return None
        return LanguageModel(self.bottom.split, self.unigram, self.scores.shape[0], self.sample)

    def _distance(self, states: Tensor, place: int, weight: Tensor, rows: Tensor | None = None) -> Tensor:
        """Weighted distance of states [s k d] (of some `rows`, or of all) from what arrived at `place`: [s k]."""
        arrived = self.observed[:, place, None] if rows is None else self.observed[rows, place, None]
        distance: Tensor = torch.linalg.vector_norm((along(states, self.gauge.directions) - arrived) * weight, dim=-1)
        return distance

    def _reach(self, place: int) -> Tensor:
        """The distance [s] up to which a candidate fits at `place`."""
        length: Tensor = torch.linalg.vector_norm((self.observed[:, place] - self.inverter.mean) * self.gauge.weight, dim=-1)
        return self.gauge.threshold * length
