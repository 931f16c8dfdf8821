"""Server modes, unequal ranks, frozen factors and whole clients, each against a plain loop over stock PEFT models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from splitft.engine.cohort import CohortExecutor
from splitft.engine.exchange import Ownership
from splitft.engine.settings import ClientState, Federation, RoundResult, same_start
from splitft.engine.workers import WorkersExecutor
from splitft.lowrank import truncate
from splitft.rng import numpy_stream
from splitft.transport.inproc import InProcess
from splitft.types import Plan, RoundPlan

from ..support import BLOCKS, federation
from .reference import batch_of, load, peft_model, rates, tensors, train_client


def plans(cuts: list[int], steps: int = 3, whole: bool = False, **changes: object) -> tuple[Plan, ...]:
    return tuple(replace(Plan(k, cut, steps, 3, whole), **changes) for k, cut in enumerate(cuts))  # type: ignore[arg-type]


def trained(fed: Federation, chosen: tuple[Plan, ...], start: torch.Tensor, size: int = 0) -> RoundResult:
    return CohortExecutor(fed, size).train(RoundPlan(1, chosen), 0, same_start(start), {}, lambda count: None)


def gradient(fed: Federation, model: torch.nn.Module, row: torch.Tensor, client: int, step: int) -> torch.Tensor:
    """Gradient [p] of one batch's loss at an adapter [p], by stock PEFT."""
    load(model, fed, row)
    model.zero_grad()
    ids, mask, labels = batch_of(fed, client, step)
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    found = torch.zeros(fed.layout.parameters)
    views = fed.layout.factors(found)
    for (key, side), parameter in tensors(model).items():
        assert parameter.grad is not None
        (views[key].a if side == "A" else views[key].b).copy_(parameter.grad)
    return found


class Row:
    """An adapter row trained by torch's own AdamW on some of its columns, clipped by its own norm."""

    def __init__(self, fed: Federation, start: torch.Tensor, columns: torch.Tensor) -> None:
        self.columns, self.value = columns, torch.nn.Parameter(start[columns].clone())
        optimizer, self.limit = fed.settings.optimizer, fed.settings.clip_norm
        self.adam = torch.optim.AdamW(
            [self.value], lr=1.0, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.epsilon, weight_decay=optimizer.weight_decay
        )

    def step(self, found: torch.Tensor, rate: float, squared: float | None = None) -> None:
        own = found[self.columns]
        norm = float(own.norm()) if squared is None else squared**0.5
        self.value.grad = own * min(1.0, self.limit / (norm + 1e-6))
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()


