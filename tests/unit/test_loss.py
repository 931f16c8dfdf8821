"""loss.py: the chunked loss and its gradient against torch's on whole logits, ignored labels, weights, and the one-token shift."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splitft import loss as module
from splitft.loss import Targets, chunk_tokens, shift_labels, token_losses, training_loss
from splitft.models.base import AfterHead, Anatomy
from splitft.rng import torch_stream
from splitft.types import IGNORE_LABEL

WIDTH, VOCABULARY = 12, 50
HEADS: dict[str, tuple[bool, AfterHead, float]] = {
    "plain": (False, "nothing", 1.0),
    "bias": (True, "nothing", 1.0),
    "softcap": (False, "softcap", 1.5),
    "divide": (False, "divide", 3.0),
    "multiply": (True, "multiply", 0.25),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 positions, so that a small batch has several."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 16 * VOCABULARY)
    monkeypatch.setattr(module, "CHUNK_MINIMUM", 16)


def head_of(case: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Anatomy]:
    bias, kind, value = HEADS[case]
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    generator = torch_stream(1, "head")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0.0, 0.8, generator=generator)
    return head.to(dtype).requires_grad_(False), Anatomy("blocks", "head", False, kind, value)


def batch_of(rows: int, tokens: int, dtype: torch.dtype = torch.float32, ignored: float = 0.3) -> tuple[Tensor, Tensor]:
    """hidden [rows t d] and labels [rows t], some of them ignored."""
    generator = torch_stream(2, "batch", rows, tokens)
    hidden = torch.randn(rows, tokens, WIDTH, generator=generator).to(dtype)
    labels = torch.randint(0, VOCABULARY, (rows, tokens), generator=generator)
    labels[torch.rand(rows, tokens, generator=generator) < ignored] = IGNORE_LABEL
    return hidden, labels


def expected(hidden: Tensor, labels: Tensor, weight: Tensor, head: nn.Linear, anatomy: Anatomy) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient and the nll of each row from whole logits in float32."""
    leaf = hidden.detach().float().requires_grad_(True)
    logits = anatomy.finish(F.linear(leaf, head.weight.float(), None if head.bias is None else head.bias.float()))
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_LABEL, reduction="none").view(labels.shape)
    total = (nll.sum(1) * weight).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    return total.detach(), gradient, nll.sum(1).detach()


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 15), (1, 16), (1, 17), (1, 33), (3, 16), (4, 23)])
def test_value_and_gradient_equal_torch_on_whole_logits(case: str, rows: int, tokens: int) -> None:
    head, anatomy = head_of(case)
    hidden, labels = batch_of(rows, tokens, ignored=0.0)
    weight = torch.linspace(0.1, 2.0, rows)
    leaf = hidden.clone().requires_grad_(True)
    loss, sums = training_loss(leaf, Targets.of(labels), weight, head, anatomy)
    loss.backward()
    total, gradient, by_row = expected(hidden, labels, weight, head, anatomy)
    torch.testing.assert_close(loss.detach(), total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums.float(), by_row, rtol=1e-5, atol=1e-5)
    assert sums.dtype == torch.float64


@pytest.mark.parametrize("case", HEADS)
def test_ignored_labels_take_no_part_and_get_no_gradient(case: str) -> None:
    head, anatomy = head_of(case)
    hidden, labels = batch_of(3, 30)
    labels[1] = IGNORE_LABEL
    weight = torch.tensor([0.5, 2.0, 1.0])
    leaf = hidden.clone().requires_grad_(True)
    loss, sums = training_loss(leaf, Targets.of(labels), weight, head, anatomy)
    loss.backward()
    total, gradient, by_row = expected(hidden, labels, weight, head, anatomy)
    torch.testing.assert_close(loss.detach(), total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-6)
    assert bool((leaf.grad[labels == IGNORE_LABEL] == 0).all())
    assert float(sums[1]) == 0.0 == float(by_row[1])


@pytest.mark.parametrize("case", HEADS)
def test_bfloat16_stays_close_to_float32(case: str) -> None:
    head, anatomy = head_of(case, torch.bfloat16)
    hidden, labels = batch_of(3, 30, torch.bfloat16)
    weight = torch.full((3,), 1.0 / 60)
    leaf = hidden.clone().requires_grad_(True)
    loss, _ = training_loss(leaf, Targets.of(labels), weight, head, anatomy)
    loss.backward()
    total, gradient, _ = expected(hidden, labels, weight, head, anatomy)
    assert leaf.grad.dtype == torch.bfloat16
    assert abs(float(loss.detach()) - float(total)) < 0.02 * float(total)
    assert float((leaf.grad.float() - gradient).norm() / gradient.norm()) < 0.02


