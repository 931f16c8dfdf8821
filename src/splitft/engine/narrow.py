"""What a bottleneck does to a pass: states become few channels in front of a wire and states again behind it. Without one, nothing.

Axes: n rows of the bank, s sessions, b sequences of a session, t tokens, d hidden width, c channels, i inputs, o outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from splitft.bottleneck import Matrix, Place, clipped
from splitft.lora import AdapterBank, Layout, add_rows


def narrows(layout: Layout) -> bool:
    """Whether cuts of this run have a bottleneck."""
    return bool(layout.matrices)


def crossing_width(layout: Layout, width: int) -> int:
    """How many channels cross: the bottleneck's, or all `width` of a state."""
    return next((one.outputs for one in layout.matrices if one.encodes), width)


def encode(bank: AdapterBank, place: Place, boundary: int, hidden: Tensor, rows: Tensor | None = None, sessions: int = 1) -> Tensor:
    """What crosses [s*b t c] of states [s*b t d] in the bank's `rows` [s] (None: its only one); the states where there is no bottleneck."""
    if not narrows(bank.layout):
        return hidden
    encoder = bank.layout.pair(place, boundary).encoder
    return clipped(_through(bank, encoder, hidden, rows, sessions), encoder.clip)


def decode(bank: AdapterBank, place: Place, boundary: int, codes: Tensor, rows: Tensor | None = None, sessions: int = 1) -> Tensor:
    """The states [s*b t d] that the receiver makes of what crossed [s*b t c]; the inverse of `encode` as far as there is one."""
    if not narrows(bank.layout):
        return codes
    return _through(bank, bank.layout.pair(place, boundary).decoder, codes, rows, sessions)


def _through(bank: AdapterBank, matrix: Matrix, tensor: Tensor, rows: Tensor | None, sessions: int) -> Tensor:
    leaf = bank.matrices[matrix.name]
    weight = leaf.detach() if rows is None else leaf.detach().index_select(0, rows.to(leaf.device))
    grouped = tensor.reshape(sessions, -1, tensor.shape[-1]).to(weight)
    used = weight.expand(sessions, -1, -1)  # without rows all sessions share the only one
    if torch.is_grad_enabled():
        where = rows if rows is not None else torch.zeros(sessions, dtype=torch.int64)
        found: Tensor = Affine.apply(grouped, used, matrix.scale, leaf.grad, where, leaf)  # type: ignore[no-untyped-call]
    else:
        found = affine(used, matrix.scale, grouped)
    return found.to(tensor).reshape(*tensor.shape[:-1], -1)


def affine(weight: Tensor, scale: float, inputs: Tensor) -> Tensor:
    """scale W [x; 1] of inputs [s n i] for weights [s o i+1]."""
    return torch.baddbmm(weight[:, :, -1].unsqueeze(1), inputs, weight[:, :, :-1].transpose(1, 2), beta=scale, alpha=scale)


class Affine(torch.autograd.Function):
    """`affine`, whose weights' gradients are added to those of the bank's rows (`into` [n o i+1]; None: not trained). The bank's leaf makes
    the output part of the graph."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, scale: float, into: Tensor | None, rows: Tensor, leaf: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.scale, ctx.into, ctx.rows = scale, into, rows
        return affine(weight, scale, inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        inputs, weight = ctx.saved_tensors
        gradient = gradients[0] * ctx.scale
        if ctx.into is not None:
            own = torch.bmm(gradient.transpose(1, 2), inputs)
            add_rows(ctx.into, ctx.rows, torch.cat([own, gradient.sum(1).unsqueeze(2)], 2))
        return torch.bmm(gradient, weight[:, :, :-1]) if ctx.needs_input_grad[0] else None, None, None, None, None, None


def around(bank: AdapterBank, boundaries: Mapping[int, Place]) -> Callable[[int, Tensor], Tensor]:
    """A route's `cross` that sends all rows [r t d] through the bottlenecks at these boundaries, without a wire: the model as it is used
    through its bottleneck. The bank has one row."""

    def cross(block: int, hidden: Tensor) -> Tensor:
        place = boundaries.get(block + 1)
        return hidden if place is None else decode(bank, place, block + 1, encode(bank, place, block + 1, hidden))

    return cross
