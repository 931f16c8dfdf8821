"""Robust rules: garbage from few clients moves the mean far and these little, up to the number each promises and no further."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from splitft.aggregate.average import Average
from splitft.aggregate.base import Aggregator, Updates
from splitft.aggregate.fed_avgm import FedAvgM
from splitft.aggregate.krum import Krum
from splitft.aggregate.median import Median
from splitft.aggregate.norm_clip import NormClip
from splitft.aggregate.product import Product
from splitft.aggregate.segments import Segments
from splitft.aggregate.trimmed_mean import TrimmedMean
from splitft.catalog import build
from splitft.errors import AdapterError, ConfigError
from splitft.lora import Layout
from splitft.rng import torch_stream
from splitft.types import Key

LAYOUT = Layout.of({Key(block, "q"): (5, 7) for block in range(2)}, 2, 1.0)
ONE = Layout.of({Key(0, "q"): (1, 1)}, 1, 1.0)
HONEST = 7


def drawn(rows: int, seed: int, layout: Layout = LAYOUT) -> Tensor:
    return torch.randn(rows, layout.parameters, generator=torch_stream(seed, "robust-test"))


BEFORE = drawn(1, 0)[0]
GOAL = BEFORE + 0.3 * drawn(1, 1)[0]


def honest(rows: int = HONEST) -> Tensor:
    return GOAL + 0.05 * drawn(rows, 2)


def attack(kind: str, rows: int) -> Tensor:
    change = honest(rows) - BEFORE
    match kind:
        case "boosted":
            return BEFORE + 1000 * change
        case "flipped":
            return BEFORE - 1000 * change
        case "constant":
            return torch.full_like(change, 1e6)
    raise AssertionError(kind)


def error(rule: Aggregator, values: Tensor, tokens: list[int] | None = None) -> float:
    """How far from the honest goal, as a share of the way there."""
    given_updates = Updates(tuple(range(len(values))), tuple(tokens or [10] * len(values)), values, LAYOUT)
    found = rule.merge(BEFORE, given_updates, rule.init(LAYOUT)).adapters
    return float((found - GOAL).norm() / (GOAL - BEFORE).norm())


@pytest.mark.parametrize("kind", ["boosted", "flipped", "constant"])
@pytest.mark.parametrize(
    ("rule", "bound"),
    [(Median(), 0.3), (TrimmedMean(share=0.25), 0.3), (Krum(attackers=2), 0.5), (Krum(attackers=2, keep=5), 0.3)],
    ids=repr,
)
def test_two_of_nine_do_not_carry_a_robust_rule_away(rule: Aggregator, bound: float, kind: str) -> None:
    values = torch.cat([attack(kind, 1), honest(), attack(kind, 1)])
    assert error(Average(), values) > 50
    assert error(rule, values) < bound


def test_clipping_bounds_what_one_client_can_do() -> None:
    values = torch.cat([honest(8), attack("flipped", 1)])
    assert error(Average(), values) > 50
    assert error(NormClip(), values) < 0.5
    largest = float((honest(8) - BEFORE).norm(dim=1).max())
    moved = NormClip().merge(BEFORE, Updates(tuple(range(9)), (1,) * 9, values, LAYOUT), {})
    clean = NormClip().merge(BEFORE, Updates(tuple(range(8)), (1,) * 8, honest(8), LAYOUT), {})
    assert float((moved.adapters - BEFORE).norm()) <= largest
    assert float((moved.adapters - clean.adapters).norm()) <= 2 * largest / 9 * 1.1
    assert moved.metrics["clip_limit"] <= largest
    assert moved.metrics["clipped_clients"] >= 1


@pytest.mark.parametrize(
    ("rule", "withstands"), [(Median(), 4), (TrimmedMean(share=0.3), 3), (TrimmedMean(share=0.45), 4), (Krum(attackers=3), 3)], ids=repr
)
def test_the_breakdown_point(rule: Aggregator, withstands: int) -> None:
    """Nine or ten clients that all agree to send the same lie: as many as promised change little, one more than half everything."""
    count = 9 if withstands < 4 or isinstance(rule, Median) else 10
    for hostile in range(withstands + 1):
        assert error(rule, torch.cat([honest(count - hostile), attack("constant", 1).expand(hostile, -1)])) < 0.7
    hostile = count // 2 + 1
    assert error(rule, torch.cat([honest(count - hostile), attack("constant", 1).expand(hostile, -1)])) > 50


def test_token_counts_buy_no_influence() -> None:
    values, tokens = torch.cat([honest(8), attack("constant", 1)]), [10] * 8 + [10**9]
    assert error(Average(), values, tokens) > 1e5
    for rule in (Median(), TrimmedMean(), Krum()):
        assert error(rule, values, tokens) < 0.5


NUMBERS = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=9)


def column(rule: Aggregator, numbers: list[float]) -> float:
    values = torch.tensor([[number, 0.0] for number in numbers])
    return float(rule.merge(torch.zeros(2), Updates(tuple(range(len(values))), (3,) * len(values), values, ONE), {}).adapters[0])


@given(NUMBERS)
def test_the_median_is_that_of_the_library(numbers: list[float]) -> None:
    assert column(Median(), numbers) == pytest.approx(statistics.median(numbers), abs=1e-5)


@given(NUMBERS, st.sampled_from([0.0, 0.1, 0.2, 0.34, 0.49]))
def test_the_trimmed_mean_is_the_mean_of_what_is_left(numbers: list[float], share: float) -> None:
    ends = next(k for k in itertools.count() if k >= share * len(numbers) - 1e-9 or 2 * k + 1 >= len(numbers))
    ends = min(ends, (len(numbers) - 1) // 2)
    left = sorted(numbers)[ends : len(numbers) - ends]
    assert column(TrimmedMean(share=share), numbers) == pytest.approx(sum(left) / len(left), abs=1e-4)


def test_a_share_of_the_cohort_is_rounded_up_but_not_by_rounding_errors() -> None:
    hundred = [float(number) for number in range(93)] + [1e6] * 7  # 0.07 * 100 is a hair above 7 in floating point
    found = TrimmedMean(share=0.07).merge(torch.zeros(2), Updates(tuple(range(100)), (1,) * 100, torch.tensor([hundred] * 2).T, ONE), {})
    assert found.metrics["trimmed_values"] == pytest.approx(0.14)
    assert column(TrimmedMean(share=0.01), [0.0, 1.0, 5.0, 1e6]) == pytest.approx(3.0)


def test_krum_keeps_what_the_definition_says() -> None:
    values, attackers = torch.cat([honest(6), attack("boosted", 2)]), 2
    scores = []
    for one in range(8):
        distances = sorted(float((values[one].double() - values[k].double()).square().sum()) for k in range(8) if k != one)
        scores.append(sum(distances[: 8 - attackers - 2]))
    best = sorted(range(8), key=scores.__getitem__)
    updates = Updates(tuple(range(8)), tuple(range(1, 9)), values, LAYOUT)
    assert torch.equal(Krum(attackers=2).merge(BEFORE, updates, {}).adapters, values[best[0]])
    kept = sorted(best[:3])
    wanted = Average().merge(BEFORE, Updates(tuple(kept), tuple(k + 1 for k in kept), values[kept], LAYOUT), {}).adapters
    assert torch.equal(Krum(attackers=2, keep=3).merge(BEFORE, updates, {}).adapters, wanted)
    assert Krum(attackers=2, keep=99).merge(BEFORE, updates, {}).metrics["rejected_clients"] == 4


def test_krum_of_too_few_is_refused_and_says_how_many() -> None:
    with pytest.raises(AdapterError, match="attackers = 2 needs 7 participants that trained, and the round has 6"):
        Krum(attackers=2).merge(BEFORE, Updates(tuple(range(7)), (1, 1, 1, 0, 1, 1, 1), honest(), LAYOUT), {})


def test_middle_values_are_taken_from_those_who_sent_them() -> None:
    sent = torch.tensor([[True, True, False, False], [True, False, True, False], [True, False, True, False]])
    layout = Layout.of({Key(0, "q"): (2, 2)}, 1, 1.0)
    values = torch.tensor([[1.0, 5.0, 1e9, 1e9], [2.0, 1e9, -4.0, 1e9], [90.0, 1e9, 8.0, 1e9]])
    updates = Updates((0, 1, 2), (1, 1, 1), values, layout, None, sent)
    assert Median().merge(torch.full((4,), 7.0), updates, {}).adapters.tolist() == [2.0, 5.0, 2.0, 7.0]


def test_columns_are_sorted_in_pieces_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = Updates(tuple(range(HONEST)), (1,) * HONEST, honest(), LAYOUT)
    whole = Median().merge(BEFORE, updates, {})
    monkeypatch.setattr("splitft.aggregate.middle.CHUNK", 5)
    assert torch.equal(Median().merge(BEFORE, updates, {}).adapters, whole.adapters)
    assert torch.equal(whole.adapters, honest().median(0).values)


def test_a_change_within_the_limit_is_left_alone_and_a_longer_one_keeps_its_direction() -> None:
    change = honest(2) - BEFORE
    limit = float(change[0].double().norm())
    values = torch.stack([BEFORE + change[0] * 0.99, BEFORE + change[1] * 7])
    for row, wanted in ((0, values[0]), (1, BEFORE + change[1] * limit / change[1].norm())):
        one = Updates((row,), (4,), values[[row]], LAYOUT)
        torch.testing.assert_close(NormClip(limit=limit).merge(BEFORE, one, {}).adapters, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(NormClip(limit=limit).merge(BEFORE, Updates((0,), (4,), values[[0]], LAYOUT), {}).adapters, values[0])


def test_a_client_of_small_rank_is_clipped_from_its_own_start() -> None:
    """It did nothing, so nothing may be clipped, however far its truncated start is from the global adapter."""
    rule, ranks = NormClip(rule=Product(), limit=1e-3), torch.tensor([[1, 1], [2, 2]])
    start = torch.stack([rule.distribute(LAYOUT, BEFORE, row)[0] for row in ranks])
    assert float((start[0] - BEFORE).norm()) > 1
    updates = Updates((0, 1), (1, 1), start, LAYOUT, ranks)
    assert rule.merge(BEFORE, updates, rule.init(LAYOUT)).metrics["clipped_clients"] == 0
    moved = replace(updates, values=start + LAYOUT.active([1, 1]) * 5.0)
    assert rule.merge(BEFORE, moved, rule.init(LAYOUT)).metrics["clipped_clients"] == 2


@pytest.mark.parametrize("rule", [Median(rule=Product()), TrimmedMean(rule=Product()), Krum(rule=Product())], ids=repr)
def test_unequal_ranks_are_refused_where_factors_are_compared(rule: Aggregator) -> None:
    assert not rule.unequal_ranks
    ranks = torch.tensor([[1, 2]] * 4 + [[1, 1]])
    with pytest.raises(AdapterError, match=r"1\.q: participants trained at ranks 1, 2"):
        rule.merge(BEFORE, Updates(tuple(range(5)), (1,) * 5, honest(5), LAYOUT, ranks), rule.init(LAYOUT))
    alike = Updates(tuple(range(5)), (1,) * 5, honest(5) * LAYOUT.active([1, 2]), LAYOUT, ranks[:1].repeat(5, 1))
    assert bool(torch.isfinite(rule.merge(BEFORE, alike, rule.init(LAYOUT)).adapters).all())


def test_a_robust_rule_under_a_server_optimizer_protects_it() -> None:
    values = torch.cat([honest(), attack("flipped", 2)])
    assert error(FedAvgM(rule=Median()), values) < 0.3
    assert error(FedAvgM(), values) > 50


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("trimmed_mean", {"share": 0.5}, "share is 0.5"),
        ("trimmed_mean", {"share": -0.1}, "share is -0.1"),
        ("norm_clip", {"limit": -1.0}, "limit is -1.0"),
        ("krum", {"attackers": -1}, "attackers is -1"),
        ("krum", {"attackers": 1.5}, "attackers is 1.5"),
        ("krum", {"keep": 0}, "keep is 0"),
        ("krum", {"rule": {"name": "segments", "count": 2}}, "uploads in 2 segments"),
        ("median", {"rule": "krum"}, "hands on 1 update, and its rule Krum needs 5"),
        ("krum", {"keep": 4, "rule": "krum"}, "hands on 4 updates"),
    ],
)
def test_bad_fields_are_refused(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("aggregator", name, fields)


def test_uploads_in_segments_pass_through_a_rule_that_understands_them() -> None:
    assert Median(rule=Segments(count=4)).segments == 4
    assert NormClip(rule=Segments(count=4)).partial_uploads
    assert not NormClip(rule=Product()).partial_uploads


def everyone(values: Tensor) -> Updates:
    """An update of each row, with as many tokens."""
    return Updates(tuple(range(len(values))), (10,) * len(values), values, LAYOUT)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_the_middle_does_not_depend_on_how_many_columns_are_sorted_at_a_time(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.cat([honest(), attack("boosted", 2)])
    given = everyone(values)
    whole = [rule.merge(BEFORE, given, rule.init(LAYOUT)) for rule in (Median(), TrimmedMean(share=0.2))]
    monkeypatch.setattr("splitft.aggregate.middle.CHUNK", chunk)
    parts = [rule.merge(BEFORE, given, rule.init(LAYOUT)) for rule in (Median(), TrimmedMean(share=0.2))]
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.adapters, other.adapters)
        assert one.metrics == other.metrics


@pytest.mark.parametrize("chunk", [1, 7])
def test_krum_s_distances_add_up_over_columns(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.cat([honest(), attack("flipped", 1)])
    rule = Krum(attackers=1, keep=3)
    whole = torch.tensor(rule._scores(values))
    monkeypatch.setattr("splitft.aggregate.krum.CHUNK", chunk)
    assert torch.allclose(torch.tensor(rule._scores(values)), whole, rtol=1e-12)


def test_a_huge_update_is_not_taken_for_an_infinite_one() -> None:
    """Its squares overflow, its values do not."""
    huge = torch.cat([honest(2), torch.full_like(honest(1), 1e30)])
    assert bool(torch.isfinite(Average().merge(BEFORE, everyone(huge), {}).adapters).all())
    for bad in (float("nan"), float("inf")):
        huge[2, 3] = bad
        with pytest.raises(AdapterError, match="client 2 holds NaN or infinity"):
            Average().merge(BEFORE, everyone(huge), {})
