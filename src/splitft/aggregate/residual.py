"""Mean of the factors; what it misses of the mean of the products is folded into the frozen weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from splitft.aggregate.base import Aggregator, Merged, State, Updates, require_finite
from splitft.aggregate.terms import mean_row, mean_terms, require_equal_ranks
from splitft.lowrank import GAUGE, best_factors, energy
from splitft.types import Factors

# Singular values of the residual below this share of the mean's norm are the rounding of the mean factors to float32.
SMALLEST = 1e-7


@dataclass(frozen=True)
class Residual(Aggregator):
    """A and B averaged as `average` does, and the residual, mean of products minus product of means, added to the frozen weights
    (FedEx-LoRA).

    Adapter and weights together are the exact token-weighted mean, the adapter keeps its rank and its coordinates, moments stay
    meaningful. The residual has a rank up to that of all clients together and goes to every holder of the block; it is sent at its
    numerical rank, and not at all for a key where clients agree. Cutting it to a lower rank would be cheaper and no longer exact; that
    is left out.

    For equal ranks: at unequal ones the sum would still be exact, but starts of different ranks are in different coordinates and their
    mean factors mean nothing. AdapterError when the ranks of a key differ between participants.
    """

    references: ClassVar[tuple[str, ...]] = ("2410.09432",)
    folds: ClassVar[bool] = True

    def merge(self, before: Tensor, updates: Updates, state: State) -> Merged:
        require_finite(updates)
        require_equal_ranks(updates, "residual")
        adapters = mean_row(updates.weights(), updates.values)
        means = updates.layout.factors(adapters)
        folded = {}
        for key, terms in mean_terms(updates).items():
            if terms and (rest := _compressed([*terms, (-1.0, means[key])], energy(means[key]))):
                folded[key] = rest
        return Merged(adapters, state, folded)


def _compressed(terms: list[tuple[float, Factors]], mean_energy: float) -> Factors | None:
    """The sum at its numerical rank, float32; None where it is nothing but rounding."""
    width = min(sum(len(factors.a) for _, factors in terms), terms[0][1].a.shape[1])
    factors, _, whole = best_factors(terms, width)
    singular = factors.b.norm(dim=0) * GAUGE
    # Against the mean's norm too, since the residual of clients that agree is itself nothing but rounding.
    kept = int((singular > SMALLEST * max(whole, mean_energy) ** 0.5).sum())
    return Factors(factors.a[:kept].float(), factors.b[:, :kept].float()) if kept else None
