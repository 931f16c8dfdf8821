"""Send what has changed since the same sample was last sent.

The payload of a packet: which samples are known, a bit each | scale f32 | u32 length and bytes of the drift, coded numbers [1 d] |
payload of the codec inside, over (rows - cache) / scale - drift.

Axes: q rows (tokens), d channels.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from splitft.compress.base import Codec, Packed, Parts, Payload, Samples, State, require_finite
from splitft.compress.cache import KEPT, Budget, Cache, Evict, Kept
from splitft.compress.coding import decode_codes, encode_codes, most_code_bytes
from splitft.compress.error_bounded import ErrorBounded
from splitft.compress.wrapper import Nested, Wrapper, on_cpu
from splitft.errors import CodecError, ConfigError

HEAD = struct.Struct("<fI")
# Of the scale: the drift is rounded to steps so small that it may be taken as exact.
DRIFT_STEPS = 256.0
LARGEST_DRIFT = 2.0**14
# What later visits take of the first one's bytes, for plans: measured on activations of the embedded model (docs/codecs.md).
LATER_SHARE = 0.2
FLOAT32_MAX = torch.finfo(torch.float32).max
# No change is more often as large as its scale: of rows that have all but vanished it would be beyond what the codec inside can count.
LARGEST_CHANGE = 2.0**20


@dataclass(frozen=True)
class Residual(Wrapper):
    """Send the change of a sample's rows against what the receiver holds of it from the last time (AQ-SGD), through `inner`.

    Both ends keep the decoded rows of every sample. The change is divided by the root mean square of the rows themselves (not of the
    change), so an `inner` codec with an absolute bound keeps one and the same relative error in every epoch: of a sample that has hardly
    changed next to nothing is left to send, and errors do not add up, for the next change is taken against what was decoded. A sample
    seen for the first time is sent against zero. Of rows that shrink to less than a millionth of their change that is the measure.

    Training moves all samples much alike: most of what changes from one epoch to the next is one and the same shift of every token. That
    mean change of a packet's known rows, the drift, is sent by itself, a few bits a channel, and taken away first (`drift`).

    `ignore`: of known samples, values that have changed by less than this many root mean squares stay as they are, which is then what they
    may be off by; with rounding to the nearest alone a value at the border of two steps would be sent back and forth. `cache_mb`, `evict`,
    `cache_dtype`, `spill`: see `compress.cache.Budget`. The default inner codec is error_bounded with a bound of an eighth.
    """

    number: ClassVar[int] = 5
    references: ClassVar[tuple[str, ...]] = ("2206.01299",)
    inner: Codec = field(default_factory=lambda: ErrorBounded(bound=0.125, of="absolute"))
    drift: bool = True
    ignore: float = 0.0
    cache_mb: float = 0.0
    evict: Evict = "new"
    cache_dtype: Kept = "bfloat16"
    spill: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._budget()
        if type(self.ignore) not in (int, float) or not 0.0 <= self.ignore <= 10.0:
            raise ConfigError(f"residual: ignore is {self.ignore!r}; allowed are numbers from 0 to 10.", "see docs/methods.md.")
        if not self.inner.mirrored:
            raise ConfigError(
                f"residual: inner is {type(self.inner).__name__.lower()}, whose two ends keep different things.",
                "what is sent is the change against what the receiver decoded: choose an inner codec the sender can follow.",
            )

    @property
    def keyed(self) -> bool:
        return True

    def scaled(self, factor: float) -> Codec:
        return replace(self, inner=self.inner.scaled(factor), ignore=min(10.0, self.ignore * factor))

    def start(self) -> Any:
        return Cache(self._budget())

    def flatten_own(self, own: Any) -> dict[str, Tensor]:
        return own.flatten()  # type: ignore[no-any-return]

    def restore_own(self, tensors: Mapping[str, Tensor]) -> Any:
        return Cache(self._budget()).restored(tensors)

    def payload_bytes(self, count: int, width: int, dtype: torch.dtype) -> int:
        return -(-count // 8) + HEAD.size + self._drift_bytes(width) + self.inner.payload_bytes(count, width, torch.float32)

    def expected_bytes(self, count: int, width: int, dtype: torch.dtype, visit: int = 0, samples: int = 1) -> float:
        inner = self.inner.expected_bytes(count, width, torch.float32, visit, samples)
        # Only a codec of variable rate has less to say of a small change.
        follows = inner < 0.9 * self.inner.payload_bytes(count, width, torch.float32)
        return HEAD.size + (LATER_SHARE if visit and follows else 1.0) * inner

    def pack_rows(self, rows: Tensor, parts: Parts) -> Packed:
        require_finite(rows, "tensor whose change is sent")
        now, width, samples = on_cpu(rows), rows.shape[1], told(parts)
        change = torch.empty_like(now)
        pairs = list(zip(torch.split(now, list(parts.counts)), torch.split(change, list(parts.counts)), strict=True))
        for state, one, (part, moved) in zip(parts.states, samples, pairs, strict=True):
            torch.sub(part, state.own.rows(one, width), out=moved)
        change.clamp_(-FLOAT32_MAX, FLOAT32_MAX)
        scales = [_scale(part, moved) for part, moved in pairs]
        for part, scale in zip(torch.split(change, list(parts.counts)), scales, strict=True):
            part.div_(scale)
        energies = [_known_energy(*told_of) * scale**2 for told_of, scale in zip(_each(parts, change), scales, strict=True)]
        drifts = [self._take_drift(cache, one, part) for cache, one, part in _each(parts, change)]
        sent, left = self._without_small(change, samples, parts, width)
        inside = parts.inside([state.inner for state in parts.states])
        packed = self.inner.pack_rows(sent, inside)
        payloads: list[Payload] = [
            _flags(cache, one, width) + HEAD.pack(scale, len(drift)) + drift + payload
            for (cache, one, _), scale, drift, payload in zip(_each(parts, now), scales, drifts, packed.payloads, strict=True)
        ]
        facts = []
        for k, (cache, one, rows_now) in enumerate(_each(parts, now)):
            fact = {**packed.facts[k], **_energies(cache, one, rows_now), "stage_drift_bytes": float(len(drifts[k]))}
            if "known_squared" in fact:
                fact["residual_squared"] = energies[k]
            if "squared_error" in fact:
                fact["squared_error"] = (fact["squared_error"] + left[k]) * scales[k] ** 2
            facts.append(fact)
        if not parts.commit and self.mirrored:
            return Packed(payloads, list(parts.states), facts)
        # The sender decodes its own packets: what it keeps is what the receiver will have, whatever the codec inside loses.
        _, after = self.unpack_rows(payloads, parts, width, rows.dtype, torch.device("cpu"))
        kept = [Nested(state.own, inner) for state, inner in zip(after, packed.states, strict=True)]
        return Packed(payloads, kept, facts)

    def unpack_rows(
        self, payloads: Sequence[Payload], parts: Parts, width: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, list[State]]:
        samples = told(parts)
        opened = [
            self._read_head(_after_flags(payload, state.own, one, width), width)
            for payload, state, one in zip(payloads, parts.states, samples, strict=True)
        ]
        scales, drifts, bodies = zip(*opened, strict=True)
        inside = parts.inside([state.inner for state in parts.states])
        for body, count in zip(bodies, parts.counts, strict=True):
            require_room(body, self.inner, count, width)
        change, inner = self.inner.unpack_rows(bodies, inside, width, torch.float32, torch.device("cpu"))
        kept = KEPT[self.cache_dtype]
        limit = largest_of_both(dtype, kept)
        decoded, states = [], []
        for state, one, part, scale, drift, within in zip(
            parts.states, samples, torch.split(change, list(parts.counts)), scales, drifts, inner, strict=True
        ):
            if drift is not None:
                part.add_(_spread(drift, _known_rows(state.own, one, width)))
            # One multiplication and one addition for each element, so that both ends round alike on any hardware.
            new = (state.own.rows(one, width) + part * scale).clamp_(-limit, limit).to(kept)
            require_finite(new, "received change")
            decoded.append(new)
            states.append(Nested(state.own.put(one, new), within))
        return torch.cat(decoded).to(device, dtype), states

    def _take_drift(self, cache: Cache, samples: Samples, change: Tensor) -> bytes:
        """The mean change of a packet's known rows, as it is sent, taken away from them in place."""
        known = _known_rows(cache, samples, change.shape[1])
        if not self.drift or not bool(known.any()):
            return b""
        mean = _chosen(change, known).mean(0, dtype=torch.float64).clamp_(-LARGEST_DRIFT, LARGEST_DRIFT)
        codes = (mean * DRIFT_STEPS).round_().to(torch.int32)
        change.sub_(_spread(codes / DRIFT_STEPS, known))
        return encode_codes(codes.numpy()[None])

    def _read_head(self, payload: Payload, width: int) -> tuple[float, Tensor | None, memoryview]:
        """Scale, drift [d] and what follows them. Raises CodecError."""
        data = memoryview(payload)
        if len(data) < HEAD.size:
            raise CodecError(f"payload of {len(data)} bytes has no room for a scale.", "the message is damaged.")
        scale, size = HEAD.unpack(data[: HEAD.size])
        if not (math.isfinite(scale) and scale > 0):
            raise CodecError(f"a received scale is {scale}.", "the message is damaged.")
        if size > len(data) - HEAD.size or (size and not self.drift):
            raise CodecError(f"a drift of {size} bytes in a payload of {len(data)}.", "the message is damaged.")
        body = data[HEAD.size :]
        if not size:
            return float(scale), None, body
        codes = decode_codes(body[:size], 1, width)
        return float(scale), torch.from_numpy(codes[0]) / DRIFT_STEPS, body[size:]

    def _drift_bytes(self, width: int) -> int:
        return most_code_bytes(1, width) if self.drift else 0

    def _without_small(self, change: Tensor, samples: Sequence[Samples], parts: Parts, width: int) -> tuple[Tensor, list[float]]:
        """The change with what is to be ignored as zero, and of each packet the energy that leaves behind."""
        if not self.ignore:
            return change, [0.0] * len(samples)
        known = torch.cat([_known_rows(state.own, one, width) for state, one in zip(parts.states, samples, strict=True)])
        small = (change.abs() < self.ignore) & known[:, None]
        left = torch.where(small, change, 0.0)
        return change - left, [_energy(part) for part in torch.split(left, list(parts.counts))]

    def _budget(self) -> Budget:
        return Budget(self.cache_mb, self.evict, self.cache_dtype, self.spill)


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


