"""What a plan costs, from shapes alone: flops, bytes and memory. Arithmetic only; no weights, no clock, no torch.

Notation: n tokens of a step (batch size x tokens per sequence t), P active parameters of a block, w its attention width, d the
hidden width, v the vocabulary, r the rank of an adapter; i and o the widths of its projection. A multiplication and an addition are two
flops. Element-wise work (norms, activations, softmax, optimizer) is left out: together a few per cent of a step.

Per block and step (the terms of Kaplan et al. 2020, arXiv 2001.08361, table 1, with a frozen base):

    forward   = 2 n P  +  4 n t w  +  2 n sum r(i + o)
    backward  = 2 n P  +  8 n t w  +  4 n sum r(i + o)

Frozen matrices need the gradient of their input and none of themselves, so their backward costs what their forward does and not
twice as much; attention's two products need four in the backward; LoRA's two products (Hu et al. 2021, arXiv 2106.09685) need four
as well. Attention is counted over the whole t x t square, as kernels without a causal short cut compute it; a causal one halves
that term. Nothing below block 0 is trained, so the embedding gets no gradient and the projections of block 0 that read it (query,
key and value by their usual names) need no input gradient: 2 n i o less for each, and 2 n r i less if adapted. The exit is the LM
head: 2 n d v forward and as much backward. Blocks kept on the client behind the server (`tail_blocks`) count with the exit.
On small GPT-2 and Llama models the sums are within 2 % of what PyTorch's flop counter sees, forward and backward.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from splitft.clock import Network
from splitft.errors import ConfigError
from splitft.types import BlockShape, Direction, Kind, ModelShape, Plan, Profile, Projection

# Projections that read the block's own input; in a parallel block the MLP does so too, which is not counted.
INPUT_READERS = re.compile(r"(^|\.)(c_attn|qkv_proj|[qkv]_proj|query_key_value|Wqkv|query|key|value|in_proj)$")
ADAPTER_VALUE_BYTES = 4
LOGIT_CHUNK_VALUES = 4_000_000
LOGIT_COPIES = 3
KNOWN_LIMIT = 256
PASS_SLACK = 1.25
BANK_COPIES = 7


@dataclass(frozen=True)
class Memory:
    """Bytes held on one side while it trains. A rough figure: allocator slack, kernels' scratch and the runtime are not in it.

    weights: parameters held x weight_bytes. adapters: LoRA parameters x 4 (float32). optimizer: their gradients and AdamW's two
    moments, 3 x 4 a parameter. activations: what the backward needs of one step,

        n x compute_bytes x sum over blocks of (P / d + 4 d + r for every adapted projection),

    since P / d is what a block's projections write or its output projections read, and 4 d stands for the norms and the residual
    stream; checked within a factor of two against PyTorch's saved tensors (Korthikanti et al. 2022, arXiv 2205.05198, count the
    same for training every weight). With checkpointing a block keeps d values a token and one block is rebuilt at a time.
    The exit adds three copies of one chunk of logits, four million values each at most.
    """

    weights_bytes: float
    adapters_bytes: float
    optimizer_bytes: float
    activations_bytes: float

    @property
    def total_bytes(self) -> float:
        """All four together."""
        return self.weights_bytes + self.adapters_bytes + self.optimizer_bytes + self.activations_bytes


@dataclass(frozen=True)
class PlanCost:
    """What one step (flops, bytes each way) and one round (adapter bytes) of one client cost under one plan.

    Byte fields may be replaced by counted bytes (`dataclasses.replace`) before `adapt.schedule.schedule`, so that the virtual clock
    runs on what really crossed the wire. The server's weights are shared by all its sessions; the rest of `server_memory` is for one.
    """

    plan: Plan
    front_forward_flops: float
    front_backward_flops: float
    back_forward_flops: float
    back_backward_flops: float
    exit_forward_flops: float
    exit_backward_flops: float
    activations_up_bytes: float
    labels_up_bytes: float
    gradients_up_bytes: float
    activations_down_bytes: float
    gradients_down_bytes: float
    adapters_up_bytes: float
    adapters_down_bytes: float
    client_memory: Memory
    server_memory: Memory

    @property
    def whole(self) -> bool:
        """Whether the client holds the whole model: then nothing crosses a cut, and the server has no block to compute."""
        return self.plan.exit_on_client and self.back_forward_flops == 0.0

    @property
    def exit_flops(self) -> float:
        """Exit and tail blocks, forward and backward, on whichever side they are."""
        return self.exit_forward_flops + self.exit_backward_flops

    @property
    def client_flops(self) -> float:
        """What the client computes in a step."""
        return self.front_forward_flops + self.front_backward_flops + (self.exit_flops if self.plan.exit_on_client else 0.0)

    @property
    def server_flops(self) -> float:
        """What the server computes for this client in a step."""
        return self.back_forward_flops + self.back_backward_flops + (0.0 if self.plan.exit_on_client else self.exit_flops)

    @property
    def uplink_bytes(self) -> float:
        """Client to server in a step."""
        return self.activations_up_bytes + self.labels_up_bytes + self.gradients_up_bytes

    @property
    def downlink_bytes(self) -> float:
        """Server to client in a step."""
        return self.activations_down_bytes + self.gradients_down_bytes

    def round_bytes(self) -> dict[Direction, dict[Kind, float]]:
        """Predicted bytes of the whole round by direction and kind, in the journal's form (control messages are not predicted)."""
        steps = self.plan.local_steps
        return {
            "up": {
                "activations": steps * self.activations_up_bytes,
                "gradients": steps * self.gradients_up_bytes,
                "labels": steps * self.labels_up_bytes,
                "adapters": self.adapters_up_bytes,
            },
            "down": {
                "activations": steps * self.activations_down_bytes,
                "gradients": steps * self.gradients_down_bytes,
                "adapters": self.adapters_down_bytes,
            },
        }


