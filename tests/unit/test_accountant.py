"""What a promise costs: the analytic Gaussian mechanism, composition and drawing, against integrals and published figures."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest

from splitft.errors import ConfigError
from splitft.privacy.accountant import ORDERS, Mechanism, Spent, Unit, delta_for, multiplier_for
from splitft.privacy.adaptive import count_noise, next_clip, sum_multiplier
from splitft.privacy.claim import claim_of
from splitft.privacy.draws import secret_normals
from splitft.privacy.gaussian import delta_of, epsilon_of, log_tail, mu_of


@pytest.mark.parametrize(("epsilon", "sigma"), [(1, 3.73), (2, 1.99), (4, 1.08), (8, 0.60), (16, 0.34), (32, 0.21), (64, 0.13)])
def test_noise_over_sensitivity_is_as_published(epsilon: float, sigma: float) -> None:
    assert 1 / mu_of(epsilon, 1e-5) == pytest.approx(sigma, abs=0.006)


@pytest.mark.parametrize("mu", [0.05, 0.5, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 2.0, 20.0])
def test_delta_is_the_integral_of_what_exceeds(mu: float, epsilon: float) -> None:
    points = np.linspace(-12, 12 + mu, 400_001)
    with np.errstate(over="ignore"):
        p, q = (np.exp(-((points - shift) ** 2) / 2) / math.sqrt(2 * math.pi) for shift in (mu, 0.0))
        integral = float(np.maximum(p - math.exp(epsilon) * q, 0.0).sum() * (points[1] - points[0]))
    assert delta_of(epsilon, mu) == pytest.approx(integral, rel=1e-4, abs=1e-13)


def test_tails_hold_far_out() -> None:
    assert log_tail(40.0) == pytest.approx(-804.608442, abs=1e-5)
    for x in (35.9, 36.1):
        assert log_tail(x) == pytest.approx(-x * x / 2 - math.log(x * math.sqrt(2 * math.pi)), abs=1e-3)


@pytest.mark.parametrize(("mu", "delta"), [(0.3, 1e-5), (2.0, 1e-6), (30.0, 1e-9)])
def test_epsilon_and_mu_are_inverse_and_never_rounded_to_the_wrong_side(mu: float, delta: float) -> None:
    epsilon = epsilon_of(mu, delta)
    assert delta_of(epsilon, mu) <= delta
    assert delta_of(epsilon * (1 - 1e-6), mu) > delta
    assert mu_of(epsilon, delta) == pytest.approx(mu, rel=1e-9)


def epsilon_by_convolution(mu: float, merges: int, delta: float) -> float:
    """Epsilon of so many Gaussian merges by the distribution of the privacy loss: on a grid, to the power `merges` by Fourier transforms.

    A path of its own: it knows nothing of how Gaussian mechanisms compose.
    """
    step, points = 2e-3, 1 << 18
    grid = (np.arange(points) - points // 4) * step
    density = np.exp(-((grid - mu * mu / 2) ** 2) / (2 * mu * mu)) / (mu * math.sqrt(2 * math.pi)) * step
    transformed = np.fft.rfft(np.roll(density, -(points // 4))) ** merges
    together = np.roll(np.fft.irfft(transformed, points), points // 4)
    low, high = 0.0, float(grid[-1])
    for _ in range(60):
        middle = (low + high) / 2
        above = grid > middle
        exceeded = float((together[above] * -np.expm1(middle - grid[above])).sum())
        low, high = (middle, high) if exceeded > delta else (low, middle)
    return high


@pytest.mark.parametrize(("multiplier", "merges", "delta"), [(2.0, 50, 1e-5), (4.0, 1, 1e-6), (10.0, 20, 1e-5), (1.5, 5, 1e-4)])
@pytest.mark.parametrize("unit", ["replace", "absent"])
def test_epsilon_of_many_merges_is_that_of_the_loss_distribution(multiplier: float, merges: int, delta: float, unit: str) -> None:
    mechanism = Mechanism(multiplier, unit)  # type: ignore[arg-type]
    clips = {"replace": 2.0, "absent": 1.0}[unit]
    found = Spent().after(mechanism, merges).epsilon(delta)
    assert found == pytest.approx(epsilon_by_convolution(clips / multiplier, merges, delta), rel=0.01)


def drawn_by_decimals(share: float, mu: float, order: int) -> float:
    """Theorem 27 of arXiv 1808.00087 as printed, alternating sums and all, with 400 digits."""
    with localcontext() as context:
        context.prec = 400
        half = Decimal(mu) ** 2 / 2
        moments = [(i * (i - 1) * half).exp() for i in range(order + 2)]

        def difference(n: int) -> Decimal:
            return sum((Decimal((-1) ** (n - i) * math.comb(n, i)) * moments[i] for i in range(n + 1)), Decimal(0))

        total = Decimal(1)
        for j in range(2, order + 1):
            bound = 2 * (j * (j - 1) * half).exp()
            total += Decimal(share) ** j * math.comb(order, j) * min(bound, 4 * (difference(j - j % 2) * difference(j + j % 2)).sqrt())
        return float(total.ln() / (order - 1))


@pytest.mark.parametrize(("share", "multiplier"), [(0.1, 2.0), (0.01, 1.0), (0.4, 8.0), (0.05, 40.0)])
def test_divergences_of_drawn_participants_are_the_printed_bound(share: float, multiplier: float) -> None:
    found = dict(zip(ORDERS, Mechanism(multiplier, "replace", share).renyi(), strict=True))
    mu = 2 / multiplier
    for order in (2, 3, 4, 7, 16, 32):
        printed = min(drawn_by_decimals(share, mu, order), order * mu * mu / 2)
        assert found[order] == pytest.approx(printed, rel=1e-6)


@pytest.mark.parametrize(("share", "multiplier"), [(0.1, 2.0), (0.3, 4.0), (0.02, 1.0)])
def test_divergences_of_drawn_participants_are_never_below_those_of_a_real_pair(share: float, multiplier: float) -> None:
    """One client's value turned round, others at zero: the density ratio integrated."""
    mu = 2 / multiplier
    points = np.linspace(-30, 30, 200_001)
    step = points[1] - points[0]

    def density(middle: float) -> np.ndarray:
        return np.exp(-((points - middle) ** 2) / 2) / math.sqrt(2 * math.pi)

    p, q = ((1 - share) * density(0.0) + share * density(shift) for shift in (mu / 2, -mu / 2))
    bound = dict(zip(ORDERS, Mechanism(multiplier, "replace", share).renyi(), strict=True))
    for order in (2, 5, 16):
        real = math.log(float((np.exp(order * np.log(p + 1e-300) + (1 - order) * np.log(q + 1e-300))).sum() * step)) / (order - 1)
        assert 0 < real <= bound[order]


