"""The contract of every aggregator in the catalogue, and of rules over rules.

What counts is what the model computes: for every key scale * B A, with what was folded into the frozen weight. Factors may differ.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from splitft.aggregate.base import Aggregator, Merged, State, Updates
from splitft.aggregate.wrapper import least_participants
from splitft.errors import AdapterError
from splitft.lora import Layout
from splitft.rng import torch_stream
from splitft.types import Key

from .variants import AGGREGATOR_VARIANTS, OWN_STEP, UNWEIGHTED, Variant, names_inside, noisy

LAYOUT = Layout.of({Key(block, name): (6, 8) for block in range(3) for name in ("q", "v")}, 2, 2.0)
every_aggregator = pytest.mark.parametrize("variant", AGGREGATOR_VARIANTS, ids=repr)


def of(keep: object) -> pytest.MarkDecorator:
    """Every variant whose rule satisfies `keep`."""
    return pytest.mark.parametrize("variant", [one for one in AGGREGATOR_VARIANTS if keep(one.build())], ids=repr)  # type: ignore[operator]


def drawn(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, LAYOUT.parameters, generator=torch_stream(seed, "aggregator-test"))


def updates(rule: Aggregator, before: Tensor, tokens: list[int], values: Tensor, clients: list[int] | None = None) -> Updates:
    """Updates as clients of this rule can send them: what it does not let them train is as it was."""
    trained = rule.trained(LAYOUT)
    if trained is not None:
        values = torch.where(trained, values, before)
    return Updates(tuple(clients or range(len(tokens))), tuple(tokens), values, LAYOUT)


def product(row: Tensor) -> Tensor:
    """scale * B A of every key, one long vector."""
    factors = LAYOUT.factors(row.double())
    return torch.cat([entry.scale * (factors[entry.key].b @ factors[entry.key].a).reshape(-1) for entry in LAYOUT.entries])


def effect(merged: Merged) -> Tensor:
    """The product of the next adapter and what was folded."""
    assert set(merged.folded) <= set(LAYOUT.by_key)
    parts = []
    for entry in LAYOUT.entries:
        part = torch.zeros(entry.outputs, entry.inputs, dtype=torch.float64)
        if entry.key in merged.folded:
            part += entry.scale * merged.folded[entry.key].b.double() @ merged.folded[entry.key].a.double()
        parts.append(part.reshape(-1))
    return product(merged.adapters) + torch.cat(parts)


@lru_cache(maxsize=4)
def start_state(rule: Aggregator) -> State:
    """One and the same state for all merges of a test: a private rule's has a key of its own, which nobody else draws again."""
    return rule.init(LAYOUT)


def merge(rule: Aggregator, before: Tensor, given: Updates) -> Tensor:
    return effect(rule.merge(before, given, start_state(rule)))


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=3e-6)


def cohort(rule: Aggregator, at_least: int) -> int:
    return max(at_least, least_participants(rule))


@of(lambda rule: not noisy(rule))
def test_clients_that_did_not_move_leave_everything_as_it_was(variant: Variant) -> None:
    rule, row = variant.build(), drawn(1)[0]
    count = cohort(rule, 1)
    close(merge(rule, row, updates(rule, row, list(range(1, count + 1)), row.expand(count, -1))), product(row))


@of(lambda rule: not names_inside(rule) & OWN_STEP and not noisy(rule))
@pytest.mark.parametrize("count", [1, 3])
def test_equal_updates_are_taken_over(variant: Variant, count: int) -> None:
    rule, before = variant.build(), drawn(1)[0]
    count = cohort(rule, count)
    given = updates(rule, before, [3, 1, 100, 7, 9, 20, 2][:count], drawn(1, 2).expand(count, -1))
    close(merge(rule, before, given), product(given.values[0]))


@every_aggregator
def test_the_order_of_participants_does_not_matter(variant: Variant) -> None:
    rule, before = variant.build(), drawn(1)[0]
    count = cohort(rule, 4)
    values, tokens = drawn(count, 1), [5, 1, 9, 3, 8, 4, 2][:count]
    orders = [list(order) for order in itertools.islice(itertools.permutations(range(count)), 0, 24, 5)] + [list(range(count))[::-1]]
    found = [merge(rule, before, updates(rule, before, [tokens[k] for k in order], values[order], order)) for order in orders]
    for other in found[1:]:
        close(other, found[0])


@every_aggregator
def test_the_scale_of_the_weights_does_not_matter(variant: Variant) -> None:
    rule, before = variant.build(), drawn(1)[0]
    values, tokens = drawn(cohort(rule, 3), 1), [2, 5, 1, 4, 3, 6, 9][: cohort(rule, 3)]
    small, large = (merge(rule, before, updates(rule, before, [k * factor for k in tokens], values)) for factor in (1, 1_000_000))
    close(small, large)


