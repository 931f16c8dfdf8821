"""Send what has changed since the same sample was last sent.

The payload of a packet: scale f32 | payload of the codec inside, over (rows - cache) / scale.

Axes: q rows (tokens), d channels.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from splitft.compress.base import Codec, Packed, Parts, Payload, Samples, State, require_finite
from splitft.compress.cache import KEPT, Budget, Cache, Evict, Kept
from splitft.compress.error_bounded import ErrorBounded
from splitft.compress.wrapper import Nested, Wrapper, on_cpu
from splitft.errors import CodecError, ConfigError

SCALE = struct.Struct("<f")
# What later visits take of the first one's bytes, for plans: measured on activations of the embedded model (docs/codecs.md).
LATER_SHARE = 0.2


@dataclass(frozen=True)
class Residual(Wrapper):
    """Send the change of a sample's rows against what the receiver holds of it from the last time (AQ-SGD), through `inner`.

    Both ends keep the decoded rows of every sample. The change is divided by the root mean square of the rows themselves (not of the
    change), so an `inner` codec with an absolute bound keeps one and the same relative error in every epoch: of a sample that has hardly
    changed next to nothing is left to send, and errors do not add up, for the next change is taken against what was decoded. A sample
    seen for the first time is sent against zero. `cache_mb`, `evict`, `cache_dtype`, `spill`: see `compress.cache.Budget`. The default
    inner codec is error_bounded with a bound of an eighth.
    """

    number: ClassVar[int] = 5
    references: ClassVar[tuple[str, ...]] = ("2206.01299",)
    inner: Codec = field(default_factory=lambda: ErrorBounded(bound=0.125, of="absolute"))
    cache_mb: float = 0.0
    evict: Evict = "new"
    cache_dtype: Kept = "bfloat16"
    spill: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._budget()
        if not self.inner.mirrored:
            raise ConfigError(
                f"residual: inner is {type(self.inner).__name__.lower()}, whose two ends keep different things.",
                "what is sent is the change against what the receiver decoded: choose an inner codec the sender can follow.",
            )

    @property
    def keyed(self) -> bool:
        return True

    def start(self) -> Any:
        return Cache(self._budget())

    def flatten_own(self, own: Any) -> dict[str, Tensor]:
        return own.flatten()  # type: ignore[no-any-return]

    def restore_own(self, tensors: Mapping[str, Tensor]) -> Any:
        return Cache(self._budget()).restored(tensors)

    def payload_bytes(self, count: int, width: int, dtype: torch.dtype) -> int:
        return SCALE.size + self.inner.payload_bytes(count, width, torch.float32)

    def expected_bytes(self, count: int, width: int, dtype: torch.dtype, visit: int = 0) -> float:
        inner = self.inner.expected_bytes(count, width, torch.float32, visit)
        # Only a codec of variable rate has less to say of a small change.
        follows = inner < 0.9 * self.inner.payload_bytes(count, width, torch.float32)
        return SCALE.size + (LATER_SHARE if visit and follows else 1.0) * inner

    def pack_rows(self, rows: Tensor, parts: Parts) -> Packed:
        require_finite(rows, "tensor whose change is sent")
        now, width, samples = on_cpu(rows), rows.shape[1], told(parts)
        before = torch.cat([state.own.rows(one, width) for state, one in zip(parts.states, samples, strict=True)])
        change = now - before
        scales = [_scale(part) for part in torch.split(now, list(parts.counts))]
        for part, scale in zip(torch.split(change, list(parts.counts)), scales, strict=True):
            part.div_(scale)
        inside = parts.inside([state.inner for state in parts.states])
        packed = self.inner.pack_rows(change, inside)
        payloads: list[Payload] = [SCALE.pack(scale) + payload for scale, payload in zip(scales, packed.payloads, strict=True)]
        facts = [
            {**known, **self._facts(state.own, one, part, moved * scale, known, scale)}
            for known, state, one, part, moved, scale in zip(
                packed.facts,
                parts.states,
                samples,
                torch.split(now, list(parts.counts)),
                torch.split(change, list(parts.counts)),
                scales,
                strict=True,
            )
        ]
        if not parts.commit and self.mirrored:
            return Packed(payloads, list(parts.states), facts)
        # The sender decodes its own packets: what it keeps is what the receiver will have, whatever the codec inside loses.
        _, after = self.unpack_rows(payloads, parts, width, rows.dtype, torch.device("cpu"))
        kept = [Nested(state.own, inner) for state, inner in zip(after, packed.states, strict=True)]
        return Packed(payloads, kept, facts)

    def unpack_rows(
        self, payloads: Sequence[Payload], parts: Parts, width: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, list[State]]:
        samples, scales = told(parts), [_read_scale(payload) for payload in payloads]
        inside = parts.inside([state.inner for state in parts.states])
        bodies = [memoryview(payload)[SCALE.size :] for payload in payloads]
        for body, count in zip(bodies, parts.counts, strict=True):
            require_room(body, self.inner, count, width)
        change, inner = self.inner.unpack_rows(bodies, inside, width, torch.float32, torch.device("cpu"))
        limit = min(torch.finfo(dtype).max, torch.finfo(KEPT[self.cache_dtype]).max)
        decoded, states = [], []
        for state, one, part, scale, within in zip(
            parts.states, samples, torch.split(change, list(parts.counts)), scales, inner, strict=True
        ):
            # One multiplication and one addition for each element, so that both ends round alike on any hardware.
            new = (state.own.rows(one, width) + part * scale).clamp_(-limit, limit).to(KEPT[self.cache_dtype])
            require_finite(new, "received change")
            decoded.append(new)
            states.append(Nested(state.own.put(one, new), within))
        return torch.cat(decoded).to(device, dtype), states

    def _budget(self) -> Budget:
        return Budget(self.cache_mb, self.evict, self.cache_dtype, self.spill)

    def _facts(
        self, cache: Cache, samples: Samples, now: Tensor, change: Tensor, inner: Mapping[str, float], scale: float
    ) -> dict[str, float]:
        """Energies of the rows and of their change, over known samples; the inner codec's error in units of the rows."""
        known = cache.known(samples, now.shape[1])
        found = {"samples": float(len(known)), "known_samples": float(sum(known)), "squared": _energy(now)}
        if "squared_error" in inner:
            found["squared_error"] = inner["squared_error"] * scale * scale
        if any(known):
            here = torch.repeat_interleave(torch.tensor(known), torch.tensor(samples.rows))
            found |= {"residual_squared": _energy(change[here]), "known_squared": _energy(now[here])}
        return found


