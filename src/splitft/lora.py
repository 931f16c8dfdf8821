"""Low-rank adapters for many clients at once: one row of a flat bank per client, one batched product per projection.

The bank holds every adapter of a client in one row of a matrix [n p]; the factors of a key are views into it, and so are their
gradients. So the optimizer, the gradient norm and the weighted average are single operations on the matrix, a client's front and
back are column ranges (keys are sorted by block), and an adapter travels as one vector.

LoRA: Hu et al. 2021, arXiv 2106.09685: y = x W^T + scale (x A^T) B^T, scale = alpha / rank, A uniform, B zero at the start.

Axes: n rows of the bank (clients), s sessions in a pass, r rank, i input width, o output width, p adapter parameters.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from splitft.errors import AdapterError
from splitft.rng import torch_stream
from splitft.types import Factors, Key


@dataclass(frozen=True)
class Entry:
    """Where the factors of one key stand in a row: A [rank inputs] at `start`, B [outputs rank] behind it."""

    key: Key
    inputs: int
    outputs: int
    rank: int
    scale: float
    start: int

    @property
    def middle(self) -> int:
        return self.start + self.rank * self.inputs

    @property
    def end(self) -> int:
        return self.middle + self.outputs * self.rank


@dataclass(frozen=True)
class Layout:
    """The order of all adapters in a row: by block, then by module. Frozen, so a column range means the same everywhere."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, widths: Mapping[Key, tuple[int, int]], rank: int | Mapping[Key, int], scale: float | Mapping[Key, float]) -> Layout:
        """Layout for keys with their (input, output) widths; rank and scale are one number or one per key."""
        entries, start = [], 0
        for key in sorted(widths):
            inputs, outputs = widths[key]
            own_rank = rank if isinstance(rank, int) else rank[key]
            own_scale = scale if isinstance(scale, int | float) else scale[key]
            if not own_rank >= 1:
                raise AdapterError(f"rank {own_rank} of {key} is not positive.", "set lora.rank to 1 or more.")
            entry = Entry(key, inputs, outputs, own_rank, float(own_scale), start)
            entries.append(entry)
            start = entry.end
        return cls(tuple(entries))

    @property
    def parameters(self) -> int:
        """Length p of a row."""
        return self.entries[-1].end if self.entries else 0

    @cached_property
    def by_key(self) -> dict[Key, Entry]:
        return {entry.key: entry for entry in self.entries}

    def columns(self, first_block: int, end_block: int) -> slice:
        """Columns of the blocks first_block .. end_block - 1."""
        inside = [entry for entry in self.entries if first_block <= entry.key.block < end_block]
        if not inside:
            end = next((entry.start for entry in self.entries if entry.key.block >= end_block), self.parameters)
            return slice(end, end)
        return slice(inside[0].start, inside[-1].end)

    def active(self, ranks: Sequence[int]) -> Tensor:
        """Which columns [p] (bool) adapters of these ranks, one per entry, use: the first rows of A and the first columns of B."""
        mask = torch.zeros(self.parameters, dtype=torch.bool)
        for entry, rank in zip(self.entries, ranks, strict=True):
            mask[entry.start : entry.start + min(rank, entry.rank) * entry.inputs] = True
            mask[entry.middle : entry.end].view(entry.outputs, entry.rank)[:, :rank] = True
        return mask

    def factors(self, row: Tensor) -> dict[Key, Factors]:
        """Views of the factors in one row [p]."""
        return {
            e.key: Factors(row[e.start : e.middle].view(e.rank, e.inputs), row[e.middle : e.end].view(e.outputs, e.rank))
            for e in self.entries
        }

    def row(self, factors: Mapping[Key, Factors]) -> Tensor:
        """One row [p] from factors of exactly these keys and shapes; AdapterError names the first that does not fit."""
        row = torch.zeros(self.parameters)
        if unknown := sorted(set(factors) - set(self.by_key)):
            raise AdapterError(
                f"the adapter has weights for {unknown[0]}, which this run does not adapt.",
                "set lora.targets to cover the adapter's modules.",
            )
        for entry in self.entries:
            if entry.key not in factors:
                raise AdapterError(f"the adapter has no weights for {entry.key}.", "set lora.targets to the adapter's modules.")
            a, b = factors[entry.key]
            if tuple(a.shape) != (entry.rank, entry.inputs) or tuple(b.shape) != (entry.outputs, entry.rank):
                want = f"A {entry.rank} x {entry.inputs}, B {entry.outputs} x {entry.rank}"
                raise AdapterError(
                    f"{entry.key}: factors have shapes A {tuple(a.shape)}, B {tuple(b.shape)}, needed are {want}.",
                    "check lora.rank and the base model.",
                )
            row[entry.start : entry.middle] = a.detach().float().reshape(-1)
            row[entry.middle : entry.end] = b.detach().float().reshape(-1)
        return row

    def initial_row(self, seed: int) -> Tensor:
        """A fresh adapter [p]: A uniform in +-1/sqrt(inputs) (kaiming with a = sqrt 5, as in PEFT), B zero."""
        row = torch.zeros(self.parameters)
        for entry in self.entries:
            generator = torch_stream(seed, f"lora-init/{entry.key.module}", entry.key.block)
            bound = 1.0 / math.sqrt(entry.inputs)
            row[entry.start : entry.middle].uniform_(-bound, bound, generator=generator)
        return row


