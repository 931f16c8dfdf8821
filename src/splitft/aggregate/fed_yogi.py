"""Yogi on the server, over any rule that keeps the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from splitft.aggregate.fed_adam import FedAdam


@dataclass(frozen=True)
class FedYogi(FedAdam):
    """FedYogi (Reddi et al. 2020, algorithm 2): FedAdam whose mean of squares moves by (1 - beta2) g^2 towards the newest square, by
    its sign alone.

    A burst of small changes so shrinks v slowly, and the step does not jump up after quiet rounds as Adam's can. Fields, defaults and
    limits are FedAdam's. Prefer it to FedAdam when participants change much from round to round.
    """

    references: ClassVar[tuple[str, ...]] = ("2003.00295",)

    def next_square(self, square: Tensor, gradient: Tensor) -> Tensor:
        newest = gradient.square()
        return square - (1 - self.beta2) * newest * torch.sign(square - newest)