def columns(fed: Federation, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the client's and of the server's adapters."""
    every = torch.arange(fed.layout.parameters)
    ownership = Ownership(plan, BLOCKS)
    own = ownership.client_columns(fed.layout)
    assert isinstance(own, list)
    return torch.cat([every[part] for part in own]), every[ownership.server_columns(fed.layout)]


def joined(start: torch.Tensor, *rows: Row) -> torch.Tensor:
    row = start.clone()
    for one in rows:
        row[one.columns] = one.value.detach()
    return row


def close(found: torch.Tensor, expected: torch.Tensor, start: torch.Tensor) -> None:
    moved = (expected - start).abs().max()
    assert moved > 1e-3, "the reference did not train"
    assert float((found - expected).abs().max() / moved) < 1e-3


@pytest.mark.parametrize("cuts", [[2, 2, 2], [1, 3, 2]])
@pytest.mark.parametrize("size", [0, 2])
def test_one_shared_server_set_is_stepped_with_all_batches_together(cuts: list[int], size: int) -> None:
    fed = federation(server="shared")
    start, chosen, model = fed.layout.initial_row(1), plans(cuts), peft_model(fed, "gpt2")
    result = trained(fed, chosen, start, size)
    fronts = [Row(fed, start, columns(fed, plan)[0]) for plan in chosen]
    deepest = torch.arange(columns(fed, plans([min(cuts)])[0])[1][0].item(), fed.layout.parameters)
    shared = Row(fed, start, deepest)
    for step, rate in enumerate(rates(fed, 3)):
        rows = []
        for front, plan in zip(fronts, chosen, strict=True):
            rows.append(gradient(fed, model, joined(joined(start, shared), front), plan.client, step))
        served = torch.zeros(fed.layout.parameters)
        for found, plan in zip(rows, chosen, strict=True):
            served[columns(fed, plan)[1]] += found[columns(fed, plan)[1]] / len(chosen)
        for front, found in zip(fronts, rows, strict=True):
            front.step(found, rate)
        shared.step(served, rate)
    for k, front in enumerate(fronts):
        close(result.values[k], joined(joined(start, shared), front), start)


def test_sequential_takes_the_servers_set_from_client_to_client() -> None:
    fed = federation(server="sequential")
    start, chosen, model = fed.layout.initial_row(1), plans([2, 2, 2]), peft_model(fed, "gpt2")
    result = trained(fed, chosen, start)
    shared = Row(fed, start, columns(fed, chosen[0])[1])
    order = numpy_stream(fed.settings.seed, "sequence", 1).permutation(3).tolist()
    assert order != [0, 1, 2] or numpy_stream(fed.settings.seed, "sequence", 2).permutation(3).tolist() != order
    fronts = {}
    for client in order:
        front = fronts[client] = Row(fed, start, columns(fed, chosen[client])[0])
        for step, rate in enumerate(rates(fed, 3)):
            found = gradient(fed, model, joined(start, shared, front), client, step)
            squared = float(found.double().square().sum())
            front.step(found, rate, squared)
            shared.step(found, rate, squared)
    for client, front in fronts.items():
        close(result.values[client], joined(start, shared, front), start)


@pytest.mark.parametrize("cuts", [[2, 2, 2], [1, 3, 2]])
def test_alternating_steps_the_servers_set_after_every_batch(cuts: list[int]) -> None:
    fed = federation(server="alternating")
    start, chosen, model = fed.layout.initial_row(1), plans(cuts), peft_model(fed, "gpt2")
    result = trained(fed, chosen, start)
    fronts = [Row(fed, start, columns(fed, plan)[0]) for plan in chosen]
    shared = Row(fed, start, torch.arange(columns(fed, plans([min(cuts)])[0])[1][0].item(), fed.layout.parameters))
    orders = []
    for step, rate in enumerate(rates(fed, 3)):
        orders.append(numpy_stream(fed.settings.seed, "turns", 1, step).permutation(3).tolist())
        for client in orders[-1]:
            found = gradient(fed, model, joined(joined(start, shared), fronts[client]), client, step)
            squared = float(found.double().square().sum())
            served = torch.zeros(fed.layout.parameters)
            served[columns(fed, chosen[client])[1]] = found[columns(fed, chosen[client])[1]]
            fronts[client].step(found, rate, squared)
            shared.step(served, rate, squared)
    assert len({tuple(order) for order in orders}) > 1
    for k, front in enumerate(fronts):
        close(result.values[k], joined(joined(start, shared), front), start)


@pytest.mark.parametrize("server", ["shared", "alternating", "sequential"])
def test_with_one_client_every_server_mode_is_the_same_training(server: str) -> None:
    alone, common = federation(clients=1), federation(clients=1, server=server)
    start = alone.layout.initial_row(1)
    expected = trained(alone, plans([2]), start)
    found = trained(common, plans([2]), start)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-6)
    assert found.ledger.clients == expected.ledger.clients
    torch.testing.assert_close(torch.tensor(found.step_losses)[:, 0], torch.tensor(expected.step_losses)[:, 0])


@pytest.mark.parametrize("engine", ["cohort", "workers"])
def test_a_client_with_a_smaller_rank_trains_like_a_stock_adapter_of_that_rank(engine: str) -> None:
    fed, small = federation(rank=4), federation(rank=2)
    start = small.layout.initial_row(1)
    padded = torch.zeros(fed.layout.parameters)
    for key, factors in small.layout.factors(start).items():
        fed.layout.factors(padded)[key].a[:2] = factors.a
    ranks = (2,) * len(fed.layout.entries)
    chosen = plans([1, 2, 3], ranks=ranks, rank=2)
    executor = CohortExecutor(fed) if engine == "cohort" else WorkersExecutor(fed, InProcess())
    result = executor.train(RoundPlan(1, chosen), 0, same_start(padded), {}, lambda count: None)
    for plan in chosen:
        model = peft_model(small, "gpt2")
        load(model, small, start)
        train_client(small, model, plan, 0, 0)
        found = fed.layout.factors(result.values[plan.client])
        for key, (a, b) in ((key, (found[key].a, found[key].b)) for key in fed.layout.by_key):
            assert not a[2:].any()
            assert not b[:, 2:].any()
            mine = {side: p for (k, side), p in tensors(model).items() if k == key}
            torch.testing.assert_close(a[:2], mine["A"].detach(), rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(b[:, :2], mine["B"].detach(), rtol=1e-3, atol=1e-5)
    own = sum(2 * (e.inputs + e.outputs) for e in fed.layout.entries if e.key.block < 1)
    assert result.ledger.of(0)["up"]["adapters"] == 4 * own + 32


@pytest.mark.parametrize("engine", ["cohort", "workers"])
def test_columns_that_are_not_trained_neither_move_nor_travel(engine: str) -> None:
    fed = federation()
    mask = torch.zeros(fed.layout.parameters, dtype=torch.bool)
    for entry in fed.layout.entries:
        mask[entry.middle : entry.end] = True
    frozen = replace(fed, trained=mask)
    start = fed.layout.initial_row(1)
    executor = CohortExecutor(frozen) if engine == "cohort" else WorkersExecutor(frozen, InProcess())
    result = executor.train(RoundPlan(1, plans([1, 2, 3])), 0, same_start(start), {}, lambda count: None)
    assert torch.equal(result.values[:, ~mask], start[~mask].expand(3, -1))
    assert float((result.values[:, mask] - start[mask]).abs().max()) > 1e-3
    b_only = sum(e.end - e.middle for e in fed.layout.entries if e.key.block < 1)
    assert result.ledger.of(0)["up"]["adapters"] == result.ledger.of(0)["down"]["adapters"] == 4 * b_only + 32
    for other in (CohortExecutor(frozen), WorkersExecutor(frozen, InProcess())):
        again = other.train(RoundPlan(1, plans([1, 2, 3])), 0, same_start(start), {}, lambda count: None)
        torch.testing.assert_close(again.values, result.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["cohort", "workers"])
def test_a_whole_client_trains_like_a_split_one_and_nothing_crosses_a_cut(engine: str) -> None:
    fed = federation()
    start = fed.layout.initial_row(1)
    executor = CohortExecutor(fed) if engine == "cohort" else WorkersExecutor(fed, InProcess())
    alone = executor.train(RoundPlan(1, plans([BLOCKS, BLOCKS, 2], whole=True)), 0, same_start(start), {}, lambda count: None)
    split = trained(fed, plans([1, 2, 3]), start)
    torch.testing.assert_close(alone.values, split.values, rtol=1e-4, atol=1e-5)
    assert alone.targets == split.targets
    for client in (0, 1):
        counts = alone.ledger.of(client)
        assert counts["up"]["activations"] == counts["up"]["gradients"] == counts["down"]["gradients"] == counts["up"]["labels"] == 0
        assert counts["up"]["adapters"] == counts["down"]["adapters"] == 4 * fed.layout.parameters + 32
        assert counts["up"]["control"] + counts["down"]["control"] < 600
    assert alone.ledger.of(2)["up"]["activations"] > 0


@pytest.mark.parametrize("engine", ["cohort", "workers"])
def test_a_segment_of_the_own_columns_travels(engine: str) -> None:
    fed = federation()
    start = fed.layout.initial_row(1)
    chosen = tuple(replace(plan, segments=3, segment=plan.client) for plan in plans([2, 2, 2]))
    executor = CohortExecutor(fed) if engine == "cohort" else WorkersExecutor(fed, InProcess())
    result = executor.train(RoundPlan(1, chosen), 0, same_start(start), {}, lambda count: None)
    own = columns(fed, chosen[0])[0]
    sizes = [(result.ledger.of(k)["up"]["adapters"] - 32) // 4 for k in range(3)]
    assert sum(sizes) == len(own)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("engine", ["cohort", "workers"])
def test_a_client_goes_on_from_its_own_adapters(engine: str) -> None:
    """Two rounds without download and upload are one round of twice the steps, moments kept."""
    fed = federation(keep_moments=True)
    start = fed.layout.initial_row(1)

    def executor() -> CohortExecutor | WorkersExecutor:
        return CohortExecutor(fed) if engine == "cohort" else WorkersExecutor(fed, InProcess())

    kept = plans([1, 2, 3], 2, download=False, upload=False)
    first = executor().train(RoundPlan(1, kept), 0, same_start(start), {}, lambda count: None)
    states = {k: replace(first.states[k], adapter=first.values[k].clone()) for k in range(3)}
    second = executor().train(RoundPlan(2, kept), 2, lambda plan: first.values[plan.client], states, lambda count: None)
    whole = trained(fed, plans([1, 2, 3], 4), start)
    torch.testing.assert_close(second.values, whole.values, rtol=1e-5, atol=1e-6)
    assert second.ledger.of(1)["up"]["adapters"] == second.ledger.of(1)["down"]["adapters"] == 0


def test_kept_moments_of_an_adapter_below_its_full_rank_begin_anew() -> None:
    fed = federation(keep_moments=True, rank=3)
    row = fed.layout.initial_row(1)
    first = torch.ones_like(row)
    states = {k: ClientState(steps=4, first=first.clone(), second=first.clone()) for k in range(3)}
    ranks = (2, *(entry.rank for entry in fed.layout.entries[1:]))
    lower, _ = truncate(fed.layout, row, torch.tensor(ranks))
    chosen = plans([2, 2, 2], 1, ranks=ranks)
    result = CohortExecutor(fed).train(RoundPlan(1, chosen), 0, same_start(lower), states, lambda count: None)
    inactive = ~fed.layout.active(ranks)
    assert not result.values[:, inactive].any(), "an inactive column moved by a moment from before"
