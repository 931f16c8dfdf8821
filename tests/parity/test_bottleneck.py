"""A bottleneck trained through the wire against the same two matrices inside an ordinary uncut model, trained by plain PyTorch."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from splitft.aggregate.average import Average
from splitft.bottleneck import begin, pair_of, principal
from splitft.compress.base import HEADER_BYTES
from splitft.engine.cohort import CohortExecutor
from splitft.engine.exchange import Ownership
from splitft.engine.ledger import Ledger
from splitft.engine.merging import updates_of
from splitft.engine.settings import ClientState, Federation, same_start
from splitft.engine.workers import WorkersExecutor
from splitft.errors import AdapterError, ProtocolError
from splitft.optimizer import AdamW
from splitft.split import Route
from splitft.transport.inproc import InProcess
from splitft.types import Plan, RoundPlan

from ..support import BLOCKS, federation
from .reference import load, peft_model, store, train_client

WIDTH = 32
SHAPES: dict[str, dict[str, Any]] = {
    "exit-on-server": {},
    "u-shape": {"exit_on_client": True},
    "tail": {"exit_on_client": True, "tail_blocks": 1},
}
NAMES = ["cohort", "cohort-of-two", "workers", "workers-ragged"]


def narrow(
    fed: Federation, channels: int = 5, cuts: tuple[int, ...] = (1, 2, 3), end: int | None = None, principal_start: bool = False, **how: Any
) -> tuple[Federation, torch.Tensor]:
    """The federation with bottlenecks at these cuts (and at a U-shape's exit), and the row to start from."""
    pairs = [pair_of("cut", cut, WIDTH, channels, **how) for cut in cuts]
    pairs += [pair_of("exit", end, WIDTH, channels, **how)] if end is not None else []
    layout = fed.layout.beside([matrix for pair in pairs for matrix in (pair.encoder, pair.decoder)])
    row = layout.initial_row(1)
    draw = torch.Generator().manual_seed(5)
    for matrix in layout.matrices:
        matrix.of(row).normal_(0.0, 0.3, generator=draw)
    if principal_start:
        ids = torch.randint(3, 90, (16, 12), generator=draw)
        for pair in (layout.pair("cut", cut) for cut in cuts):
            with torch.no_grad():
                hidden = fed.split.run(Route(16, last=pair.encoder.boundary - 1), ids, None)
            begin(pair, row, *principal([hidden], channels))
    return replace(fed, layout=layout, start=row), row


def plans(cuts: list[int], steps: int = 3, **shape: Any) -> list[Plan]:
    return [Plan(k, cut, steps, 3, **shape) for k, cut in enumerate(cuts)]


def executor(fed: Federation, name: str) -> CohortExecutor | WorkersExecutor:
    if name.startswith("workers"):
        return WorkersExecutor(fed, InProcess(), deterministic=name == "workers")
    return CohortExecutor(fed, {"cohort": 0, "cohort-of-two": 2}[name])


def run(fed: Federation, name: str, start: torch.Tensor, rounds: list[list[Plan]]) -> tuple[torch.Tensor, list[Any], list[Ledger]]:
    """Rounds as the engine closes them."""
    trainer, current, first = executor(fed, name), start.clone(), 0
    states, history, ledgers = {k: ClientState() for k in range(len(fed.clients))}, [], []
    for index, chosen in enumerate(rounds, 1):
        result = trainer.train(RoundPlan(index, tuple(chosen)), first, same_start(current), states, lambda count: None)
        updates = updates_of(fed, result, [True] * len(chosen))
        assert updates is not None
        current = Average().merge(current, updates.fetched(), {}).adapters
        states.update(result.states)
        history.append(result.step_losses)
        ledgers.append(result.ledger)
        first += chosen[0].local_steps
    return current, history, ledgers


class Narrow(torch.nn.Module):
    """D [E [h; 1]; 1] as anybody would write it."""

    def __init__(self, encoder: torch.Tensor, decoder: torch.Tensor, scale: float, clip: float) -> None:
        super().__init__()
        self.encoder, self.decoder = torch.nn.Parameter(encoder.clone()), torch.nn.Parameter(decoder.clone())
        self.scale, self.clip = scale, clip

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        one = torch.ones_like(hidden[..., :1])
        code = torch.cat([hidden, one], -1) @ (self.scale * self.encoder).T
        if self.clip:
            length = code.norm(dim=-1, keepdim=True)
            code = torch.where(length > self.clip, code * self.clip / length, code)
        return torch.cat([code, one], -1) @ (self.scale * self.decoder).T


def uncut(fed: Federation, start: torch.Tensor, rounds: list[list[Plan]]) -> tuple[torch.Tensor, list[Any]]:
    """Federated training of whole models with the two matrices behind a block; a matrix is averaged over those that have it."""
    current, drawn, history, first = start.clone(), dict.fromkeys(range(len(fed.clients)), 0), [], 0
    stock = peft_model(fed, "gpt2")
    for chosen in rounds:
        total, weights, losses = torch.zeros_like(current).double(), torch.zeros_like(current).double(), []
        for plan in chosen:
            model = copy.deepcopy(stock)
            load(model, fed, current)
            blocks = model.base_model.model.transformer.h
            inserted = {}
            end = Ownership(plan, BLOCKS).server_end
            for place, boundary in [("cut", plan.cut), *([("exit", end)] if plan.exit_on_client else [])]:
                pair = fed.layout.pair(place, boundary)  # type: ignore[arg-type]
                made = Narrow(pair.encoder.of(current), pair.decoder.of(current), pair.encoder.scale, pair.encoder.clip)
                model.add_module(f"{place}-{boundary}", made)
                inserted[pair] = made

                def behind(module: Any, given: Any, out: Any, made: Narrow = made) -> Any:
                    return (made(out[0]), *out[1:]) if isinstance(out, tuple) else made(out)

                blocks[boundary - 1].register_forward_hook(behind)
            trace, tokens = train_client(fed, model, plan, drawn[plan.client], first)
            drawn[plan.client] += plan.local_steps * fed.settings.gradient_accumulation
            row, has = store(model, fed), torch.ones_like(current, dtype=torch.bool)
            for matrix in fed.layout.matrices:
                has[matrix.start : matrix.end] = False
            for pair, made in inserted.items():
                for matrix, learned in ((pair.encoder, made.encoder), (pair.decoder, made.decoder)):
                    matrix.of(row).copy_(learned.detach())
                    has[matrix.start : matrix.end] = True
            total += torch.where(has, row.double() * tokens, 0.0)
            weights += has * tokens
            losses.append(trace)
        first += chosen[0].local_steps
        current = torch.where(weights > 0, total / weights.clamp(min=1), current.double()).float()
        history.append(losses)
    return current, history


def close(found: torch.Tensor, expected: torch.Tensor, start: torch.Tensor, tolerance: float = 2e-3) -> None:
    moved = (expected - start).abs().max()
    assert moved > 1e-3, "the reference did not train"
    assert float((found - expected).abs().max() / moved) < tolerance


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_mixed_cuts_equal_an_uncut_model_with_the_matrices_in_it(name: str, shape: str) -> None:
    cuts = [1, 2, 2] if shape == "tail" else [1, 3, 3]
    how = SHAPES[shape]
    fed, start = narrow(federation(optimizer=AdamW(epsilon=1e-5)), end=BLOCKS - how.get("tail_blocks", 0) if how else None)
    rounds = [plans(cuts, **how)] * 2
    expected, losses = uncut(fed, start, rounds)
    found, mine, _ = run(fed, name, start, rounds)
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(losses), rtol=2e-5, atol=1e-6)
    close(found, expected, start)
    for matrix in fed.layout.matrices:
        used = matrix.place == "exit" or matrix.boundary in cuts
        assert torch.equal(matrix.of(found), matrix.of(start)) == (not used), matrix.name


