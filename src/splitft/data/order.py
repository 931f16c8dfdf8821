"""In which order a client's rows are trained."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from splitft import rng
from splitft.data.base import Ints
from splitft.errors import ConfigError


@dataclass(frozen=True)
class BatchOrder:
    """An endless stream of shuffled epochs cut into batches; a pure function of (seed, client, step), so a resumed run goes on
    where it stopped without any state.

    Batches are consecutive and run across the end of an epoch: every row is used once per epoch, no batch is short. With fewer
    rows than `batch_size` a batch repeats rows. `count` is the number of rows.
    """

    count: int
    batch_size: int
    seed: int
    client: int
    _epochs: dict[int, Ints] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch_size < 1:
            raise ConfigError(f"client {self.client} has {self.count} rows and batches of {self.batch_size}.", "Both must be at least 1.")

    def epoch(self, step: int) -> int:
        """The epoch (from 0) of the first row of batch `step`."""
        return step * self.batch_size // self.count

    def indices(self, step: int) -> Ints:
        """Row indices [batch_size] of batch `step` (from 0)."""
        assert step >= 0, step
        position, wanted, parts = step * self.batch_size, self.batch_size, []
        while wanted:
            epoch, start = divmod(position, self.count)
            part = self._permutation(epoch)[start : start + wanted]
            parts.append(part)
            position, wanted = position + len(part), wanted - len(part)
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> Ints:
        if epoch not in self._epochs:
            self._epochs.clear()
            self._epochs[epoch] = rng.numpy_stream(self.seed, "data-order", self.client, epoch).permutation(self.count)
        return self._epochs[epoch]
