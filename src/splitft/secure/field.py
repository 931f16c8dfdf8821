"""Fixed point: adapter values as whole numbers modulo 2^64, so that sums are exact, in any order, and masks can hide them.

A client's value x with weight n (its trained tokens) becomes n * round(x / step). The step is a power of two, chosen so that the sum over
all clients stays within 63 bits and a sign: nothing can wrap around that is not a mask.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from splitft.errors import AdapterError, ConfigError

Words: TypeAlias = npt.NDArray[np.uint64]
Reals: TypeAlias = npt.NDArray[np.float64]
WORD_BYTES = 8
# A sum is below 2 to this power in magnitude.
SUM_BITS = 63
# A finer step than 2^-40 buys nothing: float32 adapters have fewer bits.
MOST_FRACTION_BITS, LEAST_FRACTION_BITS = 40, 16


class FixedPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Values in [-limit, limit] to the nearest multiple of 2^-fraction_bits, weights from 1 to `most_weight`, up to `clients` summed.

    Raises ConfigError where a sum could overflow: limit x steps x weight x clients must stay below 2^63.
    """

    fraction_bits: int
    limit: int
    most_weight: int
    clients: int

    def __post_init__(self) -> None:
        if min(self.limit, self.most_weight, self.clients) < 1 or not 0 <= self.fraction_bits < SUM_BITS:
            raise ConfigError(f"fixed point {self} is out of range.", "limit, weight and clients are 1 or more.")
        if (self.limit * self.most_weight * self.clients) << self.fraction_bits >= 1 << SUM_BITS:
            raise ConfigError(
                f"{self.clients} clients of up to {self.most_weight} tokens and values up to {self.limit} in steps of "
                f"2^-{self.fraction_bits} could overflow 63 bits.",
                "take fewer clients, fewer tokens a round, a smaller limit or a coarser step.",
            )

    @classmethod
    def fitting(cls, limit: int, most_weight: int, clients: int) -> FixedPoint:
        """The finest step that cannot overflow. Raises ConfigError when none as fine as 2^-16 is left."""
        largest = max(1, limit) * max(1, most_weight) * max(1, clients)
        bits = min(MOST_FRACTION_BITS, SUM_BITS - largest.bit_length())
        if bits < LEAST_FRACTION_BITS:
            raise ConfigError(
                f"values up to {limit} of {clients} clients with up to {most_weight} tokens leave a step of 2^{-bits}; needed is 2^-16.",
                "take fewer tokens a round, or a smaller limit.",
            )
        return cls(bits, limit, most_weight, clients)

    @property
    def step(self) -> float:
        """The distance of two neighbouring values; a weighted mean is off by half of it at most."""
        return math.ldexp(1.0, -self.fraction_bits)

    def encode(self, values: npt.NDArray[np.float32] | Reals, weight: int) -> Words:
        """Values times weight as words. Raises AdapterError for values that are not finite or beyond the limit, and for such a weight."""
        if not 1 <= weight <= self.most_weight:
            raise AdapterError(f"an update of {weight} tokens; allowed are 1 to {self.most_weight}.", "check train.local_steps.")
        wide = values.astype(np.float64)
        largest = float(np.abs(wide).max(initial=0.0))
        if not largest <= self.limit:  # NaN is not at most anything
            raise AdapterError(
                f"an update's largest value is {largest}; secure aggregation sums values up to {self.limit}.",
                "lower train.learning_rate, set train.clip_norm, or raise the limit.",
            )
        # Scaling by a power of two is exact; the product stays below 2^63 by construction.
        rounded = np.rint(np.ldexp(wide, self.fraction_bits)).astype(np.int64)
        return (rounded * np.int64(weight)).view(np.uint64)

    def decode(self, total: Words) -> Reals:
        """The weighted sum that words stand for, rounded to float64 once."""
        return np.ldexp(total.view(np.int64).astype(np.float64), -self.fraction_bits)


def to_bytes(words: Words) -> bytes:
    """Words as they travel: little endian."""
    return words.astype("<u8", copy=False).tobytes()


def from_bytes(data: bytes) -> Words:
    """Words that have travelled; the caller has checked the length."""
    return np.frombuffer(data, dtype="<u8").astype(np.uint64)
