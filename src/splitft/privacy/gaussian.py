"""The analytic Gaussian mechanism: what noise of a given size protects, exactly, and what size a promise needs.

`mu` is the L2 sensitivity over the standard deviation of the noise. Releases of mu_1, mu_2, .. together are one of mu = sqrt(sum of
squares), whoever chose the later ones knowing the earlier (Dong, Roth and Su 2019, arXiv 1905.02383); so one number says it all.
Balle and Wang 2018, arXiv 1805.06530, theorem 8: delta(epsilon) = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu).
"""

from __future__ import annotations

import math

# Beyond it erfc is zero in float64, and the tail's asymptotic series is good to twelve digits.
FAR = 36.0
HALVINGS = 200


def log_tail(x: float) -> float:
    """The logarithm of the chance that a standard normal number is above x."""
    if x < FAR:
        return math.log(0.5 * math.erfc(x / math.sqrt(2)))
    series = 1 - 1 / x**2 + 3 / x**4 - 15 / x**6
    return -0.5 * x * x - math.log(x * math.sqrt(2 * math.pi)) + math.log(series)


def delta_of(epsilon: float, mu: float) -> float:
    """The smallest delta at which a release of `mu` is (epsilon, delta)-private."""
    if mu == 0:
        return 0.0
    first = log_tail(epsilon / mu - mu / 2)
    second = epsilon + log_tail(epsilon / mu + mu / 2)
    return math.exp(first) * -math.expm1(min(0.0, second - first))


def epsilon_of(mu: float, delta: float) -> float:
    """The smallest epsilon at which a release of `mu` is (epsilon, delta)-private; rounded up, never down."""
    if delta_of(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while delta_of(high, mu) > delta:
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle, mu) > delta else (low, middle)
    return high


def mu_of(epsilon: float, delta: float) -> float:
    """The largest `mu` that is (epsilon, delta)-private; rounded down, never up."""
    low, high = 0.0, 1.0
    while delta_of(epsilon, high) <= delta:
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(epsilon, middle) <= delta else (low, middle)
    return low
