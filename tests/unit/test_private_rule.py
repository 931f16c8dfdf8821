"""The private mean: one client's pull is bounded, the noise is as large as accounted, nothing is drawn twice, budgets hold."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splitft.aggregate.average import Average
from splitft.aggregate.base import LEFT, Aggregator, State, Updates
from splitft.aggregate.coordinates import Coordinates
from splitft.aggregate.fed_avgm import FedAvgM
from splitft.aggregate.freeze_a import FreezeA
from splitft.aggregate.krum import Krum
from splitft.aggregate.median import Median
from splitft.aggregate.norm_clip import NormClip
from splitft.aggregate.private import CLIP, MERGES, RENYI, SQUARE, Private
from splitft.aggregate.product import Product
from splitft.aggregate.segments import Segments
from splitft.aggregate.trimmed_mean import TrimmedMean
from splitft.engine import tensor_file
from splitft.errors import AdapterError, ConfigError
from splitft.lora import Layout
from splitft.privacy.accountant import Mechanism, Spent
from splitft.privacy.claim import claim_of
from splitft.rng import torch_stream
from splitft.types import Key

LAYOUT = Layout.of({Key(block, name): (24, 30) for block in range(2) for name in ("q", "v")}, 4, 2.0)
BEFORE = LAYOUT.initial_row(1) + 0.05 * torch.randn(LAYOUT.parameters, generator=torch_stream(0, "private-before"))
RULES: list[Aggregator] = [FreezeA(), Average()]
both = pytest.mark.parametrize("inner", RULES, ids=["freeze_a", "average"])
PLAIN = Private(noise_multiplier=0.0, rate=0.0, clip=0.3)


def product(row: Tensor) -> Tensor:
    """scale * B A of every key, one long vector."""
    factors = LAYOUT.factors(row.double())
    return torch.cat([entry.scale * (factors[entry.key].b @ factors[entry.key].a).reshape(-1) for entry in LAYOUT.entries])


def given(inner: Aggregator, changes: Tensor, tokens: list[int] | None = None, before: Tensor = BEFORE) -> Updates:
    """Updates by these changes [n p] of what the rule lets clients train."""
    trained = inner.trained(LAYOUT)
    values = before + (changes if trained is None else changes * trained)
    return Updates(tuple(range(len(changes))), tuple(tokens or [5] * len(changes)), values, LAYOUT)


def drawn(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, LAYOUT.parameters, generator=torch_stream(seed, "private-changes"))


def merged(rule: Aggregator, updates: Updates, state: State | None = None, before: Tensor = BEFORE) -> Tensor:
    return rule.merge(before, updates, rule.init(LAYOUT) if state is None else state).adapters


def moved(inner: Aggregator, one: Tensor, other: Tensor) -> float:
    """How far two results are from each other, where this rule's lengths are measured."""
    difference = product(one) - product(other) if isinstance(inner, FreezeA) else (one - other).double()
    return float(difference.norm())


@both
def test_one_client_moves_the_result_by_two_clips_over_n_at_most_whatever_it_sends(inner: Aggregator) -> None:
    rule, count = replace(PLAIN, rule=inner), 5
    others = 0.01 * drawn(count)
    results = []
    for seed, size in ((1, 1e-3), (2, 1.0), (3, 1e6), (4, 1e15)):
        changes = others.clone()
        changes[2] = size * drawn(1, seed)[0]
        turned = torch.where(torch.arange(count)[:, None] == 2, -changes, changes)
        results += [merged(rule, given(inner, one)) for one in (changes, turned)]
    far = max(moved(inner, one, other) for one in results for other in results)
    assert far <= 2 * rule.clip / count * (1 + 1e-4)
    assert far > 1.9 * rule.clip / count, "an update turned round reaches the bound: it is not lower than it need be"
    unclipped = [merged(inner, given(inner, changes)) for changes in (others, 1e6 * drawn(5, 3))]
    assert moved(inner, *unclipped) > 1e3, "without the clip there is no bound"


