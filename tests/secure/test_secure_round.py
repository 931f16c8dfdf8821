"""Secure aggregation in the engine: the round's mean is the plain one to the fixed point's step, and all that a rule is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splitft.aggregate.average import Average
from splitft.aggregate.base import Aggregator, Updates
from splitft.aggregate.fed_avgm import FedAvgM
from splitft.aggregate.freeze_a import FreezeA
from splitft.aggregate.median import Median
from splitft.apps.session import FederatedRun
from splitft.engine.cohort import CohortExecutor
from splitft.engine.exchange import Ownership, positions
from splitft.engine.merging import merge, updates_of
from splitft.engine.secure_round import SealedRows, Secrecy, Unsealed, ranges_of, sealed_updates, terms_of, unsealed
from splitft.engine.settings import Federation, RoundResult, same_start
from splitft.errors import AdapterError, ProtocolError
from splitft.secure.client import own_words
from splitft.secure.server import Opened
from splitft.types import Plan, RoundPlan

from ..support import federation
from ..tiny_run import tiny_config

HIDDEN = Secrecy()


def five(cuts: Sequence[int] = (1, 2, 2, 2, 3), u_shape: bool = False, trained: Tensor | None = None) -> tuple[Federation, RoundResult]:
    """A trained round of five clients, uploading nothing beside the sealing."""
    fed = federation(clients=len(cuts))
    fed = replace(fed, trained=trained)
    plans = tuple(Plan(k, cut, 2, 3, u_shape, 0, upload=False) for k, cut in enumerate(cuts))
    result = CohortExecutor(fed).train(RoundPlan(1, plans), 0, same_start(fed.start), {}, lambda count: None)
    return fed, result


def sealed(fed: Federation, result: RoundResult, **more: object) -> Unsealed:
    return sealed_updates(fed, result, [True] * len(result.plans), fed.start, HIDDEN, "run", 1, **more)  # type: ignore[arg-type]


def plain(fed: Federation, result: RoundResult, rows: Sequence[int]) -> Tensor:
    """The mean of these clients in float64, without any of the code above."""
    weights = torch.tensor([result.targets[row] for row in rows], dtype=torch.float64)
    return (weights[:, None] * result.values[list(rows)].double()).sum(0) / weights.sum()


def client_mask(fed: Federation, plan: Plan) -> Tensor:
    mask = torch.zeros(fed.layout.parameters, dtype=torch.bool)
    mask[positions(Ownership(plan, fed.split.blocks).client_columns(fed.layout, fed.trained))] = True
    return mask


@pytest.mark.parametrize("u_shape", [False, True])
def test_mixed_cuts_give_the_plain_mean_to_the_step(u_shape: bool) -> None:
    fed, result = five((1, 2, 3, 3, 3), u_shape)
    found = sealed(fed, result)
    assert found.updates is not None
    assert not found.notices
    mean, expected = found.updates.mean(), plain(fed, result, range(5))
    assert float((mean.double() - expected).abs().max()) <= found.metrics["sealed_step"] / 2 + 6e-8 * float(expected.abs().max())
    assert float((expected - fed.start).abs().max()) > 1e-3, "nothing was trained"
    # What nobody hides is the plain mean to the last bit.
    public = ~torch.stack([client_mask(fed, plan) for plan in result.plans]).any(0)
    assert bool(public.any())
    usual = updates_of(fed, replace(result, plans=tuple(replace(one, upload=True) for one in result.plans)), [True] * 5)
    assert usual is not None
    assert torch.equal(mean[public], usual.mean()[public])


def test_the_sum_of_what_clients_hide_is_all_that_reaches_the_rule() -> None:
    fed, result = five()
    found = sealed(fed, result)
    assert found.updates is not None
    kept = found.updates.kept
    assert isinstance(kept, SealedRows)
    assert found.updates.values.shape == (0, fed.layout.parameters)
    for ask in (kept.fetch, lambda: kept.chosen([0]), lambda: kept.weighted_sum([1.0, 0.0, 0.0, 0.0, 0.0])):
        with pytest.raises(AdapterError, match="their token-weighted mean is all that is known"):
            ask()
    with pytest.raises(AdapterError, match="all that is known"):
        merge(Median(), fed.start, found.updates, {}, fed.split)


@pytest.mark.parametrize("rule", [Average(), FedAvgM(momentum=0.5), FreezeA()], ids=lambda rule: type(rule).__name__)
def test_linear_rules_merge_what_they_would_have_merged(rule: Aggregator) -> None:
    fed = federation(clients=4)
    fed, result = five((1, 2, 2, 2), trained=rule.trained(fed.layout))
    found = sealed(fed, result)
    assert found.updates is not None
    state = rule.init(fed.layout)
    hidden = merge(rule, fed.start, found.updates, state, fed.split).adapters
    usual = merge(rule, fed.start, Updates((0, 1, 2, 3), tuple(result.targets), result.values, fed.layout), state, fed.split).adapters
    torch.testing.assert_close(hidden, usual, rtol=3e-7, atol=1e-8)


def test_a_block_at_too_few_clients_stays_as_it_was_and_is_said() -> None:
    fed, result = five((1, 2, 2, 2, 3))
    found = sealed(fed, result)
    assert found.updates is not None
    alone = client_mask(fed, result.plans[4]) & ~client_mask(fed, result.plans[1])
    assert bool(alone.any())
    mean = found.updates.mean()
    assert torch.equal(mean[alone], fed.start[alone])
    assert found.notices == (
        f"{int(alone.sum())} of {int(client_mask(fed, result.plans[4]).sum())} values had too few owners left and stay as they were.",
    )
    torch.testing.assert_close(mean[~alone].double(), plain(fed, result, range(5))[~alone], rtol=3e-7, atol=1e-8)


@pytest.mark.parametrize("phase", ["keys", "shares", "inputs", "confirmations", "answers"])
def test_the_mean_is_of_those_whose_input_came(phase: str) -> None:
    fed, result = five((2, 2, 2, 2, 2))
    found = sealed(fed, result, silent={1: phase})
    assert found.updates is not None
    stayed = [0, 1, 2, 3, 4] if phase in ("confirmations", "answers") else [0, 2, 3, 4]
    assert found.updates.clients == tuple(stayed)
    assert found.updates.tokens == tuple(result.targets[k] for k in stayed)
    torch.testing.assert_close(found.updates.mean().double(), plain(fed, result, stayed), rtol=3e-7, atol=1e-8)


def test_too_few_clients_merge_nothing() -> None:
    fed, result = five((2, 2, 2, 2, 2))
    found = sealed(fed, result, silent={1: "inputs", 2: "inputs"})
    assert (found.updates, len(found.notices)) == (None, 1)
    assert "inputs of 3 clients; a sealing of 5 needs 4" in found.notices[0]
    two = sealed_updates(fed, result, [True, True, False, False, False], fed.start, HIDDEN, "run", 1)
    assert two.updates is None
    assert "too few for secure aggregation" in two.notices[0]


def test_values_that_cannot_be_summed_are_refused_before_they_are_masked() -> None:
    fed, result = five((2, 2, 2))
    result.values[1, 0] = float("nan")
    with pytest.raises(AdapterError, match="secure aggregation sums values up to 64"):
        sealed(fed, result)


def test_token_counts_that_differ_are_found_out() -> None:
    fed, result = five((2, 2, 2))
    terms = terms_of(fed, HIDDEN, result.plans, "run", 1)
    assert terms is not None
    words = terms.number.encode(torch.ones(terms.columns).numpy(), 30)
    with pytest.raises(ProtocolError, match="add up to 30, the server counted 31"):
        unsealed(fed, result.plans, {0: 10, 1: 11, 2: 10}, result.values, fed.start, Opened(terms, (0, 1, 2), dict(enumerate([words]))))


def test_the_server_s_rows_of_hidden_columns_are_not_looked_at() -> None:
    """On a network they hold what the round began with; here they are made absurd."""
    fed, result = five((2, 2, 2))
    terms, expected = terms_of(fed, HIDDEN, result.plans, "run", 1), sealed(fed, result).updates
    assert terms is not None
    assert expected is not None
    tokens = dict(enumerate(result.targets))
    inputs = [own_words(terms, k, result.values[k].numpy(), tokens[k]) for k in range(3)]
    assert [list(one) for one in inputs] == [[0]] * 3
    words = inputs[0][0] + inputs[1][0] + inputs[2][0]
    spoiled = result.values.clone()
    spoiled[:, client_mask(fed, result.plans[0])] = float("nan")
    found = unsealed(fed, result.plans, tokens, spoiled, fed.start, Opened(terms, (0, 1, 2), {0: words}))
    assert found.updates is not None
    assert torch.equal(found.updates.mean(), expected.mean())


def test_bytes_are_counted_and_are_twice_the_plain_ones_and_a_little() -> None:
    fed, result = five((2, 2, 2, 2, 2))
    before = {plan.client: result.ledger.of(plan.client)["up"]["adapters"] for plan in result.plans}
    assert set(before.values()) == {0}, "adapters travelled in the clear"
    sealed(fed, result)
    for plan in result.plans:
        counts = result.ledger.of(plan.client)
        assert counts["up"]["adapters"] == 8 * (int(client_mask(fed, plan).sum()) + 1)
        assert 0 < counts["up"]["control"] < 10_000
        assert 0 < counts["down"]["control"] < 10_000


def test_ranges_are_the_columns() -> None:
    drawn = torch.tensor([0, 1, 2, 5, 7, 8])
    assert ranges_of(drawn) == ((0, 3), (5, 6), (7, 9))
    assert ranges_of(drawn[:0]) == ()
    assert ranges_of([slice(0, 4), slice(9, 9)]) == ((0, 4),)


def sealed_run(folder: Path, name: str, secrecy: Secrecy | None, **changes: object) -> FederatedRun:
    config = tiny_config(folder, name=name, clients={"count": 4}, train={"moments": "reset"}, **changes)
    run = FederatedRun(config)
    run.engine.secrecy = secrecy
    return run


@pytest.mark.timeout(60)
def test_a_whole_run_behind_masks_is_the_run_without(tmp_path: Path) -> None:
    """Cuts 1, 2, 2, 2 through three rounds: losses agree to float32's rounding; the deepest cut of 3 is taken back to what others hide."""
    finals, events = {}, {}
    for name, secrecy, cuts in (("plain", None, [1, 2, 2, 2]), ("hidden", HIDDEN, [1, 2, 2, 3])):
        run = sealed_run(tmp_path, name, secrecy, policy={"name": "fixed", "cuts": cuts})
        records = list(run.rounds())
        finals[name] = run.state.adapters.clone()
        events[name] = [one.training for one in records if one.training is not None]
        run.close()
    torch.testing.assert_close(finals["hidden"], finals["plain"], rtol=1e-5, atol=1e-6)
    assert [one["step_losses"] for one in events["hidden"]] == [pytest.approx(one["step_losses"], rel=1e-5) for one in events["plain"]]
    for event in events["hidden"]:
        assert event["aggregated"]
        assert event["metrics"]["sealed_clients"] == 4
        assert [one["cut"] for one in event["clients"]] == [1, 2, 2, 2]
        assert event["clients"][3]["refused_cut"] == 3
    up = [[one["bytes"]["up"]["adapters"] for one in events[name][0]["clients"]] for name in ("plain", "hidden")]
    assert all(1.9 < hidden / usual < 2.1 for usual, hidden in zip(*up, strict=True))


@pytest.mark.timeout(60)
def test_a_resumed_run_behind_masks_is_the_run_that_was_not_stopped(tmp_path: Path) -> None:
    """Masks are fresh, sums are exact: nothing random is left in the numbers."""
    whole = sealed_run(tmp_path, "whole", HIDDEN, policy={"name": "fixed", "cuts": [2, 2, 2, 2]})
    list(whole.rounds())
    part = sealed_run(tmp_path, "part", HIDDEN, policy={"name": "fixed", "cuts": [2, 2, 2, 2]})
    rounds = part.rounds()
    for _ in range(2):
        next(rounds)
    folder, config = part.folder, part.config
    part.close()
    again = FederatedRun(config, resume=folder)
    again.engine.secrecy = HIDDEN
    list(again.rounds())
    assert torch.equal(again.state.adapters, whole.state.adapters)
    again.close()
    whole.close()
