"""The words of splitft as frozen values: profiles, plans, observations, keys, shapes. No torch at import time.

Axes: n clients (bank rows), b sequences, t tokens, d hidden width, v vocabulary, r rank, i input width, o output width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import torch

Direction = Literal["up", "down"]
Kind = Literal["activations", "gradients", "labels", "adapters", "weights", "control"]
DIRECTIONS: tuple[Direction, ...] = ("up", "down")
KINDS: tuple[Kind, ...] = ("activations", "gradients", "labels", "adapters", "weights", "control")
IGNORE_LABEL = -100


class Key(NamedTuple):
    """Global name of one adapted projection: block index in the whole model, module path inside the block."""

    block: int
    module: str

    def __str__(self) -> str:
        return f"{self.block}.{self.module}"


class Factors(NamedTuple):
    """LoRA factors of one key: A [rank, in] and B [out, rank] (Hu et al. 2021, arXiv 2106.09685); the update is scale * B A."""

    a: torch.Tensor
    b: torch.Tensor


Adapters: TypeAlias = Mapping[Key, Factors]


@dataclass(frozen=True)
class Profile:
    """What a device can do. `uplink` is from the client to the server."""

    name: str
    flops_per_s: float
    memory_bytes: float
    uplink_bytes_per_s: float
    downlink_bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Projection:
    """One linear projection of a block: module path inside the block, input and output width."""

    module: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class BlockShape:
    """What one block costs: all parameters, those active per token (fewer in a mixture of experts), adaptable projections."""

    parameters: int
    active_parameters: int
    projections: tuple[Projection, ...]


@dataclass(frozen=True)
class ModelShape:
    """What the cost model needs to know of a model; taken from the model itself, no weights needed."""

    name: str
    blocks: tuple[BlockShape, ...]
    hidden_size: int
    attention_width: int
    vocabulary: int
    embedding_parameters: int
    exit_parameters: int
    head_parameters: int
    positions: int
    tied: bool


@dataclass(frozen=True)
class Plan:
    """What one client does in one round. Cut k: the client holds blocks 0..k-1. With `exit_on_client` it also holds the last
    `tail_blocks` blocks, the final norm, the LM head and the labels (U-shape).

    `rank` is the largest rank of its adapters; `ranks` has one for every entry of the layout (0: no adapter there), empty: the layout's
    own everywhere. Without `download` it goes on from the adapters of its own blocks that it has; without `upload` it keeps them to
    itself. Of its own blocks' adapters it uploads piece `segment` of `segments`. `dial`: how many times as large as configured the errors
    of its codecs may be, of activations and of gradients.
    """

    client: int
    cut: int
    local_steps: int
    rank: int
    exit_on_client: bool = False
    tail_blocks: int = 0
    ranks: tuple[int, ...] = ()
    download: bool = True
    upload: bool = True
    segment: int = 0
    segments: int = 1
    dial: tuple[float, float] = (1.0, 1.0)

    def is_whole(self, blocks: int) -> bool:
        """Whether the client holds a model of so many blocks alone: then nothing crosses a cut."""
        return self.exit_on_client and self.cut + self.tail_blocks == blocks


@dataclass(frozen=True)
class RoundPlan:
    """The plans of all participants of one round, in client order. `turns`: clients in the order in which their optimizer steps pass the
    server, each once a step (empty: where it matters, a drawn order). `lost`: whose work will not count, though it is done."""

    round: int
    plans: tuple[Plan, ...]
    turns: tuple[int, ...] = ()
    lost: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Observation:
    """What happened to one client in one round. `loss` is the mean of its local steps' losses, each the mean over that step's
    targets; `held_out_loss` is of the global model after the round on the client's held-out slice (None when not evaluated), and
    `base_loss` was that slice's before training.

    `virtual_s` from the start of the round to the arrival of its update, `wait_s` of it (server and barrier) it spent waiting;
    `busy_s` is the rest, and `predicted_s` what the cost model gave for that with the device as described.
    """

    client: int
    round: int
    tokens: int
    loss: float
    virtual_s: float
    wait_s: float
    uplink_bytes: int
    downlink_bytes: int
    held_out_loss: float | None = None
    base_loss: float | None = None
    busy_s: float = 0.0
    predicted_s: float = 0.0