def test_tokens_give_no_weight_and_those_without_any_count_with_a_change_of_zero() -> None:
    """Were they left out, the number of participants would say who had something to train on."""
    changes = 0.001 * drawn(4)
    even, uneven = (merged(PLAIN, given(FreezeA(), changes, tokens)) for tokens in ([1, 1, 1, 1], [1, 10**9, 7, 3]))
    assert torch.equal(even, uneven)
    zeroed = torch.where(torch.arange(4)[:, None] == 1, torch.zeros_like(changes), changes)
    left_out = merged(PLAIN, given(FreezeA(), changes, [1, 0, 2, 5]))
    assert torch.equal(left_out, merged(PLAIN, given(FreezeA(), zeroed)))
    assert not torch.allclose(left_out, merged(PLAIN, given(FreezeA(), changes[[0, 2, 3]])), atol=1e-6)
    outcome = PLAIN.merge(BEFORE, given(FreezeA(), changes, [1, 0, 2, 5]), PLAIN.init(LAYOUT))
    assert outcome.metrics["privacy_participants"] == 4


@both
def test_updates_within_the_clip_give_the_plain_mean(inner: Aggregator) -> None:
    updates = given(inner, 0.01 * drawn(6))
    torch.testing.assert_close(merged(replace(PLAIN, rule=inner, clip=1e3), updates), merged(inner, updates), rtol=1e-6, atol=1e-7)


@both
@pytest.mark.parametrize(("rate", "more"), [(0.0, 1.0), (0.2, 1 / math.sqrt(0.95))])
def test_the_variance_of_the_noise_is_in_its_chi_square_interval(inner: Aggregator, rate: float, more: float) -> None:
    """Over merges of updates that did not move, in the space where clip and noise are: for frozen A that of the product."""
    rule, participants, rounds = Private(inner, 2.0, clip=0.01, rate=rate, secret_seed=3), 7, 40
    std, values = more * 2.0 * 0.01 / participants, 4 * (30 * 4 if isinstance(inner, FreezeA) else 54 * 4)
    square, state = 0.0, rule.init(LAYOUT)
    for _ in range(rounds):
        still = given(inner, torch.zeros(participants, LAYOUT.parameters))
        outcome = rule.merge(BEFORE, still, {**state, CLIP: torch.tensor([0.01], dtype=torch.float64)})
        assert outcome.metrics["privacy_noise_std"] == pytest.approx(std)
        state = outcome.state
        noise = product(outcome.adapters) - product(BEFORE) if isinstance(inner, FreezeA) else (outcome.adapters - BEFORE).double()
        square += float((noise / std).square().sum())
    count = rounds * values
    assert abs(square - count) < 4.5 * math.sqrt(2 * count)


def test_noise_on_both_factors_is_amplified_in_the_product_and_said_to_be() -> None:
    norms: dict[str, float] = {}
    for inner in RULES:
        rule = Private(inner, 20.0, clip=1.0, rate=0.0, secret_seed=5)
        state, squares = rule.init(LAYOUT), []
        for _ in range(30):
            outcome = rule.merge(BEFORE, given(inner, torch.zeros(10, LAYOUT.parameters)), state)
            state = outcome.state
            squares.append(float((product(outcome.adapters) - product(BEFORE)).square().sum()))
        told = outcome.metrics["privacy_noise_norm"]
        assert math.sqrt(sum(squares) / len(squares)) == pytest.approx(told, rel=0.03)
        norms[type(inner).__name__] = told
    assert norms["Average"] > 3 * norms["FreezeA"]
    assert Private(FreezeA()).cautions == ()
    assert any("amplified" in line for line in Private(Average()).cautions)


def test_lengths_are_those_of_the_product_of_a_frozen_a_also_of_one_without_full_rank() -> None:
    row = BEFORE.clone()
    factors = LAYOUT.factors(row)
    factors[LAYOUT.entries[0].key].a[1] = 2 * factors[LAYOUT.entries[0].key].a[0]
    factors[LAYOUT.entries[1].key].a.zero_()
    mask = FreezeA().trained(LAYOUT)
    space = Coordinates.of_product(LAYOUT, row, mask)
    change = drawn(1, 7)[0] * mask
    found = space.of(change)
    assert float(found.norm()) == pytest.approx(float((product(row + change) - product(row)).norm()), rel=1e-5)
    back = space.back(found)
    torch.testing.assert_close(product(row.double() + back), product(row.double() + change), rtol=1e-4, atol=1e-5)
    assert not bool(back[~mask].any())


