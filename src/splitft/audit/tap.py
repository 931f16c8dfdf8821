"""What the server has of a tensor: encoded by the run's own codec and decoded again, as in a step of the run.

Axes: s sequences, t tokens, d hidden width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from splitft.compress.base import Samples
from splitft.engine.settings import TrainSettings
from splitft.engine.streams import open_step_streams
from splitft.types import Plan
from splitft.wire import PLACES, Stream

# Rounds no run reaches: the codecs of an audit draw random numbers of their own.
PRIVATE_ROUND = 1 << 29
PUBLIC_ROUND = PRIVATE_ROUND + 1


class Tap:
    """The streams of one client at one cut. Private text has streams of its own that remember earlier visits; every batch of public text,
    which the attacker sends to itself, has new ones."""

    def __init__(self, settings: TrainSettings, plan: Plan, cut: int) -> None:
        self.settings, self.plan = settings, replace(plan, cut=cut)
        self.private_streams = open_step_streams(settings, self.plan, PRIVATE_ROUND, None)

    @property
    def remembers(self) -> bool:
        """Whether what is sent of a text depends on what was sent of it before."""
        return self.settings.codecs[0].hears_samples

    def private(self, hidden: Tensor, place: int = 0) -> Tensor:
        """What arrives of the private sample's states or gradients [s t d] at one of the places of a step (`wire.PLACES`)."""
        return self._carry(self.private_streams[place], hidden)

    def public(self, hidden: Tensor, batch: int) -> Tensor:
        """What would arrive of a batch of public text at the cut [s t d]."""
        return self._carry(open_step_streams(self.settings, self.plan, PUBLIC_ROUND + batch, None)[0], hidden)

    def _carry(self, stream: Stream, tensor: Tensor) -> Tensor:
        assert len(PLACES) == len(self.private_streams)
        sequences, tokens, width = tensor.shape
        samples = Samples(tuple(range(sequences)), (tokens,) * sequences)
        with torch.no_grad():
            decoded, _ = stream.carry(tensor.reshape(-1, width), samples)
        return decoded.reshape(tensor.shape)
