"""A clip that follows a quantile of the clients' norms, learned from a noisy count of who is within it.

Andrew, Thakkar, McMahan and Ramaswamy 2019, arXiv 1905.03871. The count has noise of its own, which is part of what is accounted: with
the sum's noise `z_sum` clips and the count's `sigma`, both together are a release of multiplier (z_sum^-2 + (s / sigma)^2)^-1/2, where s is
how far the count moves for every clip that the sum moves. Other data move the sum by two clips and the count by one: s = 1/2. An update
that counts as zero moves the sum by one clip, and the count by one too, since zero is within any clip: s = 1. The paper sets sigma to a
twentieth of the participants, which a small roster cannot afford; here it is a share of the budget (mu squared), at any number of
participants.
"""

from __future__ import annotations

import math

from splitft.privacy.accountant import CLIPS, Unit


def sum_multiplier(multiplier: float, count_share: float) -> float:
    """The sum's noise over the clip, where the release together has `multiplier` and the count takes its share of the budget."""
    return multiplier / math.sqrt(1 - count_share)


def count_noise(multiplier: float, count_share: float, unit: Unit) -> float:
    """The standard deviation of the noise on the number of clients within the clip."""
    return multiplier / (CLIPS[unit] * math.sqrt(count_share))


def next_clip(clip: float, within_share: float, quantile: float, rate: float) -> float:
    """The clip of the next round: down by a factor when more clients than the quantile are within, up when fewer.

    The noisy share is held between 0 and 1, so that a count drowned in noise moves the clip by one step at most.
    """
    return clip * math.exp(-rate * (min(1.0, max(0.0, within_share)) - quantile))
