"""Projection to the vocabulary and cross-entropy in chunks of tokens, gradient formed in the same pass.

The logits of a batch (tokens x vocabulary floats, often the largest tensor of a step) never exist whole: each chunk's logits give
its loss and at once the gradient with respect to its hidden states. Positions without a target are not computed at all.

Axes: q positions with a target, d hidden width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splitft.models.base import Anatomy
from splitft.products import product
from splitft.types import IGNORE_LABEL

CHUNK_ELEMENTS = 4_000_000
CHUNK_MINIMUM = 256


@dataclass(frozen=True)
class Targets:
    """What a batch [rows t] is to predict: `positions` [q] into the flattened batch, `labels` [q], `row` [q] the row of each."""

    positions: Tensor
    labels: Tensor
    row: Tensor
    rows: int

    @classmethod
    def of(cls, labels: Tensor, device: torch.device | str | None = None) -> Targets:
        """From shifted labels [rows t]: labels[.., t] is the token at t + 1, IGNORE_LABEL where nothing is to be predicted.

        Labels on the CPU with another `device` are looked through on the CPU, so that no GPU has to be waited for.
        """
        flat = labels.reshape(-1)
        positions = torch.nonzero(flat != IGNORE_LABEL).squeeze(1)
        where = labels.device if device is None else device
        return cls(positions.to(where), flat[positions].to(where), (positions // labels.shape[1]).to(where), labels.shape[0])

    def count_by_row(self) -> Tensor:
        """Targets of each row [rows]."""
        return torch.bincount(self.row, minlength=self.rows)


def shift_labels(ids: Tensor, trained: Tensor) -> Tensor:
    """Labels [rows t] for next-token prediction: position t is to predict token t + 1 if that token is trained on."""
    labels = torch.full_like(ids, IGNORE_LABEL)
    labels[:, :-1] = torch.where(trained[:, 1:], ids[:, 1:], IGNORE_LABEL)
    return labels


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose logits make about 16 MB in float32, and no fewer than CHUNK_MINIMUM: below that the head matrix is read too often."""
    return max(CHUNK_MINIMUM, CHUNK_ELEMENTS // vocabulary)


def token_losses(hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood [q] and whether the arg-max is right [q], without gradient, for hidden states [q d]."""
    losses, right = [], []
    size = chunk_tokens(vocabulary)
    with torch.no_grad():
        for start in range(0, hidden.shape[0], size):
            logits = head(hidden[start : start + size]).float()
            target = labels[start : start + size]
            losses.append(F.cross_entropy(logits, target, reduction="none"))
            right.append(logits.argmax(-1) == target)
    if not losses:
        return hidden.new_zeros(0, dtype=torch.float32), torch.zeros(0, dtype=torch.bool, device=hidden.device)
    return torch.cat(losses), torch.cat(right)


class ChunkedCrossEntropy(torch.autograd.Function):
    """(hidden [q d], weight [q]) -> sum of weight * nll, with each token's nll [q] beside it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, head: nn.Module, anatomy: Anatomy) -> tuple[Tensor, Tensor]:
        matrix, bias = head.weight, getattr(head, "bias", None)
        size = chunk_tokens(matrix.shape[0])  # type: ignore[arg-type,index]
        gradient, losses = torch.empty_like(hidden), hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        for start in range(0, hidden.shape[0], size):
            part = slice(start, start + size)
            if anatomy.after_head == "nothing":
                losses[part], gradient[part] = _closed_form(hidden[part], weight[part], labels[part], matrix, bias)  # type: ignore[arg-type]
            else:
                losses[part], gradient[part] = _by_autograd(hidden[part], weight[part], labels[part], head, anatomy)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(losses)
        return (losses * weight).sum(), losses

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None, None


def _closed_form(hidden: Tensor, weight: Tensor, labels: Tensor, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """nll and gradient of one chunk: softmax minus one-hot, times the head matrix."""
    logits = product(hidden.to(matrix.dtype), matrix, bias).float()
    target = labels[:, None]
    chosen = logits.gather(1, target)
    largest = logits.amax(1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    losses = (total.log() + largest - chosen).squeeze(1)
    logits.mul_(weight[:, None] / total).scatter_add_(1, target, -weight[:, None])
    return losses, product(logits.to(matrix.dtype), matrix.t()).to(hidden.dtype)


def _by_autograd(hidden: Tensor, weight: Tensor, labels: Tensor, head: nn.Module, anatomy: Anatomy) -> tuple[Tensor, Tensor]:
    """nll and gradient of one chunk for heads followed by a scale or a soft cap."""
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_(True)
        losses = F.cross_entropy(anatomy.finish(head(leaf)).float(), labels, reduction="none")
        (gradient,) = torch.autograd.grad((losses * weight).sum(), leaf)
    return losses.detach(), gradient


def training_loss(hidden: Tensor, targets: Targets, row_weight: Tensor, head: nn.Module, anatomy: Anatomy) -> tuple[Tensor, Tensor]:
    """Loss to call backward on, and the summed nll of each row [rows] in float64, on the device: whoever reads it waits for it.

    `hidden` [rows t d] stands in front of the LM head; `row_weight` [rows] multiplies every target of a row (1 / targets of the
    client's optimizer step makes each client's share its own token mean).
    """
    weight = head.weight
    assert isinstance(weight, Tensor)
    hidden = hidden.to(weight.device)  # the head of a model spread over devices may lie on another one
    chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, targets.positions.to(hidden.device))
    row, labels = targets.row.to(hidden.device), targets.labels.to(hidden.device)
    loss, losses = ChunkedCrossEntropy.apply(chosen, row_weight.to(hidden.device)[row], labels, head, anatomy)  # type: ignore[no-untyped-call]
    kind = torch.float32 if hidden.device.type == "mps" else torch.float64  # MPS has no float64
    return loss, torch.zeros(targets.rows, dtype=kind, device=hidden.device).index_add_(0, row, losses.to(kind))