def test_noise_repeats_for_the_same_merge_and_is_new_for_every_other() -> None:
    rule, still = Private(clip=1.0, rate=0.0, secret_seed=9), given(FreezeA(), torch.zeros(4, LAYOUT.parameters))
    state = rule.init(LAYOUT)
    first = rule.merge(BEFORE, still, state)
    assert torch.equal(first.adapters, merged(rule, still, state))
    noises = [first.adapters - BEFORE, merged(rule, still, first.state) - BEFORE]
    other = given(FreezeA(), 1e-4 * drawn(4))
    noises.append(merged(rule, other, state) - merged(replace(rule, noise_multiplier=0.0), other))
    noises.append(merged(replace(rule, secret_seed=10), still) - BEFORE)
    for index, one in enumerate(noises):
        for second in noises[index + 1 :]:
            assert abs(float(torch.nn.functional.cosine_similarity(one, second, 0))) < 4.5 / math.sqrt(480)


def test_without_a_seed_every_run_has_noise_of_its_own() -> None:
    rule, still = Private(clip=1.0), given(FreezeA(), torch.zeros(4, LAYOUT.parameters))
    assert not torch.equal(merged(rule, still), merged(rule, still))


def test_a_run_resumed_from_its_file_draws_what_the_other_would_have(tmp_path: Path) -> None:
    rule, row, state = Private(clip=0.2), BEFORE, Private(clip=0.2).init(LAYOUT)
    rows, kept = [], {}
    for index in range(5):
        if index == 3:
            tensor_file.write(tmp_path / "state.safetensors", {"adapters": row, **state})
            kept = tensor_file.read(tmp_path / "state.safetensors")
        outcome = rule.merge(row, given(FreezeA(), 0.01 * drawn(6, index), before=row), state)
        row, state = outcome.adapters, outcome.state
        rows.append(row)
    again, held = kept.pop("adapters"), kept
    for index in (3, 4):
        outcome = rule.merge(again, given(FreezeA(), 0.01 * drawn(6, index), before=again), held)
        again, held = outcome.adapters, dict(outcome.state)
        assert torch.equal(again, rows[index])
    assert {name: tensor.tolist() for name, tensor in held.items()} == {name: tensor.tolist() for name, tensor in state.items()}


@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.8])
def test_the_clip_goes_to_the_quantile_of_the_norms(quantile: float) -> None:
    """Norms from 1 to 9 in the product; the clip starts far too low."""
    rule, norms = Private(noise_multiplier=1.0, clip=0.3, quantile=quantile, secret_seed=2), torch.linspace(1, 9, 60)
    state, clips = rule.init(LAYOUT), []
    space = Coordinates.of_product(LAYOUT, BEFORE, FreezeA().trained(LAYOUT))
    raw = drawn(60, 4) * FreezeA().trained(LAYOUT)
    changes = torch.stack([row * (norm / space.of(row).norm()) for row, norm in zip(raw, norms, strict=True)]).float()
    for _ in range(110):
        outcome = rule.merge(BEFORE, given(FreezeA(), changes), state)
        state = outcome.state
        clips.append(outcome.metrics["privacy_clip"])
    settled = sum(clips[-40:]) / 40
    assert abs(settled - (1 + 8 * quantile)) < 0.6
    assert clips[0] == 0.3


def test_epsilon_of_the_journal_is_the_accountant_s_and_grows_with_every_merge() -> None:
    rule = Private(noise_multiplier=4.0, clients=1000)
    state, told = rule.init(LAYOUT), []
    for merges in range(1, 7):
        outcome = rule.merge(BEFORE, given(FreezeA(), 0.01 * drawn(5)), state)
        state = outcome.state
        found = outcome.metrics["privacy_epsilon"]
        assert found == pytest.approx(Spent().after(Mechanism(4.0), merges).epsilon(1e-5), rel=1e-9)
        assert claim_of(outcome.metrics) is not None
        told.append(found)
    assert told == sorted(set(told))
    assert float(state[SQUARE]) > 0
    assert float(state[RENYI].min()) > 0


def test_nothing_is_told_of_single_values_and_no_epsilon_without_noise() -> None:
    quiet = PLAIN.merge(BEFORE, given(FreezeA(), drawn(3)), PLAIN.init(LAYOUT)).metrics
    assert "privacy_epsilon" not in quiet
    assert claim_of(quiet) is None
    rule = Private(rate=0.0)
    one, other = (rule.merge(BEFORE, given(FreezeA(), changes), rule.init(LAYOUT)).metrics for changes in (drawn(3), 100 * drawn(3, 1)))
    assert one == other, "the first merge's figures depend on no update"


