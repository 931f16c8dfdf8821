"""What a plan costs, from shapes alone: flops, bytes, memory and seconds. Arithmetic only; no weights, no clock, no torch.

Notation: n tokens of a step (batch size x tokens per sequence t), P active parameters of a block, w its attention width, d the
hidden width, v the vocabulary, r the rank; i and o the widths of an adapted projection. A multiplication and an addition are two
flops. Element-wise work (norms, activations, softmax, optimizer) is left out: together a few per cent of a step.

Per block and step (the terms of Kaplan et al. 2020, arXiv 2001.08361, table 1, with a frozen base):

    forward   = 2 n P  +  4 n t w  +  2 n r sum(i + o)
    backward  = 2 n P  +  8 n t w  +  4 n r sum(i + o)

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
from dataclasses import dataclass

from splitft.clock import ADAPTERS_DOWN, ADAPTERS_UP, ClientSchedule, Resource, Stage, Step
from splitft.errors import ConfigError
from splitft.types import BlockShape, Direction, Kind, ModelShape, Plan, Profile, Projection

# Projections that read the block's own input; in a parallel block the MLP does so too, which is not counted.
INPUT_READERS = re.compile(r"(^|\.)(c_attn|qkv_proj|[qkv]_proj|query_key_value|Wqkv|query|key|value|in_proj)$")
ADAPTER_VALUE_BYTES = 4
LOGIT_CHUNK_VALUES = 4_000_000
LOGIT_COPIES = 3


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

    Byte fields may be replaced by counted bytes (`dataclasses.replace`) before `schedule`, so that the virtual clock
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


@dataclass(frozen=True)
class StepSeconds:
    """One step of one client that has the server to itself, divided by where the time goes."""

    client_s: float
    link_s: float
    server_s: float

    @property
    def total_s(self) -> float:
        """The whole step."""
        return self.client_s + self.link_s + self.server_s


@dataclass(frozen=True)
class CostModel:
    """Everything about a run that costs depend on, except the plan: `cost(plan)` does the arithmetic.

    `rank`, `local_steps`, `exit_on_client` and `tail_blocks` are what `plan(cut)` fills in; `cost` reads them from the plan it is given.
    `modules` are the adapted projections (full module path in the block, or its ending); empty means all of them. With gradient
    accumulation every micro-batch is an exchange: give its size as `batch_size` and multiply the local steps. Bytes per value may
    be fractions (0.5 for int4). Raises ConfigError for a setting out of range and for a module no block has.
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
        """The deepest cut allowed: every block but the tail blocks. At that cut the server has no blocks, only the exit if anything."""
        return len(self.shape.blocks) - self.tail_blocks

    def plan(self, cut: int, client: int = 0) -> Plan:
        """The plan of this run at `cut`."""
        return Plan(client, cut, self.local_steps, self.rank, self.exit_on_client, self.tail_blocks)

    def cost(self, plan: Plan) -> PlanCost:
        """Flops, bytes and memory of `plan`; the formulas stand at the top of this file and at `Memory`.

        Raises ConfigError for a cut outside 1..blocks - tail_blocks.
        """
        _check_tail(self.shape, plan.exit_on_client, plan.tail_blocks)
        end = len(self.shape.blocks) - plan.tail_blocks
        if not 1 <= plan.cut <= end:
            raise ConfigError(
                f"cut {plan.cut} of client {plan.client} is out of range; {self.shape.name} allows 1..{end} "
                f"({len(self.shape.blocks)} blocks, {plan.tail_blocks} of them tail blocks).",
                "Choose a cut in that range.",
            )
        front, back, tail = self.shape.blocks[: plan.cut], self.shape.blocks[plan.cut : end], self.shape.blocks[end:]
        flops = self._flops(front, back, tail, plan.rank)
        hidden_values = self.batch_size * self.sequence_tokens * self.shape.hidden_size
        up_bytes = hidden_values * self.uplink_bytes_per_value + self.packet_header_bytes
        down_bytes = hidden_values * self.downlink_bytes_per_value + self.packet_header_bytes
        label_bytes = self.batch_size * self.sequence_tokens * self.label_bytes + self.packet_header_bytes
        on_client = front + tail
        adapter_bytes = self._adapter_parameters(on_client, plan.rank) * self.adapter_bytes
        client_memory, server_memory = self._memories(on_client, back, plan)
        return PlanCost(
            plan,
            *flops,
            activations_up_bytes=up_bytes,
            labels_up_bytes=0.0 if plan.exit_on_client else label_bytes,
            gradients_up_bytes=up_bytes if plan.exit_on_client else 0.0,
            activations_down_bytes=down_bytes if plan.exit_on_client else 0.0,
            gradients_down_bytes=down_bytes,
            adapters_up_bytes=adapter_bytes,
            adapters_down_bytes=adapter_bytes,
            client_memory=client_memory,
            server_memory=server_memory,
        )

    def every_cut(self) -> tuple[PlanCost, ...]:
        """The cost of cut 1, 2, .. deepest."""
        return tuple(self.cost(self.plan(cut)) for cut in range(1, self.deepest_cut + 1))

    def _adapted(self, block: BlockShape) -> tuple[Projection, ...]:
        if not self.modules:
            return block.projections
        return tuple(item for item in block.projections if any(_matches(item.module, module) for module in self.modules))

    def _adapter_parameters(self, blocks: Sequence[BlockShape], rank: int) -> int:
        return sum(rank * (item.inputs + item.outputs) for block in blocks for item in self._adapted(block))

    def _flops(
        self, front: Sequence[BlockShape], back: Sequence[BlockShape], tail: Sequence[BlockShape], rank: int
    ) -> tuple[float, float, float, float, float, float]:
        """Forward and backward flops of front, back, and exit with tail, in the order of PlanCost's fields."""
        tokens = self.batch_size * self.sequence_tokens
        forward = [0.0, 0.0, 0.0]
        backward = [0.0, 0.0, 0.0]
        for part, blocks in enumerate((front, back, tail)):
            for block in blocks:
                matrices = 2.0 * tokens * block.active_parameters
                attention = 4.0 * tokens * self.sequence_tokens * self.shape.attention_width
                adapters = 2.0 * tokens * self._adapter_parameters((block,), rank)
                forward[part] += matrices + attention + adapters
                backward[part] += matrices + 2 * attention + 2 * adapters
        backward[0] -= self._unneeded_flops(front[0], rank)
        if self.checkpointing:  # the blocks' forward is done again in the backward
            backward = [once + again for once, again in zip(backward, forward, strict=True)]
        head = 2.0 * tokens * self.shape.head_parameters
        return forward[0], backward[0], forward[1], backward[1], forward[2] + head, backward[2] + head

    def _unneeded_flops(self, first: BlockShape, rank: int) -> float:
        """Input gradients that block 0 does not compute because nothing below it is trained."""
        tokens = self.batch_size * self.sequence_tokens
        frozen = sum(item.inputs * item.outputs for item in first.projections if INPUT_READERS.search(item.module))
        adapters = sum(rank * item.inputs for item in self._adapted(first) if INPUT_READERS.search(item.module))
        return 2.0 * tokens * (frozen + adapters)

    def _memories(self, on_client: Sequence[BlockShape], back: Sequence[BlockShape], plan: Plan) -> tuple[Memory, Memory]:
        """Client's and server's memory. A tied head is the embedding: the client has it already, a server with the exit needs its own."""
        shape = self.shape
        exit_parameters = shape.exit_parameters + shape.head_parameters
        client_parameters = shape.embedding_parameters + sum(block.parameters for block in on_client)
        server_parameters = sum(block.parameters for block in back)
        if plan.exit_on_client:
            client_parameters += shape.exit_parameters if shape.tied else exit_parameters
        else:
            server_parameters += exit_parameters
        return (
            self._memory(client_parameters, on_client, plan.rank, plan.exit_on_client),
            self._memory(server_parameters, back, plan.rank, not plan.exit_on_client),
        )

    def _memory(self, parameters: int, blocks: Sequence[BlockShape], rank: int, has_exit: bool) -> Memory:
        tokens = self.batch_size * self.sequence_tokens
        width = self.shape.hidden_size
        kept = [block.active_parameters / width + 4 * width + rank * len(self._adapted(block)) for block in blocks]
        values_per_token = len(kept) * width + max(kept, default=0.0) if self.checkpointing else sum(kept)
        activations_bytes = tokens * values_per_token * self.compute_bytes
        if has_exit:
            vocabulary = max(1, self.shape.vocabulary)
            chunk_tokens = min(tokens, max(16, LOGIT_CHUNK_VALUES // vocabulary))
            activations_bytes += LOGIT_COPIES * chunk_tokens * vocabulary * 4
        adapters_bytes = float(self._adapter_parameters(blocks, rank) * ADAPTER_VALUE_BYTES)
        return Memory(parameters * self.weight_bytes, adapters_bytes, 3 * adapters_bytes, activations_bytes)


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


def step_stages(cost: PlanCost, profile: Profile, server: Profile) -> Step:
    """One step as the stages of the virtual clock; seconds = flops / flops_per_s, and bytes / bytes_per_s plus latency.

    With the exit on the server the labels travel with the activations and the server does forward, exit and backward in one stage.
    """

    def compute(kind: str, resource: Resource, flops: float) -> Stage:
        return Stage(kind, resource, flops / (server if resource == "server" else profile).flops_per_s)

    def send_up(kind: str, byte_count: float) -> Stage:
        return Stage(kind, "link", byte_count / profile.uplink_bytes_per_s, profile.latency_s)

    def send_down(kind: str, byte_count: float) -> Stage:
        return Stage(kind, "link", byte_count / profile.downlink_bytes_per_s, profile.latency_s)

    first = (
        compute("front_forward", "client", cost.front_forward_flops),
        send_up("uplink", cost.activations_up_bytes + cost.labels_up_bytes),
    )
    last = compute("front_backward", "client", cost.front_backward_flops)
    if not cost.plan.exit_on_client:
        return (*first, compute("back", "server", cost.server_flops), send_down("downlink", cost.gradients_down_bytes), last)
    return (
        *first,
        compute("back", "server", cost.back_forward_flops),
        send_down("downlink", cost.activations_down_bytes),
        compute("exit", "client", cost.exit_flops),
        send_up("uplink_gradient", cost.gradients_up_bytes),
        compute("back_backward", "server", cost.back_backward_flops),
        send_down("downlink_gradient", cost.gradients_down_bytes),
        last,
    )


def step_seconds(cost: PlanCost, profile: Profile, server: Profile) -> StepSeconds:
    """The step of a client that finds the server free: the stages of `step_stages` added up by resource."""
    seconds: dict[Resource, float] = {"client": 0.0, "link": 0.0, "server": 0.0}
    for stage in step_stages(cost, profile, server):
        seconds[stage.resource] += stage.total_s
    return StepSeconds(seconds["client"], seconds["link"], seconds["server"])


def schedule(plan: Plan, cost: PlanCost, profile: Profile, server: Profile) -> ClientSchedule:
    """A client's round for the virtual clock: adapters down, `plan.local_steps` equal steps, adapters up."""
    step = step_stages(cost, profile, server)
    before = Stage(ADAPTERS_DOWN, "link", cost.adapters_down_bytes / profile.downlink_bytes_per_s, profile.latency_s)
    after = Stage(ADAPTERS_UP, "link", cost.adapters_up_bytes / profile.uplink_bytes_per_s, profile.latency_s)
    return ClientSchedule(plan.client, (step,) * plan.local_steps, (before,), (after,))
