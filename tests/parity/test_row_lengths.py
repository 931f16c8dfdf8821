"""Rows lengthened to buckets: what is learned and measured stays what it was, in every engine; what is named are multiples only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from splitft.compress.base import HEADER_BYTES
from splitft.compress.residual import Residual
from splitft.data.base import TokenRows
from splitft.data.tokens import lengthened
from splitft.engine.evaluate import evaluate
from splitft.engine.settings import Federation
from splitft.optimizer import AdamW

from ..support import federation
from .test_federation import NAMES, SHAPES, close, plans, run

BUCKET = 8


def bucketed(fed: Federation, tokens: int = BUCKET) -> Federation:
    """The same federation with all clients' rows lengthened."""
    clients = [replace(one, train=lengthened(one.train, tokens), held_out=lengthened(one.held_out, tokens)) for one in fed.clients]
    return replace(fed, clients=tuple(clients))


@examples(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 3)), max_size=6), st.integers(0, 12))
def test_every_row_is_itself_and_then_its_own_beginning_untrained(shapes: list[tuple[int, int]], bucket: int) -> None:
    made = [
        (np.arange(100 * n, 100 * n + length, dtype=np.int32), np.arange(length) >= prompt) for n, (length, prompt) in enumerate(shapes)
    ]
    rows = TokenRows.build(made, truncated=3, dropped_tokens=5)
    found = lengthened(rows, bucket)
    assert (found.truncated, found.dropped_tokens, found.target_tokens, len(found)) == (3, 5, rows.target_tokens, len(rows))
    for number, (ids, trained) in enumerate(made):
        got, [length], targets = (part[0] if part.ndim == 2 else part for part in found.batch([number]))
        due = len(ids) if bucket < 2 else -(-len(ids) // bucket) * bucket
        assert length == due
        assert got.tolist() == np.resize(ids, due).tolist()
        assert targets.tolist() == [*trained, *[False] * (due - len(ids))]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_adapters_are_those_of_rows_as_they_are(name: str, shape: str) -> None:
    """Mixed cuts, prompts, accumulation, uneven rows."""
    # Plain steps of equal size: AdamW's first ones are signs, which magnify a rounding without end.
    plain = federation(length=(3, 14), prompt=1, gradient_accumulation=2, optimizer=AdamW(epsilon=1e-3))
    start = plain.layout.initial_row(1)
    rounds = [plans([1, 2, 3] if shape != "u-shape-tail-1" else [1, 2, 2], **SHAPES[shape])] * 2
    expected, losses, _ = run(plain, name, start, rounds)
    padded = bucketed(plain)
    found, own_losses, _ = run(padded, name, start, rounds)
    torch.testing.assert_close(torch.tensor(own_losses), torch.tensor(losses), rtol=2e-5, atol=1e-6)
    close(found, expected, start)
    scores = [evaluate(fed.split, fed.layout, expected, [one.held_out for one in fed.clients], 4, fed.device) for fed in (plain, padded)]
    for one, other in zip(*scores, strict=True):
        assert (one.tokens, one.correct) == (other.tokens, other.correct)
        assert one.loss_sum == pytest.approx(other.loss_sum, rel=1e-5)


def test_a_target_that_saw_what_was_added_would_be_noticed() -> None:
    """The twin: with the added tokens as targets the numbers are others."""
    plain = federation(length=(3, 14))
    start = plain.layout.initial_row(1)
    longer = [lengthened(one.train, BUCKET) for one in plain.clients]
    learnt = [replace(rows, trained=np.ones(rows.tokens, bool)) for rows in longer]
    wrong = replace(plain, clients=tuple(replace(one, train=rows) for one, rows in zip(plain.clients, learnt, strict=True)))
    expected, found = (run(fed, "cohort", start, [plans([1, 2, 3])])[1] for fed in (plain, wrong))
    assert (torch.tensor(found) - torch.tensor(expected)).abs().max() > 1e-2


@pytest.mark.parametrize("changes", [{}, {"uplink": Residual(), "downlink": Residual()}], ids=["plain", "caches by sample"])
def test_bytes_are_those_of_the_lengthened_rows_and_engines_agree(changes: dict[str, Any]) -> None:
    fed = bucketed(federation(length=(3, 14), **changes))
    start, chosen = fed.layout.initial_row(1), plans([1, 2, 3], steps=6)
    counted = {name: run(fed, name, start, [chosen, chosen])[2] for name in ("cohort", "workers")}
    for one, other in zip(counted["cohort"], counted["workers"], strict=True):
        assert one.clients == other.clients
    if changes:
        return
    for plan in chosen:
        order, rows = fed.orders[plan.client], fed.clients[plan.client].train
        tokens = sum(int(rows.lengths[order.indices(step)].sum()) for step in range(6))
        assert tokens % BUCKET == 0
        assert counted["cohort"][0].clients[plan.client]["up"]["activations"] == tokens * 32 * 4 + 6 * HEADER_BYTES