@pytest.mark.parametrize("name", NAMES)
def test_padded_rows_accumulation_clip_scale_and_decay_equal_an_uncut_model(name: str) -> None:
    made = federation(length=(5, 12), prompt=2, gradient_accumulation=2, optimizer=AdamW(epsilon=1e-5, weight_decay=0.1))
    fed, start = narrow(made, scale=0.5, clip=2.0)
    rounds = [plans([3, 1, 3])] * 2
    expected, losses = uncut(fed, start, rounds)
    found, mine, _ = run(fed, name, start, rounds)
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(losses), rtol=5e-5, atol=1e-6)
    close(found, expected, start)


@pytest.mark.parametrize("name", ["cohort", "workers"])
def test_the_last_cut_of_all_has_its_decoder_at_the_server(name: str) -> None:
    fed, start = narrow(federation(optimizer=AdamW(epsilon=1e-5)), cuts=(BLOCKS,))
    rounds = [plans([BLOCKS] * 3)]
    expected, losses = uncut(fed, start, rounds)
    found, mine, _ = run(fed, name, start, rounds)
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(losses), rtol=2e-5, atol=1e-6)
    close(found, expected, start)


@pytest.mark.parametrize("name", ["cohort", "workers"])
def test_as_many_channels_as_the_state_has_and_nothing_learned_is_no_bottleneck(name: str) -> None:
    plain = federation()
    fed, start = narrow(plain, WIDTH, cuts=(1, 2), principal_start=True, trained=False)
    rounds = [plans([1, 2, 2])] * 2
    found, losses, _ = run(fed, name, start, rounds)
    bare, expected, _ = run(plain, name, plain.layout.initial_row(1), rounds)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    ours, theirs, before = (layout.factors(row) for layout, row in ((fed.layout, found), (plain.layout, bare), (fed.layout, start)))
    moved = max(float((theirs[key].b - before[key].b).abs().max()) for key in theirs)
    assert max(float((ours[key].b - theirs[key].b).abs().max()) for key in theirs) < 0.02 * moved
    for matrix in fed.layout.matrices:
        assert torch.equal(matrix.of(found), matrix.of(start)), "frozen"


