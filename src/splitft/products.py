"""Products with frozen float32 weights by oneDNN, where PyTorch's own choice is slow.

PyTorch on x86 gives float32 products to MKL, which leaves half of an AMD processor unused: on an EPYC with AVX-512 it reaches 100 to 110
GFLOP/s a core and oneDNN, which PyTorch uses for narrower types and always brings along, 210 to 250. Type and precision are the same
(errors against float64 4e-7 and 7e-7 of the largest value), the last bits differ. Which of the two computes follows from the machine, never
from a timing, so that a run repeats its numbers.

Axes: t tokens, i input width, o output width.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Products with fewer multiplications end sooner in MKL, for a call of oneDNN takes ten microseconds to begin.
LEAST_MULTIPLICATIONS = 1 << 20
_CPU_FACTS = Path("/proc/cpuinfo")


def is_amd(facts: Path = _CPU_FACTS) -> bool:
    """Whether the processor is AMD's, by what Linux says of it; elsewhere by what Python says."""
    try:
        return "AuthenticAMD" in facts.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "AuthenticAMD" in platform.processor()


@cache
def onednn_pays() -> bool:
    """Whether this machine's float32 products are faster in oneDNN: an AMD processor, and a PyTorch that would ask MKL."""
    there = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(there) and hasattr(torch.ops.mkldnn, "_linear_pointwise") and is_amd()


def _onednn(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return result


class FrozenProduct(torch.autograd.Function):
    """inputs [.. t i], weight [o i], bias [o] -> [.. t o] by oneDNN; a gradient for the inputs only."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _onednn(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _onednn(gradients[0].contiguous(), weight.t(), None), None, None


def suits(inputs: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN should compute inputs [.. i] times weight [o i]: frozen, float32, on the CPU, and not small."""
    return (
        inputs.dtype == weight.dtype == torch.float32
        and inputs.device.type == weight.device.type == "cpu"
        and not weight.requires_grad
        and inputs.numel() * weight.shape[0] >= LEAST_MULTIPLICATIONS
        and onednn_pays()
        and not torch.is_autocast_enabled("cpu")
    )


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs [.. t i], frozen weight [o i], bias [o] -> [.. t o], like `torch.nn.functional.linear`, by whoever is faster here."""
    if not suits(inputs, weight):
        return nn.functional.linear(inputs, weight, bias)
    if torch.is_grad_enabled() and inputs.requires_grad:
        result: Tensor = FrozenProduct.apply(inputs, weight, bias)  # type: ignore[no-untyped-call]
        return result
    return _onednn(inputs, weight, bias)


class FrozenLinear(nn.Linear):
    """nn.Linear whose weight is frozen."""

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias)


class FrozenConv1D(Conv1D):  # type: ignore[misc]  # transformers is not followed
    """GPT-2's Conv1D, weight [i o], when it is frozen."""

    def forward(self, x: Tensor) -> Tensor:
        if not suits(x, self.weight.t()):
            result: Tensor = super().forward(x)
            return result
        return product(x, self.weight.t(), self.bias)


def use_fast_products(model: nn.Module) -> None:
    """Let the linear layers of a frozen model compute with `product` where oneDNN pays on this machine; they stay what they are otherwise.

    Layers of other types, and of classes derived from PyTorch's and transformers', are left alone.
    """
    if not onednn_pays():
        return
    for module in model.modules():
        kind = {nn.Linear: FrozenLinear, Conv1D: FrozenConv1D}.get(type(module))
        if kind is not None and module.weight.dtype == torch.float32:
            module.__class__ = kind
