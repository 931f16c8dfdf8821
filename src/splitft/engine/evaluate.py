"""Evaluate the joined model: token-weighted loss, perplexity and next-token accuracy, per client and over all.

The metric has the one-token shift (position t predicts token t + 1); published "accuracies" near 0.06 come from leaving it out. The model
is evaluated whole and without codecs, as the exported adapter will be used. In a simulation this is the observer's measurement: it
crosses no cut and costs the federation neither bytes nor virtual time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from splitft.bottleneck import Place
from splitft.data.base import Ints, TokenRows
from splitft.engine.batches import assemble
from splitft.engine.narrow import around
from splitft.errors import DataError
from splitft.lora import AdapterBank, Layout
from splitft.loss import Targets, token_losses
from splitft.split import Route, SplitModel

# Clients with models of their own whose adapters are on the device at a time.
OWN_MODELS = 16
NOWHERE: Mapping[int, Place] = MappingProxyType({})


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
    through: Mapping[int, Place] = NOWHERE,
) -> list[Score | None]:
    """One score per set of rows (None for a set without rows). Rows of all sets are batched by length: `batch_size` of the longest, more
    of shorter ones, for as many tokens.

    `adapters` is one row [p] for all sets, or [n p] with `owners` naming the row of each set.
    `max_rows` limits each set to its first rows (0: all). `through`: boundaries at which the states of all go through their bottleneck,
    without a wire; the exported adapter has none. Raises DataError for rows without a target; `names` of the sets go into it.
    """
    adapters = adapters if adapters.ndim == 2 else adapters[None]
    bank = AdapterBank(layout, len(adapters), device)
    with torch.no_grad():
        bank.values.copy_(adapters.to(device))
    taken = [rows.select(range(max_rows)) if 0 < max_rows < len(rows) else rows for rows in sets]
    joined, set_of = TokenRows.concatenate(taken), np.repeat(np.arange(len(sets)), [len(rows) for rows in taken])
    bank_row = torch.tensor(owners, dtype=torch.int64)[torch.from_numpy(set_of)].to(device) if owners else None
    loss_sum, correct, tokens = np.zeros(len(sets)), np.zeros(len(sets), np.int64), np.zeros(len(sets), np.int64)
    for chosen in batches_by_length(joined.lengths, batch_size):
        losses, right, row = _batch(split, bank, joined, chosen, device, bank_row, through)
        owner = set_of[chosen[row]]
        np.add.at(loss_sum, owner, losses)
        correct += np.bincount(owner[right], minlength=len(sets))
        tokens += np.bincount(owner, minlength=len(sets))
    for set_index, (rows, count) in enumerate(zip(sets, tokens.tolist(), strict=True)):
        if len(rows) and count == 0:
            name = names[set_index] if names else f"set {set_index}"
            raise DataError(
                f"the held-out rows of {name} have no token to predict.", "raise tokens.held_out, or give that client more text."
            )
    sums = zip(loss_sum, correct, tokens, strict=True)
    return [Score(float(loss), int(right), int(count)) if count else None for loss, right, count in sums]


def evaluate_own(
    split: SplitModel,
    layout: Layout,
    adapters: Sequence[Tensor],
    sets: Sequence[TokenRows],
    common: TokenRows,
    batch_size: int,
    device: torch.device,
    max_rows: int = 0,
    names: Sequence[str] = (),
) -> tuple[list[Score | None], list[Score | None]]:
    """Every client's set with its own adapter [p], and the common rows with each client's in turn.

    OWN_MODELS clients at a time, so that neither memory nor a batch's company grows with their number. Errors as in `evaluate`.
    """
    own: list[Score | None] = []
    shared: list[Score | None] = []
    for start in range(0, len(sets), OWN_MODELS):
        part = slice(start, start + OWN_MODELS)
        count = len(sets[part])
        scores = evaluate(
            split,
            layout,
            torch.stack(list(adapters[part])),
            [*sets[part], *[common] * count],
            batch_size,
            device,
            max_rows,
            [*names[part], *["the common slice"] * count] if names else (),
            [*range(count), *range(count)],
        )
        own += scores[:count]
        shared += scores[count:]
    return own, shared


def batches_by_length(lengths: Ints, batch_size: int) -> Iterator[Ints]:
    """Rows in batches, the shortest first; a batch with its padding has at most the tokens of `batch_size` rows of the longest."""
    order = np.argsort(lengths, kind="stable")
    most = batch_size * int(lengths.max(initial=0))
    start = 0
    while start < len(order):
        # Sorted, so that a batch is as wide as its last row: the first that would make it too large begins the next one.
        widths = lengths[order[start : start + most]]
        count = int(np.searchsorted(widths * np.arange(1, len(widths) + 1), most, side="right"))
        yield order[start : start + count]
        start += count


def _batch(
    split: SplitModel,
    bank: AdapterBank,
    joined: TokenRows,
    chosen: Ints,
    device: torch.device,
    bank_row: Tensor | None,
    through: Mapping[int, Place],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """nll, right-or-wrong and row of every target of a batch."""
    ids, lengths, trained = joined.batch(chosen)
    batch = assemble(ids, trained, lengths[:, None], device)
    with torch.no_grad():
        rows = None if bank_row is None else bank_row[torch.from_numpy(chosen).to(device)]
        route = Route(len(chosen), bank=bank, bank_rows=rows, sessions=1 if rows is None else len(chosen))
        route.cross = around(bank, through) if through else None
        hidden = split.run(route, batch.ids, split.needed_mask(batch.mask))
        targets = Targets.of(batch.labels, hidden.device)
        picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, targets.positions)
        losses, right = token_losses(picked, split.logits, targets.labels, split.model.config.get_text_config().vocab_size)
    return losses.cpu().double().numpy(), right.cpu().numpy(), targets.row.cpu().numpy()
