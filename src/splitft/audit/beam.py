"""A search that keeps several readings of a text at once, by the likelihood of what the wire adds.

Over a wire with noise the likeliest next token is often not the right one, and a wrong one spoils all that follow: so the best few
beginnings go on side by side, and whatever else is known of a token (what a language model expects, what returned gradients say of it)
is added to what its state says.

Axes: s sequences, b beginnings of each, t tokens, k candidates, d hidden width, r directions, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from splitft.audit.bottom import Bottom, LanguageModel, Prefix
from splitft.audit.tap import PublicTap
from splitft.clock import monotonic_s

WIDTH = 8
LEAST_CANDIDATES, MOST_CANDIDATES = 128, 512
# What a ridge's score weighs in the choice of candidates, beside what is expected of a token.
RIDGE_WEIGHT = 20.0
# Multiplications of a search, at most: what a processor core does in some 20 s.
WORK = 2e11
# Of a coordinate's own deviation: no wire counts as more exact than this.
FLOOR = 0.002


@dataclass(frozen=True)
class WireNoise:
    """What a wire adds to every coordinate, as normal noise of standard deviation `size` [r]; `by_length`: times a row's root mean square.

    `axes` [r d] are the coordinates' directions (None: the channels). `clip`: rows longer than that are shortened before (0: none).
    """

    size: Tensor
    by_length: bool
    axes: Tensor | None
    clip: float = 0.0

    def shortened(self, states: Tensor) -> Tensor:
        """States [.. d] as the codec shortens them."""
        if not self.clip:
            return states
        length: Tensor = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        return states * (self.clip / length.clamp_min(1e-30)).clamp_max(1.0)

    def coordinates(self, states: Tensor) -> Tensor:
        """States [.. d] in the coordinates that cross [.. r]."""
        found: Tensor = states if self.axes is None else states @ self.axes.T.to(states)
        return found

    def log_likelihood(self, states: Tensor, arrived: Tensor) -> Tensor:
        """Of what arrived [.. r] if these states [.. d] were sent, up to a constant: [..]."""
        sent = self.shortened(states)
        squares = ((self.coordinates(sent) - arrived) / self.size).square().sum(-1)
        if not self.by_length:
            return -0.5 * squares
        power = sent.square().mean(-1).clamp_min(1e-30)
        return -0.5 * squares / power - 0.5 * len(self.size) * power.log()

    def doubted(self, states: Tensor, arrived: Tensor) -> WireNoise:
        """The noise with what a guess [s t d] leaves unexplained of what arrived [s t r] where that is more: an attacker whose weights are
        not the client's sees its own ignorance as noise."""
        sent = self.shortened(states)
        left = (self.coordinates(sent) - arrived).square()
        power = sent.square().mean(-1, keepdim=True).clamp_min(1e-30) if self.by_length else torch.ones(())
        return replace(self, size=torch.maximum(self.size, (left / power).mean((0, 1)).sqrt()))


def listen(bottom: Bottom, tap: PublicTap, ids: Tensor, axes: Tensor | None, clip: float, batch: int) -> WireNoise:
    """The wire's noise, from public texts [s t] that the attacker sends to itself; of the two forms the likelier one."""
    arrived, sent = tap.public(bottom.hidden(ids), batch).float().cpu(), bottom.replay(ids).float().cpu()
    made = WireNoise(torch.ones(()), False, axes, clip)
    sent = made.shortened(sent)
    apart, floor = made.coordinates(arrived) - made.coordinates(sent), FLOOR * made.coordinates(sent).std((0, 1)).clamp_min(1e-12)
    length = sent.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    plain, relative = apart.square().mean((0, 1)).sqrt(), (apart / length).square().mean((0, 1)).sqrt()
    by_length = bool(relative.clamp_min(1e-30).log().sum() + len(relative) * length.log().mean() < plain.clamp_min(1e-30).log().sum())
    size = torch.maximum(relative, floor / length.mean()) if by_length else torch.maximum(plain, floor)
    return WireNoise(size, by_length, axes, clip)


@dataclass
class Beam:
    """One search: the attacker's copy of the blocks, the wire's noise, what arrived [s t r] in its coordinates, the ridge's scores [s t v],
    a language model, and what else is known of each token, as log-likelihoods [s t v] (None: nothing)."""

    bottom: Bottom
    noise: WireNoise
    arrived: Tensor
    scores: Tensor
    model: LanguageModel
    evidence: Tensor | None = None

    def search(self, until_s: float) -> tuple[Tensor, int]:
        """The likeliest texts [s t] that were found, and how many positions were reached in time; behind them the ridge's own tokens."""
        sequences, tokens, _ = self.scores.shape
        count = self._candidates(sequences * tokens)
        prefix, total = self.bottom.start(sequences), torch.zeros(sequences, 1)
        for place in range(tokens):
            if monotonic_s() > until_s:
                return torch.cat([self._best(prefix, total), self.scores[:, place:].argmax(-1)], 1), place
            prefix, total = self._step(prefix, total, place, count)
        return self._best(prefix, total), tokens

    def _step(self, prefix: Prefix, total: Tensor, place: int, count: int) -> tuple[Prefix, Tensor]:
        """The beginnings [s b] with this log-likelihood, one token longer."""
        sequences, beginnings = total.shape
        rows = torch.arange(sequences).repeat_interleave(beginnings)
        expected = self.model.log_share.cpu()
        if self.evidence is not None:
            expected = expected + self.evidence[rows, place]
        ranked = RIDGE_WEIGHT * self.scores[rows, place] + expected
        candidates = ranked.topk(min(count, ranked.shape[1]), dim=-1).indices
        states = self.bottom.try_(prefix, candidates).float().cpu()
        value = self.noise.log_likelihood(states, self.arrived[rows, place, None]) + expected.gather(1, candidates)
        value = (value + total.reshape(-1, 1)).reshape(sequences, -1)
        kept, which = value.topk(min(WIDTH, value.shape[1]), dim=1)
        each = candidates.shape[1]
        origin = (torch.arange(sequences)[:, None] * beginnings + which // each).reshape(-1)
        chosen = candidates.reshape(sequences, -1).gather(1, which).reshape(-1)
        grown, _ = self.bottom.extend(prefix.taken(origin), chosen)
        self.model.keep(origin)
        self.model.accept(chosen)
        return grown, kept

    def _candidates(self, places: int) -> int:
        """How many candidates the work allows for each beginning."""
        weights = sum(parameter.numel() for block in self.bottom.split._blocks[: self.bottom.blocks] for parameter in block.parameters())
        return max(LEAST_CANDIDATES, min(MOST_CANDIDATES, int(WORK / (2 * max(1, weights) * WIDTH * max(1, places)))))

    @staticmethod
    def _best(prefix: Prefix, total: Tensor) -> Tensor:
        """Of every sequence the likeliest beginning [s t]."""
        sequences, beginnings = total.shape
        return prefix.ids.reshape(sequences, beginnings, -1)[torch.arange(sequences), total.argmax(1)]
