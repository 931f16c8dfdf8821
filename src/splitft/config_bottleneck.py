"""The table [bottleneck]: a trainable pair of small matrices around every cut."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from splitft.config_fields import CountOrZero, NotNegative, Section


def _cuts(value: object) -> object:
    if isinstance(value, list | tuple) and all(type(item) is int and item >= 1 for item in value):
        return tuple(sorted(set(value)))
    raise ValueError("must be a list of cuts such as [2] or [1, 2, 3]")


class BottleneckSection(Section):
    """An encoder at the sender and a decoder at the receiver of every cut, trained with the adapters (PrivateLoRA, arXiv 2311.14030)."""

    channels: CountOrZero = Field(
        0, description="Numbers that cross a cut for each token, both ways, instead of the model's width; 0: no bottleneck."
    )
    noise: NotNegative = Field(
        0.0,
        description="Noise that a client puts on what it sends, in root mean squares of its row (with clip: of the longest row), as codec "
        '"noise" does; training goes on around it. 0: none.',
    )
    clip: NotNegative = Field(0.0, description="Longest row that a client sends: longer ones are shortened, and learn so; 0: any.")
    learning_rate: Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)] = Field(
        1.0, description="The pair's learning rate, as a multiple of the adapters'; 0: it stays as it begins."
    )
    cuts: Annotated[tuple[int, ...], BeforeValidator(_cuts)] = Field(
        (), description="Cuts that have a pair; empty: those that the policy may choose."
    )