def test_epsilon_is_that_of_dp_accounting() -> None:
    accounting = pytest.importorskip("dp_accounting", reason="dp-accounting is not installed: the other oracles here stand alone")
    replaced = accounting.NeighboringRelation.REPLACE_ONE
    for share, multiplier, merges, delta in ((0.1, 2.0, 50, 1e-5), (0.01, 1.5, 1000, 1e-6), (0.3, 4.0, 20, 1e-5), (0.05, 20.0, 100, 1e-5)):
        oracle = accounting.rdp.RdpAccountant(neighboring_relation=replaced)
        gaussian = accounting.GaussianDpEvent(multiplier / 2)
        oracle.compose(accounting.SampledWithoutReplacementDpEvent(1000, round(1000 * share), gaussian), merges)
        found = Spent().after(Mechanism(multiplier, "replace", share), merges).epsilon(delta)
        assert found == pytest.approx(oracle.get_epsilon(delta), rel=0.01)
    whole = accounting.pld.PLDAccountant()
    whole.compose(accounting.GaussianDpEvent(3.0 / 2), 30)
    assert Spent().after(Mechanism(3.0), 30).epsilon(1e-5) == pytest.approx(whole.get_epsilon(1e-5), rel=0.01)


def test_more_merges_cost_more_more_noise_and_rarer_drawing_less() -> None:
    def epsilon(merges: int, multiplier: float = 3.0, share: float = 1.0) -> float:
        return Spent().after(Mechanism(multiplier, "replace", share), merges).epsilon(1e-5)

    by_merges = [epsilon(merges) for merges in range(8)]
    assert by_merges[0] == 0.0
    assert by_merges == sorted(set(by_merges))
    assert epsilon(10, 6.0) < epsilon(10, 3.0)
    by_share = [epsilon(10, 3.0, share) for share in (0.02, 0.1, 0.3, 1.0)]
    assert by_share == sorted(set(by_share))
    one_by_one = Spent()
    for _ in range(5):
        one_by_one = one_by_one.after(Mechanism(3.0, "replace", 0.1))
    assert one_by_one.epsilon(1e-5) == pytest.approx(epsilon(5, 3.0, 0.1), rel=1e-12)


@pytest.mark.parametrize("share", [1.0, 0.1])
@pytest.mark.parametrize("unit", ["replace", "absent"])
def test_the_multiplier_for_a_target_meets_it_and_a_percent_less_does_not(share: float, unit: str) -> None:
    multiplier = multiplier_for(4.0, 1e-5, 40, unit, share)  # type: ignore[arg-type]

    def epsilon(used: float) -> float:
        return Spent().after(Mechanism(used, unit, share), 40).epsilon(1e-5)  # type: ignore[arg-type]

    assert epsilon(multiplier) <= 4.0 * (1 + 1e-9)
    assert epsilon(0.99 * multiplier) > 4.0


