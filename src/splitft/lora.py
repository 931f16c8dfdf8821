"""Low-rank adapters for many clients at once: one row of a flat bank per client, one batched product per projection.

The bank holds every adapter of a client in one row of a matrix [n p]; the factors of a key are views into it, and so are their
gradients. So the optimizer, the gradient norm and the weighted average are single operations on the matrix, a client's front and
back are column ranges (keys are sorted by block), and an adapter travels as one vector.

LoRA: Hu et al. 2021, arXiv 2106.09685: y = x W^T + scale (x A^T) B^T, scale = alpha / rank, A uniform, B zero at the start.

Axes: n rows of the bank (clients), s sessions in a pass, r rank, i input width, o output width, p adapter parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from splitft.bottleneck import Matrix, Pair, Place
from splitft.errors import AdapterError
from splitft.products import FrozenConv1D, FrozenLinear, product
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
    """The order of all adapters in a row: by block, then by module. Frozen, so a column range means the same everywhere.

    The matrices of bottlenecks stand behind the adapters of their block; `entries` are the adapters alone.
    """

    entries: tuple[Entry, ...]
    matrices: tuple[Matrix, ...] = ()

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

    def beside(self, matrices: Iterable[Matrix]) -> Layout:
        """The same adapters with the matrices of bottlenecks among them."""
        entries, placed, start = [], [], 0
        waiting = sorted(matrices, key=lambda one: (one.block, one.name))
        for block in sorted({*(entry.key.block for entry in self.entries), *(one.block for one in waiting)}):
            for entry in (entry for entry in self.entries if entry.key.block == block):
                entries.append(replace(entry, start=start))
                start = entries[-1].end
            for one in (one for one in waiting if one.block == block):
                placed.append(one.at(start))
                start += one.size
        return Layout(tuple(entries), tuple(placed))

    def pair(self, place: Place, boundary: int) -> Pair:
        """The bottleneck at a boundary. Raises AdapterError where the run has none there."""
        found = self._pairs.get((place, boundary))
        if found is None:
            raise AdapterError(
                f"a tensor is to cross at the {place} behind block {boundary - 1}, where this run has no bottleneck.",
                "name the cut in bottleneck.cuts.",
            )
        return found

    @cached_property
    def _pairs(self) -> dict[tuple[Place, int], Pair]:
        decoders = {(one.place, one.boundary): one for one in self.matrices if not one.encodes}
        return {where: Pair(one, decoders[where]) for one in self.matrices if one.encodes for where in [(one.place, one.boundary)]}

    @property
    def parameters(self) -> int:
        """Length p of a row."""
        return max(self.entries[-1].end if self.entries else 0, self.matrices[-1].end if self.matrices else 0)

    @cached_property
    def by_key(self) -> dict[Key, Entry]:
        return {entry.key: entry for entry in self.entries}

    def columns(self, first_block: int, end_block: int) -> slice:
        """Columns of the blocks first_block .. end_block - 1."""
        last = len(self._block_starts) - 1
        end = self._block_starts[min(max(end_block, 0), last)]
        return slice(min(self._block_starts[min(max(first_block, 0), last)], end), end)

    @cached_property
    def _block_starts(self) -> list[int]:
        """The first column of every block, adapted or not, and behind them the number of columns."""
        firsts: dict[int, int] = {}
        for block, start in (*((e.key.block, e.start) for e in self.entries), *((one.block, one.start) for one in self.matrices)):
            firsts[block] = min(start, firsts.get(block, start))
        found = [self.parameters]
        for block in range(max(firsts, default=-1), -1, -1):
            found.append(firsts.get(block, found[-1]))
        return found[::-1]

    def active(self, ranks: Sequence[int]) -> Tensor:
        """Which columns [p] (bool) adapters of these ranks, one per entry, use: the first rows of A and the first columns of B."""
        mask = torch.zeros(self.parameters, dtype=torch.bool)
        for entry, rank in zip(self.entries, ranks, strict=True):
            mask[entry.start : entry.start + min(rank, entry.rank) * entry.inputs] = True
            mask[entry.middle : entry.end].view(entry.outputs, entry.rank)[:, :rank] = True
        for one in self.matrices:
            mask[one.start : one.end] = True
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


Rows: TypeAlias = Tensor | slice | None


@dataclass(frozen=True)
class Adapters:
    """The adapters of one projection in one pass: A [s r i] and B [s o r] in the type of the computation, and where the gradients of the
    sessions' bank rows go: views A [n r i], B [n o r] (None: not trained), rows as in `AdapterBank.add`."""

    a: Tensor
    b: Tensor
    scale: float
    a_gradients: Tensor | None
    b_gradients: Tensor | None
    rows: Rows

    def low(self, inputs: Tensor) -> Tensor:
        """A x^T [s r t] for inputs [s t i]. The narrow axis is never a product's last: on a CPU that alone is seven times as fast."""
        return torch.bmm(self.a, inputs.transpose(1, 2))

    def raise_(self, output: Tensor, low: Tensor) -> None:
        """output [s t o] += scale * low^T B^T, in place."""
        output.baddbmm_(low.transpose(1, 2), self.b.transpose(1, 2), alpha=self.scale)

    def collect(self, inputs: Tensor, low: Tensor, gradient: Tensor) -> Tensor:
        """Add the factors' gradients to the bank's for the gradient [s t o] of the output; returns that of `low` [s r t]."""
        low_gradient = torch.bmm(self.b.transpose(1, 2), gradient.transpose(1, 2)).mul_(self.scale)
        if self.a_gradients is not None:
            add_rows(self.a_gradients, self.rows, torch.bmm(low_gradient, inputs))
        if self.b_gradients is not None:
            add_rows(self.b_gradients, self.rows, torch.bmm(low, gradient).mul_(self.scale).transpose(1, 2))
        return low_gradient


