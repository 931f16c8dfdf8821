"""What the server has of a tensor: encoded by the run's own codec and decoded again, as in a step of the run.

Axes: s sequences, t tokens, d hidden width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from splitft.compress.base import Samples
from splitft.engine.settings import TrainSettings
from splitft.engine.streams import StreamStates, open_step_streams, states_after
from splitft.types import Plan
from splitft.wire import PLACES, Stream

# Rounds no run reaches: the codecs of an audit draw random numbers of their own.
PRIVATE_ROUND = 1 << 29
PUBLIC_ROUND = PRIVATE_ROUND + 1
# Public sequences are samples that no client has.
PUBLIC_SAMPLES = 1 << 20
# Singular values below this share of the largest are taken for equal: they are float32's rounding.
ROUNDING = 1e-6
# From one singular value to the next: so large a step may be where what was sent ends and rounding begins. Measured, of standardised
# states: 1.3 at most without a projection, 230 and more behind one whose states are in bfloat16.
GAP = 8.0
# Of as many rows as arrived, or of as many channels, so large a share of directions says nothing of the wire.
MOST_DIRECTIONS = 0.9


@dataclass(frozen=True)
class Span:
    """The orthonormal directions [r d] that something lies in. `exact`: nothing is outside but float32's rounding."""

    axes: Tensor
    exact: bool


def directions_of(arrived: Tensor) -> Span | None:
    """The directions that what arrived [s t d] seems to lie in; None where nothing points to fewer than there can be.

    A codec that sends fewer coordinates than channels leaves such a trace of itself, and who compares a guess with what arrived has to
    look along these directions only: in all others the guess differs however right it is. They end where the sorted singular values fall
    most: with states in bfloat16 there is rounding in every direction, of no size that could be known beforehand. Channels count alike
    for that, and their means do not, since few channels of a trained model are far larger than all others. A guess all the same: who uses
    it without `exact` should try all directions too.
    """
    rows = arrived.detach().reshape(-1, arrived.shape[-1]).double().cpu()
    spread = rows.std(0)
    if not bool(spread.any()):
        return None
    scale = spread.clamp_min(1e-9 * float(spread.max()))
    sizes = torch.linalg.svdvals((rows - rows.mean(0)) / scale)
    floor = ROUNDING * float(sizes[0])
    steps = sizes.clamp_min(floor)
    steps = steps[:-1] / steps[1:]
    most = math.ceil(MOST_DIRECTIONS * min(rows.shape)) - 1
    count = int(steps[:most].argmax()) + 1 if most > 0 else 0
    if not count or float(steps[count - 1]) < GAP:
        return None
    among = torch.linalg.svd(rows / scale, full_matrices=False).Vh[:count]
    axes = torch.linalg.qr((among * scale).T).Q.T
    return Span(axes.float().contiguous(), float(sizes[count]) <= 10 * floor)


def along(states: Tensor, directions: Tensor | None) -> Tensor:
    """The part of states [.. d] along some directions [r d]; all of them where these are None."""
    if directions is None:
        return states
    axes = directions.to(states)
    return (states @ axes.T) @ axes


class Tap:
    """The streams of one client at one cut. Private text has streams of its own that remember earlier visits; every batch of public text,
    which the attacker sends to itself, has new ones, or such as go on where the private ones stand (`follow`).

    A text is sent once in every epoch. Where a codec draws random numbers, they are others each time, so who keeps what came averages them
    out: `visits` says of how many visits what arrives is the mean, of private and of public text alike. All visits are under one adapter
    here; an attacker that has each round's adapter adds up distances to each visit, which tells it as much.
    """

    def __init__(self, settings: TrainSettings, plan: Plan, cut: int) -> None:
        self.settings, self.plan = settings, replace(plan, cut=cut)
        self.private_streams = open_step_streams(settings, self.plan, PRIVATE_ROUND, None)
        self.known: StreamStates | None = None
        self.visits = 1

    def follow(self) -> None:
        """From now on public text goes through what the private text has left at the server: axes that were fitted to it, say."""
        self.known = states_after(self.settings, self.plan, self.private_streams)

    @property
    def draws(self) -> bool:
        """Whether another visit of the same text at the cut has random numbers of its own."""
        return self.settings.codecs[0].draws

    @property
    def remembers(self) -> bool:
        """Whether what is sent of a text depends on what was sent of it before."""
        return self.settings.codecs[0].hears_samples

    def private(self, hidden: Tensor, place: int = 0) -> Tensor:
        """What arrives of the private sample's states or gradients [s t d] at one of the places of a step (`wire.PLACES`)."""
        return self._carry(self.private_streams[place], hidden)

    def public(self, hidden: Tensor, batch: int) -> Tensor:
        """What would arrive of a batch of public text at the cut [s t d]."""
        stream = open_step_streams(self.settings, self.plan, PUBLIC_ROUND + batch, self.known)[0]
        return self._carry(stream, hidden, 0 if self.known is None else PUBLIC_SAMPLES)

    def _carry(self, stream: Stream, tensor: Tensor, first: int = 0) -> Tensor:
        assert len(PLACES) == len(self.private_streams)
        sequences, tokens, width = tensor.shape
        samples = Samples(tuple(range(first, first + sequences)), (tokens,) * sequences)
        rows, visits = tensor.reshape(-1, width), self.visits if stream.codec.draws else 1
        with torch.no_grad():
            decoded, _ = stream.carry(rows, samples)
            if visits > 1:
                total = decoded.float()
                for _ in range(visits - 1):
                    total = total + stream.carry(rows, samples)[0].float()
                decoded = total / visits
        return decoded.reshape(tensor.shape)
