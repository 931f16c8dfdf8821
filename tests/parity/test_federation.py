"""Oracles 2, 3, 4, 7 and 9: federated split training against stock transformers + PEFT, cohort against workers, counted bytes."""

from __future__ import annotations

import pytest
import torch

from splitft.aggregate.average import Average
from splitft.aggregate.base import Updates
from splitft.compress.base import HEADER_BYTES
from splitft.compress.cast import Cast
from splitft.compress.quantize import Quantize
from splitft.engine.cohort import CohortExecutor
from splitft.engine.ledger import Ledger
from splitft.engine.settings import ClientState, Federation, same_start
from splitft.engine.workers import WorkersExecutor
from splitft.messages import FRAME_BYTES, STEP_BYTES
from splitft.optimizer import AdamW, Schedule
from splitft.transport.inproc import InProcess
from splitft.types import Plan, RoundPlan

from ..support import BLOCKS, federation
from .reference import federated


def plans(cuts: list[int], steps: int = 3, u_shape: bool = False, tail: int = 0, rank: int = 3) -> list[Plan]:
    return [Plan(k, cut, steps, rank, u_shape, tail) for k, cut in enumerate(cuts)]


def executors(fed: Federation) -> dict[str, CohortExecutor | WorkersExecutor]:
    return {
        "cohort": CohortExecutor(fed),
        "cohort-of-one": CohortExecutor(fed, 1),
        "cohort-of-two": CohortExecutor(fed, 2),
        "workers": WorkersExecutor(fed, InProcess(), deterministic=True),
        "workers-ragged": WorkersExecutor(fed, InProcess(), deterministic=False),
    }


def run(
    fed: Federation, name: str, start: torch.Tensor, rounds: list[list[Plan]]
) -> tuple[torch.Tensor, list[list[list[float]]], list[Ledger]]:
    executor, current, states, first_step = executors(fed)[name], start.clone(), {k: ClientState() for k in range(len(fed.clients))}, 0
    history, ledgers = [], []
    for index, chosen in enumerate(rounds, 1):
        result = executor.train(RoundPlan(index, tuple(chosen)), first_step, same_start(current), states, lambda count: None)
        updates = Updates(tuple(one.client for one in result.plans), tuple(result.targets), result.values, fed.layout)
        current = Average().merge(current, updates, {}).adapters
        states.update(result.states)
        history.append(result.step_losses)
        ledgers.append(result.ledger)
        first_step += chosen[0].local_steps
    return current, history, ledgers


def close(found: torch.Tensor, expected: torch.Tensor, start: torch.Tensor, tolerance: float = 1e-3) -> None:
    """The movement from the start agrees, relative to its largest entry; AdamW's sign-like steps leave no room for compensation."""
    moved = (expected - start).abs().max()
    assert moved > 1e-3, "the reference did not train"
    assert float((found - expected).abs().max() / moved) < tolerance


NAMES = ["cohort", "cohort-of-two", "workers", "workers-ragged"]
SHAPES = {
    "exit-on-server": {},
    "u-shape": {"u_shape": True},
    "u-shape-tail-1": {"u_shape": True, "tail": 1},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_three_clients_two_rounds_mixed_cuts_equal_unsplit_peft(name: str, shape: str) -> None:
    fed = federation()
    start = fed.layout.initial_row(1)
    rounds = [plans([1, 2, 3] if shape != "u-shape-tail-1" else [1, 2, 2], **SHAPES[shape]) for _ in range(2)]
    expected, expected_losses = federated(fed, "gpt2", start, rounds)
    found, losses, _ = run(fed, name, start, rounds)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected_losses), rtol=2e-5, atol=1e-6)
    close(found, expected, start)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", ["exit-on-server", "u-shape"])
