"""What the server has of a tensor: encoded by the run's own codec and decoded again, as in a step of the run.

Axes: s sequences, t tokens, d hidden width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from splitft.compress.base import Codec, Samples
from splitft.compress.cast import Cast
from splitft.compress.entropy import Entropy
from splitft.compress.identity import Identity
from splitft.compress.noise import Noise
from splitft.compress.projection import Projection
from splitft.compress.quantize import Quantize
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
# So many visits are played one by one, where one cannot stand for them.
MOST_PLAYED = 16


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


class PublicTap(Protocol):
    """What an attacker learns a wire from: public text that it sends to itself."""

    @property
    def plan(self) -> Plan: ...

    def public(self, hidden: Tensor, batch: int) -> Tensor:
        """What would arrive of a batch of public text at the cut [s t d]."""
        ...


def averaged(codec: Codec, visits: int) -> Codec | None:
    """A codec whose one visit is like the mean of so many, where there is one: noise over what is linear shrinks by their square root.

    What rounds after the noise rounds every visit another way, so that in the mean it is as if it did not round.
    """
    if visits == 1:
        return codec
    if isinstance(codec, Entropy):
        inner = averaged(codec.inner, visits)
        return None if inner is None else replace(codec, inner=inner)
    if not isinstance(codec, Noise):
        return None
    through = codec.inner
    if isinstance(through, Projection) and isinstance(through.inner, Identity | Cast | Quantize):
        through = replace(through, inner=Identity())
    elif isinstance(through, Identity | Cast | Quantize):
        through = Identity()
    else:
        return None
    return replace(codec, multiple=codec.multiple / visits**0.5, inner=through)


class Tap:
    """The streams of one client at one cut. Private text has streams of its own that remember earlier visits; every batch of public text,
    which the attacker sends to itself, has new ones, or such as go on where the private ones stand (`follow`).

    A text is sent once in every epoch. Where a codec draws random numbers, they are others each time, so who keeps what came averages them
    out (`come_by`). All visits are under one adapter here; an attacker that has each round's adapter adds up distances to each visit, which
    tells it as much.
    """

    def __init__(self, settings: TrainSettings, plan: Plan, cut: int) -> None:
        self.settings, self.plan = settings, replace(plan, cut=cut)
        self.private_streams = open_step_streams(settings, self.plan, PRIVATE_ROUND, None)
        self.known: StreamStates | None = None
        self.visits = self.played = 1
        self.scaled: dict[int, bool] = {}  # the places where one visit stands for all

    def come_by(self, visits: int) -> None:
        """From now on what arrives is the mean of so many visits, of private and of public text alike, wherever random numbers are drawn;
        where they all have to be played, of MOST_PLAYED at most."""
        up, _, _, back = self.settings.codecs
        once = [None if not codec.draws else averaged(codec, visits) for codec in (up, back)]
        self.settings = replace(self.settings, uplink=once[0] or up, exit_uplink=once[1] or back)
        self.private_streams = open_step_streams(self.settings, self.plan, PRIVATE_ROUND, None)
        self.scaled = {0: once[0] is not None, 3: once[1] is not None}
        self.visits, self.played = visits, min(visits, MOST_PLAYED)

    def follow(self) -> None:
        """From now on public text goes through what the private text has left at the server: axes that were fitted to it, say."""
        self.known = states_after(self.settings, self.plan, self.private_streams)

    @property
    def looked(self) -> int:
        """Over how many visits what arrives at the cut is the mean."""
        return self.visits if self.scaled.get(0, False) else self.played

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
        return self._carry(self.private_streams[place], hidden, 0, self.scaled.get(place, False))

    def public(self, hidden: Tensor, batch: int) -> Tensor:
        """What would arrive of a batch of public text at the cut [s t d]."""
        return self._carry(self.fresh(batch), hidden, 0 if self.known is None else PUBLIC_SAMPLES, self.scaled.get(0, False))

    def fresh(self, batch: int) -> Stream:
        """A stream at the cut for a batch of public text."""
        return open_step_streams(self.settings, self.plan, PUBLIC_ROUND + batch, self.known)[0]

    def _carry(self, stream: Stream, tensor: Tensor, first: int = 0, scaled: bool = False) -> Tensor:
        assert len(PLACES) == len(self.private_streams)
        return carried(stream, tensor, 1 if scaled or not stream.codec.draws else self.played, first)[1]


def carried(stream: Stream, tensor: Tensor, visits: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """What arrives of a tensor [s t d] at the last of so many visits, and the mean of all; samples are numbered from `first`."""
    sequences, tokens, width = tensor.shape
    samples, rows = Samples(tuple(range(first, first + sequences)), (tokens,) * sequences), tensor.reshape(-1, width)
    with torch.no_grad():
        last = total = stream.carry(rows, samples)[0]
        for _ in range(visits - 1):
            last = stream.carry(rows, samples)[0]
            total = total.float() + last.float()
    mean = total if visits == 1 else total / visits
    return last.reshape(tensor.shape), mean.reshape(tensor.shape)


class Later:
    """A tap whose codec remembers, after so many visits of a text: what arrives last, and the mean of all that arrived."""

    def __init__(self, tap: Tap, visits: int) -> None:
        self.tap, self.visits, self.plan = tap, visits, tap.plan
        self._latest: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def private(self, before: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        """Of the private sample [s t d]: the first visit under the adapter of then, the others under that of now."""
        stream = self.tap.private_streams[0]
        first, _ = carried(stream, before, 1)
        last, mean = carried(stream, now, self.visits - 1)
        return last, (first.float() + (self.visits - 1) * mean.float()) / self.visits

    def public(self, hidden: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Of a batch of public text; asked twice of the same states, it is played once."""
        if self._latest is None or self._latest[0] is not hidden:
            first = 0 if self.tap.known is None else PUBLIC_SAMPLES
            self._latest = hidden, carried(self.tap.fresh(batch), hidden, self.visits, first)
        return self._latest[1]


@dataclass(frozen=True)
class Reading:
    """One of the two things that arrive after several visits, as a tap to learn from."""

    later: Later
    mean: bool

    @property
    def plan(self) -> Plan:
        return self.later.plan

    def public(self, hidden: Tensor, batch: int) -> Tensor:
        return self.later.public(hidden, batch)[self.mean]
