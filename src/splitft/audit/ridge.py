"""A linear inverter in closed form: from states at the cut back to embeddings, by ridge regression on public text.

Sums only are kept of the public text, so its amount does not matter; the penalty is the one that names most tokens of held-out public text.

Axes: q tokens, d hidden width, e embedding width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from splitft.audit.bottom import Bottom
from splitft.audit.tap import PublicTap
from splitft.clock import monotonic_s
from splitft.data.base import TokenRows

PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
BATCH_SEQUENCES = 32
HELD_OUT_SHARE = 0.1
HELD_OUT_TOKENS = 2048
LEAST_SEQUENCES = 16
KeyT = TypeVar("KeyT", bound=Hashable)


def directions(table: Tensor, vocabulary: int) -> Tensor:
    """Embedding rows [v e], centred and of length one."""
    rows = table.detach()[:vocabulary].float().cpu()
    return F.normalize(rows - rows.mean(0), dim=1)


@dataclass(frozen=True)
class Inverter:
    """`weight` [d+1 e] maps standardised states to directions of embeddings; `accuracy` of held-out public tokens at this `penalty`.

    `sequences`: how many public ones it learned from. `mean`, `deviation` [d] are of the states that arrived.
    """

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    penalty: float
    accuracy: float
    sequences: int

    def scores(self, observed: Tensor, table: Tensor) -> Tensor:
        """Cosine of what states [.. d] map to with each direction [v e]: [.. v]."""
        flat = observed.reshape(-1, observed.shape[-1]).float().cpu()
        found = F.normalize(self.standard(flat) @ self.weight, dim=1) @ table.T
        return found.reshape(*observed.shape[:-1], -1)

    def standard(self, flat: Tensor) -> Tensor:
        """States [q d] with mean 0 and deviation 1 in every channel, and a 1 behind them."""
        return F.pad((flat - self.mean) / self.deviation, (0, 1), value=1.0)


class Sums:
    """What is kept of public states at one cut: products of channels, their products with the embeddings' directions [v e], and some
    held-out rows."""

    def __init__(self, table: Tensor, first: Tensor) -> None:
        self.table, width = table, first.shape[1] + 1
        self.mean, deviation = first.mean(0), first.std(0)
        self.deviation = deviation.clamp_min(1e-6 * float(deviation.max()) + 1e-12)
        self.products = torch.zeros(width, width, dtype=torch.float64)
        self.targets = torch.zeros(width, table.shape[1], dtype=torch.float64)
        self.rows = 0
        self.held: list[tuple[Tensor, Tensor]] = []

    def standard(self, flat: Tensor) -> Tensor:
        return F.pad((flat - self.mean) / self.deviation, (0, 1), value=1.0)

    def add(self, flat: Tensor, tokens: Tensor) -> None:
        """States [q d] as they arrived, and the tokens [q] they are of."""
        rows = self.standard(flat)
        self.products += (rows.T @ rows).double()  # a batch in float32, their sum in float64
        self.targets += (rows.T @ self.table[tokens]).double()
        self.rows += len(tokens)

    def hold(self, flat: Tensor, tokens: Tensor) -> None:
        """States [q d] to choose the penalty by."""
        self.held.append((flat, tokens))

    def fit(self, sequences: int) -> Inverter:
        """The inverter with the best penalty; of equal ones the largest."""
        unit = torch.eye(len(self.products), dtype=torch.float64)
        held = torch.cat([flat for flat, _ in self.held])[:HELD_OUT_TOKENS]
        tokens = torch.cat([token for _, token in self.held])[:HELD_OUT_TOKENS]
        best: Inverter | None = None
        for penalty in PENALTIES:
            weight = torch.linalg.solve(self.products + penalty * max(self.rows, 1) / 100 * unit, self.targets).float()
            made = Inverter(self.mean, self.deviation, weight, penalty, 0.0, sequences)
            accuracy = float((made.scores(held, self.table).argmax(-1) == tokens).double().mean())
            if best is None or accuracy >= best.accuracy:
                best = Inverter(self.mean, self.deviation, weight, penalty, accuracy, sequences)
        assert best is not None
        return best


def learn(bottom: Bottom, taps: Mapping[KeyT, PublicTap], public: TokenRows, table: Tensor, until_s: float) -> dict[KeyT, Inverter]:
    """An inverter for every one of `taps`, from as many rows of `public` as time allows, all of one length; one row in ten is held out."""
    cuts: Sequence[int] = sorted({tap.plan.cut for tap in taps.values()})
    sums: dict[KeyT, Sums] = {}
    used, period = 0, round(1 / HELD_OUT_SHARE)
    ids = torch.from_numpy(public.batch(range(len(public)))[0])
    for number, start in enumerate(range(0, len(ids), BATCH_SEQUENCES)):
        if used >= LEAST_SEQUENCES and monotonic_s() > until_s:
            break
        batch = ids[start : start + BATCH_SEQUENCES]
        states = bottom.at_cuts(batch, cuts)
        # Of the first batch every tenth row is held out too, so that a short text has some.
        held = (torch.arange(len(batch)) + start) % period == 0
        for key, tap in taps.items():
            arrived = tap.public(states[tap.plan.cut], number).float().cpu()
            width = arrived.shape[-1]
            if key not in sums:
                sums[key] = Sums(table, arrived.reshape(-1, width))
            sums[key].add(arrived[~held].reshape(-1, width), batch[~held].reshape(-1))
            if bool(held.any()):
                sums[key].hold(arrived[held].reshape(-1, width), batch[held].reshape(-1))
        used += len(batch)
    return {key: made.fit(used) for key, made in sums.items()}