@of(lambda rule: not names_inside(rule) & (UNWEIGHTED | OWN_STEP) and getattr(rule, "weights", "tokens") == "tokens")
def test_weights_matter(variant: Variant) -> None:
    rule, before = variant.build(), drawn(1)[0]
    values = drawn(2, 1)
    more, less = (merge(rule, before, updates(rule, before, tokens, values)) for tokens in ([9, 1], [1, 9]))
    first = product(updates(rule, before, [1, 1], values).values[0])
    assert float((more - first).norm()) < float((less - first).norm())


@every_aggregator
def test_a_participant_without_tokens_does_not_matter(variant: Variant) -> None:
    rule, before = variant.build(), drawn(1)[0]
    count = cohort(rule, 3)
    values, tokens = drawn(count + 1, 1), [4, 6, 1, 3, 8, 2, 9][:count]
    values[1] *= 50
    rows = [row for row in range(count + 1) if row != 1]
    with_idle = merge(rule, before, updates(rule, before, [tokens[0], 0, *tokens[1:]], values))
    if "private" in names_inside(rule):  # it is counted, as who sends no change: the number of participants must say nothing of data
        values[1] = before
        close(with_idle, merge(rule, before, updates(rule, before, [tokens[0], 7, *tokens[1:]], values)))
        return
    close(with_idle, merge(rule, before, updates(rule, before, tokens, values[rows], rows)))


@every_aggregator
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_naming_the_client(variant: Variant, bad: float) -> None:
    rule, before = variant.build(), drawn(1)[0]
    count = cohort(rule, 3)
    given = updates(rule, before, [1] * count, drawn(count, 1), [4, 17, *range(30, 28 + count)])
    given.values[1, 5] = bad
    with pytest.raises(AdapterError, match="client 17"):
        rule.merge(before, given, rule.init(LAYOUT))


@every_aggregator
@pytest.mark.parametrize("tokens", [[0, 0], [], [3, -1]])
def test_a_round_without_tokens_is_refused(variant: Variant, tokens: list[int]) -> None:
    rule, before = variant.build(), drawn(1)[0]
    with pytest.raises(AdapterError, match=r"token counts are \["):
        rule.merge(before, updates(rule, before, tokens, drawn(max(1, len(tokens)))[: len(tokens)]), rule.init(LAYOUT))


@every_aggregator
def test_arguments_are_left_alone_and_the_answer_repeats(variant: Variant) -> None:
    rule, before = variant.build(), drawn(1)[0]
    count = cohort(rule, 3)
    given, state = updates(rule, before, list(range(1, count + 1)), drawn(count, 1)), rule.init(LAYOUT)
    kept_values, kept_before, kept_state = given.values.clone(), before.clone(), {name: one.clone() for name, one in state.items()}
    first, again = (rule.merge(before, given, state) for _ in range(2))
    assert torch.equal(first.adapters, again.adapters)
    assert torch.equal(effect(first), effect(again))
    assert torch.equal(given.values, kept_values)
    assert torch.equal(before, kept_before)
    assert all(torch.equal(state[name], kept_state[name]) for name in kept_state)
    assert (first.adapters.dtype, first.adapters.shape) == (torch.float32, (LAYOUT.parameters,))
    assert all(isinstance(figure, float) and math.isfinite(figure) for figure in first.metrics.values())


@every_aggregator
def test_the_state_keeps_its_names_types_and_shapes_so_that_a_checkpoint_holds_it(variant: Variant) -> None:
    rule, row = variant.build(), drawn(1)[0]
    count, state = cohort(rule, 2), rule.init(LAYOUT)
    form = {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()}
    for index in range(3):
        merged = rule.merge(row, updates(rule, row, [1] * count, row + 0.1 * drawn(count, 5 + index)), state)
        row, state = merged.adapters, merged.state
        assert {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()} == form
        assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
        assert bool(torch.isfinite(row).all())


@every_aggregator
def test_only_a_rule_that_says_so_folds_and_what_nobody_trains_stays(variant: Variant) -> None:
    rule, before = variant.build(), drawn(1)[0]
    count = cohort(rule, 3)
    merged = rule.merge(before, updates(rule, before, [1] * count, drawn(count, 1)), rule.init(LAYOUT))
    assert rule.folds or not merged.folded
    trained = rule.trained(LAYOUT)
    if trained is not None:
        assert (trained.dtype, trained.shape) == (torch.bool, before.shape)
        assert torch.equal(merged.adapters[~trained], before[~trained])


@of(lambda rule: not names_inside(rule) & OWN_STEP and not noisy(rule))
def test_updates_on_one_line_give_a_result_between_them(variant: Variant) -> None:
    """A common, B = B0 + t B1: then every sensible mean of the products is between the outermost in every coordinate."""
    rule, before = variant.build(), drawn(1, 1)[0]
    count, step = cohort(rule, 2), drawn(1, 2)[0]
    for entry in LAYOUT.entries:
        step[entry.start : entry.middle] = 0.0
    values = before + torch.linspace(0, 1, count).unsqueeze(1) * step
    found, ends = merge(rule, before, updates(rule, before, list(range(1, count + 1)), values)), [product(values[0]), product(values[-1])]
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    assert bool(((found >= low - 1e-5) & (found <= high + 1e-5)).all())


