"""Adapters for tests of low-rank algebra, and the dense float64 oracle they are held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from splitft.aggregate.base import Aggregator, Merged, Updates
from splitft.lora import Layout
from splitft.rng import torch_stream
from splitft.types import Key

Dense = npt.NDArray[np.float64]

RANK = 4
# Different widths and scales per key, so that a mix-up of either shows.
WIDTHS = {Key(0, "q"): (7, 9), Key(0, "v"): (12, 5), Key(1, "q"): (7, 9)}
LAYOUT = Layout.of(WIDTHS, RANK, {Key(0, "q"): 2.0, Key(0, "v"): 0.5, Key(1, "q"): 1.0})


def drawn(rows: int, seed: int = 0, layout: Layout = LAYOUT) -> Tensor:
    return torch.randn(rows, layout.parameters, generator=torch_stream(seed, "lowrank-test"))


def products(layout: Layout, row: Tensor) -> dict[Key, Dense]:
    """scale * B A of every key in float64, by NumPy."""
    return {
        key: layout.by_key[key].scale * (factors.b.double().numpy() @ factors.a.double().numpy())
        for key, factors in layout.factors(row).items()
    }


def mean_products(updates: Updates) -> dict[Key, Dense]:
    """The token-weighted mean of the clients' dense products."""
    total = sum(updates.tokens)
    rows = [products(updates.layout, row) for row in updates.values]
    return {
        key: np.sum([count / total * row[key] for count, row in zip(updates.tokens, rows, strict=True)], axis=0)
        for key in updates.layout.by_key
    }


def least_error(matrix: Dense, rank: int) -> float:
    """The smallest squared error any matrix of this rank can have."""
    return float((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum())


def padded(values: Tensor, ranks: Tensor, layout: Layout = LAYOUT) -> Tensor:
    """Rows with everything behind each client's own ranks [n e] set to zero."""
    return torch.stack([row * layout.active(own.tolist()) for row, own in zip(values, ranks, strict=True)])


def ranks_of(*clients: int, layout: Layout = LAYOUT) -> Tensor:
    """One rank per client, the same on every entry [n e]."""
    return torch.tensor([[rank] * len(layout.entries) for rank in clients])


def updates(tokens: Sequence[int], values: Tensor, ranks: Tensor | None = None, layout: Layout = LAYOUT) -> Updates:
    return Updates(tuple(range(len(tokens))), tuple(tokens), values, layout, ranks)


def merged(rule: Aggregator, before: Tensor, given: Updates) -> Merged:
    return rule.merge(before, given, rule.init(given.layout))


def effect(layout: Layout, outcome: Merged) -> dict[Key, Dense]:
    """What adapter and fold together add to the frozen weights."""
    found = products(layout, outcome.adapters)
    for key, (a, b) in outcome.folded.items():
        found[key] = found[key] + layout.by_key[key].scale * (b.double().numpy() @ a.double().numpy())
    return found


def assert_same(found: dict[Key, Dense], wanted: dict[Key, Dense], relative: float = 1e-6) -> None:
    """Equal in the Frobenius norm of each key; `relative` to the wanted one."""
    assert set(found) == set(wanted)
    for key in wanted:
        assert np.linalg.norm(found[key] - wanted[key]) <= relative * np.linalg.norm(wanted[key]) + 1e-12, key
