"""products.py: oneDNN's products against float64 and against PyTorch's own, gradients included; when it steps aside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from splitft import products
from splitft.lora import AdapterBank, Layout
from splitft.products import FrozenConv1D, FrozenLinear, product, suits, use_fast_products
from splitft.rng import torch_stream
from splitft.split import Route

from ..support import VOCABULARY, split_model

if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
    pytest.skip("this PyTorch comes without oneDNN", allow_module_level=True)

SHAPES = [((1024,), 256, 1024), ((8, 128), 1024, 256), ((3, 7, 11), 96, 80), ((2, 1), 512, 2048)]


@pytest.fixture(autouse=True)
def _everything_suits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where it pays, for products of any size."""
    monkeypatch.setattr(products, "onednn_pays", lambda: True)
    monkeypatch.setattr(products, "LEAST_MULTIPLICATIONS", 1)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch_stream(seed, "products"))


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest value."""
    right = wanted.detach().double()
    return float((found.detach().double() - right).abs().max() / right.abs().max())


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("stored", ["out in", "in out"])
def test_values_and_gradients_are_those_of_float64(rows: tuple[int, ...], inputs: int, outputs: int, stored: str) -> None:
    x = drawn(*rows, inputs).requires_grad_(True)
    weight = drawn(outputs, inputs, seed=1) if stored == "out in" else drawn(inputs, outputs, seed=1).T
    bias, outer = drawn(outputs, seed=2), drawn(*rows, outputs, seed=3)
    for given in (bias, None):
        assert suits(x, weight)
        found = product(x, weight, given)
        (gradient,) = torch.autograd.grad(found, x, outer)
        wide = x.detach().double().requires_grad_(True)
        wanted = nn.functional.linear(wide, weight.double(), None if given is None else given.double())
        (wanted_gradient,) = torch.autograd.grad(wanted, wide, outer.double())
        assert found.shape == wanted.shape
        assert error(found, wanted) < 2e-6
        assert error(gradient, wanted_gradient) < 2e-6
        with torch.no_grad():
            assert torch.equal(product(x, weight, given), found)


def test_a_gradient_that_is_spread_over_its_tensor_without_memory_of_its_own() -> None:
    x, weight = drawn(64, 32).requires_grad_(True), drawn(48, 32, seed=1)
    product(x, weight).sum().backward()
    assert error(x.grad, weight.sum(0).expand(64, 32)) < 2e-6  # type: ignore[arg-type]


def test_layers_keep_their_class_their_tensors_and_their_names() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), Conv1D(6, 4), nn.Embedding(3, 3), nn.Bilinear(2, 2, 2)).requires_grad_(False)
    before, addresses = list(model.state_dict()), [one.data_ptr() for one in model.parameters()]
    x = drawn(5, 8)
    wanted = model[:3](x)
    use_fast_products(model)
    assert [type(one) for one in model] == [FrozenLinear, nn.ReLU, FrozenConv1D, nn.Embedding, nn.Bilinear]
    assert isinstance(model[0], nn.Linear)
    assert isinstance(model[2], Conv1D)
    assert list(model.state_dict()) == before
    assert [one.data_ptr() for one in model.parameters()] == addresses
    assert error(model[:3](x), wanted) < 2e-6


def test_it_steps_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = drawn(4, 8), drawn(6, 8, seed=1)
    assert suits(x, weight)
    assert not suits(x.bfloat16(), weight.bfloat16())
    assert not suits(x.double(), weight.double())
    assert not suits(x, weight.clone().requires_grad_(True)), "a weight that is trained needs a gradient"
    assert not suits(x, weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not suits(x, weight)
        assert product(x, weight).dtype == torch.bfloat16
    monkeypatch.setattr(products, "LEAST_MULTIPLICATIONS", 4 * 8 * 6 + 1)
    assert not suits(x, weight)
    assert torch.equal(product(x, weight), nn.functional.linear(x, weight))
    monkeypatch.setattr(products, "onednn_pays", lambda: False)
    layer = nn.Linear(2, 2)
    use_fast_products(layer)
    assert type(layer) is nn.Linear


def test_a_bfloat16_model_is_left_alone() -> None:
    layer = nn.Linear(4, 4).to(torch.bfloat16)
    use_fast_products(layer)
    assert type(layer) is nn.Linear


def test_whose_processor_it_is(tmp_path: Path) -> None:
    facts = tmp_path / "cpuinfo"
    facts.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\n")
    assert products.is_amd(facts)
    facts.write_text("processor\t: 0\nvendor_id\t: GenuineIntel\n")
    assert not products.is_amd(facts)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_whole_pass_and_its_adapter_gradients(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and every adapter's gradient of a model with and without."""
    found, ids = [], torch.randint(VOCABULARY, (2, 9), generator=torch_stream(5, "products"))
    for pays in (True, False):
        monkeypatch.setattr(products, "onednn_pays", lambda pays=pays: pays)
        split = split_model(family, "all")
        assert any(isinstance(one, FrozenLinear | FrozenConv1D) for one in split.modules()) is pays
        layout = Layout.of(split.keys, 3, 1.5)
        bank = AdapterBank(layout, 1)
        with torch.no_grad():
            bank.values[0] = 0.1 * drawn(layout.parameters, seed=4)
        logits = split.logits(split.run(Route(2, bank=bank), ids, None))
        logits.square().mean().backward()  # type: ignore[no-untyped-call]
        found.append((logits.detach(), bank.gradients.clone()))
    (fast, fast_gradients), (plain, gradients) = found
    assert error(fast, plain) < 5e-6
    assert error(fast_gradients, gradients) < 2e-5
