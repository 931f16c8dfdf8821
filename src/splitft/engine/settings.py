"""What training means in this run, as values; and the state of a federation between rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from splitft.compress.base import Codec
from splitft.data.base import ClientData
from splitft.data.order import BatchOrder
from splitft.engine.ledger import Ledger
from splitft.lora import Layout
from splitft.optimizer import AdamW, Moments, Schedule
from splitft.split import SplitModel
from splitft.types import Plan

OnStep = Callable[[int], None]


@dataclass(frozen=True)
class TrainSettings:
    """How every client trains. `clip_norm` 0 is off; `keep_moments` carries AdamW's moments of a client from round to round."""

    batch_size: int
    gradient_accumulation: int
    schedule: Schedule
    optimizer: AdamW
    clip_norm: float
    keep_moments: bool
    uplink: Codec
    downlink: Codec
    adapter_codec: Codec
    seed: int


@dataclass
class ClientState:
    """What outlives a round for one client: batches drawn so far, and its moments [p] if they are kept."""

    batches: int = 0
    steps: int = 0
    first: Tensor | None = None
    second: Tensor | None = None


@dataclass(frozen=True)
class Federation:
    """The fixed parts of a run that executors share: the model, the layout of its adapters, the clients' data and their order."""

    split: SplitModel
    layout: Layout
    clients: tuple[ClientData, ...]
    orders: tuple[BatchOrder, ...]
    settings: TrainSettings
    vocabulary: int
    device: torch.device


@dataclass
class RoundResult:
    """What a round's training gave, in client order: adapters [n p], mean loss of each step, bytes.

    `tokens` [n] went through the model; `targets` [n] were trained on (prompts and padding are not) and weigh the average.
    """

    plans: tuple[Plan, ...]
    values: Tensor
    tokens: list[int]
    step_losses: list[list[float]]
    ledger: Ledger
    states: dict[int, ClientState]
    targets: list[int] = field(default_factory=list)


def load_moments(states: list[ClientState], layout: Layout, settings: TrainSettings, device: torch.device) -> Moments:
    """Moments for these clients' rows: theirs from the round before if kept, else zeros."""
    moments = Moments.zeros(len(states), layout.parameters, device)
    if settings.keep_moments:
        for row, state in enumerate(states):
            if state.first is not None and state.second is not None:
                moments.first[row], moments.second[row] = state.first.to(device), state.second.to(device)
                moments.steps[row] = state.steps
    return moments


def next_state(before: ClientState, batches: int, settings: TrainSettings, moments: Moments, row: int) -> ClientState:
    """The client's state after a round; tensors are copies on the CPU."""
    if not settings.keep_moments:
        return ClientState(before.batches + batches)
    first, second = moments.first[row].to("cpu", copy=True), moments.second[row].to("cpu", copy=True)
    return ClientState(before.batches + batches, int(moments.steps[row]), first, second)
