"""A codec over another codec: what all of them have in common.

Its state is its own beside that of the codec inside; its payload holds what it says itself, and the payload of the codec inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from splitft.compress.base import Codec, State
from splitft.compress.cast import Cast
from splitft.errors import ConfigError

PREFIX = "inner."


class Nested(NamedTuple):
    """State of a wrapper: what it remembers itself, and what the codec inside does."""

    own: Any
    inner: State


@dataclass(frozen=True)
class Wrapper(Codec):
    """A codec that works over `inner`. What concerns both, such as random numbers and samples, follows from the inner one where a subclass
    has none of its own."""

    # Whether what it does follows from the inner codec's payload alone.
    works_on_payload: ClassVar[bool] = False
    inner: Codec = field(default_factory=Cast)

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Codec):
            raise ConfigError(
                f"{type(self).__name__.lower()}: inner is {self.inner!r}; allowed is a codec.",
                'write inner = "cast", or a table with a name and that codec\'s fields.',
            )
        if self.inner.outermost and not self.works_on_payload:
            name, outer = type(self.inner).__name__.lower(), type(self).__name__.lower()
            raise ConfigError(f"{outer}: inner is {name}, whose work {outer} would undo.", f"put {name} outside, and {outer} in its inner.")

    @property
    def outermost(self) -> bool:  # type: ignore[override]  # of the codec inside, not of the class
        return self.inner.outermost

    @property
    def draws(self) -> bool:
        return self.inner.draws

    @property
    def keyed(self) -> bool:
        return self.inner.keyed

    @property
    def hears_samples(self) -> bool:
        return self.keyed or self.inner.hears_samples

    @property
    def mirrored(self) -> bool:
        return self.inner.mirrored

    def for_adapters(self, rank: int, gradients: bool) -> Codec:
        return replace(self, inner=self.inner.for_adapters(rank, gradients))

    def scaled(self, factor: float) -> Codec:
        return replace(self, inner=self.inner.scaled(factor))

    def stride_bytes(self, dtype: torch.dtype) -> int:
        return self.inner.stride_bytes(dtype)

    def init(self) -> State:
        return Nested(self.start(), self.inner.init())

    def start(self) -> Any:
        """What it remembers itself before the first packet."""
        return None

    def flatten(self, state: State) -> dict[str, Tensor]:
        inner = {PREFIX + name: tensor for name, tensor in self.inner.flatten(state.inner).items()}
        return {**self.flatten_own(state.own), **inner}

    def restore(self, tensors: Mapping[str, Tensor]) -> State:
        inner = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
        return Nested(self.restore_own(own), self.inner.restore(inner))

    def flatten_own(self, own: Any) -> dict[str, Tensor]:
        """Its own part of `flatten`."""
        return {}

    def restore_own(self, tensors: Mapping[str, Tensor]) -> Any:
        """The inverse of `flatten_own`."""
        return self.start()


def on_cpu(rows: Tensor) -> Tensor:
    """Rows as float32 on the processor, where packets are made."""
    return rows.detach().to("cpu", torch.float32)
