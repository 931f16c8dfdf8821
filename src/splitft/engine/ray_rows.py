"""Adapters in Ray's object store: those a cohort begins with, and those it ends with, summed where they lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import TypeVar

import numpy as np
import ray
import torch
from ray import exceptions
from torch import Tensor

from splitft.engine.ray_pool import ATTEMPTS, Actor, Finished, Job, Pool, Reference
from splitft.engine.settings import Starts
from splitft.errors import ResourceError
from splitft.types import Plan

Answer = TypeVar("Answer")


class SharedStarts:
    """The adapters [p] that participants begin with; cohorts that begin with the same share one array."""

    def __init__(self, starts: Starts) -> None:
        self.starts = starts
        self.known: dict[tuple[int, ...], tuple[Reference, list[Tensor]]] = {}

    def of(self, group: Sequence[Plan]) -> tuple[Reference, tuple[int, ...]]:
        """A reference to the distinct rows [u p] of a cohort, and which of them each member begins with."""
        rows = [self.starts(one) for one in group]
        distinct = {id(row): row for row in rows}
        order = tuple(distinct)
        if order not in self.known:
            array = np.stack([row.numpy() for row in distinct.values()])
            self.known[order] = ray.put(array), list(distinct.values())  # kept, so that no other row gets the id of one of them
        return self.known[order][0], tuple(order.index(id(row)) for row in rows)


@dataclass(frozen=True)
class KeptRows:
    """The adapters of a round as its cohorts' `jobs` left them. `places`: for each row its cohort and its row there.

    `in_order`: rows are added one by one in client order, the sum so far going from machine to machine: bit for bit what one process
    gets, and no faster. Else as a tree over the cohorts, where the machines add side by side, and the sum differs from that in float64's
    last bits. Neither depends on the number of actors. Where a machine is gone with the rows it kept, the jobs run again, with the same
    numbers.
    """

    pool: Pool
    jobs: Sequence[Job]
    finished: list[Finished]
    places: tuple[tuple[int, int], ...]
    in_order: bool
    on_wait: Callable[[], None]

    def __len__(self) -> int:
        return len(self.places)

    def chosen(self, rows: Sequence[int]) -> KeptRows:
        return replace(self, places=tuple(self.places[row] for row in rows))

    def fetch(self) -> Tensor:
        def fetched() -> Tensor:
            values = {cohort: ray.get(self.finished[cohort].array) for cohort in sorted({cohort for cohort, _ in self.places})}
            return torch.stack([torch.tensor(values[cohort][row]) for cohort, row in self.places])

        return self._mended(fetched)

    def weighted_sum(self, weights: Sequence[float]) -> Tensor:
        return self._mended(lambda: self._chain(weights) if self.in_order else self._tree(weights))

    def _chain(self, weights: Sequence[float]) -> Tensor:
        """The rows in their order; neighbours of one cohort in one job."""
        total: Reference = None
        for cohort, run in groupby(zip(self.places, weights, strict=True), key=lambda one: one[0][0]):
            members = list(run)
            (done,) = self.pool.run(
                [self._leaf(cohort, [row for (_, row), _ in members], [share for _, share in members], total)], self.on_wait
            )
            total = done.array
        return torch.tensor(ray.get(total))

    def _tree(self, weights: Sequence[float]) -> Tensor:
        """Each cohort is summed, in client order, then neighbouring cohorts' sums are added, and those again, until one is left."""
        members: dict[int, tuple[list[int], list[float]]] = {}
        for (cohort, row), weight in zip(self.places, weights, strict=True):
            rows, shares = members.setdefault(cohort, ([], []))
            rows.append(row)
            shares.append(weight)
        level = self.pool.run([self._leaf(cohort, *members[cohort], None) for cohort in sorted(members)], self.on_wait)
        while len(level) > 1:
            pairs = zip(level[::2], level[1::2], strict=False)
            odd = level[-1:] if len(level) % 2 else []
            jobs = [Job("a sum of adapters", partial(_add, one.array, other.array), one.actor) for one, other in pairs]
            level = [*self.pool.run(jobs, self.on_wait), *odd]
        return torch.tensor(ray.get(level[0].array))

    def _leaf(self, cohort: int, rows: list[int], weights: list[float], before: Reference) -> Job:
        done = self.finished[cohort]
        return Job("the sum of a cohort's adapters", partial(_weigh, done.array, rows, weights, before), done.actor)

    def _mended(self, action: Callable[[], Answer]) -> Answer:
        """`action`, and again with rows trained anew when some were lost with their machine."""
        for _ in range(ATTEMPTS):
            try:
                return action()
            except exceptions.ObjectLostError:
                self.pool.notices.append(
                    "a machine was lost with adapters it kept; their cohorts were trained again, with the same numbers."
                )
                self.finished[:] = self.pool.run(self.jobs, self.on_wait)
        raise ResourceError(
            f"machines were lost with the adapters they kept, {ATTEMPTS} times in one round.",
            "the run can be resumed on a steadier cluster.",
        )


def _weigh(array: Reference, rows: list[int], weights: list[float], before: Reference, actor: Actor) -> Sequence[Reference]:
    references: Sequence[Reference] = actor.weigh.options(num_returns=2).remote(array, rows, weights, before)
    return references


def _add(left: Reference, right: Reference, actor: Actor) -> Sequence[Reference]:
    references: Sequence[Reference] = actor.add.options(num_returns=2).remote(left, right)
    return references
