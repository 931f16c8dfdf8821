"""How much of a text came out: aligned accuracy with its interval, whole sequences, longest common subsequence, rare tokens, floors.

Axes: s sequences, t tokens, q tokens in any order, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from splitft.audit.base import Case, Figures, Floors
from splitft.split import Route, SplitModel

RARE_FREQUENCY = 1e-4
Z_95 = 1.959963984540054
T_975 = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912)


def wilson(hits: float, trials: float) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927); (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    share, square = hits / trials, Z_95 * Z_95
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    half = Z_95 * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials)) / (1 + square / trials)
    # At the ends the interval ends there exactly, which rounding would miss.
    return middle - half if hits else 0.0, middle + half if hits < trials else 1.0


def t_quantile(freedom: int) -> float:
    """The 97.5 % point of Student's distribution with so many degrees of freedom (Cornish and Fisher's expansion from seven on)."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = Z_95
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + math.fsum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def clustered(hits: Sequence[int], trials: Sequence[int]) -> tuple[float, float]:
    """95 % score interval of a share of tokens that come in rows, with so many hits and trials each.

    Tokens of a row are recovered together or not at all, more than by chance. The interval is that of as many fewer tokens as rows differ
    more than independent tokens would (Kish's design effect, estimated from the rows), and as few rows say little of how much they differ
    (the square of Student's point over the normal one: Korn and Graubard 1998, Survey Methodology 24). One row counts as one token.
    """
    total, count = sum(hits), sum(trials)
    rows = [(one, of) for one, of in zip(hits, trials, strict=True) if of]
    if not rows:
        return 0.0, 1.0
    share = total / count
    effect = float(count)
    if len(rows) > 1:
        # Ratio estimator: the variance of the share between rows, over that of independent tokens.
        between = len(rows) / (len(rows) - 1) * sum((one - share * of) ** 2 for one, of in rows) / count**2
        plain = share * (1 - share) / count
        effect = min(effect, max(1.0, between / plain if plain else 1.0) * (t_quantile(len(rows) - 1) / Z_95) ** 2)
    return wilson(total / effect, count / effect)


def rouge_l(found: Sequence[int], true: Sequence[int]) -> float:
    """F1 of the longest common subsequence of two token sequences (Lin 2004)."""
    if not found or not true:
        return 0.0
    lengths = [0] * (len(true) + 1)
    for token in found:
        previous = 0
        for place, wanted in enumerate(true, 1):
            kept = lengths[place]
            lengths[place] = previous + 1 if token == wanted else max(lengths[place], lengths[place - 1])
            previous = kept
    return 2 * lengths[-1] / (len(found) + len(true))


def rare_tokens(frequency: Tensor, notable: Tensor) -> Tensor:
    """Which tokens [v] count as rare: seldom in public text (`frequency` [v]), with a digit, or capitalised."""
    return (frequency < RARE_FREQUENCY) | notable


def score(found: Tensor, true: Tensor, counted: Tensor, rare: Tensor) -> Figures:
    """Figures of `found` against `true` [s t] where `counted` [s t]; `rare` [v] as `rare_tokens` gives it."""
    right = (found == true) & counted
    hits, trials = int(right.sum()), int(counted.sum())
    low, high = clustered(right.sum(1).tolist(), counted.sum(1).tolist())
    wanted = rare[true] & counted
    count = int(wanted.sum())
    rows = [(f[c].tolist(), g[c].tolist()) for f, g, c in zip(found, true, counted, strict=True) if bool(c.any())]
    exact = sum(one == other for one, other in rows) / len(rows) if rows else 0.0
    each = counted.sum(0)
    return Figures(
        tokens=trials,
        accuracy=hits / trials if trials else 0.0,
        low=low,
        high=high,
        exact=exact,
        rouge_l=sum(rouge_l(one, other) for one, other in rows) / len(rows) if rows else 0.0,
        rare_recall=int((right & wanted).sum()) / count if count else None,
        rare_tokens=count,
        by_position=tuple((right.sum(0)[each > 0] / each[each > 0]).tolist()),
    )


def common_rate(true: Tensor) -> float:
    """Accuracy of always guessing the sample's own most common token: no constant guess does better."""
    return int(torch.bincount(true.reshape(-1)).max()) / true.numel()


def language_model_rate(split: SplitModel, true: Tensor) -> float:
    """Accuracy of the base model's first choice with the true text before it, over all positions but the first."""
    with torch.no_grad():
        hidden = split.run(Route(true.shape[0]), true.to(next(split.head.parameters()).device), None)
        chosen = split.logits(hidden[:, :-1]).argmax(-1).cpu()
    return float((chosen == true[:, 1:]).double().mean())


def floors_of(case: Case) -> Floors:
    """The chance levels of a case."""
    return Floors(1.0 / case.vocabulary, common_rate(case.private), language_model_rate(case.split, case.private))
