"""What a run has spent of its privacy: client-level (epsilon, delta) of noisy means, merge after merge.

Two bounds are kept side by side, both true, and the smaller is told. The first counts every client as a participant of every merge: then
the merges together are one Gaussian mechanism, and its epsilon is exact (gaussian.py). The second uses that participants were drawn in
secret: a fixed number without replacement, as the engine draws them (not Poisson sampling, whose figures are smaller and would not be
true here), by Renyi divergences of integer orders: Wang, Balle and Kasiviswanathan 2019, arXiv 1808.00087, theorem 27, brought to
(epsilon, delta) by Canonne, Kamath and Steinke 2020, arXiv 2004.00010, proposition 12.

Units: "replace": one client's data become anything else (sensitivity two clips). "absent": one client's update counts as zero, the number
of participants being public (one clip). The aggregation rule claims nothing from drawing, since its clients are drawn by the run's seed or
are whoever is there; the account of it is for those who do draw in secret. Secret drawing is accounted for in the first alone, which
implies the second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from splitft.errors import ConfigError
from splitft.privacy.gaussian import epsilon_of, mu_of

Unit = Literal["replace", "absent"]
CLIPS: dict[str, float] = {"replace": 2.0, "absent": 1.0}
ORDERS = (*range(2, 65), 80, 96, 128)
# A search for a multiplier ends here: there is no promise worth more noise.
MOST_MULTIPLIER = 1e4
POINTS = 8001


@dataclass(frozen=True)
class Mechanism:
    """One merge: noise of standard deviation `multiplier` times the clip on the sum of clipped updates; the noise on whatever else is told
    of them is part of the figure. `drawn_share`: the share of the clients that a secret draw takes, 1 for no claim from drawing."""

    multiplier: float
    unit: Unit = "replace"
    drawn_share: float = 1.0

    @property
    def mu(self) -> float:
        """Sensitivity over noise."""
        return CLIPS[self.unit] / self.multiplier

    def renyi(self) -> tuple[float, ...]:
        """Renyi divergences at ORDERS, of the drawn mechanism."""
        return _drawn_renyi(self.drawn_share, CLIPS["replace"] / self.multiplier)


@dataclass(frozen=True)
class Spent:
    """The merges so far: the sum of their mu squared, and of their Renyi divergences at ORDERS."""

    square: float = 0.0
    renyi: tuple[float, ...] = (0.0,) * len(ORDERS)

    def after(self, mechanism: Mechanism, merges: int = 1) -> Spent:
        """With so many merges more."""
        grown = tuple(before + merges * more for before, more in zip(self.renyi, mechanism.renyi(), strict=True))
        return Spent(self.square + merges * mechanism.mu**2, grown)

    def epsilon(self, delta: float) -> float:
        """The smallest epsilon that can be claimed at this delta."""
        if self.square == 0:
            return 0.0
        return min(epsilon_of(math.sqrt(self.square), delta), _converted(self.renyi, delta))


def multiplier_for(epsilon: float, delta: float, merges: int, unit: Unit = "replace", drawn_share: float = 1.0) -> float:
    """The smallest noise multiplier with which so many merges are (epsilon, delta)-private. Raises ConfigError when none is enough."""
    exact = CLIPS[unit] * math.sqrt(merges) / mu_of(epsilon, delta)
    if not exact <= MOST_MULTIPLIER:
        raise ConfigError(
            f"epsilon {epsilon:g} at delta {delta:g} over {merges} merges asks for a noise multiplier above {MOST_MULTIPLIER:g}.",
            "raise aggregator.epsilon or lower rounds.",
        )
    if drawn_share >= 1:
        return exact
    low, high = 1e-3 * exact, exact  # drawing in secret never asks for more noise than being there each time
    for _ in range(60):
        middle = math.sqrt(low * high)
        enough = Spent().after(Mechanism(middle, unit, drawn_share), merges).epsilon(delta) <= epsilon
        low, high = (low, middle) if enough else (middle, high)
        if high / low < 1 + 1e-6:
            break
    return high


def delta_for(clients: int) -> float:
    """A delta well below one in so many clients: clients^-1.1, and at most 1e-5 (a roster of five would otherwise be offered 0.17)."""
    return min(1e-5, clients**-1.1) if clients > 0 else 1e-5


@lru_cache(maxsize=256)
def _drawn_renyi(share: float, mu: float) -> tuple[float, ...]:
    """Divergences at ORDERS of a Gaussian mechanism of `mu` over a share of the clients drawn without replacement."""
    whole = [order * mu * mu / 2 for order in ORDERS]
    if share >= 1:
        return tuple(whole)
    even = {order: _log_moment(order, mu) for order in range(2, ORDERS[-1] + 2, 2)}

    def log_term(j: int) -> float:
        """The logarithm of the bound of the j-th moment of the density ratio less one."""
        plain = math.log(2) + j * (j - 1) * mu * mu / 2
        return min(plain, math.log(4) + (even[j - j % 2] + even[j + j % 2]) / 2)

    terms = {j: log_term(j) + j * math.log(share) for j in range(2, ORDERS[-1] + 1)}
    found = []
    for order, most in zip(ORDERS, whole, strict=True):
        logs = [0.0, *(terms[j] + _log_choose(order, j) for j in range(2, order + 1))]
        found.append(min(most, _log_sum(logs) / (order - 1)))
    return tuple(found)


def _log_moment(order: int, mu: float) -> float:
    """log E (e^(mu z - mu^2/2) - 1)^order of a standard normal z, for an even order.

    As an integral of positive terms: the closed form is an alternating sum, of which float64 keeps no digit at small mu.
    """
    points = np.linspace(-14.0, order * mu + 14.0, POINTS)
    exponent = mu * points - mu * mu / 2
    # log |e^x - 1| = max(x, 0) + log(1 - e^-|x|); at x = 0 the term is zero
    shifted = np.maximum(exponent, 0.0) + np.log(-np.expm1(-np.maximum(np.abs(exponent), 1e-300)))
    logs = order * shifted - points * points / 2 + math.log((points[1] - points[0]) / math.sqrt(2 * math.pi))
    top = float(logs.max())
    total: float = math.log(float(np.exp(logs - top).sum()))
    return top + total


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _log_sum(logs: list[float]) -> float:
    top = max(logs)
    return top + math.log(math.fsum(math.exp(one - top) for one in logs))


def _converted(renyi: tuple[float, ...], delta: float) -> float:
    """The smallest epsilon at delta that follows from the divergences."""
    found: list[float] = [
        divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1) for order, divergence in zip(ORDERS, renyi, strict=True)
    ]
    return max(0.0, min(found))
