"""Skip samples whose rows have hardly changed since they were last sent: the receiver uses its old rows once more.

The payload of a packet of m samples:

    skips u8 [ceil(m / 8)], the first sample in the lowest bit | what the codec inside makes of the other samples' rows, if there are any

Axes: q rows (tokens) of all packets together, d channels, k dimensions of a projection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from splitft.compress.base import Codec, Facts, Packed, Parts, Payload, Samples, State, require_finite
from splitft.compress.cache import Budget, Cache, Evict, Kept, Ledger, finite_as, packets_left, rows_of
from splitft.compress.wrapper import Nested, Wrapper, on_cpu
from splitft.errors import CodecError, ConfigError
from splitft.rng import torch_stream

SIMILARITY_BINS = 20


@dataclass(frozen=True)
class Temporal(Wrapper):
    """Skip a sample when its rows are as similar to those sent last as `threshold` says; else send them through `inner`.

    SplitCom, arXiv 2602.10564. The receiver keeps the decoded rows of every sample, the sender only their random projection to
    `dimensions` channels a row: so a client needs memory for `dimensions` float32 numbers a token in place of d. Similar means the cosine
    of the two projections over the whole sample; since a cosine does not see lengths, theirs may also differ by a share of
    `norm_tolerance` at most (ours). The paper names no projection; a Gaussian one is our reconstruction. It is taken of the rows as they
    were before `inner`, so a coarse `inner` does not count as change, and always against the rows sent last, so slow drift is noticed.

    `cache_mb`, `evict`, `cache_dtype` and `spill` are those of the receiver's cache (see `Budget`; reused rows have lost what
    `cache_dtype` loses). The sender follows from shapes what that cache drops, and sends such a sample in full. A dial (`scaled`) moves
    the threshold's distance from 1. No bound on an element's error is declared.
    """

    number: ClassVar[int] = 6
    references: ClassVar[tuple[str, ...]] = ("2602.10564",)
    threshold: float = 0.98
    norm_tolerance: float = 0.05
    dimensions: int = 16
    cache_mb: float = 0.0
    evict: Evict = "new"
    cache_dtype: Kept = "bfloat16"
    spill: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        number = (int, float)
        wrong = {
            f"threshold is {self.threshold!r}; allowed are cosines from -1 to 1": type(self.threshold) not in number
            or not -1 <= self.threshold <= 1,
            f"norm_tolerance is {self.norm_tolerance!r}; allowed are shares from 0": type(self.norm_tolerance) not in number
            or not self.norm_tolerance >= 0,
            f"dimensions is {self.dimensions!r}; allowed are whole numbers from 1 to 4096": type(self.dimensions) is not int
            or not 1 <= self.dimensions <= 4096,
        }
        if found := tuple(problem for problem, is_wrong in wrong.items() if is_wrong):
            raise ConfigError(f"temporal has {len(found)} wrong field{'s' if len(found) > 1 else ''}.", "see docs/methods.md.", found)
        _ = self.budget

    @property
    def budget(self) -> Budget:
        """Of the receiver's cache."""
        return Budget(self.cache_mb, self.evict, self.cache_dtype, self.spill)

    @property
    def keyed(self) -> bool:
        return True

    @property
    def mirrored(self) -> bool:
        return False

    def scaled(self, factor: float) -> Codec:
        threshold = min(1.0, max(-1.0, 1 - (1 - self.threshold) * factor))
        return replace(self, threshold=threshold, inner=self.inner.scaled(factor))

    def start(self) -> None:
        """Nothing: an end's first packet shows whether it sends (then it has a `Ledger`) or receives (a `Cache`)."""

    def flatten_own(self, own: Ledger | Cache | None) -> dict[str, Tensor]:
        return {} if own is None else own.flatten()

    def restore_own(self, tensors: Mapping[str, Tensor]) -> Ledger | Cache | None:
        if "noted" in tensors:
            return Ledger(self.budget).restored(tensors)
        return Cache(self.budget).restored(tensors) if tensors else None

    def payload_bytes(self, count: int, width: int, dtype: torch.dtype) -> int:
        return _skip_bytes(count) + self.inner.payload_bytes(count, width, dtype)

    def expected_bytes(self, count: int, width: int, dtype: torch.dtype, visit: int = 0, samples: int = 1) -> float:
        """Of samples that are not skipped, on any visit: how many are only training can show."""
        return 1.0 + self.inner.expected_bytes(count, width, dtype, visit, samples)

    def pack_rows(self, rows: Tensor, parts: Parts) -> Packed:
        require_finite(rows, "tensor to send")
        samples, width = cast("Sequence[Samples]", parts.samples), rows.shape[1]
        projection = torch.randn((width, self.dimensions), generator=torch_stream(0, "temporal projection", width))
        skips: list[list[bool]] = []
        ledgers: list[Ledger] = []
        facts: list[Facts] = []
        for part, one, state in zip(torch.split(on_cpu(rows), list(parts.counts)), samples, parts.states, strict=True):
            # A product for each packet, of a copy: its last bits may depend on how many rows go into one, and where in memory they begin.
            skip, ledger, counted = self._choose(part.clone() @ projection, one, state.own or Ledger(self.budget), width)
            skips.append(skip)
            ledgers.append(ledger)
            facts.append({**counted, "squared": float(part.double().square().sum())})
        mask, kept = rows_of(samples, [[not flag for flag in flags] for flags in skips])
        chosen = [k for k, one in enumerate(kept) if one.ids]
        payloads: list[Payload] = [np.packbits(flags, bitorder="little").tobytes() for flags in skips]
        inner = [state.inner for state in parts.states]
        if chosen:
            # Whatever the caller decodes, it is not this end's state: so the one of the codec inside is needed too.
            left = replace(packets_left(parts, chosen, inner, kept), commit=True)
            sent = self.inner.pack_rows(rows[mask.to(rows.device)], left)
            for k, payload, state, known in zip(chosen, *sent, strict=True):
                payloads[k], inner[k] = b"".join((payloads[k], payload)), state
                # The inner codec's own sums are of the samples it was given; those of all samples are ours.
                facts[k] = {**{name: value for name, value in known.items() if name != "squared_error"}, **facts[k]}
        return Packed(payloads, [Nested(*pair) for pair in zip(ledgers, inner, strict=True)], facts)

    def _choose(self, projected: Tensor, samples: Samples, ledger: Ledger, width: int) -> tuple[list[bool], Ledger, dict[str, float]]:
        """Of one packet, from its projected rows [q k]: which samples are skipped, the sender's notes after it, and the facts."""
        known = ledger.known(samples, width)
        bins: Counter[str] = Counter()
        skips: list[bool] = []
        for one, part, here in zip(samples.ids, torch.split(projected, list(samples.rows)), known, strict=True):
            similarity, change = _compared(part, ledger.entries[one].summary) if here else (-1.0, 0.0)
            skips.append(here and similarity >= self.threshold and change <= self.norm_tolerance)
            if here:
                place = int(min(max(similarity, 0.0) * SIMILARITY_BINS, SIMILARITY_BINS - 1))
                bins[f"similarity_{place:02d}"] += 1
        mask, [kept] = rows_of([samples], [[not flag for flag in skips]])
        # First those that are used again, then those that are new: the receiver does the same, so both forget the same.
        ledger = ledger.touched(_skipped(samples, skips)).put(kept, projected[mask], width)
        facts = {"samples": len(skips), "skipped": sum(skips), "stage_skips_bytes": _skip_bytes(len(skips)), **bins}
        return skips, ledger, {name: float(value) for name, value in facts.items()}

    def unpack_rows(
        self, payloads: Sequence[Payload], parts: Parts, width: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, list[State]]:
        samples = cast("Sequence[Samples]", parts.samples)
        caches: list[Cache] = [state.own or Cache(self.budget) for state in parts.states]
        skips = [_read_skips(payload, one, cache, width) for payload, one, cache in zip(payloads, samples, caches, strict=True)]
        mask, kept = rows_of(samples, [[not flag for flag in flags] for flags in skips])
        chosen = [k for k, one in enumerate(kept) if one.ids]
        rests = [memoryview(payload)[_skip_bytes(len(one.ids)) :] for payload, one in zip(payloads, samples, strict=True)]
        for rest, one in zip(rests, kept, strict=True):
            most = self.inner.payload_bytes(sum(one.rows), width, dtype) if one.ids else 0
            if len(rest) > most:
                raise CodecError(f"{len(rest)} bytes for {len(one.ids)} samples that are not skipped, at most {most}.", _REMEDY)
        inner = [state.inner for state in parts.states]
        rows = torch.empty((sum(parts.counts), width), dtype=dtype, device=device)
        if chosen:
            part = packets_left(parts, chosen, inner, kept)
            fresh, states = self.inner.unpack_rows([rests[k] for k in chosen], part, width, dtype, device)
            rows[mask.to(device)] = fresh
            for k, state in zip(chosen, states, strict=True):
                inner[k] = state
        _, again = rows_of(samples, skips)
        if any(one.ids for one in again):
            old = torch.cat([cache.rows(one, width) for cache, one in zip(caches, again, strict=True)])
            rows[~mask.to(device)] = finite_as(old, dtype).to(device)
        arrived = torch.split(rows[mask.to(device)], [sum(one.rows) for one in kept])
        caches = [cache.touched(old.ids).put(one, part) for cache, old, one, part in zip(caches, again, kept, arrived, strict=True)]
        return rows, [Nested(*pair) for pair in zip(caches, inner, strict=True)]


