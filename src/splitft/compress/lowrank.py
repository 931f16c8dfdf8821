"""Send what has changed since a sample was sent last as a matrix of low rank, in whole numbers of few bits.

The payload of a packet with m samples that both ends know:

    ranks u8 [m] | of each of them: steps bf16 [k 2], codes [k ceil((t + d) * bits / 8)] | the other samples' rows by the codec inside

Axes: q rows (tokens) of all packets together, t rows of a sample, d channels, k components.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from splitft.compress.base import Codec, Facts, Packed, Parts, Payload, Samples, State, require_finite
from splitft.compress.cache import Budget, Cache, Evict, Kept, finite_as, packets_left, rows_of
from splitft.compress.factors import (
    MOST_COMPONENTS,
    Factors,
    Triplets,
    enough,
    factor_bytes,
    largest_triplets,
    quantised,
    read_factors,
    write_factors,
)
from splitft.compress.stateless import slices
from splitft.compress.wrapper import Nested, Wrapper, on_cpu
from splitft.errors import CodecError, ConfigError

BITS = (8, 4)
LEAST_ENERGY = 0.001


RANK_ALONE = 16


@dataclass(frozen=True)
class LowRank(Wrapper):
    """Both ends add the same `rank` components, in `bits` bits (8 or 4), to the last decoded rows of a sample; a new one goes through
    `inner`.

    SplitLite, arXiv 2608.23018: what changes in a sample's rows from epoch to epoch has about twice the rank of the adapters (four times
    for gradients), so it is sent as a truncated singular value decomposition, rounded without bias. The paper's own settings for adapters
    of rank r are 2r and 4 bits for activations, 4r and 8 bits for gradients: `rank = 0` takes 2r and 4r from the run. The change is taken
    against what the receiver holds, so what one visit loses the next one sends. `energy` above zero: the smallest rank, up to `rank`, that
    keeps this share of the change's squares, for each sample by itself (ours).

    The paper leaves open how codes are scaled and how ends on different hardware stay equal. Our reconstruction: a step in bfloat16 for
    each column and each row, and sums that are exact in float64 (see `factors`). The search for the components is randomised with a fixed
    guess; only the sender makes it. Unknown samples, and those the cache has no room for (`cache_mb`, `evict`, `cache_dtype`, `spill`, see
    `Budget`), are sent by `inner`. A dial (`scaled`) moves `energy`, or `rank`. No bound on an element's error is declared.
    """

    number: ClassVar[int] = 7
    references: ClassVar[tuple[str, ...]] = ("2608.23018", "0909.4061")
    rank: int = 0
    energy: float = 0.0
    bits: int = 4
    cache_mb: float = 0.0
    evict: Evict = "new"
    cache_dtype: Kept = "bfloat16"
    spill: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = {
            f"rank is {self.rank!r}; allowed are whole numbers from 0 to {MOST_COMPONENTS}": type(self.rank) is not int
            or not 0 <= self.rank <= MOST_COMPONENTS,
            f"energy is {self.energy!r}; allowed are shares from 0 (off) to 1": type(self.energy) not in (int, float)
            or not 0 <= self.energy <= 1,
            f"bits is {self.bits!r}; allowed are 8 and 4": type(self.bits) is not int or self.bits not in BITS,
            f"inner is {type(self.inner).__name__.lower()}, whose two ends remember different things": not self.inner.mirrored,
        }
        if found := tuple(problem for problem, is_wrong in wrong.items() if is_wrong):
            raise ConfigError(f"lowrank has {len(found)} wrong field{'s' if len(found) > 1 else ''}.", "see docs/methods.md.", found)
        _ = self.budget

    @property
    def budget(self) -> Budget:
        """Of the cache at each end."""
        return Budget(self.cache_mb, self.evict, self.cache_dtype, self.spill)

    @property
    def draws(self) -> bool:
        return True

    @property
    def keyed(self) -> bool:
        return True

    @property
    def most_rank(self) -> int:
        """The largest rank of a change; without a run to take it from, RANK_ALONE."""
        return self.rank or RANK_ALONE

    def for_adapters(self, rank: int, gradients: bool) -> Codec:
        inner = self.inner.for_adapters(rank, gradients)
        return replace(self, inner=inner, rank=self.rank or min(MOST_COMPONENTS, rank * (4 if gradients else 2)))

    def scaled(self, factor: float) -> Codec:
        inner = self.inner.scaled(factor)
        if self.energy:
            return replace(self, inner=inner, energy=min(1.0, max(LEAST_ENERGY, 1 - (1 - self.energy) * factor**2)))
        return replace(self, inner=inner, rank=min(MOST_COMPONENTS, max(1, round(min(self.most_rank / factor, MOST_COMPONENTS)))))

    def start(self) -> Cache:
        return Cache(self.budget)

    def flatten_own(self, own: Cache) -> dict[str, Tensor]:
        return own.flatten()

    def restore_own(self, tensors: Mapping[str, Tensor]) -> Cache:
        return self.start().restored(tensors)

    def payload_bytes(self, count: int, width: int, dtype: torch.dtype) -> int:
        """An upper bound however the rows are divided into samples, known ones and others: a sample of t rows has at most t components,
        so it takes most for its rows when t is one, but for what the codes of a column take."""
        most = min(self.most_rank, count, width)
        return count * (1 + factor_bytes(most, width, self.bits)) + self.inner.payload_bytes(count, width, dtype)

    def expected_bytes(self, count: int, width: int, dtype: torch.dtype, visit: int = 0, samples: int = 1) -> float:
        """With `energy` the rank is taken to be the largest."""
        if not visit:
            return self.inner.expected_bytes(count, width, dtype, visit, samples)
        tokens = max(1, count // samples)
        return samples * (1.0 + min(self.most_rank, tokens, width) * factor_bytes(tokens, width, self.bits))

    def pack_rows(self, rows: Tensor, parts: Parts) -> Packed:
        require_finite(rows, "tensor to send")
        wide, samples, width = on_cpu(rows), cast("Sequence[Samples]", parts.samples), rows.shape[1]
        caches: list[Cache] = [state.own for state in parts.states]
        known = [cache.known(one, width) for cache, one in zip(caches, samples, strict=True)]
        mask, fresh = rows_of(samples, [[not here for here in flags] for flags in known])
        chosen = [k for k, one in enumerate(fresh) if one.ids]
        inner = [state.inner for state in parts.states]
        decoded, first = wide.clone(), [b""] * len(caches)
        facts: list[Facts] = [{}] * len(caches)
        if chosen:
            place, part = mask.to(rows.device), packets_left(parts, chosen, inner, fresh)
            sent = self.inner.pack_rows(rows[place], part)
            # What the receiver will hold: read from the same bytes.
            decoded_first, states = self.inner.unpack_rows(sent.payloads, part, width, rows.dtype, torch.device("cpu"))
            decoded[mask] = decoded_first.float()
            for k, payload, state, counted in zip(chosen, sent.payloads, states, sent.facts, strict=True):
                first[k], inner[k], facts[k] = bytes(payload), state, counted
        payloads: list[Payload] = []
        for k, (one, part_decoded) in enumerate(zip(samples, torch.split(decoded, list(parts.counts)), strict=True)):
            part_sent = torch.split(wide, list(parts.counts))[k]
            changes, counted = self._pack_changes(part_sent, part_decoded, one, caches[k], known[k], parts.generators[k])
            payloads.append(b"".join((*changes, first[k])))
            error = float((part_sent.double() - part_decoded.double()).square().sum())
            facts[k] = {**facts[k], **counted, "squared": float(part_sent.double().square().sum()), "squared_error": error}
            if parts.commit:
                caches[k] = caches[k].put(one, part_decoded)
        return Packed(payloads, [Nested(*pair) for pair in zip(caches, inner, strict=True)], facts)

    def _pack_changes(
        self, sent: Tensor, decoded: Tensor, samples: Samples, cache: Cache, known: Sequence[bool], generator: torch.Generator | None
    ) -> tuple[list[bytes | memoryview], dict[str, float]]:
        """The bytes of one packet's known samples, whose rows in `decoded` become what the receiver will have; and the facts."""
        before = cache.rows(samples, sent.shape[1])
        places = _places(samples, known)
        changes = [sent[place].double() - before[place].double() for place in places]
        found: list[tuple[Triplets, int]] = [(_EMPTY, 0)] * len(changes)
        for same in _by_length([len(change) for change in changes]).values():
            triplets = largest_triplets(torch.stack([changes[j] for j in same]), self.most_rank)
            for position, j in enumerate(same):
                found[j] = triplets, position
        ranks, pieces = [], []
        for place, (triplets, j) in zip(places, found, strict=True):
            limit = enough(triplets.energies[j], triplets.totals[j], self.energy) if self.energy else triplets.energies.shape[1]
            factors = quantised(triplets.columns[j, :, :limit], triplets.rows[j, :limit], self.bits, generator)
            decoded[place] = _applied(before[place], factors)
            ranks.append(len(factors.steps))
            pieces += write_factors(factors, self.bits)
        facts = {
            "samples": float(len(known)),
            "residual_squared": float(sum(float(change.square().sum()) for change in changes)),
            "known_squared": float(sum(float(sent[place].double().square().sum()) for place in places)),
            "rank_sum": float(sum(ranks)),
            "rank_samples": float(len(ranks)),
            "stage_ranks_bytes": float(len(ranks)),
            "stage_steps_bytes": 4.0 * sum(ranks),
            "stage_codes_bytes": float(sum(map(len, pieces)) - 4 * sum(ranks)),
        }
        return [bytes(ranks), *pieces], facts

    def unpack_rows(
        self, payloads: Sequence[Payload], parts: Parts, width: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, list[State]]:
        samples = cast("Sequence[Samples]", parts.samples)
        caches: list[Cache] = [state.own for state in parts.states]
        known = [cache.known(one, width) for cache, one in zip(caches, samples, strict=True)]
        mask, fresh = rows_of(samples, [[not here for here in flags] for flags in known])
        read = [self._read(payload, one, flags, width) for payload, one, flags in zip(payloads, samples, known, strict=True)]
        for (_, rest), one in zip(read, fresh, strict=True):
            most = self.inner.payload_bytes(sum(one.rows), width, dtype) if one.ids else 0
            if len(rest) > most:
                raise CodecError(f"{len(rest)} bytes for {len(one.ids)} samples that are not known, at most {most}.", _REMEDY)
        decoded, chosen = torch.empty(sum(parts.counts), width), [k for k, one in enumerate(fresh) if one.ids]
        inner = [state.inner for state in parts.states]
        if chosen:
            part = packets_left(parts, chosen, inner, fresh)
            decoded_first, states = self.inner.unpack_rows([read[k][1] for k in chosen], part, width, dtype, torch.device("cpu"))
            decoded[mask] = decoded_first.float()
            for k, state in zip(chosen, states, strict=True):
                inner[k] = state
        for k, (one, part_decoded) in enumerate(zip(samples, torch.split(decoded, list(parts.counts)), strict=True)):
            before = caches[k].rows(one, width)
            for place, factors in zip(_places(one, known[k]), read[k][0], strict=True):
                part_decoded[place] = _applied(before[place], factors)
            caches[k] = caches[k].put(one, part_decoded)
        return finite_as(decoded, dtype).to(device), [Nested(*pair) for pair in zip(caches, inner, strict=True)]

    def _read(self, payload: Payload, samples: Samples, known: Sequence[bool], width: int) -> tuple[list[Factors], memoryview]:
        """The components of one packet's known samples, and what follows them. Raises CodecError for damaged bytes."""
        lengths, data = [rows for rows, here in zip(samples.rows, known, strict=True) if here], memoryview(payload)
        ranks = list(data[: len(lengths)])
        sizes = [rank * factor_bytes(rows, width, self.bits) for rank, rows in zip(ranks, lengths, strict=False)]
        if len(ranks) < len(lengths) or len(lengths) + sum(sizes) > len(data):
            raise CodecError(f"payload of {len(data)} bytes is too short for {len(lengths)} samples of ranks {ranks[:9]}.", _REMEDY)
        if any(rank > min(rows, width) for rank, rows in zip(ranks, lengths, strict=True)):
            raise CodecError(f"ranks {ranks[:9]} for samples of {lengths[:9]} rows and {width} channels.", _REMEDY)
        pieces = slices(data[len(ranks) :], sizes)
        factors = [read_factors(piece, rank, rows, width, self.bits) for piece, rank, rows in zip(pieces, ranks, lengths, strict=True)]
        return factors, data[len(ranks) + sum(sizes) :]


_REMEDY = "use the same codec with the same fields on both sides, and resume both from the same round."
_EMPTY = Triplets(*[torch.empty(0)] * 4)


def _applied(before: Tensor, factors: Factors) -> Tensor:
    """Rows [t d] after their change: one addition and one rounding of each element, the same on any hardware."""
    return finite_as(before.double() + factors.product(len(before)), torch.float32)


def _places(samples: Samples, chosen: Sequence[bool]) -> list[slice]:
    """Where the rows of the chosen samples lie in their packet."""
    ends = torch.tensor(samples.rows).cumsum(0).tolist()
    return [slice(end - rows, end) for end, rows, flag in zip(ends, samples.rows, chosen, strict=True) if flag]


def _by_length(lengths: Sequence[int]) -> dict[int, list[int]]:
    """Which samples have how many rows."""
    found: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        found.setdefault(length, []).append(place)
    return found
