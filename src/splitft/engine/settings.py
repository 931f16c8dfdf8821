"""What training means in this run, as values; and the state of a federation between rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from splitft.aggregate.base import Rows
from splitft.compress.base import Codec
from splitft.data.base import ClientData
from splitft.data.order import BatchOrder
from splitft.engine.ledger import Ledger
from splitft.engine.shelf import Shelf
from splitft.engine.streams import StreamStates
from splitft.lora import Layout
from splitft.optimizer import AdamW, Moments, Schedule
from splitft.split import SplitModel
from splitft.types import Plan

OnStep = Callable[[int], None]
# The adapter [p] a participant begins a round with, whole: its own part and its session's.
Starts = Callable[[Plan], Tensor]


def same_start(row: Tensor) -> Starts:
    """Everyone begins with the same adapter [p]."""
    return lambda plan: row


@dataclass(frozen=True)
class TrainSettings:
    """How every client trains. `clip_norm` 0 is off; `keep_moments` carries AdamW's moments of a client from round to round.

    `server`: whose adapters the server's blocks have: one set per client ("per_client", and "unaveraged", where the clients' own parts
    are never averaged), or one set for all, stepped with all batches together ("shared"), after every single batch, clients in turn
    ("alternating"), or client after client ("sequential"). At a U-shape's exit activations take the uplink's codec and gradients the
    downlink's unless others are given. `secret`: what a client elsewhere draws the noise on what it sends from, and nobody else knows (0:
    the seed, which everybody knows). `row_tokens`: the most tokens a row has (0: as many as the model has positions).
    """

    batch_size: int
    gradient_accumulation: int
    schedule: Schedule
    optimizer: AdamW
    clip_norm: float
    keep_moments: bool
    uplink: Codec
    downlink: Codec
    adapter_uplink: Codec
    adapter_downlink: Codec
    seed: int
    server: str = "per_client"
    round_steps: int = 0
    row_tokens: int = 0
    exit_downlink: Codec | None = None
    exit_uplink: Codec | None = None
    secret: int = 0

    @cached_property
    def codecs(self) -> tuple[Codec, Codec, Codec, Codec]:
        """Of the four tensors of a step, in the order of `wire.PLACES`."""
        return self.uplink, self.downlink, self.exit_downlink or self.uplink, self.exit_uplink or self.downlink

    @property
    def variable_rate(self) -> bool:
        """Whether what a tensor takes on the wire is only known when it has been sent."""
        return any(not codec.fixed_rate for codec in (*self.codecs, self.adapter_uplink, self.adapter_downlink))

    @property
    def keyed(self) -> bool:
        """Whether one of them remembers by sample: then a step names its samples."""
        return any(codec.hears_samples for codec in self.codecs)

    def codecs_at(self, dial: tuple[float, float]) -> tuple[Codec, Codec, Codec, Codec]:
        """The four codecs with errors so many times as large, of activations and of gradients."""
        up, down, exit_down, exit_up = self.codecs
        if dial == (1.0, 1.0):
            return self.codecs
        activations, gradients = dial
        return up.scaled(activations), down.scaled(gradients), exit_down.scaled(activations), exit_up.scaled(gradients)

    def rate(self, first_step: int, step: int, local_steps: int) -> float:
        """Learning rate of a client's step in a round that begins at `first_step` of the schedule. Who takes more steps than a round has
        (`round_steps`; 0: any number) divides the round's span among them, so that no schedule is overrun."""
        if 0 < self.round_steps < local_steps:
            step = step * self.round_steps // local_steps
        return self.schedule.rate(first_step + step)

    @property
    def one_server_set(self) -> bool:
        """Whether all clients train the same adapters on the server."""
        return self.server in ("shared", "alternating", "sequential")


@dataclass
class ClientState:
    """What outlives a round for one client: batches drawn so far, its moments [p] if they are kept, its adapters [p] if they are its
    own for longer than a round, the number of first blocks it has had, the round up to which it knows the frozen weights, its last cut,
    what the ends of its streams remember."""

    batches: int = 0
    steps: int = 0
    first: Tensor | None = None
    second: Tensor | None = None
    adapter: Tensor | None = None
    deepest: int = 0
    folded: int = 0
    cut: int = 0
    streams: StreamStates | None = None


# The state of the adapters that all clients share on the server, kept beside the clients'.
SHARED_SERVER = -1


@dataclass(frozen=True)
class Federation:
    """The fixed parts of a run that executors share: the model, the layout of its adapters, the clients' data and their order.

    `start` [p] is the adapter before the first round, which every side knows; `trained` [p] says which columns change at all (None: all).
    `shelf` is where clients' rows lie between rounds (None: each in memory of its own, and old ones beside new ones).
    """

    split: SplitModel
    layout: Layout
    clients: tuple[ClientData, ...]
    orders: tuple[BatchOrder, ...]
    settings: TrainSettings
    vocabulary: int
    device: torch.device
    start: Tensor
    trained: Tensor | None = None
    shelf: Shelf | None = None


@dataclass
class RoundResult:
    """What a round's training gave, in client order: adapters [n p], mean loss of each step, bytes.

    `tokens` [n] went through the model; `targets` [n] were trained on (prompts and padding are not) and weigh the average. Where
    `kept` is given the adapters lie elsewhere and `values` is [0 p]. `notices`: what went wrong and was mended, for the journal.
    `facts`: what codecs say of each client's streams, by place.
    """

    plans: tuple[Plan, ...]
    values: Tensor
    tokens: list[int]
    step_losses: list[list[float]]
    ledger: Ledger
    states: dict[int, ClientState]
    targets: list[int] = field(default_factory=list)
    kept: Rows | None = None
    notices: list[str] = field(default_factory=list)
    facts: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)


def load_moments(
    states: Sequence[ClientState], layout: Layout, settings: TrainSettings, device: torch.device, plans: Sequence[Plan | None] = ()
) -> Moments:
    """Moments for these clients' rows: theirs from the round before if kept, else zeros.

    An adapter below its full rank begins every round with new factors; then all moments of its client begin anew, steps included.
    """
    moments = Moments.zeros(len(states), layout.parameters, device)
    if settings.keep_moments:
        for row, state in enumerate(states):
            if state.first is None or state.second is None or is_low(plans[row] if plans else None, layout):
                continue
            moments.first[row], moments.second[row] = state.first.to(device), state.second.to(device)
            moments.steps[row] = state.steps
    return moments


def is_low(plan: Plan | None, layout: Layout) -> bool:
    """Whether a plan has an adapter below its full rank."""
    return plan is not None and any(rank < entry.rank for rank, entry in zip(plan.ranks, layout.entries, strict=False))


def next_state(before: ClientState, batches: int, settings: TrainSettings, moments: Moments, row: int, low: bool = False) -> ClientState:
    """The client's state after a round; tensors are copies on the CPU. With `low` ranks there are no moments to keep."""
    after = replace(before, batches=before.batches + batches)
    if not settings.keep_moments or low:
        return replace(after, steps=0, first=None, second=None)
    first, second = moments.first[row].to("cpu", copy=True), moments.second[row].to("cpu", copy=True)
    return replace(after, steps=int(moments.steps[row]), first=first, second=second)
