"""The CPU kernels of training, causal attention and the activation, against PyTorch's own in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from splitft.models import attention
from splitft.models.activation import fuse_activations
from splitft.models.attention import LONGEST, CausalAttention
from splitft.rng import torch_stream
from splitft.split import SplitModel

from ..support import build_sized


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_stream(seed, "kernel-test")).to(dtype)


# One tile; a ragged last block of queries; several parts of heads; both; a single token's neighbour.
SHAPES = [(3, 5, 8), (4, 64, 8), (2, 200, 16), (130, 20, 4), (70, 150, 4), (1, 2, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_and_its_gradients_equal_those_of_pytorch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    given = [drawn(*shape, seed=k, dtype=dtype).requires_grad_() for k in range(3)]
    outer = drawn(*shape, seed=9, dtype=dtype)
    exact = [one.detach().double().requires_grad_() for one in given]
    wanted = F.scaled_dot_product_attention(*exact, is_causal=True, scale=0.3)
    found = CausalAttention.apply(*given, 0.3)  # type: ignore[no-untyped-call]
    tolerance = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(found.double(), wanted, **tolerance)
    for mine, theirs in zip(torch.autograd.grad(found, given, outer), torch.autograd.grad(wanted, exact, outer.double()), strict=True):
        torch.testing.assert_close(mine.double(), theirs, **tolerance)


def test_attention_never_looks_ahead() -> None:
    query, key, value = (drawn(2, 150, 8, seed=k) for k in range(3))
    found = CausalAttention.apply(query, key, value, 0.3)  # type: ignore[no-untyped-call]
    key[:, 100:], value[:, 100:] = 1e3, 1e6
    later = CausalAttention.apply(query, key, value, 0.3)  # type: ignore[no-untyped-call]
    assert torch.equal(found[:, :100], later[:, :100])


@pytest.mark.parametrize(
    ("change", "plain"),
    [
        ({}, True),
        ({"mask": torch.zeros(1, 1, 6, 6)}, False),
        ({"options": {"dropout": 0.1}}, False),
        ({"options": {"softcap": 30.0}}, False),
        ({"options": {"is_causal": False}}, False),
        ({"module": SimpleNamespace(is_causal=False)}, False),
        ({"query": torch.zeros(2, 3, 1, 4)}, False),
        ({"query": torch.zeros(2, 3, 6, 4, dtype=torch.float64)}, False),
        ({"query": torch.zeros(1, 1, LONGEST + 1, 4), "key": torch.zeros(1, 1, LONGEST + 1, 4)}, False),
    ],
    ids=["plain", "mask", "dropout", "softcap", "not causal", "module not causal", "one query", "float64", "long"],
)
def test_only_plain_causal_attention_takes_this_way(change: dict[str, object], plain: bool) -> None:
    given = {"module": nn.Identity(), "query": torch.zeros(2, 3, 6, 4), "key": torch.zeros(2, 3, 6, 4), "mask": None, "options": {}}
    assert attention._is_plain(**{**given, **change}) is plain  # type: ignore[arg-type]


def test_grouped_heads_and_other_ways_give_what_pytorch_gives() -> None:
    """Six query heads over two key heads, with and without a mask: with one, PyTorch's kernel computes it."""
    module = SimpleNamespace(is_causal=True, num_key_value_groups=3, training=False)
    query, key, value = drawn(2, 6, 9, 8), drawn(2, 2, 9, 8, seed=1), drawn(2, 2, 9, 8, seed=2)
    wanted = F.scaled_dot_product_attention(query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), is_causal=True)
    mask = torch.ones(9, 9).tril().bool()[None, None]
    for given in (None, mask):
        found, _ = attention._attend(module, query, key, value, given)  # type: ignore[arg-type]
        torch.testing.assert_close(found, wanted.transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_gpt2s_activation_is_replaced_by_the_same_function_and_no_other() -> None:
    model = build_sized("gpt2", 20)
    written_out = next(module for module in model.modules() if type(module).__name__ == "NewGELUActivation")
    values = torch.linspace(-9, 9, 999)
    torch.testing.assert_close(nn.GELU(approximate="tanh")(values), written_out(values), rtol=1e-5, atol=1e-6)
    fuse_activations(model)
    assert not any(type(module).__name__ == "NewGELUActivation" for module in model.modules())
    other = nn.Sequential(nn.GELU(), nn.SiLU())
    fuse_activations(other)
    assert [type(module) for module in other] == [nn.GELU, nn.SiLU]


def test_padding_needs_no_mask_where_the_family_was_found_not_to_look_there() -> None:
    from splitft.selfcheck import inspect_family

    model = build_sized("gpt2", 20)
    split = SplitModel(model, inspect_family(model.config, "gpt2"))
    mask = torch.tensor([[1, 1, 0]])
    assert split.anatomy.maskless
    assert split.needed_mask(mask) is None