def largest_of_both(one: torch.dtype, other: torch.dtype) -> float:
    """The largest number that two floating-point types have both."""
    first, second = torch.finfo(one), torch.finfo(other)
    narrow, wide = (first, second) if first.max <= second.max else (second, first)
    if narrow.eps >= wide.eps:
        return float(narrow.max)
    # All ones but for the places that the wider type lacks.
    return float(narrow.max * (2 - wide.eps) / (2 - narrow.eps))


def _scale(rows: Tensor, change: Tensor) -> float:
    """Root mean square of a packet's rows as float32 has it, but no less than the change can be said in; one where all are zero."""
    lowest, highest = change.aminmax()
    least = max(-float(lowest), float(highest)) / LARGEST_CHANGE
    found = float(torch.tensor(max(math.sqrt(_energy(rows) / rows.numel()), least), dtype=torch.float32))
    return found if found > 0 and math.isfinite(found) else 1.0


def _known_rows(cache: Cache, samples: Samples, width: int) -> Tensor:
    """Which rows [q] of a packet belong to samples that are known."""
    return torch.repeat_interleave(torch.tensor(cache.known(samples, width), dtype=torch.bool), torch.tensor(samples.rows))


def _chosen(rows: Tensor, known: Tensor) -> Tensor:
    """The known ones of rows [q d]; without a copy where all are."""
    return rows if bool(known.all()) else rows[known]