def test_a_factor_behind_the_loss_reaches_the_gradient() -> None:
    head, anatomy = head_of("plain")
    hidden, labels = batch_of(2, 9)
    gradients = []
    for factor in (1.0, 3.0):
        leaf = hidden.clone().requires_grad_(True)
        loss, _ = training_loss(leaf, Targets.of(labels), torch.ones(2), head, anatomy)
        (factor * loss).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], 3.0 * gradients[0])


def test_a_batch_without_targets_is_zero_and_does_not_fail() -> None:
    head, anatomy = head_of("plain")
    leaf = torch.randn(2, 5, WIDTH, generator=torch_stream(1, "x")).requires_grad_(True)
    loss, sums = training_loss(leaf, Targets.of(torch.full((2, 5), IGNORE_LABEL)), torch.ones(2), head, anatomy)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert sums.tolist() == [0.0, 0.0]
    assert float(leaf.grad.abs().sum()) == 0.0


def test_whole_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    head, anatomy = head_of("softcap")
    hidden, labels = batch_of(4, 50, ignored=0.0)
    seen: list[int] = []
    head.register_forward_pre_hook(lambda own, inputs: seen.append(inputs[0].shape[0]))
    training_loss(hidden.requires_grad_(True), Targets.of(labels), torch.ones(4), head, anatomy)
    assert max(seen) == chunk_tokens(VOCABULARY) == 16
    assert sum(seen) == 200


def test_targets_name_positions_rows_and_counts() -> None:
    labels = torch.tensor([[7, IGNORE_LABEL, 9], [IGNORE_LABEL] * 3, [1, 2, IGNORE_LABEL]])
    targets = Targets.of(labels)
    assert targets.positions.tolist() == [0, 2, 6, 7]
    assert targets.labels.tolist() == [7, 9, 1, 2]
    assert targets.row.tolist() == [0, 0, 2, 2]
    assert targets.count_by_row().tolist() == [2, 0, 2]


def test_labels_are_the_next_token_where_it_is_trained() -> None:
    ids = torch.tensor([[10, 11, 12, 13]])
    assert shift_labels(ids, torch.ones(1, 4, dtype=torch.bool)).tolist() == [[11, 12, 13, IGNORE_LABEL]]
    trained = torch.tensor([[True, False, False, True]])
    assert shift_labels(ids, trained).tolist() == [[IGNORE_LABEL, IGNORE_LABEL, 13, IGNORE_LABEL]]


def test_accuracy_has_the_one_token_shift() -> None:
    """A model that repeats its input is always wrong, one that knows the next token always right; without the shift it is the reverse."""
    ids = torch.arange(40).reshape(2, 20) % VOCABULARY
    labels = shift_labels(ids, torch.ones_like(ids, dtype=torch.bool))
    targets = Targets.of(labels)
    copying = F.one_hot(ids, VOCABULARY).float().reshape(-1, VOCABULARY)
    knowing = F.one_hot((ids + 1) % VOCABULARY, VOCABULARY).float().reshape(-1, VOCABULARY)
    results = {}
    for name, states in (("copying", copying), ("knowing", knowing)):
        losses, right = token_losses(states.index_select(0, targets.positions) * 20, lambda hidden: hidden, targets.labels, VOCABULARY)
        results[name] = (float(losses.mean()), float(right.float().mean()))
    assert results["copying"][1] == 0.0
    assert results["copying"][0] > 10
    assert results["knowing"][1] == 1.0
    assert results["knowing"][0] < 1e-3


@pytest.mark.parametrize("count", [0, 1, 16, 17, 40])
def test_token_losses_equal_torch_at_chunk_boundaries(count: int) -> None:
    head, anatomy = head_of("softcap")
    hidden, labels = batch_of(1, max(count, 1), ignored=0.0)
    hidden, labels = hidden[0, :count], labels[0, :count]
    losses, right = token_losses(hidden, lambda part: anatomy.finish(head(part)), labels, VOCABULARY)
    logits = anatomy.finish(head(hidden))
    assert losses.shape == right.shape == (count,)
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none") if count else losses)
    assert torch.equal(right, logits.argmax(-1) == labels)