@cache
def _hear_layout_warning() -> None:
    """Let torch say its once-per-process warning about strided gradients where nobody is disturbed.

    Leaves are strided views on purpose; their gradients add up in place, so the layout costs nothing.
    """
    values = torch.zeros(2, 4)
    leaf = values[:, :2].view(-1, 2, 1).detach().requires_grad_(True)
    leaf.grad = torch.zeros(2, 4)[:, :2].view(-1, 2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        leaf.sum().backward()  # type: ignore[no-untyped-call]


class LowRank(torch.autograd.Function):
    """output [s t o] + scale * (inputs [s t i] A^T) B^T with A [s r i], B [s o r].

    The same as letting autograd do it, with the products arranged so that the narrow axis r is never the inner loop's last one: on a CPU
    the gradient of B alone is seven times as fast that way, a whole step about a tenth.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low = torch.bmm(a, inputs.transpose(1, 2))  # [s r t]
        ctx.save_for_backward(inputs, a, b, low)
        ctx.scale = scale
        return torch.baddbmm(output, low.transpose(1, 2), b.transpose(1, 2), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, None]:
        inputs, a, b, low = ctx.saved_tensors
        (gradient,) = gradients
        low_gradient = torch.bmm(b.transpose(1, 2), gradient.transpose(1, 2)).mul_(ctx.scale)  # [s r t]
        a_gradient = torch.bmm(low_gradient, inputs) if ctx.needs_input_grad[2] else None
        b_gradient = torch.bmm(low, gradient).mul_(ctx.scale).transpose(1, 2)
        input_gradient = torch.bmm(low_gradient.transpose(1, 2), a) if ctx.needs_input_grad[1] else None
        return gradient, input_gradient, a_gradient, b_gradient, None


def wide(device: torch.device) -> torch.dtype:
    """The type for sums over many values: float64 where the device has it (MPS has not)."""
    return torch.float32 if device.type == "mps" else torch.float64


class AdapterBank:
    """Adapters of n clients with their gradients: `values` and `gradients` [n p], float32 on `device`.

    `blocks` restricts which blocks' factors become trainable leaves (a client's own blocks); the columns of others stay zero.
    `trained` [p] (bool) says which factors get gradients at all (None: all); a rule that freezes A leaves its columns out.
    """

    def __init__(
        self,
        layout: Layout,
        rows: int,
        device: torch.device | str = "cpu",
        blocks: Iterable[int] | None = None,
        trained: Tensor | None = None,
    ) -> None:
        _hear_layout_warning()
        self.layout = layout
        self.values = torch.zeros(rows, layout.parameters, device=device)
        self.gradients = torch.zeros_like(self.values)
        self.trained = None if trained is None else trained.to(self.values)
        wanted = None if blocks is None else frozenset(blocks)
        self.leaves: dict[Key, tuple[Tensor, Tensor]] = {}
        for entry in layout.entries:
            if wanted is None or entry.key.block in wanted:
                self.leaves[entry.key] = (
                    self._leaf(entry.start, entry.middle, entry.rank, entry.inputs),
                    self._leaf(entry.middle, entry.end, entry.outputs, entry.rank),
                )

    def _leaf(self, start: int, end: int, first: int, second: int) -> Tensor:
        """A trainable view [n first second] of the columns, whose gradient accumulates in place in the gradient matrix."""
        leaf = self.values[:, start:end].view(-1, first, second).detach()
        if self.trained is None or bool(self.trained[start:end].any()):
            leaf.requires_grad_(True)
            leaf.grad = self.gradients[:, start:end].view(-1, first, second)
        return leaf

    @property
    def rows(self) -> int:
        return self.values.shape[0]

    def zero_gradients(self) -> None:
        self.gradients.zero_()

    def squared_norms(self) -> Tensor:
        """Squared gradient norm of every row [n], float64 on the CPU."""
        norms: Tensor = torch.linalg.vector_norm(self.gradients, dim=1)
        return norms.cpu().double().square()

    def scale_gradients(self, factors: Tensor) -> None:
        """Multiply the gradients of every row by its factor [n]."""
        self.gradients.mul_(factors.to(self.gradients.dtype).to(self.gradients.device)[:, None])

    def add(self, key: Key, base_output: Tensor, inputs: Tensor, rows: Tensor | None, sessions: int) -> Tensor:
        """base_output [.. o] plus the low-rank update of inputs [.. i], whose rows belong in equal runs to `sessions` sessions.

        `rows` [s] maps a session to its bank row; None: session k uses row k (or all share the only row).
        """
        leaf = self.leaves.get(key)
        if leaf is None:
            return base_output
        a, b = leaf
        if rows is not None:
            a, b = a[rows[:sessions]], b[rows[:sessions]]
        elif sessions < a.shape[0]:
            a, b = a[:sessions], b[:sessions]
        kind = base_output.dtype
        grouped = inputs.reshape(sessions, -1, inputs.shape[-1]).to(kind)
        output = base_output.reshape(sessions, -1, base_output.shape[-1])
        scale = self.layout.by_key[key].scale
        result: Tensor = LowRank.apply(output, grouped, a.to(kind), b.to(kind), scale)  # type: ignore[no-untyped-call]
        return result.view(base_output.shape)
