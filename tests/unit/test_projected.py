"""A frozen projection and its adapters as one node, against the frozen projection followed by the update."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from splitft import products
from splitft.lora import AdapterBank, Layout, Rows
from splitft.optimizer import AdamW, Moments
from splitft.products import FrozenConv1D, FrozenLinear, use_fast_products
from splitft.rng import torch_stream
from splitft.types import Key

KEY = Key(0, "attn.q")
LAYOUT = Layout.of({KEY: (6, 10)}, 3, 1.7)


class Odd(nn.Linear):
    """A projection with a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(input)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_stream(seed, "projected-test"))


def bank(rows: int = 4) -> AdapterBank:
    found = AdapterBank(LAYOUT, rows)
    with torch.no_grad():
        found.values.copy_(drawn(rows, LAYOUT.parameters, seed=5))
    return found


def frozen(kind: type[nn.Module], bias: bool = True) -> nn.Module:
    base = Conv1D(10, 6) if kind is Conv1D else kind(6, 10, bias=bias)  # type: ignore[call-arg]
    with torch.no_grad():
        for k, parameter in enumerate(base.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=20 + k))
    return base.requires_grad_(False)


@pytest.mark.parametrize("rows", [None, torch.tensor([2, 0, 2]), slice(1, 4)], ids=["all", "map", "range"])
@pytest.mark.parametrize(("kind", "bias"), [(nn.Linear, True), (nn.Linear, False), (Conv1D, True), (Odd, True)], ids=str)
def test_one_node_equals_two(kind: type[nn.Module], bias: bool, rows: Rows) -> None:
    base, one, two = frozen(kind, bias), bank(), bank()
    inputs = [drawn(6, 5, 6).requires_grad_() for _ in range(2)]
    found, wanted = one.project(KEY, base, inputs[0], rows, 3), two.add(KEY, base(inputs[1]), inputs[1], rows, 3)
    assert (type(found.grad_fn).__name__ == "ProjectedBackward") == (kind is not Odd)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for output in (found, wanted):
        (output * drawn(*output.shape, seed=7)).sum().backward()
    torch.testing.assert_close(one.gradients, two.gradients, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-5)
    assert float(one.gradients.abs().sum()) > 0


def test_the_first_projection_of_a_pass_has_gradients_and_asks_for_none_of_its_input() -> None:
    one, base = bank(), frozen(nn.Linear)
    one.project(KEY, base, drawn(4, 5, 6), None, 4).sum().backward()
    assert float(one.gradients.abs().sum()) > 0


def test_a_projection_with_a_hook_is_called() -> None:
    base, seen = frozen(nn.Linear), []
    base.register_forward_hook(lambda module, inputs, output: seen.append(1))
    output = bank().project(KEY, base, drawn(4, 5, 6), None, 4)
    assert seen == [1]
    assert type(output.grad_fn).__name__ != "ProjectedBackward"


def test_gradients_pass_through_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    plain, again, base = bank(), bank(), frozen(nn.Linear)
    inputs = drawn(4, 5, 6).requires_grad_()
    plain.project(KEY, base, inputs, None, 4).square().sum().backward()
    checkpoint(lambda x: again.project(KEY, base, x, None, 4), inputs, use_reentrant=False).square().sum().backward()
    assert torch.equal(plain.gradients, again.gradients)


def test_values_are_cast_once_and_again_after_every_change() -> None:
    one = bank()
    first = one.in_type(torch.bfloat16)
    assert one.in_type(torch.bfloat16) is first
    one.gradients.fill_(1.0)
    AdamW().step(one.values, one.gradients, Moments.zeros(4, LAYOUT.parameters), 0.1)
    second = one.in_type(torch.bfloat16)
    assert torch.equal(second, one.values.bfloat16())
    assert not torch.equal(first, second)
    with torch.no_grad():
        one.values[2] = 3.0
    assert torch.equal(one.in_type(torch.bfloat16), one.values.bfloat16())


def test_untrained_factors_get_no_gradient() -> None:
    """A rule that freezes A: its columns stay zero, B's do not."""
    trained = torch.zeros(LAYOUT.parameters, dtype=torch.bool)
    entry = LAYOUT.entries[0]
    trained[entry.middle : entry.end] = True
    one = AdapterBank(LAYOUT, 2, trained=trained)
    with torch.no_grad():
        one.values.copy_(drawn(2, LAYOUT.parameters))
    one.project(KEY, frozen(nn.Linear), drawn(2, 5, 6), None, 2).sum().backward()
    assert float(one.gradients[:, : entry.middle].abs().sum()) == 0.0
    assert float(one.gradients[:, entry.middle :].abs().sum()) > 0


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D], ids=str)
def test_layers_that_were_given_a_faster_product_still_go_the_short_way(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_pays", lambda: True)
    holder = nn.Sequential(frozen(kind))
    use_fast_products(holder)
    assert type(holder[0]) in (FrozenLinear, FrozenConv1D)
    output = bank().project(KEY, holder[0], drawn(4, 5, 6), None, 4)
    assert type(output.grad_fn).__name__ == "ProjectedBackward"
