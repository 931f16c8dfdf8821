"""The frozen weights as plain arrays that the machines of a cluster share, and back into a model that holds none.

A module's tensors become flat byte arrays, each tensor once however many names it has. Ray maps such arrays read-only into every process
of a machine, and a model made of them holds no copy: on a CPU, however many actors, the base is there once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Stored:
    """One tensor: what it is, and where its bytes are. `strides` as the model had them: another order would round products differently."""

    data: Bytes
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def tensor(self) -> Tensor:
        """The tensor over the same memory; not to be written to."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        if not self.data.size:
            return torch.empty(self.shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
            flat = torch.from_numpy(self.data).view(dtype)
        return flat.as_strided(self.shape, self.strides)


@dataclass(frozen=True)
class Weights:
    """All tensors of a module. `names`: module path and attribute of every place, with the number of the tensor that stands there."""

    tensors: tuple[Stored, ...]
    names: tuple[tuple[str, str, int], ...]

    @property
    def size_bytes(self) -> int:
        return sum(stored.data.nbytes for stored in self.tensors)


def store(tensor: Tensor) -> Stored:
    """The tensor's bytes on the CPU, in the order of its memory."""
    value = tensor.detach().cpu()
    order = sorted(range(value.ndim), key=value.stride, reverse=True)
    dense = value.permute(order).contiguous()
    restored = dense.permute([order.index(axis) for axis in range(value.ndim)])
    data: Bytes = dense.reshape(-1).view(torch.uint8).numpy()
    return Stored(data, str(value.dtype).removeprefix("torch."), tuple(value.shape), tuple(restored.stride()))


def weights_of(module: nn.Module) -> Weights:
    """Every parameter, buffer and loose tensor of a module, shared ones once."""
    numbers: dict[tuple[Any, ...], int] = {}
    tensors: list[Stored] = []
    names: list[tuple[str, str, int]] = []
    for path, attribute, _, value in _places(module):
        same = (value.data_ptr(), value.dtype, tuple(value.shape), tuple(value.stride())) if value.numel() else (id(value),)
        if same not in numbers:
            numbers[same] = len(tensors)
            tensors.append(store(value))
        names.append((path, attribute, numbers[same]))
    return Weights(tuple(tensors), tuple(names))


def place(module: nn.Module, weights: Weights, device: torch.device) -> None:
    """Put the weights into a module of the same structure whose tensors need not exist (device "meta"). On a CPU nothing is copied."""
    holders = {(path, attribute): (owner, value) for path, attribute, owner, value in _places(module)}
    wanted = {(path, attribute) for path, attribute, _ in weights.names}
    assert wanted == set(holders), f"the structures differ in {sorted(wanted ^ set(holders))[:3]}"
    shared: dict[tuple[int, bool], Tensor] = {}
    for path, attribute, number in weights.names:
        owner, before = holders[path, attribute]
        kind = number, isinstance(before, nn.Parameter)
        if kind not in shared:
            value = weights.tensors[number].tensor().to(device)
            shared[kind] = nn.Parameter(value, requires_grad=False) if kind[1] else value
        if attribute in owner._buffers:
            owner._buffers[attribute] = shared[kind]
        else:
            setattr(owner, attribute, shared[kind])


def _places(module: nn.Module) -> Iterator[tuple[str, str, nn.Module, Tensor]]:
    """(path, attribute, owner, tensor) of everything that holds a tensor; some rotary embeddings keep one as a plain attribute."""
    for path, owner in module.named_modules():
        found: dict[str, Any] = {**owner._parameters, **owner._buffers, **vars(owner)}
        for attribute, value in found.items():
            if isinstance(value, Tensor):
                yield path, attribute, owner, value
