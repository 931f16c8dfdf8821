"""Synchronisation `drift`: aggregate when the clients have moved far enough apart.

Axes: n participants, p adapter parameters, s sketch rows, w sketch width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from splitft.errors import AdapterError, ConfigError
from splitft.rng import numpy_stream
from splitft.sync.base import Decision, State, Synchronisation


@dataclass(frozen=True)
class Drift(Synchronisation):
    """Aggregate when the variance of the clients' drifts exceeds a threshold, or after `max_rounds` rounds without (FDA-Opt,
    Theologitis et al. 2025).

    With drift u_i and weight w_i the variance is sum w_i |u_i|^2 - |sum w_i u_i|^2. A client reports |u_i|^2 and an AMS sketch of
    `rows` x `width` numbers (Alon, Matias and Szegedy 1996, DOI 10.1145/237814.237823): sketches add up as drifts do, so the sketch of the
    mean gives the second term (the median over rows of their squared norm), which is divided by 1 + 1 / sqrt(width), lest the variance
    be taken too small. The threshold starts at 0: the first round always ends with an aggregation. Each aggregation sets it to
    (max_rounds / 2) / rounds since the last x the variance found, so that about max_rounds / 2 rounds pass between two.

    The weights are shares of the tokens (the paper's mean is plain); a "round" is one of `train.local_steps`, where the paper has an
    epoch. `seed` names the hash functions, which client and server draw for themselves. The sketch needs only what the report
    declares, 4 bytes a number: a session's part is at the server, and its sketch is added there. `exact` takes the second term from
    the drifts themselves: a yardstick for simulations, in which only the 4 bytes of the norm are counted although a real client
    would have to send its whole adapter. Prefer drift to `every_round` where adapters are most of the traffic, or local steps are few.
    """

    references: ClassVar[tuple[str, ...]] = ("2505.04535",)
    max_rounds: int = 10
    rows: int = 3
    width: int = 500
    exact: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_rounds", 1), ("rows", 1), ("width", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"synchronisation.{name} is {value!r}; allowed are whole numbers from {least}.",
                    f"Leave it out for {type(self).__dataclass_fields__[name].default}.",
                )
        if not isinstance(self.exact, bool):
            raise ConfigError(f"synchronisation.exact is {self.exact!r}; allowed is true or false.", "Leave it out for false.")

    @property
    def report_bytes(self) -> int:
        return 4 if self.exact else 4 * (1 + self.rows * self.width)

    def init(self) -> State:
        return {"theta": 0.0, "rounds_since": 0, "aggregations": 0}

    def decide(self, drifts: Tensor, weights: Tensor, state: State) -> Decision:
        theta, done = float(cast(float, state["theta"])), int(cast(int, state["aggregations"]))
        rounds = int(cast(int, state["rounds_since"])) + 1
        variance = self.variance(drifts, weights)
        aggregate = done == 0 or variance > theta or rounds >= self.max_rounds
        metrics = {"drift_variance": variance, "drift_threshold": theta, "rounds_since_aggregation": float(rounds)}
        if not aggregate:
            return Decision(False, {"theta": theta, "rounds_since": rounds, "aggregations": done}, metrics)
        # Were the variance linear in the rounds, the next aggregation would come after max_rounds / 2 of them.
        after = {"theta": self.max_rounds / 2 / rounds * max(variance, 0.0), "rounds_since": 0, "aggregations": done + 1}
        return Decision(True, after, metrics)

    def variance(self, drifts: Tensor, weights: Tensor) -> float:
        """The weighted variance of drifts [n p]: exact, or as the reports let it be estimated (then at times below zero).

        Raises AdapterError for drifts that are not finite.
        """
        norms = torch.stack([row.double().square().sum() for row in drifts])
        if not bool((fine := torch.isfinite(norms.float())).all()):
            place = int((~fine).nonzero()[0])
            raise AdapterError(
                f"the adapter of participant {place} of the round holds NaN or infinity.",
                "lower train.learning_rate, or set train.clip_norm.",
            )
        shares = weights.double()
        if self.exact:
            mean = torch.zeros(drifts.shape[1], dtype=torch.float64)
            for share, row in zip(shares.tolist(), drifts, strict=True):
                mean.add_(row.double(), alpha=share)
            return float((shares * norms).sum() - mean.square().sum())
        mean_sketch = (shares.view(-1, 1, 1) * self.sketches(drifts).double()).sum(0)
        mean_of_squares = float((shares * norms.float().double()).sum())  # what is reported are float32 numbers
        return mean_of_squares - squared_norm(mean_sketch) / (1 + 1 / math.sqrt(self.width))

    def sketches(self, drifts: Tensor) -> Tensor:
        """What the clients send beside their norms [n s w] float32: in every sketch row each parameter is added, with a random sign, to
        one random place. Linear in the drifts up to rounding."""
        found = torch.zeros(len(drifts), self.rows, self.width, dtype=torch.float64)
        for row in range(self.rows):
            stream = numpy_stream(self.seed, "drift-sketch", row)
            places = torch.from_numpy(stream.integers(0, self.width, drifts.shape[1]))
            signs = torch.from_numpy(numpy_stream(self.seed, "drift-sign", row).integers(0, 2, drifts.shape[1])).double() * 2 - 1
            for client, drift in enumerate(drifts):
                found[client, row] = torch.bincount(places, drift.double() * signs, minlength=self.width)
        return found.float()


def squared_norm(sketch: Tensor) -> float:
    """Estimate of |u|^2 from a sketch of u [s w]: the median over rows of their squared norm, each of standard error below
    sqrt(2 / w) |u|^2."""
    return float(torch.quantile(sketch.double().square().sum(1), 0.5))