def test_padded_documents_prompts_and_accumulation_equal_unsplit_peft(name: str, shape: str) -> None:
    fed = federation(length=(5, 12), prompt=2, gradient_accumulation=2, clients=3)
    start = fed.layout.initial_row(1)
    rounds = [plans([3, 1, 2], **SHAPES[shape])] * 2
    expected, expected_losses = federated(fed, "gpt2", start, rounds)
    found, losses, _ = run(fed, name, start, rounds)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected_losses), rtol=2e-5, atol=1e-6)
    close(found, expected, start)


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("name", ["cohort", "workers"])
def test_one_client_equals_plain_fine_tuning_trace_for_trace(name: str, shape: str) -> None:
    fed = federation(clients=1, schedule=Schedule(1e-2, 12, 2, shape), clip_norm=0.3, optimizer=AdamW(0.8, 0.95, 1e-7, 0.2))
    start = fed.layout.initial_row(2)
    rounds = [plans([2], steps=12)]
    expected, expected_losses = federated(fed, "gpt2", start, rounds)
    found, losses, _ = run(fed, name, start, rounds)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected_losses), rtol=5e-5, atol=1e-6)
    close(found, expected, start)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt-350m-layout", "bloom"])
def test_other_families_equal_unsplit_peft(family: str) -> None:
    fed = federation(family, length=(6, 10), targets="all")
    start = fed.layout.initial_row(1)
    rounds = [plans([1, 2, 4], steps=2)]
    expected, expected_losses = federated(fed, family, start, rounds)
    for name in ("cohort", "workers-ragged"):
        found, losses, _ = run(fed, name, start, rounds)
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected_losses), rtol=2e-5, atol=1e-5)
        close(found, expected, start, 5e-3)


def test_every_cut_up_to_the_last_block_trains_the_same() -> None:
    fed = federation(clients=1)
    start = fed.layout.initial_row(1)
    found = [run(fed, name, start, [plans([cut])])[0] for cut in range(1, BLOCKS + 1) for name in ("cohort", "workers")]
    for other in found[1:]:
        close(other, found[0], start)


def test_moving_a_cut_between_rounds_changes_only_placement() -> None:
    fed = federation(keep_moments=True)
    start = fed.layout.initial_row(1)
    still = [plans([2, 2, 2])] * 3
    moving = [plans([1, 2, 3]), plans([3, 1, 2]), plans([2, 3, 1])]
    for name in ("cohort", "workers"):
        expected = run(fed, name, start, still)[0]
        close(run(fed, name, start, moving)[0], expected, start)


def test_kept_moments_differ_from_reset_ones() -> None:
    kept, reset = federation(keep_moments=True), federation()
    start = kept.layout.initial_row(1)
    rounds = [plans([2, 2, 2])] * 2
    assert (run(kept, "cohort", start, rounds)[0] - run(reset, "cohort", start, rounds)[0]).abs().max() > 1e-4


def test_batched_cohort_equals_clients_one_after_another() -> None:
    fed = federation(clients=5, length=(6, 12))
    start = fed.layout.initial_row(1)
    rounds = [plans([1, 2, 3, 4, 2])]
    alone = CohortExecutor(fed, 1).train(RoundPlan(1, tuple(rounds[0])), 0, same_start(start), {}, lambda count: None)
    together = CohortExecutor(fed, 5).train(RoundPlan(1, tuple(rounds[0])), 0, same_start(start), {}, lambda count: None)
    for one, other in zip(alone.values, together.values, strict=True):
        close(one, other, start)
    assert alone.ledger.clients == together.ledger.clients


BYTES = {
    "identity": ({}, 32 * 4),
    "cast": ({"uplink": Cast("bfloat16"), "downlink": Cast("float16")}, 32 * 2),
    "int8": ({"uplink": Quantize(), "downlink": Quantize()}, 32 + 2),
}


