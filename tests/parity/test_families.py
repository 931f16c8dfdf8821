"""Oracle 1: split = uncut for every supported family, every cut, padded and unpadded, exit on the server and on the client.

The reference is the family's own model in stock PEFT; split, each side runs a pass of its own with a bank of its own and only the hidden
state and its gradient go from one to the other.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch

from splitft.lora import AdapterBank, Layout
from splitft.loss import Targets, shift_labels, training_loss
from splitft.models.attention import build_with, suited
from splitft.models.load import causal_class
from splitft.selfcheck import inspect_family
from splitft.split import Route, SplitModel

from ..support import BLOCKS, FAMILIES, VOCABULARY, build, federation, split_model
from .reference import load, peft_model, tensors

ROWS, TOKENS, RANK = 3, 10, 2


@functools.lru_cache(maxsize=4)
def parts(family: str, attention: str) -> tuple[SplitModel, Layout, torch.Tensor, torch.nn.Module]:
    """The split model, its layout, a loud adapter and the same in stock PEFT."""
    split = split_model(family, "all", attention)
    layout = Layout.of(split.keys, RANK, 2.0)
    row = layout.initial_row(5)
    generator = torch.Generator().manual_seed(1)
    row += 0.1 * torch.randn(row.shape, generator=generator)
    fed = replace(federation("gpt2", clients=1), split=split, layout=layout, start=row)
    reference = peft_model(fed, family, attention)
    load(reference, fed, row)
    return split, layout, row, reference


def batch(padding: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """ids, mask and shifted labels of a batch without padding or with padding on one side."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=generator)
    if padding == "none":
        return ids, None, shift_labels(ids, torch.ones_like(ids, dtype=torch.bool))
    mask = torch.ones_like(ids)
    for row, count in ((1, 3), (2, 6)):
        mask[row, :count] = 0 if padding == "left" else 1
        if padding == "right":
            mask[row, -count:] = 0
    ids = torch.where(mask.bool(), ids, 0)
    trained = mask.bool().clone()
    if padding == "left":  # the first real token is predicted from padding: nobody trains on that
        trained[:, 1:] &= mask[:, :-1].bool()
    return ids, mask, shift_labels(ids, trained)


