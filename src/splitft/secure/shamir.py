"""Shares of a secret: any `threshold` of them give it back, fewer say nothing about it.

Shamir, How to share a secret, 1979 (doi 10.1145/359168.359176), over the integers modulo a prime just above 2^256.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splitft.errors import ProtocolError
from splitft.rng import fresh_bytes

# The smallest prime above 2^256: any 32 bytes are a number below it.
PRIME = (1 << 256) + 297
SECRET_BYTES, SHARE_BYTES = 32, 33
# Many more bits than the prime, so that the remainder is as good as uniform.
COEFFICIENT_BYTES = 64
SAME_VERSION = "both sides must run the same version; if they do, the sender is not honest."


def split(secret: bytes, threshold: int, points: Sequence[int]) -> dict[int, bytes]:
    """A share of `secret` (32 bytes) for every point (distinct, 1 or more)."""
    assert len(secret) == SECRET_BYTES
    assert 1 <= threshold <= len(points) == len(set(points))
    assert min(points) >= 1
    polynomial = [int.from_bytes(secret, "little")]
    polynomial += [int.from_bytes(fresh_bytes(COEFFICIENT_BYTES), "little") % PRIME for _ in range(threshold - 1)]
    return {point: _value(polynomial, point).to_bytes(SHARE_BYTES, "little") for point in points}


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret behind `shares`, by point; of more than `threshold` the first count.

    Raises ProtocolError for too few shares, for one that is no number of the field, and when the result is no secret.
    """
    if len(shares) < threshold:
        raise ProtocolError(f"{len(shares)} shares of a secret that needs {threshold}.", "more clients must answer.")
    chosen = {point: _number(point, shares[point]) for point in sorted(shares)[:threshold]}
    total = sum(value * factor for value, factor in zip(chosen.values(), _at_zero(tuple(chosen)), strict=True)) % PRIME
    if total >> (8 * SECRET_BYTES):
        raise ProtocolError("shares that belong to different secrets, or a wrong one among them.", SAME_VERSION)
    return total.to_bytes(SECRET_BYTES, "little")


def check_share(share: bytes, whose: str) -> bytes:
    """The share, if it is a number of the field. Raises ProtocolError."""
    if len(share) != SHARE_BYTES or int.from_bytes(share, "little") >= PRIME:
        raise ProtocolError(f"{whose} is no share of a secret ({len(share)} bytes).", SAME_VERSION)
    return share


def _number(point: int, share: bytes) -> int:
    if point % PRIME == 0:
        raise ProtocolError(f"a share at point {point}; points are 1 or more.", SAME_VERSION)
    return int.from_bytes(check_share(share, f"the share at point {point}"), "little")


def _value(polynomial: Sequence[int], point: int) -> int:
    """The polynomial at a point (Horner)."""
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * point + coefficient) % PRIME
    return value


def _at_zero(points: tuple[int, ...]) -> list[int]:
    """Lagrange's factors: what each point's value counts in the value at 0."""
    factors = []
    for mine in points:
        above, below = 1, 1
        for other in points:
            if other != mine:
                above, below = above * other % PRIME, below * (other - mine) % PRIME
        factors.append(above * pow(below, -1, PRIME) % PRIME)
    return factors
