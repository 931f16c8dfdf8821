"""Cut a causal LM into front, back and exit without touching its forward: slots around the blocks, and a route for each pass.

The model keeps its own forward, so masks, rotary tables, ALiBi, norms and scalings are its own and are computed once per pass. Each
block sits in a `Slot`; the route of a pass says for every slot whether to run the block, which rows join before it, and what happens
to the hidden state behind it (go on, cross a wire, end the pass). Slicing the list of blocks instead breaks Bloom and Granite.

Axes: s sessions, b sequences of a session, t tokens, d hidden width. Rows of a pass are ordered by session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from splitft.lora import AdapterBank, Rows
from splitft.models.activation import fuse_activations
from splitft.models.anatomy import block_count, find_blocks, find_head, projections, select_targets
from splitft.models.base import Anatomy
from splitft.products import use_fast_products
from splitft.types import Factors, Key

Crossing = Callable[[int, Tensor], Tensor]


class EarlyExit(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass with its hidden state [rows t d]."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@dataclass
class Route:
    """What one pass does. `entries` maps a block index to the hidden rows [s*b t d] that join before that block (index `blocks` means
    behind the last one); with entries, nothing else enters. The pass ends behind block `last` (None: in front of the LM head).

    `cross` is called behind every block with its index and the hidden state and may replace it: the simulated wire. `block_rows` gives
    for a block the bank rows of the sessions and their number, where that differs from block to block (an adapter that sessions share).
    """

    total_rows: int
    last: int | None = None
    entries: dict[int, Tensor] = field(default_factory=dict)
    cross: Crossing | None = None
    bank: AdapterBank | None = None
    bank_rows: Rows = None
    block_rows: Callable[[int], tuple[Rows, int]] | None = None
    sessions: int = 1
    active_rows: int = 0

    def join(self, index: int, hidden: Tensor) -> Tensor:
        """The state with the rows that enter before block `index`; they follow the rows that are already there."""
        joining = self.entries.get(index)
        if joining is None:
            return hidden
        joined = joining if self.active_rows == 0 else torch.cat([hidden, joining])
        self.active_rows += joining.shape[0]
        return joined

    @property
    def active_sessions(self) -> int:
        """Sessions whose rows have entered so far."""
        return self.sessions * self.active_rows // self.total_rows


class RouteHolder:
    """The route of the pass in progress, shared by all slots and adapted projections of one model."""

    def __init__(self) -> None:
        self.route: Route | None = None

    def current(self) -> Route:
        assert self.route is not None, "the model was called outside a pass"
        return self.route


class BankLinear(nn.Module):
    """A frozen projection plus the adapters of the pass in progress."""

    def __init__(self, base: nn.Module, key: Key, holder: RouteHolder) -> None:
        super().__init__()
        self.base = base
        self.key = key
        self.holder = holder

    @property
    def weight(self) -> Tensor:
        """The frozen weight; some forwards look at a projection's dtype."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, inputs: Tensor) -> Tensor:
        route = self.holder.route
        if route is None or route.bank is None:
            output: Tensor = self.base(inputs)
            return output
        rows, sessions = (route.bank_rows, route.active_sessions) if route.block_rows is None else route.block_rows(self.key.block)
        return route.bank.project(self.key, self.base, inputs, rows, sessions)