def unsplit(reference: torch.nn.Module, layout: Layout, padding: str) -> tuple[float, torch.Tensor]:
    ids, mask, labels = batch(padding)
    reference.zero_grad()
    logits = reference(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss.backward()
    gradient = torch.zeros(layout.parameters)
    factors = layout.factors(gradient)
    for (key, side), parameter in tensors(reference).items():
        assert parameter.grad is not None
        (factors[key].a if side == "A" else factors[key].b).copy_(parameter.grad)
    return loss.item(), gradient


def bank_of(layout: Layout, row: torch.Tensor, blocks: list[int]) -> AdapterBank:
    bank = AdapterBank(layout, 1, blocks=blocks)
    with torch.no_grad():
        bank.values[0] = row
    return bank


def cut_and_trained(split: SplitModel, layout: Layout, row: torch.Tensor, padding: str, cut: int, end: int) -> tuple[float, torch.Tensor]:
    """Front on the client, blocks cut..end-1 on the server, the rest on the client again (end < blocks or exit on the client)."""
    ids, mask, labels = batch(padding)
    front = bank_of(layout, row, list(range(cut)))
    back, tail = bank_of(layout, row, list(range(cut, end))), bank_of(layout, row, list(range(end, BLOCKS)))
    hidden = split.run(Route(ROWS, last=cut - 1, bank=front), ids, mask)
    received = hidden.detach().clone().requires_grad_(True)
    state = received
    if cut < end:
        state = split.run(Route(ROWS, last=end - 1, entries={cut: received}, bank=back), None, mask)
    returned = state.detach().clone().requires_grad_(True)
    final = split.run(Route(ROWS, entries={end: returned}, bank=tail), None, mask)
    targets = Targets.of(labels)
    weight = torch.full((ROWS,), 1.0 / len(targets.labels))
    loss, _ = training_loss(final, targets, weight, split.head, split.anatomy)
    loss.backward()
    if cut < end:
        state.backward(returned.grad)
        hidden.backward(received.grad)
    else:
        hidden.backward(returned.grad)
    return loss.item(), (front.gradients + back.gradients + tail.gradients)[0]


def joined(split: SplitModel, layout: Layout, row: torch.Tensor, padding: str) -> tuple[float, torch.Tensor]:
    ids, mask, labels = batch(padding)
    bank = bank_of(layout, row, list(range(BLOCKS)))
    targets = Targets.of(labels)
    final = split.run(Route(ROWS, bank=bank), ids, mask)
    loss, _ = training_loss(final, targets, torch.full((ROWS,), 1.0 / len(targets.labels)), split.head, split.anatomy)
    loss.backward()
    return loss.item(), bank.gradients[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_of_the_processor_gives_what_the_plain_one_gives(family: str) -> None:
    """Logits of every family, and that padding behind a row needs no mask where the self-check says so."""
    config = FAMILIES[family]()
    attention = suited(causal_class(config), config)
    anatomy = inspect_family(config, family, attention)
    ids, mask, _ = batch("right")
    with torch.no_grad():
        wanted = build(family, "eager")(input_ids=ids, attention_mask=mask, use_cache=False).logits
        split = SplitModel(build_with(lambda name: build(family, name), attention), anatomy)
        found = split.logits(split.run(Route(ROWS), ids, split.needed_mask(mask)))
    valid = mask.bool()
    assert (found - wanted)[valid].abs().max() <= 1e-5 * wanted[valid].abs().max()
    assert anatomy.maskless


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_split_equals_uncut(family: str, attention: str) -> None:
    split, layout, row, reference = parts(family, attention)
    for padding in ("none", "right", "left"):
        loss, gradient = unsplit(reference, layout, padding)
        largest = gradient.abs().max()
        assert largest > 1e-4, "the adapters get no gradient: the test would prove nothing"
        cases = {"joined": joined(split, layout, row, padding)}
        # Every cut with the exit on the server (end = blocks), and U-shapes with zero and one tail block.
        for cut in range(1, BLOCKS + 1):
            for end in {BLOCKS, max(cut, BLOCKS - 1)}:
                cases[f"cut {cut}, end {end}"] = cut_and_trained(split, layout, row, padding, cut, end)
        for name, (found, found_gradient) in cases.items():
            assert found == pytest.approx(loss, rel=1e-5), f"{padding}, {name}: loss"
            difference = found_gradient - gradient
            assert difference.norm() <= 1e-5 * gradient.norm(), f"{padding}, {name}: gradient"
            factors = layout.factors(difference)
            for key, (a, b) in layout.factors(gradient).items():  # and no key hides behind larger ones
                for own, expected in zip(factors[key], (a, b), strict=True):
                    assert own.abs().max() <= 1e-4 * expected.abs().max() + 1e-7, f"{padding}, {name}: gradient of {key}"


@pytest.mark.parametrize("family", FAMILIES)
def test_in_double_precision_split_and_uncut_agree_far_below_float32(family: str) -> None:
    """What float32 leaves between the two is rounding and nothing else: with weights and activations in float64 (the adapters' gradients
    are added up in float32) the largest difference is below 1e-6 of the largest gradient."""
    split, layout, row, reference = parts(family, "sdpa")
    try:
        for module in (split.model, split.head, reference):
            module.double()
        for cut, end in ((1, BLOCKS), (2, BLOCKS - 1)):
            try:
                loss, gradient = unsplit(reference, layout, "right")
            except RuntimeError as problem:
                pytest.skip(f"the family itself does not run in float64: {problem}")
            if math.isnan(loss):
                pytest.skip("the family's own forward gives NaN in float64")
            found, found_gradient = cut_and_trained(split, layout, row, "right", cut, end)
            assert found == pytest.approx(loss, rel=1e-6)
            assert (found_gradient - gradient).abs().max() <= 1e-6 * gradient.abs().max()
    finally:
        parts.cache_clear()  # these are no longer the float32 models the other tests want


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_entry_equals_one_by_one(family: str) -> None:
    split, layout, row, _ = parts(family, "sdpa")
    assert inspect_family(FAMILIES[family](), family).ragged
    ids, mask, _ = batch("right")
    bank = bank_of(layout, row, list(range(BLOCKS)))
    cuts = [1, 2, 4]
    alone, entries = [], {}
    for position, cut in enumerate(cuts):
        one = slice(position, position + 1)
        assert mask is not None
        hidden = split.run(Route(1, last=cut - 1, bank=bank), ids[one], mask[one])
        entries[cut] = hidden
        alone.append(split.run(Route(1, entries={cut: hidden}, bank=bank), None, mask[one]))
    together = split.run(Route(ROWS, entries=entries, bank=bank, bank_rows=torch.zeros(ROWS, dtype=torch.int64), sessions=ROWS), None, mask)
    valid = mask.bool()
    difference = (together - torch.cat(alone))[valid].abs().max()
    assert difference <= 1e-4 * together[valid].abs().max()


def test_the_tiny_models_are_not_trivial() -> None:
    """Leaving a block out must show; otherwise agreement would prove nothing."""
    for family in FAMILIES:
        split, layout, row, _ = parts(family, "sdpa")
        ids, _, _ = batch("none")
        bank = bank_of(layout, row, list(range(BLOCKS)))
        whole = split.run(Route(ROWS, bank=bank), ids, None)
        front = split.run(Route(ROWS, last=0, bank=bank), ids, None)
        skipped = split.run(Route(ROWS, entries={2: front}, bank=bank), None, None)
        assert (whole - skipped).abs().max() > 1e-2 * whole.abs().max(), family


def test_reference_model_is_stock() -> None:
    model = build("llama")
    assert type(model).__module__.startswith("transformers.models.llama")