def told(parts: Parts) -> list[Samples]:
    """The samples of packets for a codec that cannot do without."""
    return [one for one in parts.samples if one is not None]


def require_room(body: memoryview, inner: Codec, count: int, width: int) -> None:
    """CodecError when the payload for a codec inside another one is longer than any it makes of so many float32 rows."""
    most = inner.payload_bytes(count, width, torch.float32)
    if len(body) > most:
        raise CodecError(
            f"{len(body)} bytes for {count} rows of {width} channels, {type(inner).__name__.lower()} needs at most {most}.",
            "use the same codec with the same fields on both sides.",
        )


def _energy(values: Tensor) -> float:
    return float(values.double().square().sum())


def _scale(rows: Tensor) -> float:
    """Root mean square of a packet's rows as float32 has it; one where all are zero."""
    found = float(torch.tensor(math.sqrt(_energy(rows) / rows.numel()), dtype=torch.float32))
    return found if found > 0 and math.isfinite(found) else 1.0


def _read_scale(payload: Payload) -> float:
    if len(payload) < SCALE.size:
        raise CodecError(f"payload of {len(payload)} bytes has no room for a scale.", "the message is damaged.")
    scale = float(SCALE.unpack(payload[: SCALE.size])[0])
    if not (math.isfinite(scale) and scale > 0):
        raise CodecError(f"a received scale is {scale}.", "the message is damaged.")
    return scale