@pytest.mark.parametrize("codec", BYTES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [12, (5, 12)])
def test_counted_bytes_equal_the_closed_form_and_both_executors_agree(codec: str, shape: str, length: int | tuple[int, int]) -> None:
    changes, token_bytes = BYTES[codec]
    fed = federation(length=length, gradient_accumulation=2, **changes)
    start, chosen = fed.layout.initial_row(1), plans([1, 2, 3] if shape != "u-shape-tail-1" else [1, 2, 2], **SHAPES[shape])
    counted = {name: run(fed, name, start, [chosen])[2][0].clients for name in NAMES}
    for name in NAMES[1:]:
        assert counted[name] == counted["cohort"], name
    batch = fed.settings.batch_size
    for plan in chosen:
        steps = plan.local_steps * fed.settings.gradient_accumulation
        tokens = sum(int(fed.clients[plan.client].train.batch(fed.orders[plan.client].indices(k))[1].sum()) for k in range(steps))
        tensor = tokens * token_bytes + steps * HEADER_BYTES
        own = fed.layout.columns(0, plan.cut), fed.layout.columns(BLOCKS - plan.tail_blocks if plan.exit_on_client else BLOCKS, BLOCKS)
        adapters = 4 * sum(part.stop - part.start for part in own) + HEADER_BYTES
        up, down = counted["cohort"][plan.client]["up"], counted["cohort"][plan.client]["down"]
        step_frame, u_shape = FRAME_BYTES + STEP_BYTES, plan.exit_on_client
        assert up["activations"] == tensor
        assert down["gradients"] == tensor
        assert up["gradients"] == down["activations"] == (tensor if u_shape else 0)
        assert up["labels"] == (0 if u_shape else 2 * tokens + steps * HEADER_BYTES)
        assert up["adapters"] == down["adapters"] == adapters
        assert down["labels"] == 0
        # Round messages carry variable-length fields of well under 200 bytes beside 9 bytes for each learning rate.
        assert 0 < up["control"] - steps * (step_frame * (2 if u_shape else 1) + 4 * batch) < 200
        assert 0 < down["control"] - steps * step_frame * (2 if u_shape else 1) - 9 * plan.local_steps < 400


def test_labels_never_leave_a_u_shaped_client() -> None:
    fed = federation(prompt=2)
    start = fed.layout.initial_row(1)
    _, _, ledgers = run(fed, "workers", start, [plans([1, 2, 3], u_shape=True)])
    assert all(counts["up"]["labels"] == 0 for counts in ledgers[0].clients.values())


def test_aggregation_that_ignores_weights_would_be_caught() -> None:
    fed = federation(length=(4, 12))
    start = fed.layout.initial_row(1)
    chosen = plans([1, 2, 3])
    expected, _ = federated(fed, "gpt2", start, [chosen])
    result = CohortExecutor(fed).train(RoundPlan(1, tuple(chosen)), 0, same_start(start), {}, lambda count: None)
    assert len(set(result.targets)) > 1, "the clients must differ in tokens for this test to mean anything"
    unweighted = result.values.double().mean(0).float()
    with pytest.raises(AssertionError):
        close(unweighted, expected, start)


def test_lossy_codec_changes_numbers_so_the_wire_is_a_wire() -> None:
    exact, rounded = federation(), federation(uplink=Cast("bfloat16"), downlink=Cast("bfloat16"))
    start = exact.layout.initial_row(1)
    first, second = (run(fed, "cohort", start, [plans([1, 2, 3])])[1] for fed in (exact, rounded))
    difference = (torch.tensor(first) - torch.tensor(second)).abs().max()
    assert 0 < difference < 0.05


@pytest.mark.parametrize("name", ["cohort", "workers"])
def test_bfloat16_base_trains_close_to_float32(name: str) -> None:
    exact, narrow = federation(), federation()
    narrow.split.model.bfloat16()
    start = exact.layout.initial_row(1)
    expected = torch.tensor(run(exact, name, start, [plans([1, 2, 3])] * 2)[1])
    found = torch.tensor(run(narrow, name, start, [plans([1, 2, 3])] * 2)[1])
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)
    assert (found - expected).abs().max() > 0, "bfloat16 must show"