def add_rows(total: Tensor, rows: Rows, part: Tensor) -> None:
    """total[rows] += part, whatever their types; a row named twice gets both."""
    if isinstance(rows, Tensor):
        total.index_add_(0, rows.to(total.device), part.to(total))
        return
    start = 0 if rows is None else int(rows.start)
    total[start : start + len(part)].add_(part.to(total.device))


class LowRank(torch.autograd.Function):
    """output [s t o] plus the low-rank update of inputs [s t i], for a projection that computes its output in its own way.

    `anchors` are the bank's leaves: they make the output part of the graph. Their gradients are added to the bank's directly.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, adapters: Adapters, *anchors: Tensor) -> Tensor:
        low = adapters.low(inputs)
        ctx.save_for_backward(inputs, low)
        ctx.adapters = adapters
        found = output.clone()
        adapters.raise_(found, low)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        inputs, low = ctx.saved_tensors
        (gradient,) = gradients
        low_gradient = ctx.adapters.collect(inputs, low, gradient)
        input_gradient = torch.bmm(low_gradient.transpose(1, 2), ctx.adapters.a) if ctx.needs_input_grad[1] else None
        return gradient, input_gradient, None, None, None


class Projected(torch.autograd.Function):
    """inputs [.. i] -> inputs W + bias plus the low-rank update, as one node: the update is added in place to the frozen product's result,
    and in the backward to the frozen product's gradient, so that neither is read and written again. W [i o] may be a transposed view."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, sessions: int, adapters: Adapters, *anchors: Tensor
    ) -> Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1])
        grouped = flat.view(sessions, -1, flat.shape[1])
        output = product(flat, weight.T, bias)
        low = adapters.low(grouped)
        adapters.raise_(output.view(sessions, -1, output.shape[1]), low)
        ctx.save_for_backward(grouped, low, weight)
        ctx.adapters = adapters
        return output.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None, None, None]:
        inputs, low, weight = ctx.saved_tensors
        (gradient,) = gradients
        flat = gradient.reshape(-1, gradient.shape[-1])
        low_gradient = ctx.adapters.collect(inputs, low, flat.view(len(inputs), -1, flat.shape[1]))
        found = None
        if ctx.needs_input_grad[0]:
            found = product(flat, weight)
            found.view(inputs.shape).baddbmm_(low_gradient.transpose(1, 2), ctx.adapters.a)
            found = found.view(*gradient.shape[:-1], -1)
        return found, None, None, None, None, None, None


PLAIN = (nn.Linear, Conv1D, FrozenLinear, FrozenConv1D)


