"""The end of a round: the participants' adapters become the next global adapter.

Also what a merge brings with it: uploads that were held back, weights folded into the frozen base, the importance of every projection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitft.aggregate.base import Aggregator, State, Updates, weighted_sum
from splitft.compress.base import HEADER_BYTES
from splitft.engine.exchange import Ownership, decode_vector, encode_vector, positions, put, take
from splitft.engine.settings import Federation, RoundResult
from splitft.lora import Layout
from splitft.lowrank import energy, pad
from splitft.split import SplitModel
from splitft.types import Factors, Key, Plan

# Singular values below this share of the largest are float32's rounding of the frozen weights.
FOLD_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Outcome:
    """The next global adapter [p], the rule's state, figures for the journal, what was folded into the frozen weights in values a block,
    and the folded factors themselves."""

    adapters: Tensor
    state: State
    metrics: Mapping[str, float]
    folded: Mapping[int, int]
    factors: Mapping[Key, Factors]


def updates_of(
    federation: Federation, result: RoundResult, contributes: Sequence[bool], tokens: Mapping[int, int] | None = None
) -> Updates | None:
    """What the round gives to the aggregation rule, its rows left where they are; None when nobody came through. `tokens` overrides
    the targets of the round."""
    rows = [row for row, counts in enumerate(contributes) if counts]
    if not rows:
        return None
    plans = [result.plans[row] for row in rows]
    layout, blocks = federation.layout, federation.split.blocks
    ranks = None
    if any(plan.ranks for plan in plans):
        full = [entry.rank for entry in layout.entries]
        ranks = torch.tensor([list(plan.ranks) or full for plan in plans], dtype=torch.int64)
    sent = None
    if any(not plan.upload or plan.segments > 1 or Ownership(plan, blocks).unused(layout) for plan in plans):
        sent = torch.zeros(len(plans), layout.parameters, dtype=torch.bool)
        for mask, plan in zip(sent, plans, strict=True):
            _mark_sent(mask, Ownership(plan, blocks), federation)
    return Updates(
        tuple(plan.client for plan in plans),
        tuple(result.targets[row] if tokens is None else tokens[result.plans[row].client] for row in rows),
        rows_of(result.values, rows) if result.kept is None else result.values,
        layout,
        ranks,
        sent,
        None if result.kept is None else result.kept.chosen(rows),
    )


def rows_of(values: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows, ascending, of a matrix [n p]: where they are all, the matrix itself and no copy."""
    return values if len(rows) == len(values) else values[list(rows)]


def _mark_sent(mask: Tensor, ownership: Ownership, federation: Federation) -> None:
    """Set which columns [p] of an update the aggregation has: all of the session's, and of the client's own what it uploads."""
    layout = federation.layout
    mask[ownership.server_columns(layout)] = True
    if ownership.plan.upload:
        mask[positions(ownership.upload_columns(layout, federation.trained))] = True
    for part in ownership.unused(layout):  # who did not use a bottleneck has nothing to say of it
        mask[part] = False


def merge(rule: Aggregator, before: Tensor, updates: Updates, state: State, split: SplitModel) -> Outcome:
    """Aggregate, and fold what the rule wants folded into the frozen weights of `split`."""
    in_place = rule.linear and updates.sent is None
    merged = rule.merge(before, updates if in_place else updates.fetched(), state)
    sizes: dict[int, int] = {}
    for key, factors in merged.folded.items():
        split.fold(key, factors, updates.layout.by_key[key].scale)
        sizes[key.block] = sizes.get(key.block, 0) + factors.a.numel() + factors.b.numel()
    return Outcome(merged.adapters, merged.state, merged.metrics, sizes, merged.folded)


def collect(federation: Federation, plan: Plan, row: Tensor, result: RoundResult) -> None:
    """The upload of a client that had kept its adapters [p] to itself: encoded, counted, decoded."""
    codec = federation.settings.adapter_uplink
    columns = Ownership(plan, federation.split.blocks).upload_columns(federation.layout, federation.trained)
    data = encode_vector(take(row, columns), codec)
    result.ledger.add(plan.client, "up", "adapters", len(data))
    put(row, columns, decode_vector(data, codec))


def fold_bytes(folds: Sequence[Mapping[str, int]], known: int, held: Sequence[int]) -> int:
    """Bytes of the changes to the frozen weights that a client holding these blocks has missed since round `known`: each is sent as
    factors, float32 and a header. `folds` has one entry per round, of values by block."""
    missed = [sum(size for block, size in one.items() if int(block) in held) for one in folds[known:]]
    return sum(HEADER_BYTES + 4 * values for values in missed if values)


def weight_norms(split: SplitModel, layout: Layout) -> list[float]:
    """Frobenius norm of the frozen weight behind every entry."""
    return [float(torch.linalg.vector_norm(split.weight(entry.key).detach().float())) for entry in layout.entries]


def mean_of(updates: Updates) -> Tensor:
    """The token-weighted mean of the updates' rows [p], summed in float64."""
    return weighted_sum(updates.weights().tolist(), updates.values).float()


def importance(layout: Layout, before: Tensor, after: Tensor, norms: Sequence[float], folded: Mapping[Key, Factors]) -> list[float]:
    """Norm of the frozen weight times the norm of the change of the product B A, for every entry: how much a projection matters. What was
    folded into the frozen weight is part of the change.

    Our reconstruction of the gradient-weight product of HSplitLoRA (arXiv 2505.02795), whose exact formula is not published: what a
    round changed in the product stands for the gradient.
    """
    old, new = layout.factors(before), layout.factors(after)
    found = []
    for entry, norm in zip(layout.entries, norms, strict=True):
        parts = [new[entry.key], Factors(old[entry.key].a, -old[entry.key].b)]
        if entry.key in folded:
            # A fold holds the old product too where the adapter starts afresh: the change is fold + new - old either way.
            parts.append(Factors(folded[entry.key].a.float(), folded[entry.key].b.float()))
        change = Factors(torch.cat([one.a for one in parts]), torch.cat([one.b for one in parts], dim=1))
        found.append(norm * math.sqrt(max(0.0, energy(change))))
    return found


def unfolded(
    layout: Layout, row: Tensor, weights: Mapping[Key, Tensor], originals: Mapping[Key, Tensor], transposed: bool
) -> tuple[Layout, Tensor]:
    """The whole change of every adapted weight since training began, folds and adapter [p] together, as one adapter: its layout (scale
    1, one rank for all keys, the smallest that loses nothing but rounding) and its row. `transposed`: weights are stored [in out]."""
    factors = layout.factors(row)
    decomposed: dict[Key, tuple[Tensor, Tensor, Tensor]] = {}
    for entry in layout.entries:
        change = weights[entry.key].detach().double().cpu() - originals[entry.key].double().cpu()
        change = (change.T if transposed else change) + entry.scale * factors[entry.key].b.double() @ factors[entry.key].a.double()
        decomposed[entry.key] = torch.linalg.svd(change, full_matrices=False)
    needed = [int((values > FOLD_TOLERANCE * values[:1].clamp(min=1e-30)).sum()) for _, values, _ in decomposed.values()]
    rank = max(1, *needed)
    whole = Layout.of({entry.key: (entry.inputs, entry.outputs) for entry in layout.entries}, rank, 1.0)
    found = {}
    for key, (u, values, vh) in decomposed.items():
        kept = min(rank, len(values))
        found[key] = pad(Factors(vh[:kept].float(), (u[:, :kept] * values[:kept]).float()), rank)
    return whole, whole.row(found)