_REMEDY = "use the same codec with the same fields on both sides, and resume both from the same round."


def _compared(now: Tensor, before: Tensor) -> tuple[float, float]:
    """Cosine of two projections of a sample, and by which share of the old one their lengths differ. Two that are zero are the same."""
    now, before = now.double(), before.double()
    product, of_now, of_before = (float((a * b).sum()) for a, b in ((now, before), (now, now), (before, before)))
    if of_now == of_before == 0.0:
        return 1.0, 0.0
    # Nothing is similar to zero, nor to a projection that overflowed.
    if of_before == 0.0 or not np.isfinite(product + of_now + of_before):
        return -1.0, 0.0
    # One root of the product: of equal projections this is 1 exactly.
    return product / (of_now * of_before) ** 0.5 if of_now else 0.0, abs((of_now / of_before) ** 0.5 - 1)


def _skip_bytes(samples: int) -> int:
    return -(-samples // 8)


def _skipped(samples: Samples, skips: Sequence[bool]) -> list[int]:
    return [one for one, skip in zip(samples.ids, skips, strict=True) if skip]


def _read_skips(payload: Payload, samples: Samples, cache: Cache, width: int) -> list[bool]:
    """Which samples of a packet are skipped. Raises CodecError for bytes that cannot be, and for a sample that is not in the cache."""
    length = _skip_bytes(len(samples.ids))
    if len(payload) < length:
        raise CodecError(f"payload of {len(payload)} bytes for {len(samples.ids)} samples, whose skips take {length}.", _REMEDY)
    bits = np.unpackbits(np.frombuffer(payload, np.uint8, length), bitorder="little").astype(bool)
    skips: list[bool] = bits[: len(samples.ids)].tolist()
    if bool(bits[len(samples.ids) :].any()):
        raise CodecError(f"skips of more than the {len(samples.ids)} samples of a packet.", _REMEDY)
    missing = [one for one, skip, here in zip(samples.ids, skips, cache.known(samples, width), strict=True) if skip and not here]
    if missing:
        raise CodecError(f"{len(missing)} samples are skipped that this end does not hold, the first is {missing[0]}.", _REMEDY)
    return skips
