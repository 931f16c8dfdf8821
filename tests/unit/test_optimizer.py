"""optimizer.py against torch.optim.AdamW, clip_grad_norm_ and transformers' schedules."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from splitft.errors import ConfigError
from splitft.optimizer import SCHEDULES, AdamW, Moments, Schedule, clip_factor
from splitft.rng import torch_stream

PARAMETERS = 23


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_stream(seed, "optimizer-test"))


def torch_adamw(values: torch.Tensor, rule: AdamW) -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
    parameter = torch.nn.Parameter(values.clone())
    betas = (rule.beta1, rule.beta2)
    return parameter, torch.optim.AdamW([parameter], lr=1.0, betas=betas, eps=rule.epsilon, weight_decay=rule.weight_decay)


@pytest.mark.parametrize("rule", [AdamW(), AdamW(0.8, 0.95, 1e-6, 0.3), AdamW(0.0, 0.5, 1e-3, 0.01)], ids=["default", "decay", "odd"])
def test_fifty_steps_with_changing_rates_equal_torch(rule: AdamW) -> None:
    values, moments = drawn(3, PARAMETERS), Moments.zeros(3, PARAMETERS)
    parameter, optimizer = torch_adamw(values, rule)
    for step in range(50):
        # From large to tiny gradients, and some that are zero.
        gradients = drawn(3, PARAMETERS, seed=step) * 10.0 ** (2 - step % 7)
        gradients[:, step % PARAMETERS] = 0.0
        rate = 0.1 / (1 + step) if step % 9 else 0.0
        rule.step(values, gradients, moments, rate)
        parameter.grad = gradients.clone()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        torch.testing.assert_close(values, parameter.detach(), rtol=2e-5, atol=1e-6)
    assert moments.steps.tolist() == [50, 50, 50]


def test_every_row_has_its_own_step_count() -> None:
    """Rows that join later are as if each had an optimizer of its own: the bias correction follows the row's steps."""
    rule, rows, joins = AdamW(weight_decay=0.1), 3, [0, 4, 9]
    values, moments = drawn(rows, PARAMETERS), Moments.zeros(rows, PARAMETERS)
    references = [torch_adamw(values[row], rule) for row in range(rows)]
    for step in range(15):
        gradients = drawn(rows, PARAMETERS, seed=100 + step)
        for row in range(rows):
            if step < joins[row]:
                continue
            one = slice(row, row + 1)
            rule.step(values[one], gradients[one], moments.select(one, slice(0, PARAMETERS)), 0.01)
            parameter, optimizer = references[row]
            parameter.grad = gradients[row].clone()
            optimizer.param_groups[0]["lr"] = 0.01
            optimizer.step()
    assert moments.steps.tolist() == [15, 11, 6]
    for row, (parameter, _) in enumerate(references):
        torch.testing.assert_close(values[row], parameter.detach(), rtol=1e-5, atol=1e-7)


def test_rows_with_unequal_counts_may_step_together() -> None:
    rule, values = AdamW(), drawn(2, PARAMETERS)
    moments = Moments.zeros(2, PARAMETERS)
    alone, alone_moments = values.clone(), Moments.zeros(2, PARAMETERS)
    for batch in (moments, alone_moments):
        batch.steps[1], batch.second[1] = 7, 0.5
    gradients = drawn(2, PARAMETERS, seed=5)
    rule.step(values, gradients, moments, 0.1)
    for row in range(2):
        one = slice(row, row + 1)
        rule.step(alone[one], gradients[one], alone_moments.select(one, slice(0, PARAMETERS)), 0.1)
    assert torch.equal(values, alone)
    assert moments.steps.tolist() == [1, 8]


def test_columns_may_step_apart() -> None:
    """Front and back of one client are column ranges; stepping them apart equals stepping the whole, the count is then kept apart."""
    rule, gradients = AdamW(weight_decay=0.2), drawn(1, PARAMETERS, seed=3)
    whole, parts = drawn(1, PARAMETERS), drawn(1, PARAMETERS)
    moments, apart = Moments.zeros(1, PARAMETERS), [Moments.zeros(1, PARAMETERS), Moments.zeros(1, PARAMETERS)]
    for _ in range(3):
        rule.step(whole, gradients, moments, 0.05)
        for columns, own in zip((slice(0, 9), slice(9, PARAMETERS)), apart, strict=True):
            rule.step(parts[:, columns], gradients[:, columns], own.select(slice(0, 1), columns), 0.05)
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-8)  # a last digit: the kernel treats the end of a row apart


def test_a_selection_by_list_is_a_copy_and_by_slice_a_view() -> None:
    moments = Moments.zeros(3, 4)
    moments.select([0, 2], slice(0, 4)).first.add_(1.0)
    assert float(moments.first.sum()) == 0.0
    moments.select(slice(1, 2), slice(1, 3)).first.add_(1.0)
    assert moments.first[1].tolist() == [0.0, 1.0, 1.0, 0.0]


def test_weight_decay_is_decoupled() -> None:
    values, moments = torch.full((1, 2), 2.0), Moments.zeros(1, 2)
    AdamW(weight_decay=0.5).step(values, torch.zeros(1, 2), moments, 0.1)
    torch.testing.assert_close(values, torch.full((1, 2), 2.0 * (1 - 0.1 * 0.5)))


@pytest.mark.parametrize("limit", [0.01, 1.0, 1e3])
def test_clipping_equals_torch(limit: float) -> None:
    gradients = drawn(4, PARAMETERS) * torch.tensor([[1e-3], [0.2], [5.0], [0.0]])
    factor = clip_factor(gradients.double().square().sum(1), limit)
    assert factor.dtype == torch.float64
    for row in range(4):
        parts = [torch.nn.Parameter(torch.zeros(9)), torch.nn.Parameter(torch.zeros(PARAMETERS - 9))]
        parts[0].grad, parts[1].grad = gradients[row, :9].clone(), gradients[row, 9:].clone()
        torch.nn.utils.clip_grad_norm_(parts, limit)
        torch.testing.assert_close(gradients[row] * float(factor[row]), torch.cat([parts[0].grad, parts[1].grad]), rtol=1e-5, atol=1e-9)
    assert float(factor.max()) <= 1.0


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize(("shape", "name"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")])
def test_every_rate_equals_transformers_scheduler(shape: str, name: str, warmup: int) -> None:
    total, peak = 17, 3e-3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = tf.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    schedule = Schedule(peak, total, warmup, shape)
    for step in range(total + 3):
        assert schedule.rate(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-18), step
        optimizer.step()
        scheduler.step()


def test_schedules_begin_peak_and_end_where_they_should() -> None:
    for shape in SCHEDULES:
        schedule = Schedule(1.0, 10, 2, shape)
        assert schedule.rate(0) == 0.0
        assert schedule.rate(1) == 0.5
        assert schedule.rate(2) == 1.0
        assert schedule.rate(10) == pytest.approx(1.0 if shape == "constant" else 0.0)


def test_a_run_shorter_than_its_warm_up_does_not_divide_by_zero() -> None:
    for shape in SCHEDULES:
        for total in (1, 3, 5):
            rates = [Schedule(1.0, total, 5, shape).rate(step) for step in range(total)]
            assert rates == [step / 5 for step in range(total)]


def test_an_unknown_schedule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="polynomial") as caught:
        Schedule(1.0, 3, 0, "polynomial")
    assert all(name in str(caught.value) for name in SCHEDULES)
