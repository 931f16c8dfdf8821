"""What the server has of a tensor: encoded by the run's own codec and decoded again, as in a step of the run.

Axes: s sequences, t tokens, d hidden width.
"""

from __future__ import annotations

from dataclasses import replace

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
# A singular value below this share of the largest is rounding: what arrives has no such direction.
ROUNDING = 1e-5
# Of as many rows as arrived, or of as many channels, so large a share of directions says nothing of the wire.
MOST_DIRECTIONS = 0.9


def directions_of(arrived: Tensor) -> Tensor | None:
    """The orthonormal directions [r d] that what arrived [s t d] lies in; None where there are about as many as there can be.

    A codec that sends fewer coordinates than channels leaves such a trace of itself, and who compares a guess with what arrived has to
    look along these directions only: in all others the guess differs however right it is.
    """
    rows = arrived.detach().reshape(-1, arrived.shape[-1]).double().cpu()
    _, sizes, axes = torch.linalg.svd(rows, full_matrices=False)
    count = int((sizes > ROUNDING * sizes[0]).sum())
    return axes[:count].float() if 0 < count < MOST_DIRECTIONS * min(rows.shape) else None


def along(states: Tensor, directions: Tensor | None) -> Tensor:
    """The part of states [.. d] along some directions [r d]; all of them where these are None."""
    if directions is None:
        return states
    axes = directions.to(states)
    return (states @ axes.T) @ axes


class Tap:
    """The streams of one client at one cut. Private text has streams of its own that remember earlier visits; every batch of public text,
    which the attacker sends to itself, has new ones, or such as go on where the private ones stand (`follow`)."""

    def __init__(self, settings: TrainSettings, plan: Plan, cut: int) -> None:
        self.settings, self.plan = settings, replace(plan, cut=cut)
        self.private_streams = open_step_streams(settings, self.plan, PRIVATE_ROUND, None)
        self.known: StreamStates | None = None

    def follow(self) -> None:
        """From now on public text goes through what the private text has left at the server: axes that were fitted to it, say."""
        self.known = states_after(self.settings, self.plan, self.private_streams)

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
        with torch.no_grad():
            decoded, _ = stream.carry(tensor.reshape(-1, width), samples)
        return decoded.reshape(tensor.shape)