def test_a_budget_that_no_noise_meets_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"epsilon 1e-06 at delta 1e-10 over 1000 merges asks for a noise multiplier above 10000"):
        multiplier_for(1e-6, 1e-10, 1000)


def test_delta_is_small_for_small_rosters_too() -> None:
    assert delta_for(5) == 1e-5
    assert delta_for(10**6) == pytest.approx(10**-6.6)


@pytest.mark.parametrize("unit", ["replace", "absent"])
@pytest.mark.parametrize("share", [0.05, 0.4])
def test_the_count_and_the_sum_together_cost_what_is_accounted(unit: Unit, share: float) -> None:
    """Independently: the farthest that any neighbour moves (sum in clips, within), by trying; then the distance in units of the noise."""
    multiplier, values = 3.0, [-1e9, -1.0, -0.5, 0.0, 0.3, 1.0, 7.0]

    def told(value: float) -> tuple[float, float]:
        return max(-1.0, min(1.0, value)), float(abs(value) <= 1.0)

    neighbours = [0.0] if unit == "absent" else values
    on_sum, on_count = sum_multiplier(multiplier, share), count_noise(multiplier, share, unit)
    moves = [(told(one)[0] - told(other)[0], told(one)[1] - told(other)[1]) for one in values for other in neighbours]
    farthest = [max(abs(move[part]) for move in moves) for part in (0, 1)]
    assert farthest == [2.0 if unit == "replace" else 1.0, 1.0]
    mu = max(math.hypot(of_sum / on_sum, of_count / on_count) for of_sum, of_count in moves)
    bound = math.hypot(farthest[0] / on_sum, farthest[1] / on_count)
    assert mu == pytest.approx(bound), "an update beyond the clip moves both as far as they go"
    assert mu == pytest.approx(Mechanism(multiplier, unit).mu)


def test_a_noisy_share_beyond_all_and_nobody_moves_the_clip_by_one_step_at_most() -> None:
    assert next_clip(1.0, 9.0, 0.5, 0.2) == pytest.approx(math.exp(-0.1))
    assert next_clip(1.0, -9.0, 0.5, 0.2) == pytest.approx(math.exp(0.1))
    assert next_clip(1.0, 0.5, 0.5, 0.2) == 1.0


def test_no_epsilon_is_told_without_all_that_it_means() -> None:
    whole = {
        "privacy_epsilon": 3.14159,
        "privacy_delta": 1e-5,
        "privacy_clip": 0.25,
        "privacy_noise_multiplier": 2.0,
        "privacy_participants": 50.0,
        "privacy_merges": 7.0,
        "privacy_replaced": 1.0,
    }
    said = claim_of(whole)
    assert said is not None
    for part in ("epsilon 3.14", "delta 1e-05", "clip 0.25", "noise 2 clips", "50 updates", "7 merges", "replaced", "every client"):
        assert part in said
    for name in whole:
        assert claim_of({key: value for key, value in whole.items() if key != name}) is None
    assert claim_of({**whole, "privacy_clip": 0.0}) is None
    assert claim_of({**whole, "privacy_noise_multiplier": 0.0}) is None


def test_secret_numbers_are_normal_repeat_under_one_name_and_share_nothing_with_another() -> None:
    count = 200_001
    drawn = secret_normals(b"k" * 32, "one", b"values", count)
    assert drawn.shape == (count,)
    assert np.array_equal(drawn, secret_normals(b"k" * 32, "one", b"values", count))
    assert abs(drawn.mean()) < 4.5 / math.sqrt(count)
    assert abs((drawn**2).sum() - count) < 4.5 * math.sqrt(2 * count)
    assert abs((drawn**4).mean() - 3) < 4.5 * math.sqrt(96 / count)
    for level in (-2.0, -0.5, 0.0, 1.0, 3.0):
        chance = 0.5 * math.erfc(level / math.sqrt(2))
        assert abs((drawn > level).mean() - chance) < 4.5 * math.sqrt(chance * (1 - chance) / count)
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 4.5 / math.sqrt(count)
    for other in (secret_normals(b"l" * 32, "one", b"values", count), secret_normals(b"k" * 32, "two", b"values", count)):
        assert abs(np.corrcoef(drawn, other)[0, 1]) < 4.5 / math.sqrt(count)
    assert abs(np.corrcoef(drawn, secret_normals(b"k" * 32, "one", b"value", count))[0, 1]) < 4.5 / math.sqrt(count)