def test_it_learns_more_with_the_matrices_than_around_them() -> None:
    rounds = [plans([2, 2, 2], steps=8)] * 3
    last = {}
    for trained in (True, False):
        fed, start = narrow(federation(), 3, cuts=(2,), principal_start=True, trained=trained)
        last[trained] = sum(losses[-1] for losses in run(fed, "cohort", start, rounds)[1][-1])
    assert last[True] < last[False] - 0.1, last


@pytest.mark.parametrize("name", ["cohort", "workers"])
@pytest.mark.parametrize("shape", ["exit-on-server", "u-shape"])
def test_bytes_are_those_of_the_narrow_tensors_and_of_one_matrix(name: str, shape: str) -> None:
    how, channels = SHAPES[shape], 5
    fed, start = narrow(federation(length=(5, 12)), channels, end=BLOCKS if how else None)
    one = plans([1, 2, 3], steps=2, **how)
    ledger = run(fed, name, start, [one])[2][0]
    for plan in one:
        seen = 0
        for step in range(plan.local_steps):
            _, lengths, _ = fed.clients[plan.client].train.batch(fed.orders[plan.client].indices(step))
            seen += int(lengths.sum())
        counted = ledger.clients[plan.client]
        tensors = plan.local_steps * HEADER_BYTES + 4 * seen * channels
        assert counted["up"]["activations"] == tensors
        assert counted["down"]["gradients"] == tensors
        if how:
            assert counted["down"]["activations"] == counted["up"]["gradients"] == tensors
        held = sum(entry.end - entry.start for entry in fed.layout.entries if entry.key.block < plan.cut)
        held += channels * (WIDTH + 1) + (WIDTH * (channels + 1) if how else 0)
        assert counted["up"]["adapters"] == counted["down"]["adapters"] == HEADER_BYTES + 4 * held


def test_a_cut_without_a_bottleneck_is_refused_at_both_ends() -> None:
    fed, start = narrow(federation(), cuts=(2,))
    with pytest.raises(ProtocolError, match="no bottleneck"):
        run(fed, "workers", start, [plans([2, 1, 2])])
    with pytest.raises(AdapterError, match="no bottleneck"):
        run(fed, "cohort", start, [plans([2, 1, 2])])


def test_whole_states_are_refused_where_a_bottleneck_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    fed, start = narrow(federation(), cuts=(2,))
    monkeypatch.setattr("splitft.engine.client.encode", lambda bank, place, boundary, hidden: hidden)
    with pytest.raises(ProtocolError, match="of width 5"):
        run(fed, "workers", start, [plans([2, 2, 2])])


def test_a_model_in_bfloat16_learns_through_a_bottleneck_in_float32() -> None:
    made = federation()
    made.split.model.to(torch.bfloat16)
    fed, start = narrow(made, cuts=(2,), principal_start=True)
    found, losses, ledgers = run(fed, "cohort", start, [plans([2, 2, 2], steps=6)])
    _, same, _ = run(fed, "workers", start, [plans([2, 2, 2], steps=6)])
    assert found.dtype == torch.float32
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(same), rtol=0.02, atol=0.02)
    rows = 6 * 2 * 12 * 5
    assert ledgers[0].clients[0]["up"]["activations"] == 6 * HEADER_BYTES + 2 * rows, "two bytes a number, as states of this model have"