def test_no_epsilon_is_told_of_noise_from_a_seed_that_others_may_know() -> None:
    told, quiet = (
        rule.merge(BEFORE, given(FreezeA(), drawn(3)), rule.init(LAYOUT)).metrics for rule in (Private(), Private(secret_seed=1))
    )
    assert set(told) - set(quiet) == {f"privacy_{name}" for name in ("epsilon", "delta", "noise_multiplier", "merges", "replaced")}
    assert claim_of(told) is not None
    assert claim_of(quiet) is None
    assert any("by whoever knows the seed" in line for line in Private(secret_seed=1).cautions)


@pytest.mark.parametrize("left", [0, 1, 3])
def test_releases_that_left_without_a_commit_are_counted_with_the_next_merge_and_change_no_noise(left: int) -> None:
    rule, updates = Private(noise_multiplier=4.0, clients=1000), given(FreezeA(), 0.01 * drawn(5))
    state = rule.init(LAYOUT)
    plain, counted = (rule.merge(BEFORE, updates, {**state, LEFT: torch.tensor([count])}) for count in (0, left))
    assert torch.equal(plain.adapters, counted.adapters)
    assert counted.metrics["privacy_epsilon"] == pytest.approx(Spent().after(Mechanism(4.0), 1 + left).epsilon(1e-5))
    assert counted.metrics["privacy_merges"] == int(counted.state[MERGES]) == 1 + left
    assert int(counted.state[LEFT]) == 0


def test_a_target_is_met_by_the_last_round_and_not_a_merge_more() -> None:
    rule = Private(epsilon=6.0, rounds=4, clients=50).settled(50, 4)
    state = rule.init(LAYOUT)
    for _ in range(4):
        outcome = rule.merge(BEFORE, given(FreezeA(), 0.01 * drawn(5)), state)
        state = outcome.state
    assert 5.99 < outcome.metrics["privacy_epsilon"] <= 6.0
    with pytest.raises(AdapterError, match=r"the privacy budget is spent: after 4 merges"):
        rule.merge(BEFORE, given(FreezeA(), 0.01 * drawn(5)), state)


def test_a_budget_too_small_for_so_few_participants_is_refused_with_the_reason() -> None:
    rule = Private(epsilon=1.0).settled(8, 20)
    with pytest.raises(
        ConfigError, match=r"epsilon 1 at delta 1e-05 over 20 rounds needs a noise multiplier of .* with 8 participants"
    ) as refused:
        rule.require_useful(LAYOUT, 8)
    enough = int(refused.value.remedy.split()[1])
    assert rule.require_useful(LAYOUT, enough).epsilon == pytest.approx(1.0, rel=1e-6)
    with pytest.raises(ConfigError):
        rule.require_useful(LAYOUT, enough - 1)
    with pytest.raises(ConfigError, match="noise multiplier above"):
        Private(epsilon=1e-5).settled(8, 1000)
    with pytest.raises(ConfigError, match=r"rounds"):
        Private(epsilon=1.0).init(LAYOUT)


@pytest.mark.parametrize("inner", [Median(), Product(), Krum(), Private(), FedAvgM()], ids=repr)
def test_a_rule_inside_without_a_bound_is_refused(inner: Aggregator) -> None:
    with pytest.raises(ConfigError, match=r"rule|claim"):
        Private(rule=inner)


@pytest.mark.parametrize("outer", [Median, Krum, NormClip, TrimmedMean, Segments])
def test_a_rule_outside_that_looks_across_clients_is_refused(outer: type[Aggregator]) -> None:
    with pytest.raises(ConfigError):
        outer(rule=Private())  # type: ignore[call-arg]
    with pytest.raises(ConfigError):
        outer(rule=FedAvgM(rule=Private()))  # type: ignore[call-arg]
    assert FedAvgM(rule=Private()).guarded


def test_partial_uploads_are_refused() -> None:
    whole = given(FreezeA(), drawn(2))
    with pytest.raises(AdapterError, match="whole updates"):
        merged(Private(), replace(whole, sent=torch.ones_like(whole.values, dtype=torch.bool)))


@pytest.mark.parametrize(
    "fields",
    [
        {"clip": 0.0},
        {"noise_multiplier": -1.0},
        {"delta": 1.0},
        {"unit": "token"},
        {"count_share": 1.0},
        {"rounds": -1},
    ],
)
def test_fields_that_mean_nothing_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"aggregator.{next(iter(fields))}"):
        Private(**fields)  # type: ignore[arg-type]