def _spread(drift: Tensor, known: Tensor) -> Tensor:
    """A drift [d] as what each row [q d] has of it: nothing where it is not known."""
    return drift if bool(known.all()) else drift * known[:, None]


def _flags(cache: Cache, samples: Samples, width: int) -> bytes:
    """Which samples of a packet are known, a bit each: so that ends that have come apart notice."""
    return np.packbits(cache.known(samples, width)).tobytes()


def _after_flags(payload: Payload, cache: Cache, samples: Samples, width: int) -> memoryview:
    """What follows the flags. Raises CodecError when the sender knows other samples than this end."""
    data, expected = memoryview(payload), _flags(cache, samples, width)
    if bytes(data[: len(expected)]) != expected:
        raise CodecError(
            "the two ends of a stream do not know the same samples.", "one of them has lost a round: resume both from the same checkpoint."
        )
    return data[len(expected) :]


def _each(parts: Parts, rows: Tensor) -> Iterator[tuple[Cache, Samples, Tensor]]:
    """The cache, the samples and the rows of each packet."""
    for state, one, part in zip(parts.states, told(parts), torch.split(rows, list(parts.counts)), strict=True):
        yield state.own, one, part


def _known_energy(cache: Cache, samples: Samples, rows: Tensor) -> float:
    return _energy(_chosen(rows, _known_rows(cache, samples, rows.shape[1])))


def _energies(cache: Cache, samples: Samples, now: Tensor) -> dict[str, float]:
    """How many samples a packet has and how many are known, and the energy of all rows and of those."""
    known = cache.known(samples, now.shape[1])
    found = {"samples": float(len(known)), "known_samples": float(sum(known)), "squared": _energy(now)}
    return found | {"known_squared": _known_energy(cache, samples, now)} if any(known) else found
