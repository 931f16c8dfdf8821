"""What codecs are measured on: hidden states and gradients of real text at a cut, as the engine sends them epoch after epoch.

The embedded model is fine-tuned on the documentation of Python by clients that are all cut after the second block, and a codec that keeps
what passes takes down every packet. Rows of 768 channels are those of three clients side by side: as wide as GPT-2 small's, with the
statistics of real hidden states, which random weights of that shape do not have.

Axes: n clients, q rows (tokens) of a packet, d channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks import setups
from splitft.compress.base import Packed, Parts, Samples
from splitft.compress.identity import Identity
from splitft.data.base import ClientData
from splitft.data.federate import federate
from splitft.data.order import BatchOrder
from splitft.data.partitions.iid import Iid
from splitft.data.python_docs import PythonDocs
from splitft.engine.cohort import CohortExecutor
from splitft.models.load import load_tokenizer
from splitft.optimizer import Schedule
from splitft.types import Plan, RoundPlan

CUT, CHANNELS = 2, 256
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Sizes:
    """Of a recording: `batches` of `sequences` rows of `tokens` tokens for each of `clients` in an epoch, and how many epochs."""

    clients: int = 8
    sequences: int = 4
    tokens: int = 128
    batches: int = 3
    epochs: int = 3


@dataclass(frozen=True)
class Visit:
    """One exchange of all clients in one direction: the rows of their packets [n q, d], rows of each packet, samples of each."""

    rows: Tensor
    counts: tuple[int, ...]
    samples: tuple[Samples, ...]


@dataclass(frozen=True)
class Kept(Identity):
    """Identity that keeps what passes."""

    passed: list[Visit] = field(default_factory=list, compare=False)

    @property
    def hears_samples(self) -> bool:
        return True

    def pack_rows(self, rows: Tensor, parts: Parts) -> Packed:
        known = tuple(one for one in parts.samples if one is not None)
        self.passed.append(Visit(rows.detach().float().clone(), parts.counts, known))
        return super().pack_rows(rows, parts)


def text_clients(sizes: Sizes, clients: int) -> tuple[ClientData, ...]:
    """The documentation of the running Python, dealt evenly; of each client as many full rows as an epoch has."""
    wanted = sizes.batches * sizes.sequences
    source = PythonDocs(max_documents=max(100, 4 * clients * wanted * sizes.tokens // 128))
    data = federate(source.documents(), load_tokenizer("embedded"), Iid(), clients, 0, "blocks", sizes.tokens)
    found = []
    for one in data.clients:
        full = np.flatnonzero(one.train.lengths == sizes.tokens)[:wanted]
        if len(full) < wanted:
            raise RuntimeError(f"client {one.client} has {len(full)} full rows, {wanted} are needed; take more documents.")
        found.append(replace(one, train=one.train.select(full)))
    return tuple(found)


def record(sizes: Sizes, data: Sequence[ClientData]) -> tuple[list[Visit], list[Visit]]:
    """Hidden states up and gradients down of every exchange of these clients, in the order they were made."""
    case = setups.Case("embedded", "float32", len(data), sizes.tokens, sizes.batches * sizes.epochs)
    split = setups.cohort_model(setups.build_model(case.model, case.dtype))
    up, down = Kept(), Kept()
    base = setups.federation(replace(case, clients=1), split, up)
    settings = replace(
        base.settings, batch_size=sizes.sequences, uplink=up, downlink=down, schedule=Schedule(LEARNING_RATE, 1, 0, "constant")
    )
    # Every group of clients takes its rows in one order, so that what lies side by side does so in every epoch.
    orders = tuple(BatchOrder(len(one.train), sizes.sequences, 0, k) for k, one in enumerate(data))
    clients = tuple(replace(one, client=k) for k, one in enumerate(data))
    executor = CohortExecutor(replace(base, clients=clients, orders=orders, settings=settings))
    plans = tuple(Plan(k, CUT, case.steps, setups.RANK) for k in range(len(data)))
    executor.train(RoundPlan(1, plans), 0, lambda one: base.layout.initial_row(0), {}, lambda *told: None)
    if not len(up.passed) == len(down.passed) == case.steps:
        raise RuntimeError(f"{len(up.passed)} exchanges of {case.steps} steps: the cohort was not one pass; record fewer clients.")
    return up.passed, down.passed


def side_by_side(ways: Sequence[Sequence[Visit]]) -> list[Visit]:
    """The exchanges of several groups of clients as those of one, whose rows have the channels of all."""
    return [Visit(torch.cat([one.rows for one in visits], 1), visits[0].counts, visits[0].samples) for visits in zip(*ways, strict=True)]


def recorded(sizes: Sizes, widths: Sequence[int]) -> dict[int, tuple[list[Visit], list[Visit]]]:
    """Up and down for each width, which is a multiple of CHANNELS."""
    times = {width: width // CHANNELS for width in widths}
    most = max(times.values())
    data = text_clients(sizes, sizes.clients * most)
    groups = [record(sizes, data[k * sizes.clients : (k + 1) * sizes.clients]) for k in range(most)]
    return {
        width: (side_by_side([up for up, _ in groups[:count]]), side_by_side([down for _, down in groups[:count]]))
        for width, count in times.items()
    }