@every_aggregator
def test_clients_of_full_rank_start_from_the_global_product_and_others_use_only_their_ranks(variant: Variant) -> None:
    rule, row = variant.build(), drawn(1)[0]
    start, lost = rule.distribute(LAYOUT, row, torch.tensor([entry.rank for entry in LAYOUT.entries]))
    close(product(start), product(row))
    assert lost == pytest.approx(0.0, abs=1e-12)
    ranks = torch.tensor([1, 2, 1, 1, 2, 1])
    start, lost = rule.distribute(LAYOUT, row, ranks)
    assert bool((start[~LAYOUT.active(ranks.tolist())] == 0).all())
    assert 0 < lost < 1


def unequal(rule: Aggregator, before: Tensor, tokens: list[int], seed: int) -> Updates:
    """Clients that trained at ranks 2 and 1, from what the rule gave them."""
    rows = [[2] * 6, [1] * 6, [1, 2, 1, 2, 1, 2], [2, 2, 1, 1, 1, 1], [1] * 6, [2] * 6][: len(tokens)]
    starts = torch.stack([rule.distribute(LAYOUT, before, torch.tensor(row))[0] for row in rows])
    change = drawn(len(rows), seed) * torch.stack([LAYOUT.active(row) for row in rows])
    trained = rule.trained(LAYOUT)
    values = starts + (change if trained is None else change * trained)
    return Updates(tuple(range(len(tokens))), tuple(tokens), values, LAYOUT, torch.tensor(rows))


@of(lambda rule: rule.unequal_ranks)
def test_unequal_ranks_keep_the_laws_of_order_and_weight(variant: Variant) -> None:
    rule, before = variant.build(), drawn(1)[0]
    count = cohort(rule, 4)
    given = unequal(rule, before, [4, 1, 7, 2, 3, 6][:count], 3)
    assert given.ranks is not None
    wanted = merge(rule, before, given)
    assert bool(torch.isfinite(wanted).all())
    order = list(range(count))[::-1]
    turned = Updates(tuple(order), tuple(given.tokens[k] * 1000 for k in order), given.values[order], LAYOUT, given.ranks[order])
    close(merge(rule, before, turned), wanted)


@of(lambda rule: rule.unequal_ranks and not names_inside(rule) & OWN_STEP and not noisy(rule))
def test_equal_updates_of_a_small_rank_are_taken_over(variant: Variant) -> None:
    rule, before = variant.build(), drawn(1)[0]
    count, ranks = cohort(rule, 3), torch.ones(6, dtype=torch.long)
    start, _ = rule.distribute(LAYOUT, before, ranks)
    change, trained = drawn(1, 4)[0] * LAYOUT.active([1] * 6), rule.trained(LAYOUT)
    row = start + (change if trained is None else change * trained)
    given = Updates(tuple(range(count)), tuple(range(1, count + 1)), row.repeat(count, 1), LAYOUT, ranks.repeat(count, 1))
    close(merge(rule, before, given), product(row))


def parts(count: int) -> Tensor:
    """What arrived [n p]: a third of the columns from each client in turn; the last key from nobody."""
    sent = (torch.arange(LAYOUT.parameters) % 3).unsqueeze(0) == (torch.arange(count) % 3).unsqueeze(1)
    sent[:, LAYOUT.entries[-1].start :] = False
    return sent


@of(lambda rule: rule.partial_uploads)
def test_values_that_did_not_arrive_do_not_count(variant: Variant) -> None:
    rule, before = variant.build(), drawn(1)[0]
    count = cohort(rule, 4)
    given, sent = updates(rule, before, [5, 1, 2, 8, 3, 4][:count], drawn(count, 1)), parts(count)
    found = []
    for filler in (0.0, 1e4):
        values = given.values.masked_fill(~sent, filler)
        merged = rule.merge(before, Updates(given.clients, given.tokens, values, LAYOUT, None, sent), rule.init(LAYOUT))
        found.append(effect(merged))
        close(found[-1][-48:], product(before)[-48:])  # the last key, of 6 x 8, which nobody sent
    assert torch.equal(found[0], found[1])


@of(lambda rule: rule.partial_uploads)
def test_a_partial_upload_of_everything_is_a_whole_one(variant: Variant) -> None:
    rule, before = variant.build(), drawn(1)[0]
    count = cohort(rule, 4)
    given = updates(rule, before, [5, 1, 2, 8, 3, 4][:count], drawn(count, 1))
    everything = Updates(given.clients, given.tokens, given.values, LAYOUT, None, torch.ones_like(given.values, dtype=torch.bool))
    whole, partial = (rule.merge(before, one, rule.init(LAYOUT)).adapters for one in (given, everything))
    torch.testing.assert_close(partial, whole, rtol=1e-6, atol=1e-7)


@of(lambda rule: rule.segments > 1)
def test_a_rule_that_asks_for_segments_understands_them(variant: Variant) -> None:
    assert variant.build().partial_uploads
