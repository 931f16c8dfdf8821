"""Networks of two layers with their gradients and Adam steps, for controllers that learn: float64, a few hundred numbers.

Written out, not left to autograd: it must run wherever an engine calls it, inference mode included, and its state must be plain lists.
Axes: n rows, i inputs, h hidden units, o outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
BETAS = (0.9, 0.999)
TINY = 1e-8


@dataclass(frozen=True)
class Network:
    """tanh of an affine map [i h], then an affine map [h o], bounded by a tanh of its own where `bounded`."""

    parts: tuple[Array, Array, Array, Array]  # [i h], [h], [h o], [o]
    bounded: bool

    @classmethod
    def drawn(cls, inputs: int, hidden: int, outputs: int, bounded: bool, stream: np.random.Generator) -> Network:  # noqa: TID251 - a type
        """Weights as the paper of DDPG draws them: uniform within 1 / root of the inputs, the last layer within 0.003 of zero."""
        first, last = 1.0 / math.sqrt(inputs), 3e-3
        shapes = (((inputs, hidden), first), ((hidden,), first), ((hidden, outputs), last), ((outputs,), last))
        parts = [stream.uniform(-bound, bound, shape) for shape, bound in shapes]
        return cls((parts[0], parts[1], parts[2], parts[3]), bounded)

    @classmethod
    def restored(cls, plain: Sequence[Any], bounded: bool) -> Network:
        """The inverse of `plain`."""
        parts = [np.asarray(part, dtype=np.float64) for part in plain]
        return cls((parts[0], parts[1], parts[2], parts[3]), bounded)

    def plain(self) -> list[Any]:
        """The weights as nested lists, which JSON holds exactly."""
        return [part.tolist() for part in self.parts]

    def hidden(self, rows: Array) -> Array:
        return np.tanh(rows @ self.parts[0] + self.parts[1])

    def __call__(self, rows: Array) -> Array:
        """Outputs [n o] of rows [n i]."""
        out = self.hidden(rows) @ self.parts[2] + self.parts[3]
        return np.tanh(out) if self.bounded else out

    def gradients(self, rows: Array, above: Array) -> tuple[list[Array], Array]:
        """Gradients of a scalar by the four parts and by the rows [n i], from its gradient `above` by the outputs [n o]."""
        hidden = self.hidden(rows)
        if self.bounded:
            above = above * (1.0 - np.tanh(hidden @ self.parts[2] + self.parts[3]) ** 2)
        inner = (above @ self.parts[2].T) * (1.0 - hidden**2)
        return [rows.T @ inner, inner.sum(0), hidden.T @ above, above.sum(0)], inner @ self.parts[0].T

    def towards(self, other: Network, share: float) -> Network:
        """This network moved by `share` of the way to another: a slow copy follows its original."""
        first, second, third, fourth = ((1.0 - share) * mine + share * its for mine, its in zip(self.parts, other.parts, strict=True))
        return Network((first, second, third, fourth), self.bounded)


@dataclass(frozen=True)
class Moments:
    """Adam's memory of a network's gradients: `count` steps, running means and running means of squares of the four parts."""

    count: int
    means: list[Array]
    squares: list[Array]

    @classmethod
    def empty(cls, network: Network) -> Moments:
        return cls(0, [np.zeros_like(part) for part in network.parts], [np.zeros_like(part) for part in network.parts])

    @classmethod
    def restored(cls, plain: dict[str, Any]) -> Moments:
        """The inverse of `plain`."""
        return cls(int(plain["count"]), *([np.asarray(part, dtype=np.float64) for part in plain[name]] for name in ("means", "squares")))

    def plain(self) -> dict[str, Any]:
        """All of it as JSON holds it exactly."""
        return {"count": self.count, "means": [part.tolist() for part in self.means], "squares": [part.tolist() for part in self.squares]}

    def step(self, network: Network, gradients: Sequence[Array], rate: float) -> tuple[Network, Moments]:
        """The network after an Adam step against these gradients, and the memory after it."""
        count = self.count + 1
        means = [BETAS[0] * old + (1.0 - BETAS[0]) * new for old, new in zip(self.means, gradients, strict=True)]
        squares = [BETAS[1] * old + (1.0 - BETAS[1]) * new**2 for old, new in zip(self.squares, gradients, strict=True)]
        parts = [
            part - rate * (mean / (1.0 - BETAS[0] ** count)) / (np.sqrt(square / (1.0 - BETAS[1] ** count)) + TINY)
            for part, mean, square in zip(network.parts, means, squares, strict=True)
        ]
        return Network((parts[0], parts[1], parts[2], parts[3]), network.bounded), Moments(count, means, squares)
