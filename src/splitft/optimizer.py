"""AdamW over the rows of an adapter bank, global-norm clipping, and learning-rate schedules.

AdamW: Loshchilov and Hutter 2017, arXiv 1711.05101; the arithmetic is torch.optim.AdamW's, step by step, with a step count per row.
Schedules are those of transformers' `get_scheduler` (linear, cosine, constant), so that a run of one client is a plain fine-tuning.

Axes: n rows (clients), p adapter parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from splitft.errors import ConfigError

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step: linear warm-up from zero, then constant, or linear or half-cosine decay to zero at `total_steps`."""

    peak: float
    total_steps: int
    warmup_steps: int = 0
    shape: str = "linear"

    def __post_init__(self) -> None:
        if self.shape not in SCHEDULES:
            raise ConfigError(f"train.schedule is {self.shape!r}.", f"choose one of {', '.join(SCHEDULES)}.")

    def rate(self, step: int) -> float:
        """Learning rate of the optimizer step with this 0-based index."""
        if step < self.warmup_steps:
            return self.peak * step / max(1, self.warmup_steps)
        if self.shape == "constant":
            return self.peak
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.shape == "linear":
            return self.peak * max(0.0, 1.0 - progress)
        return self.peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class AdamW:
    """Hyper-parameters; `step` applies them. The state is a `Moments` value owned by the caller."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def step(
        self,
        values: Tensor,
        gradients: Tensor,
        moments: Moments,
        rate: float | Tensor,
        trained: Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> None:
        """One step in place on values [n p] with gradients [n p], of the rows named (None: all); `rate` is one number or one per row
        that steps (float64). Only columns where `trained` [p] is 1 decay (None: all)."""
        chosen = range(len(values)) if rows is None else rows
        rates = [rate] * len(chosen) if not isinstance(rate, Tensor) else rate.tolist()
        decay = self.weight_decay
        if decay and trained is not None:
            for row, own in zip(chosen, rates, strict=True):
                values[row].mul_(1.0 - own * decay * trained)
            decay = 0.0
        steps = moments.steps.to(values.device, torch.float32)  # a copy: the kernel counts in it
        for own in dict.fromkeys(rates):
            mine = [row for row, other in zip(chosen, rates, strict=True) if other == own]
            # One pass over a row reads and writes each of its values once; written as tensor operations it takes eleven.
            adamw(
                [values[row] for row in mine],
                [gradients[row] for row in mine],
                [moments.first[row] for row in mine],
                [moments.second[row] for row in mine],
                [],
                [steps[row] for row in mine],
                fused=True,
                amsgrad=False,
                beta1=self.beta1,
                beta2=self.beta2,
                lr=own,
                weight_decay=decay,
                eps=self.epsilon,
                maximize=False,
            )
        torch.autograd.graph.increment_version(values)  # the kernel does not, and casts are kept by version
        moments.steps[slice(None) if rows is None else list(rows)] += 1


@dataclass
class Moments:
    """AdamW's running means [n p] and the steps each row has taken [n]."""

    first: Tensor
    second: Tensor
    steps: Tensor

    @classmethod
    def zeros(cls, rows: int, parameters: int, device: torch.device | str = "cpu") -> Moments:
        zero = torch.zeros(rows, parameters, device=device)
        return cls(zero, zero.clone(), torch.zeros(rows, dtype=torch.int64))

    def select(self, rows: list[int] | slice, columns: slice) -> Moments:
        """A view (for a slice) or copy (for a list) of some rows and columns."""
        return Moments(self.first[rows, columns], self.second[rows, columns], self.steps[rows])


def clip_factor(squared_norm: Tensor, limit: float) -> Tensor:
    """Factor [n] that brings gradients of these squared norms [n] (float64) to at most `limit`, as torch's clip_grad_norm_ does."""
    return (limit / (squared_norm.sqrt() + 1e-6)).clamp(max=1.0)
