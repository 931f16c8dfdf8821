"""Weights in shared memory: a model made of them is the model they came from, bit for bit, and holds no copy. Ray is not needed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from splitft.engine.ray_weights import place, store, weights_of
from splitft.models.anatomy import without_dropout
from splitft.selfcheck import inspect_family
from splitft.split import Route, SplitModel

from ..support import FAMILIES, VOCABULARY, build, split_model

CHOSEN = ("gpt2", "bloom", "llama-tied", "gemma3", "granite", "mixtral", "opt-350m-layout")


def skeleton(family: str) -> SplitModel:
    """The same structure without a single value."""
    config = without_dropout(FAMILIES[family]())
    config._attn_implementation = build(family).config._attn_implementation
    with torch.device("meta"):
        model = type(build(family))(config)
    return SplitModel(model.eval(), inspect_family(FAMILIES[family](), family, "sdpa"))


@pytest.mark.parametrize("family", CHOSEN)
def test_a_model_made_of_stored_weights_computes_the_same_bits(family: str) -> None:
    whole, copy = split_model(family), skeleton(family)
    place(copy, weights_of(whole), torch.device("cpu"))
    ids = torch.arange(24).reshape(2, 12) * 3 % VOCABULARY
    with torch.no_grad():
        found, wanted = (one.logits(one.run(Route(2), ids, None)) for one in (copy, whole))
    assert torch.equal(found, wanted)
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in copy.parameters())


def test_nothing_is_copied_and_shared_tensors_are_stored_once() -> None:
    whole, copy = split_model("llama-tied"), skeleton("llama-tied")
    weights = weights_of(whole)
    stored = {one.data.ctypes.data for one in weights.tensors}
    assert weights.size_bytes == sum(one.numel() * one.element_size() for one in {*whole.parameters(), *whole.buffers()})
    for one in weights.tensors:
        one.data.flags.writeable = False  # as Ray maps them
    place(copy, weights, torch.device("cpu"))
    assert {parameter.data_ptr() for parameter in copy.parameters()} <= stored
    assert copy.head.weight is copy.model.get_input_embeddings().weight


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12, dtype=torch.float32).reshape(3, 4).t(),
        torch.arange(24, dtype=torch.bfloat16).reshape(2, 3, 4).permute(2, 0, 1),
        torch.arange(8, dtype=torch.float32)[::2],
        torch.tensor(3.5),
        torch.zeros(0, 4),
        torch.ones(1, 3).expand(5, 3),
        torch.tensor([True, False]),
    ],
    ids=["transposed", "permuted", "strided", "scalar", "empty", "expanded", "bool"],
)
def test_any_tensor_comes_back(tensor: torch.Tensor) -> None:
    back = store(tensor).tensor()
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)


def test_the_order_in_memory_is_kept() -> None:
    """A product of a transposed weight rounds otherwise than one of its copy."""
    weight = torch.randn(8, 6).t()
    assert store(weight).tensor().stride() == weight.stride()


def test_a_loose_tensor_and_a_buffer_travel() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loose = torch.tensor([1.0, 2.0])
            self.register_buffer("table", torch.tensor([3, 4]), persistent=False)

    whole = Odd()
    with torch.device("meta"):
        copy = Odd()
    place(copy, weights_of(whole), torch.device("cpu"))
    assert copy.loose.tolist() == [1.0, 2.0]
    assert copy.table.tolist() == [3, 4]  # type: ignore[operator]


def test_another_structure_is_refused() -> None:
    with pytest.raises(AssertionError, match="structures differ"):
        place(nn.Linear(2, 2, bias=False), weights_of(nn.Linear(2, 2)), torch.device("cpu"))
