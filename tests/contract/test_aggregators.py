"""The contract of every aggregator in the catalogue."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from splitft.aggregate.base import Aggregator, Updates
from splitft.errors import AdapterError
from splitft.lora import Layout
from splitft.rng import torch_stream
from splitft.types import Key

from .variants import AGGREGATOR_VARIANTS, Variant

LAYOUT = Layout.of({Key(block, name): (6, 8) for block in range(3) for name in ("q", "v")}, 2, 2.0)
every_aggregator = pytest.mark.parametrize("variant", AGGREGATOR_VARIANTS, ids=repr)


def drawn(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, LAYOUT.parameters, generator=torch_stream(seed, "aggregator-test"))


def updates(tokens: list[int], values: Tensor, clients: list[int] | None = None) -> Updates:
    return Updates(tuple(clients or range(len(tokens))), tuple(tokens), values, LAYOUT)


def merged(rule: Aggregator, before: Tensor, given: Updates) -> Tensor:
    return rule.merge(before, given, rule.init(LAYOUT))[0]


@every_aggregator
def test_equal_updates_are_a_fixed_point(variant: Variant) -> None:
    row = drawn(1)[0]
    found = merged(variant.build(), row, updates([3, 1, 100], row.expand(3, -1)))
    torch.testing.assert_close(found, row, rtol=1e-6, atol=1e-7)


@every_aggregator
def test_one_participant_is_taken_over(variant: Variant) -> None:
    torch.testing.assert_close(merged(variant.build(), drawn(1)[0], updates([7], drawn(1, 2))), drawn(1, 2)[0], rtol=1e-6, atol=1e-7)


@every_aggregator
def test_the_order_of_participants_does_not_matter(variant: Variant) -> None:
    values, tokens, before = drawn(4, 1), [5, 1, 9, 3], drawn(1)[0]
    found = []
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 5):
        found.append(merged(variant.build(), before, updates([tokens[k] for k in order], values[list(order)], list(order))))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-7)


@every_aggregator
def test_the_scale_of_the_weights_does_not_matter(variant: Variant) -> None:
    values, before = drawn(3, 1), drawn(1)[0]
    small, large = (merged(variant.build(), before, updates([k * factor for k in (2, 5, 1)], values)) for factor in (1, 1_000_000))
    torch.testing.assert_close(small, large, rtol=1e-6, atol=1e-7)


@every_aggregator
def test_weights_matter(variant: Variant) -> None:
    values, before = drawn(2, 1), drawn(1)[0]
    more = merged(variant.build(), before, updates([9, 1], values))
    less = merged(variant.build(), before, updates([1, 9], values))
    assert float((more - values[0]).norm()) < float((less - values[0]).norm())


@every_aggregator
def test_a_participant_without_tokens_does_not_matter(variant: Variant) -> None:
    values, before = drawn(3, 1), drawn(1)[0]
    with_idle = merged(variant.build(), before, updates([4, 0, 6], values))
    without = merged(variant.build(), before, updates([4, 6], values[[0, 2]], [0, 2]))
    torch.testing.assert_close(with_idle, without, rtol=1e-6, atol=1e-7)


@every_aggregator
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_naming_the_client(variant: Variant, bad: float) -> None:
    values = drawn(3, 1)
    values[1, 5] = bad
    rule = variant.build()
    with pytest.raises(AdapterError, match="client 17"):
        rule.merge(drawn(1)[0], updates([1, 1, 1], values, [4, 17, 30]), rule.init(LAYOUT))


@every_aggregator
@pytest.mark.parametrize("tokens", [[0, 0], [], [3, -1]])
def test_a_round_without_tokens_is_refused(variant: Variant, tokens: list[int]) -> None:
    rule = variant.build()
    with pytest.raises(AdapterError, match=r"token counts are \["):
        rule.merge(drawn(1)[0], updates(tokens, drawn(max(1, len(tokens)))[: len(tokens)]), rule.init(LAYOUT))


@every_aggregator
def test_arguments_are_left_alone_and_the_answer_repeats(variant: Variant) -> None:
    values, before, rule = drawn(3, 1), drawn(1)[0], variant.build()
    kept_values, kept_before, state = values.clone(), before.clone(), rule.init(LAYOUT)
    kept_state = {name: tensor.clone() for name, tensor in state.items()}
    first, after = rule.merge(before, updates([1, 2, 3], values), state)
    again, _ = rule.merge(before, updates([1, 2, 3], values), state)
    assert torch.equal(first, again)
    assert torch.equal(values, kept_values)
    assert torch.equal(before, kept_before)
    assert set(state) == set(kept_state) == set(after)
    assert all(torch.equal(state[name], kept_state[name]) for name in state)
    assert (first.dtype, first.shape) == (torch.float32, (LAYOUT.parameters,))


@every_aggregator
def test_a_result_between_the_updates_in_every_coordinate_when_all_are_on_one_line(variant: Variant) -> None:
    base, step = drawn(1, 1)[0], drawn(1, 2)[0]
    values = torch.stack([base, base + step])
    found = merged(variant.build(), base, updates([1, 3], values))
    low, high = torch.minimum(values[0], values[1]), torch.maximum(values[0], values[1])
    assert bool(((found >= low - 1e-5) & (found <= high + 1e-5)).all())
