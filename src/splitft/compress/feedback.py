"""Error feedback: what a lossy codec loses of a sample is added to it when it is sent the next time.

The payload is that of the inner codec; the receiver knows of nothing.

Axes: q rows (tokens), d channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from splitft.compress.base import Codec, Facts, Packed, Parts, Payload, Samples, State, require_finite, require_samples
from splitft.compress.bits import BF16_MAX
from splitft.compress.cache import KEPT, Budget, Cache, Evict, Kept
from splitft.compress.randk import RandK
from splitft.compress.topk import TopK
from splitft.compress.wrapper import Nested, Wrapper, on_cpu
from splitft.errors import ConfigError

STREAM = "stream"


class Owed(NamedTuple):
    """What the receiver has not been given yet: rows by sample, and the rows [q d] of a stream without samples."""

    samples: Cache
    stream: Tensor | None = None


@dataclass(frozen=True)
class Feedback(Wrapper):
    """Send x + e through `inner`, where e is what is still owed; then e becomes `decay` * (x + e - what arrived).

    Over many sends of about the same values the mean of what arrives is right, however coarse the inner codec is (arXiv 1901.09847; there
    for one stream of gradients, e by sample is ours). e lies at the sender alone: by sample where the packet's samples are told
    (`cache_mb`, `evict`, `cache_dtype`, `spill` as in `Budget`; a sample that is not held is owed nothing), else for the last packet if
    it had the same shape. `decay` below 1 forgets old errors. Needs an inner codec whose error is smaller than what it sends: `topk`,
    `quantize`, and `randk` only if it is not unbiased: the other is refused, however deep inside.
    """

    number: ClassVar[int] = 10
    references: ClassVar[tuple[str, ...]] = ("1901.09847", "2206.01299")
    inner: Codec = field(default_factory=TopK)
    decay: float = 1.0
    cache_mb: float = 0.0
    evict: Evict = "new"
    cache_dtype: Kept = "float32"
    spill: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inner.mirrored:
            name = type(self.inner).__name__.lower()
            raise ConfigError(f"feedback: inner is {name}, whose sender cannot tell what arrives.", "put feedback around once, outermost.")
        if _multiplies(self.inner):
            raise ConfigError(
                "feedback: inner is or contains a randk with unbiased = true, whose error may be larger than what it sends: "
                "what is owed would grow without end.",
                "set unbiased = false in that randk.",
            )
        if type(self.decay) not in (int, float) or not 0.0 < self.decay <= 1.0:
            raise ConfigError(f"feedback: decay is {self.decay!r}; allowed are numbers above 0 up to 1.", "see docs/methods.md.")
        self.start()

    @property
    def hears_samples(self) -> bool:
        return True

    @property
    def mirrored(self) -> bool:
        return False

    def start(self) -> Owed:
        return Owed(Cache(Budget(self.cache_mb, self.evict, self.cache_dtype, self.spill)))

    def flatten_own(self, own: Owed) -> dict[str, Tensor]:
        return {**own.samples.flatten(), **({} if own.stream is None else {STREAM: own.stream})}

    def restore_own(self, tensors: Mapping[str, Tensor]) -> Owed:
        empty = self.start()
        return Owed(empty.samples.restored(tensors), tensors.get(STREAM))

    def pack_rows(self, rows: Tensor, parts: Parts) -> Packed:
        require_finite(rows, "tensor to send with what is owed")
        wide, counts = on_cpu(rows), list(parts.counts)
        for told, count in zip(parts.samples, counts, strict=True):
            if told is not None:
                require_samples(told, count, "feedback")
        owned: list[Owed] = [state.own for state in parts.states]
        owing = [_owing(*each, rows.shape[1]) for each in zip(owned, parts.samples, counts, strict=True)]
        wanted = wide + torch.cat(owing)
        limit = min(torch.finfo(rows.dtype).max, BF16_MAX)
        sent = wanted.clamp(-limit, limit).to(rows.dtype)
        # Decoded below at the same states: that gives the states after it too.
        inside = replace(parts.inside([state.inner for state in parts.states]), commit=False)
        packed = self.inner.pack_rows(sent, inside)
        arrived, states = self.inner.unpack_rows(packed.payloads, inside, rows.shape[1], rows.dtype, torch.device("cpu"))
        most = torch.finfo(KEPT[self.cache_dtype]).max
        left = (wanted - arrived.float()).mul_(self.decay).clamp_(-most, most)
        split = [torch.split(tensor, counts) for tensor in (left, wide, arrived)]
        return Packed(
            packed.payloads,
            [
                Nested(_with(own, samples, rest), state)
                for own, samples, rest, state in zip(owned, parts.samples, split[0], states, strict=True)
            ],
            [_facts(facts, x, y) for facts, x, y in zip(packed.facts, split[1], split[2], strict=True)],
        )

    def unpack_rows(
        self, payloads: Sequence[Payload], parts: Parts, width: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, list[State]]:
        rows, states = self.inner.unpack_rows(payloads, parts.inside([state.inner for state in parts.states]), width, dtype, device)
        return rows, [Nested(before.own, state) for before, state in zip(parts.states, states, strict=True)]

    def payload_bytes(self, count: int, width: int, dtype: torch.dtype) -> int:
        return self.inner.payload_bytes(count, width, dtype)

    def expected_bytes(self, count: int, width: int, dtype: torch.dtype, visit: int = 0, samples: int = 1) -> float:
        return self.inner.expected_bytes(count, width, dtype, visit, samples)


def _multiplies(codec: Codec) -> bool:
    """Whether a codec is an unbiased randk, or one is inside it."""
    if isinstance(codec, RandK) and codec.unbiased:
        return True
    return isinstance(codec, Wrapper) and _multiplies(codec.inner)


def _owing(own: Owed, samples: Samples | None, count: int, width: int) -> Tensor:
    """What is owed to the rows of a packet [q d], float32."""
    if samples is not None:
        return own.samples.rows(samples, width)
    same = own.stream is not None and tuple(own.stream.shape) == (count, width)
    return own.stream.float() if own.stream is not None and same else torch.zeros(count, width)


def _with(own: Owed, samples: Samples | None, left: Tensor) -> Owed:
    """What is owed after a packet of which `left` [q d] did not arrive."""
    if samples is not None:
        return own._replace(samples=own.samples.put(samples, left))
    return own._replace(stream=left.to(KEPT[own.samples.budget.kept], copy=True))


def _facts(inner: Facts, rows: Tensor, arrived: Tensor) -> dict[str, float]:
    """Energy and error of a packet, those of its own rows in place of the inner codec's, which saw rows with what was owed."""
    known: dict[str, Any] = {**inner}
    known["squared"] = float(rows.double().square().sum())
    known["squared_error"] = float((rows.double() - arrived.double()).square().sum())
    return known