def _plain_weight(base: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight [i o] and bias of a projection that computes nothing but their product; None for any other (hooks, other layers, types)."""
    if type(base) not in PLAIN or base._forward_hooks or base._forward_pre_hooks or hasattr(base, "_hf_hook"):
        return None
    weight, bias = base.weight, base.bias
    if weight.dtype != inputs.dtype or weight.device != inputs.device or torch.is_autocast_enabled(inputs.device.type):
        return None
    return (weight if isinstance(base, Conv1D) else weight.T), bias  # type: ignore[return-value]


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
        self.layout = layout
        self.values = torch.zeros(rows, layout.parameters, device=device)
        self.gradients = torch.zeros_like(self.values)
        if any(not one.trained for one in layout.matrices):
            trained = torch.ones(layout.parameters, dtype=torch.bool) if trained is None else trained.clone()
            for one in (one for one in layout.matrices if not one.trained):
                trained[one.start : one.end] = False
        self.trained = None if trained is None else trained.to(self.values)
        wanted = None if blocks is None else frozenset(blocks)
        self._cast: tuple[tuple[torch.dtype, int], Tensor] | None = None
        self.leaves: dict[Key, tuple[Tensor, Tensor]] = {}
        for entry in layout.entries:
            if wanted is None or entry.key.block in wanted:
                self.leaves[entry.key] = (
                    self._leaf(entry.start, entry.middle, entry.rank, entry.inputs),
                    self._leaf(entry.middle, entry.end, entry.outputs, entry.rank),
                )
        self.matrices = {
            one.name: self._leaf(one.start, one.end, one.outputs, one.inputs)
            for one in layout.matrices
            if wanted is None or one.block in wanted
        }

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

    def in_type(self, kind: torch.dtype) -> Tensor:
        """The values [n p] in another type, cast once for every change of them."""
        if kind == self.values.dtype:
            return self.values.detach()
        version = self.values._version
        if self._cast is None or self._cast[0] != (kind, version):
            self._cast = ((kind, version), self.values.detach().to(kind))
        return self._cast[1]

    def adapters(self, key: Key, kind: torch.dtype, device: torch.device, rows: Rows, sessions: int) -> Adapters:
        """The adapters of a key for a pass of these sessions, in the type and on the device that it computes with."""
        # One cast of everything serves all projections of a pass, but a pass of few sessions should not pay for the others' rows.
        entry, values = self.layout.by_key[key], self.in_type(kind) if 2 * sessions > self.rows else self.values.detach()
        a = values[:, entry.start : entry.middle].view(-1, entry.rank, entry.inputs)
        b = values[:, entry.middle : entry.end].view(-1, entry.outputs, entry.rank)
        if isinstance(rows, Tensor):
            rows = rows[:sessions]
            a, b = a[rows], b[rows]
        else:
            start = 0 if rows is None else int(rows.start)
            a, b = a[start : start + sessions], b[start : start + sessions]
        a_leaf, b_leaf = self.leaves[key]
        return Adapters(a.to(device, kind), b.to(device, kind), entry.scale, a_leaf.grad, b_leaf.grad, rows)

    def project(self, key: Key, base: nn.Module, inputs: Tensor, rows: Rows, sessions: int) -> Tensor:
        """What the frozen projection `base` makes of inputs [.. i], plus the low-rank update; sessions and rows as in `add`."""
        plain = _plain_weight(base, inputs)
        if plain is None or key not in self.leaves:
            return self.add(key, base(inputs), inputs, rows, sessions)
        adapters = self.adapters(key, inputs.dtype, inputs.device, rows, sessions)
        found: Tensor = Projected.apply(inputs, *plain, sessions, adapters, *self.leaves[key])  # type: ignore[no-untyped-call]
        return found

    def add(self, key: Key, base_output: Tensor, inputs: Tensor, rows: Rows, sessions: int) -> Tensor:
        """base_output [.. o] plus the low-rank update of inputs [.. i], whose rows belong in equal runs to `sessions` sessions.

        `rows` maps a session to its bank row: positions [s], or a range of them; None: session k uses row k (or all share the only row).
        """
        if key not in self.leaves:
            return base_output
        adapters = self.adapters(key, base_output.dtype, base_output.device, rows, sessions)
        grouped = inputs.reshape(sessions, -1, inputs.shape[-1]).to(base_output.dtype)
        output = base_output.reshape(sessions, -1, base_output.shape[-1])
        result: Tensor = LowRank.apply(output, grouped, adapters, *self.leaves[key])  # type: ignore[no-untyped-call]
        return result.view(base_output.shape)
