"""Evaluate the joined model: token-weighted loss, perplexity and next-token accuracy, per client and over all.

The metric has the one-token shift (position t predicts token t + 1); published "accuracies" near 0.06 come from leaving it out. The model
is evaluated whole and without codecs, as the exported adapter will be used. In a simulation this is the observer's measurement: it
crosses no cut and costs the federation neither bytes nor virtual time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from splitft.data.base import TokenRows
from splitft.engine.batches import assemble
from splitft.errors import DataError
from splitft.lora import AdapterBank, Layout
from splitft.loss import Targets, token_losses
from splitft.split import Route, SplitModel


@dataclass(frozen=True)
class Score:
    """Sums over the targets of a set of rows: nll in nats, right arg-max predictions, number of targets."""

    loss_sum: float
    correct: int
    tokens: int

    @property
    def loss(self) -> float:
        """Mean nll per target in nats."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def accuracy(self) -> float:
        """Share of targets predicted by the arg-max."""
        return self.correct / self.tokens

    def __add__(self, other: Score) -> Score:
        return Score(self.loss_sum + other.loss_sum, self.correct + other.correct, self.tokens + other.tokens)

    def to_json(self) -> dict[str, float | int]:
        return {"loss": self.loss, "perplexity": self.perplexity, "accuracy": self.accuracy, "tokens": self.tokens}


def evaluate(
    split: SplitModel,
    layout: Layout,
    adapters: Tensor,
    sets: Sequence[TokenRows],
    batch_size: int,
    device: torch.device,
    max_rows: int = 0,
    names: Sequence[str] = (),
    owners: Sequence[int] = (),
) -> list[Score | None]:
    """One score per set of rows (None for a set without rows). Rows of all sets are batched by length.

    `adapters` is one row [p] for all sets, or [n p] with `owners` naming the row of each set.
    `max_rows` limits each set to its first rows (0: all). Raises DataError for rows without a target; `names` of the sets go into it.
    """
    adapters = adapters if adapters.ndim == 2 else adapters[None]
    bank = AdapterBank(layout, len(adapters), device)
    with torch.no_grad():
        bank.values.copy_(adapters.to(device))
    work = [(set_index, row) for set_index, rows in enumerate(sets) for row in range(min(len(rows), max_rows) if max_rows else len(rows))]
    work.sort(key=lambda item: (int(sets[item[0]].lengths[item[1]]), item))
    loss_sum, correct, tokens = np.zeros(len(sets)), np.zeros(len(sets), np.int64), np.zeros(len(sets), np.int64)
    for start in range(0, len(work), batch_size):
        chosen = work[start : start + batch_size]
        owner = np.array([set_index for set_index, _ in chosen])
        losses, right, row = _batch(split, bank, sets, chosen, device, owners)
        np.add.at(loss_sum, owner[row], losses)
        np.add.at(correct, owner[row], right)
        np.add.at(tokens, owner[row], 1)
    for set_index, (rows, count) in enumerate(zip(sets, tokens.tolist(), strict=True)):
        if len(rows) and count == 0:
            name = names[set_index] if names else f"set {set_index}"
            raise DataError(
                f"the held-out rows of {name} have no token to predict.", "raise tokens.held_out, or give that client more text."
            )
    sums = zip(loss_sum, correct, tokens, strict=True)
    return [Score(float(loss), int(right), int(count)) if count else None for loss, right, count in sums]


def _batch(
    split: SplitModel,
    bank: AdapterBank,
    sets: Sequence[TokenRows],
    chosen: list[tuple[int, int]],
    device: torch.device,
    owners: Sequence[int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """nll, right-or-wrong and row of every target of a batch."""
    parts = [sets[set_index].batch(np.array([row])) for set_index, row in chosen]
    width = max(ids.shape[1] for ids, _, _ in parts)
    ids = np.zeros((len(parts), width), np.int64)
    trained = np.zeros((len(parts), width), bool)
    for k, (part, _, part_trained) in enumerate(parts):
        ids[k, : part.shape[1]], trained[k, : part.shape[1]] = part[0], part_trained[0]
    lengths = np.array([[int(part_lengths[0])] for _, part_lengths, _ in parts])
    batch = assemble(ids, trained, lengths, device)
    with torch.no_grad():
        rows = torch.tensor([owners[set_index] for set_index, _ in chosen], device=device) if owners else None
        route = Route(len(parts), bank=bank, bank_rows=rows, sessions=len(parts) if owners else 1)
        hidden = split.run(route, batch.ids, batch.mask)
        targets = Targets.of(batch.labels, hidden.device)
        picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, targets.positions)
        losses, right = token_losses(picked, split.logits, targets.labels, split.model.config.get_text_config().vocab_size)
    return losses.cpu().double().numpy(), right.cpu().numpy(), targets.row.cpu().numpy()
