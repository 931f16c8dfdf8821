"""Coordinates of an update in which its length is measured and noise is added: one space for both, or the length bounds nothing.

With A frozen the change of the product, scale (B' - B) A, is linear in B. Its coordinates are (B' - B) R with R R = scale^2 A A^T, so that
their length is the Frobenius norm of the product's change, never formed, and noise on them is noise on the product. Without a frozen A
they are the factors themselves.

Axes: p adapter parameters, r rank, o output width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from splitft.lora import Layout
from splitft.types import Key

# Singular values of A below this share of the largest carry nothing through the product but rounding.
SMALLEST = 1e-5


@dataclass(frozen=True)
class Coordinates:
    """Where noise goes: `columns` [p] (bool) of an adapter, and with a frozen A the roots R [r r] and their pseudo-inverses by key."""

    layout: Layout
    columns: Tensor
    roots: dict[Key, tuple[Tensor, Tensor]]

    @classmethod
    def of_factors(cls, layout: Layout) -> Coordinates:
        """A and B as they are."""
        return cls(layout, torch.ones(layout.parameters, dtype=torch.bool), {})

    @classmethod
    def of_product(cls, layout: Layout, before: Tensor, columns: Tensor) -> Coordinates:
        """Those of the product, over the frozen A of the adapter `before` [p]; `columns` are those of B."""
        roots = {}
        for key, factors in layout.factors(before).items():
            a = factors.a.double() * layout.by_key[key].scale
            values, vectors = torch.linalg.eigh(a @ a.T)
            lengths = values.clamp(min=0.0).sqrt()
            kept = lengths > SMALLEST * lengths.max()
            inverse = torch.where(kept, 1.0 / lengths.clamp(min=torch.finfo(torch.float64).tiny), torch.zeros_like(lengths))
            roots[key] = (vectors * (lengths * kept)) @ vectors.T, (vectors * inverse) @ vectors.T
        return cls(layout, columns, roots)

    @property
    def count(self) -> int:
        """How many values get noise."""
        return int(self.columns.sum())

    def of(self, change: Tensor) -> Tensor:
        """The coordinates [p] float64 of a change [p] of an adapter; zero outside `columns`."""
        return self._times(change, 0)

    def back(self, coordinates: Tensor) -> Tensor:
        """The change [p] float64 of an adapter with these coordinates."""
        return self._times(coordinates, 1)

    def scattered(self, values: Tensor) -> Tensor:
        """One value for each of the columns, as a row [p] float64."""
        row = torch.zeros(self.layout.parameters, dtype=torch.float64)
        row[self.columns] = values
        return row

    def noise_norm(self, before: Tensor, std: float) -> float:
        """The length to expect, as a change of the product at `before` [p], of noise of this standard deviation on every coordinate (root
        of the mean square)."""
        if self.roots:
            return std * math.sqrt(self.count)
        total = 0.0
        for key, (a, b) in self.layout.factors(before.double()).items():
            rank, inputs, outputs = a.shape[0], a.shape[1], b.shape[0]
            linear = outputs * float(a.square().sum()) + inputs * float(b.square().sum())
            total += self.layout.by_key[key].scale ** 2 * (std**2 * linear + std**4 * rank * inputs * outputs)
        return math.sqrt(total)

    def _times(self, row: Tensor, which: int) -> Tensor:
        wide = row.double() * self.columns
        factors = self.layout.factors(wide) if self.roots else {}
        for key, pair in self.roots.items():
            b = factors[key].b
            b.copy_(b @ pair[which])
        return wide