class _Held(NamedTuple):
    """A block and its adapters: every adapted projection, in the layout's order, with its rank."""

    shape: BlockShape
    adapters: tuple[tuple[Projection, int], ...]


@dataclass(frozen=True)
class CostModel:
    """Everything about a run that costs depend on, except the plan: `cost(plan)` does the arithmetic.

    `rank`, `local_steps`, `exit_on_client` and `tail_blocks` are what `plan(cut)` fills in; `cost` reads them from the plan it is given.
    `modules` are the adapted projections (full module path in the block, or its ending); empty means all of them. With gradient
    accumulation every micro-batch is an exchange: give its size as `batch_size` and multiply the local steps. Bytes per value may
    be fractions (0.5 for int4). `crossing_width`: channels of a bottleneck at the cut (0: none, states cross whole). Raises ConfigError
    for a setting out of range and for a module no block has.
    """

    shape: ModelShape
    server: Profile
    batch_size: int
    sequence_tokens: int
    rank: int
    local_steps: int = 1
    exit_on_client: bool = False
    tail_blocks: int = 0
    modules: tuple[str, ...] = ()
    weight_bytes: float = 4.0
    compute_bytes: float = 4.0
    adapter_bytes: float = 4.0
    uplink_bytes_per_value: float = 2.0
    downlink_bytes_per_value: float = 2.0
    label_bytes: float = 4.0
    packet_header_bytes: float = 0.0
    checkpointing: bool = False
    minimum_cut: int = 1
    maximum_cut: int = 0
    network: Network = field(default_factory=Network)
    crossing_width: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_tokens", "rank", "local_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; allowed is 1 or more.", "Correct the setting.")
        _check_tail(self.shape, self.exit_on_client, self.tail_blocks)
        known = sorted({projection.module for block in self.shape.blocks for projection in block.projections})
        for module in self.modules:
            if not any(_matches(path, module) for path in known):
                near = difflib.get_close_matches(module, known, n=1)
                raise ConfigError(
                    f"no block of {self.shape.name} has a projection {module!r}; known: {', '.join(known)}.",
                    f"Did you mean {near[0]!r}?" if near else "Name one of these.",
                )

    @property
    def deepest_cut(self) -> int:
        """The deepest cut allowed: `maximum_cut`, or (0) every block but the tail blocks, which leaves the server at most the exit."""
        every = len(self.shape.blocks) - self.tail_blocks
        return min(self.maximum_cut, every) if self.maximum_cut else every

    @property
    def shallowest_cut(self) -> int:
        """The shallowest cut allowed."""
        return min(self.minimum_cut, self.deepest_cut)

    def plan(self, cut: int, client: int = 0) -> Plan:
        """The plan of this run at `cut`."""
        return Plan(client, cut, self.local_steps, self.rank, self.exit_on_client, self.tail_blocks)

    def cost(self, plan: Plan) -> PlanCost:
        """Flops, bytes and memory of `plan`; the formulas stand at the top of this file and at `Memory`.

        `plan.ranks`, if given, has one rank per adapted projection of the model, sorted by block and module path; else all have
        `plan.rank`. A segment of an upload is counted as an even share. Raises ConfigError for a cut outside 1..blocks - tail_blocks
        and for ranks that do not fit the adapted projections.
        """
        form = (plan.cut, plan.exit_on_client, plan.tail_blocks, plan.rank, plan.ranks, plan.download, plan.upload, plan.segments)
        known = self._known.get(form)
        if known is None:
            if len(self._known) >= KNOWN_LIMIT:
                self._known.clear()
            known = self._known[form] = self._cost(plan)
        return known if known.plan == plan else replace(known, plan=plan)

    @cached_property
    def _known(self) -> dict[tuple[object, ...], PlanCost]:
        """What has been asked before, by all of a plan that costs depend on: many clients have the same."""
        return {}

    def _cost(self, plan: Plan) -> PlanCost:
        _check_tail(self.shape, plan.exit_on_client, plan.tail_blocks)
        end = len(self.shape.blocks) - plan.tail_blocks
        if not 1 <= plan.cut <= end:
            raise ConfigError(
                f"cut {plan.cut} of client {plan.client} is out of range; {self.shape.name} allows 1..{end} "
                f"({len(self.shape.blocks)} blocks, {plan.tail_blocks} of them tail blocks).",
                "Choose a cut in that range.",
            )
        held = self._held(plan)
        front, back, tail = held[: plan.cut], held[plan.cut : end], held[end:]
        on_client = front + tail
        client_memory, server_memory = self._memories(on_client, back, plan)
        adapter_bytes = (_adapter_parameters(on_client) + self._encoder_parameters(plan)) * self.adapter_bytes
        return PlanCost(
            plan,
            *self._flops(front, back, tail),
            *self._crossing(plan),
            adapters_up_bytes=adapter_bytes / plan.segments if plan.upload else 0.0,
            adapters_down_bytes=adapter_bytes if plan.download else 0.0,
            client_memory=client_memory,
            server_memory=server_memory,
        )

    def every_cut(self) -> tuple[PlanCost, ...]:
        """The cost of every cut allowed, the shallowest first."""
        return tuple(self.cost(self.plan(cut)) for cut in range(self.shallowest_cut, self.deepest_cut + 1))

    def block_bytes(self, block: int) -> float:
        """What a client has to fetch before it can hold this block (an index into `shape.blocks`): its frozen weights."""
        return self.shape.blocks[block].parameters * self.weight_bytes

    def session_bytes(self) -> float:
        """What one more client adds to a pass of a simulation, which computes both sides: activations of all blocks and a bank row.

        Measured (resident memory on a CPU, float32): 1.14 times the predicted activations, and 4 to 7 float32 values a parameter, since
        beside a row's value, gradient and two moments there are copies while it is stepped and put away.
        """
        inside = self._memory(0, self._held(self.plan(self.shallowest_cut)), False)
        return PASS_SLACK * inside.activations_bytes + BANK_COPIES * inside.adapters_bytes

    def _crossing(self, plan: Plan) -> tuple[float, float, float, float, float]:
        """Bytes of activations, labels and gradients up, activations and gradients down, in the order of PlanCost's fields."""
        if plan.is_whole(len(self.shape.blocks)):
            return 0.0, 0.0, 0.0, 0.0, 0.0
        tokens = self.batch_size * self.sequence_tokens
        values = tokens * (self.crossing_width or self.shape.hidden_size)
        up_bytes = values * self.uplink_bytes_per_value + self.packet_header_bytes
        down_bytes = values * self.downlink_bytes_per_value + self.packet_header_bytes
        if plan.exit_on_client:
            return up_bytes, 0.0, up_bytes, down_bytes, down_bytes
        return up_bytes, tokens * self.label_bytes + self.packet_header_bytes, 0.0, 0.0, down_bytes

    def _encoder_parameters(self, plan: Plan) -> int:
        """What a client holds of its bottlenecks, offsets included: the encoder at the cut, and the decoder at a U-shape's exit."""
        channels, width = self.crossing_width, self.shape.hidden_size
        if not channels or plan.is_whole(len(self.shape.blocks)):
            return 0
        return channels * (width + 1) + (width * (channels + 1) if plan.exit_on_client else 0)

    def _held(self, plan: Plan) -> tuple[_Held, ...]:
        """All blocks with the ranks of their adapters."""
        adapted = [self._adapted(block) for block in self.shape.blocks]
        entries = sum(map(len, adapted))
        if plan.ranks and (len(plan.ranks) != entries or min(plan.ranks) < 0):
            raise ConfigError(
                f"the plan of client {plan.client} has {len(plan.ranks)} ranks, the smallest {min(plan.ranks)}; {self.shape.name} has "
                f"{entries} adapted projections, and a rank is 0 or more.",
                "Give one rank per adapted projection, or none.",
            )
        ranks = iter(plan.ranks or (plan.rank,) * entries)
        return tuple(
            _Held(block, tuple((item, next(ranks)) for item in items)) for block, items in zip(self.shape.blocks, adapted, strict=True)
        )

    def _adapted(self, block: BlockShape) -> list[Projection]:
        """The adapted projections of a block in the layout's order."""
        chosen = (item for item in block.projections if not self.modules or any(_matches(item.module, one) for one in self.modules))
        return sorted(chosen, key=lambda item: item.module)

    def _flops(
        self, front: Sequence[_Held], back: Sequence[_Held], tail: Sequence[_Held]
    ) -> tuple[float, float, float, float, float, float]:
        """Forward and backward flops of front, back, and exit with tail, in the order of PlanCost's fields."""
        tokens = self.batch_size * self.sequence_tokens
        forward = [0.0, 0.0, 0.0]
        backward = [0.0, 0.0, 0.0]
        for part, blocks in enumerate((front, back, tail)):
            for block in blocks:
                matrices = 2.0 * tokens * block.shape.active_parameters
                attention = 4.0 * tokens * self.sequence_tokens * self.shape.attention_width
                adapters = 2.0 * tokens * _adapter_parameters((block,))
                forward[part] += matrices + attention + adapters
                backward[part] += matrices + 2 * attention + 2 * adapters
        backward[0] -= self._unneeded_flops(front[0])
        if self.checkpointing:  # the blocks' forward is done again in the backward
            backward = [once + again for once, again in zip(backward, forward, strict=True)]
        head = 2.0 * tokens * self.shape.head_parameters
        return forward[0], backward[0], forward[1], backward[1], forward[2] + head, backward[2] + head

    def _unneeded_flops(self, first: _Held) -> float:
        """Input gradients that block 0 does not compute because nothing below it is trained."""
        tokens = self.batch_size * self.sequence_tokens
        frozen = sum(item.inputs * item.outputs for item in first.shape.projections if INPUT_READERS.search(item.module))
        adapters = sum(rank * item.inputs for item, rank in first.adapters if INPUT_READERS.search(item.module))
        return 2.0 * tokens * (frozen + adapters)

    def _memories(self, on_client: Sequence[_Held], back: Sequence[_Held], plan: Plan) -> tuple[Memory, Memory]:
        """Client's and server's memory. A tied head is the embedding: the client has it already, a server with the exit needs its own."""
        shape = self.shape
        exit_parameters = shape.exit_parameters + shape.head_parameters
        client_parameters = shape.embedding_parameters + sum(block.shape.parameters for block in on_client)
        server_parameters = sum(block.shape.parameters for block in back)
        if plan.exit_on_client:
            client_parameters += shape.exit_parameters if shape.tied else exit_parameters
        else:
            server_parameters += exit_parameters
        return (
            self._memory(client_parameters, on_client, plan.exit_on_client),
            self._memory(server_parameters, back, not plan.exit_on_client),
        )

    def _memory(self, parameters: int, blocks: Sequence[_Held], has_exit: bool) -> Memory:
        tokens = self.batch_size * self.sequence_tokens
        width = self.shape.hidden_size
        kept = [one.shape.active_parameters / width + 4 * width + sum(rank for _, rank in one.adapters) for one in blocks]
        values_per_token = len(kept) * width + max(kept, default=0.0) if self.checkpointing else sum(kept)
        activations_bytes = tokens * values_per_token * self.compute_bytes
        if has_exit:
            vocabulary = max(1, self.shape.vocabulary)
            chunk_tokens = min(tokens, max(16, LOGIT_CHUNK_VALUES // vocabulary))
            activations_bytes += LOGIT_COPIES * chunk_tokens * vocabulary * 4
        adapters_bytes = float(_adapter_parameters(blocks) * ADAPTER_VALUE_BYTES)
        return Memory(parameters * self.weight_bytes, adapters_bytes, 3 * adapters_bytes, activations_bytes)


def _adapter_parameters(blocks: Sequence[_Held]) -> int:
    return sum(rank * (item.inputs + item.outputs) for block in blocks for item, rank in block.adapters)


def _matches(path: str, module: str) -> bool:
    return path == module or path.endswith(f".{module}")


def _check_tail(shape: ModelShape, exit_on_client: bool, tail_blocks: int) -> None:
    if tail_blocks and not exit_on_client:
        raise ConfigError(
            f"tail_blocks is {tail_blocks} but the exit is on the server.", "Keep the exit on the client too, or set tail_blocks to 0."
        )
    if not 0 <= tail_blocks < len(shape.blocks):
        raise ConfigError(
            f"tail_blocks is {tail_blocks}; {shape.name} has {len(shape.blocks)} blocks, so 0..{len(shape.blocks) - 1} are allowed.",
            "Leave at least one block for the front.",
        )