def first_rows(value: Any, active: int, total: int) -> Any:
    """The part of a block's argument that belongs to the first `active` of `total` rows.

    Tensors with two or more axes whose first is a multiple of `total` are per row (masks, position ids, rotary tables per row,
    Bloom's ALiBi of rows * heads); anything else is shared. The self-check runs this on the family at load time.
    """
    if isinstance(value, Tensor):
        per_row = value.ndim >= 2 and value.shape[0] >= total and value.shape[0] % total == 0
        return value[: value.shape[0] // total * active] if per_row and total > 1 else value
    if isinstance(value, tuple | list):
        return type(value)(first_rows(item, active, total) for item in value)
    if isinstance(value, dict):
        return {name: first_rows(item, active, total) for name, item in value.items()}
    return value


class Slot(nn.Module):
    """Stands in a model's list of blocks. Holds the block, or None where this side does not own it."""

    def __init__(
        self, index: int, block: nn.Module | None, like: nn.Module, holder: RouteHolder, returns_tuple: bool, is_last: bool
    ) -> None:
        super().__init__()
        self.index = index
        self.is_last = is_last
        self.checkpointing = False
        self.block = block
        self.holder = holder
        self.returns_tuple = returns_tuple
        # Some forwards read plain attributes off the block (Qwen2 and Gemma: attention_type).
        for name, value in vars(like).items():
            if not name.startswith("_") and name not in vars(self) and isinstance(value, str | int | float | bool):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        route = self.holder.current()
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        rest: tuple[Any, ...] = (None,)
        if route.entries:
            hidden = route.join(self.index, hidden)
        else:
            route.active_rows = route.total_rows
        if route.active_rows > 0:
            hidden, rest = self._run(route, hidden, args, kwargs)
            if route.cross is not None:
                hidden = route.cross(self.index, hidden)
        if self.is_last:
            hidden = route.join(self.index + 1, hidden)
        if route.last == self.index:
            raise EarlyExit(hidden)
        return (hidden, *rest) if self.returns_tuple else hidden

    def _run(self, route: Route, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...]]:
        assert self.block is not None, f"block {self.index} is not on this side"
        others, named = args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}
        if route.active_rows < route.total_rows:
            others = first_rows(others, route.active_rows, route.total_rows)
            named = first_rows(named, route.active_rows, route.total_rows)
        by_name = not args
        if self.checkpointing and torch.is_grad_enabled():
            output = checkpoint(self._call, route, route.active_rows, by_name, hidden, others, named, use_reentrant=False)
        else:
            output = self._call(route, route.active_rows, by_name, hidden, others, named)
        return (output[0], tuple(output[1:])) if isinstance(output, tuple) else (output, (None,))

    def _call(self, route: Route, active_rows: int, by_name: bool, hidden: Tensor, others: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Run the block under `route`, whatever pass is in progress: gradient checkpointing calls this again in the backward."""
        assert self.block is not None
        before, rows_before = self.holder.route, route.active_rows
        self.holder.route, route.active_rows = route, active_rows
        try:
            return self.block(hidden_states=hidden, **named) if by_name else self.block(hidden, *others, **named)
        finally:
            self.holder.route, route.active_rows = before, rows_before


class HeadSlot(nn.Module):
    """Stands for the LM head and ends the pass in front of it, so that the logits of a whole batch never exist."""

    def forward(self, hidden: Tensor) -> Tensor:
        raise EarlyExit(hidden)


class SplitModel(nn.Module):
    """A frozen causal LM whose blocks sit in slots and whose chosen projections take adapters from the bank of the pass.

    One instance serves every role: the whole cohort in a simulation, a client's front or exit, the server's back. `owned` are the
    indices of the blocks whose weights are present. Parameters are never trained; adapters live in the bank (lora.py).
    """

    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, targets: str | list[str] = "default", owned: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        model.requires_grad_(False)
        # Without it the family does not look for padding in every batch, to warn of a mask that is left out on purpose (`needed_mask`).
        model.config.get_text_config().pad_token_id = None
        self.anatomy = anatomy
        self.holder = RouteHolder()
        self.blocks = block_count(model.config)
        self.owned = frozenset(range(self.blocks) if owned is None else owned)
        _, blocks = find_blocks(model, self.blocks)
        self.scan(blocks, targets)
        path, head = find_head(model)
        fuse_activations(blocks)
        use_fast_products(model)
        for index, block in enumerate(list(blocks)):
            blocks[index] = Slot(
                index, block if index in self.owned else None, block, self.holder, anatomy.returns_tuple, index == self.blocks - 1
            )
        parent, _, name = path.rpartition(".")
        self.hidden_size = int(model.config.get_text_config().hidden_size)
        self.embedding_width = int(model.get_input_embeddings().weight.shape[1])
        setattr(model.get_submodule(parent), name, HeadSlot())
        self.head = head
        self.model = model

    def scan(self, blocks: nn.ModuleList, targets: str | list[str]) -> None:
        """Note every adaptable projection with its widths, and wrap those that `targets` chooses."""
        self._widths: dict[Key, tuple[int, int]] = {}
        chosen: list[Key] = []
        for index, block in enumerate(blocks):
            available = tuple(one for one in projections(block) if one.module not in self.anatomy.bypassed)
            if index not in self.owned and not available:
                continue
            self._widths.update({Key(index, one.module): (one.inputs, one.outputs) for one in available})
            chosen += [Key(index, one.module) for one in select_targets(available, targets)]
        self._blocks = list(blocks)
        self.adapt(chosen)

    def adapt(self, keys: Sequence[Key]) -> None:
        """Let exactly these projections take adapters; called again, it replaces the choice."""
        self.keys: dict[Key, tuple[int, int]] = {key: self._widths[key] for key in sorted(keys)}
        for key in self._widths:
            if key.block not in self.owned:
                continue
            parent, _, name = key.module.rpartition(".")
            module = self._blocks[key.block].get_submodule(parent)
            current = getattr(module, name)
            if key in self.keys and not isinstance(current, BankLinear):
                setattr(module, name, BankLinear(current, key, self.holder))
            elif key not in self.keys and isinstance(current, BankLinear):
                setattr(module, name, current.base)

    def projection(self, key: Key) -> nn.Module:
        """The frozen projection behind a key of this side."""
        module = self._blocks[key.block].get_submodule(key.module)
        return module.base if isinstance(module, BankLinear) else module

    def fold(self, key: Key, factors: Factors, scale: float) -> None:
        """Add scale * B A to the frozen weight behind a key, for good."""
        weight = self.weight(key)
        change = (scale * factors.b.double() @ factors.a.double()).to(weight.device)
        with torch.no_grad():
            weight.add_((change.T if isinstance(self.projection(key), Conv1D) else change).to(weight.dtype))

    def weight(self, key: Key) -> Tensor:
        """The frozen weight behind a key as the family stores it: [out in], in GPT-2's Conv1D [in out]."""
        weight = self.projection(key).weight
        assert isinstance(weight, Tensor)
        return weight

    def keys_of_all(self) -> dict[Key, tuple[int, int]]:
        """Every adaptable projection with its (input, output) width."""
        return dict(self._widths)

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute blocks in the backward instead of keeping their activations."""
        for module in self.model.modules():
            if isinstance(module, Slot):
                module.checkpointing = enabled

    def compile_blocks(self) -> None:
        """Let torch.compile fuse what stands between a block's projections; those keep their own kernels. Needs a C++ compiler on a CPU."""
        for module in self.model.modules():
            if isinstance(module, BankLinear):
                module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign,no-untyped-call]
        for module in self.model.modules():
            if isinstance(module, Slot) and module.block is not None:
                module.block.compile()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the frozen weights, and of the hidden states between blocks."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @contextmanager
    def _routed(self, route: Route) -> Iterator[None]:
        self.holder.route = route
        try:
            yield
        finally:
            self.holder.route = None

    def run(self, route: Route, ids: Tensor | None, mask: Tensor | None, cache: Any = None) -> Tensor:
        """One pass: token ids [rows t] (or None when every row enters by `route.entries`) to the hidden state where the route ends.

        `mask` [rows t] is 1 for tokens, 0 for padding; None when there is no padding. `cache`: one of transformers' key-value caches, which
        holds the tokens before these and takes them up.
        """
        assert route.last is None or route.last < self.blocks, (route.last, self.blocks)
        inputs: dict[str, Tensor] = {}
        if ids is not None:
            inputs["input_ids"] = ids
        else:
            some = next(iter(route.entries.values()))
            inputs["inputs_embeds"] = some.new_zeros((route.total_rows, some.shape[1], self.embedding_width))
        if mask is not None:
            inputs["attention_mask"] = mask
        with self._routed(route):
            try:
                self.model(use_cache=cache is not None, **({} if cache is None else {"past_key_values": cache}), **inputs)
            except EarlyExit as stop:
                return stop.hidden
        raise AssertionError("the pass did not end at its exit")

    def needed_mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask that `run` needs for a batch padded behind its rows' last tokens: none where the family does not look there."""
        return None if self.anatomy.maskless else mask

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [.. v] of hidden states [.. d] taken in front of the LM head."""
        device = next(self.head.parameters()).device
        return self.anatomy.finish(self.head(hidden.to(device)))
