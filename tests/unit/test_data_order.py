from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitft.data.order import BatchOrder
from splitft.errors import ConfigError


@settings(deadline=None)
@given(count=st.integers(1, 12), batch_size=st.integers(1, 30), epochs=st.integers(1, 3))
def test_every_epoch_is_a_permutation_and_batches_are_full(count: int, batch_size: int, epochs: int) -> None:
    order = BatchOrder(count, batch_size, seed=3, client=0)
    steps = -(-count * epochs // batch_size)
    batches = [order.indices(step) for step in range(steps)]
    assert all(batch.shape == (batch_size,) for batch in batches)
    stream = np.concatenate(batches)[: count * epochs]
    assert all(sorted(epoch) == list(range(count)) for epoch in stream.reshape(epochs, count).tolist())


@settings(deadline=None)
@given(steps=st.permutations(range(12)))
def test_a_batch_depends_on_its_step_alone(steps: list[int]) -> None:
    one, other = BatchOrder(7, 3, seed=1, client=2), BatchOrder(7, 3, seed=1, client=2)
    wanted = {step: one.indices(step).tolist() for step in range(12)}
    assert {step: other.indices(step).tolist() for step in steps} == wanted


def test_epochs_clients_and_seeds_differ() -> None:
    orders = [BatchOrder(50, 50, seed, client).indices(step).tolist() for seed in (0, 1) for client in (0, 1) for step in (0, 1)]
    assert len({tuple(order) for order in orders}) == 8


def test_epoch_of_a_step() -> None:
    order = BatchOrder(count=10, batch_size=4, seed=0, client=0)
    assert [order.epoch(step) for step in range(6)] == [0, 0, 0, 1, 1, 2]


def test_only_one_epoch_is_kept() -> None:
    order = BatchOrder(5, 3, 0, 0)
    for step in range(20):
        order.indices(step)
    assert len(order._epochs) == 1


def test_changing_a_batch_does_not_change_the_next() -> None:
    order = BatchOrder(4, 4, 0, 0)
    first = order.indices(0)
    kept = first.tolist()
    first[:] = 0
    assert order.indices(0).tolist() == kept


@pytest.mark.parametrize(("count", "batch_size"), [(0, 4), (4, 0), (4, -1)])
def test_nothing_to_order_is_refused(count: int, batch_size: int) -> None:
    with pytest.raises(ConfigError, match="client 5"):
        BatchOrder(count, batch_size, 0, client=5)
