"""Rank policy `budget`: the largest rank a client's link and memory can carry."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from splitft.adapt.cost import CostModel
from splitft.errors import CheckpointError, ConfigError, ResourceError
from splitft.lora import Layout
from splitft.ranks.base import RankPolicy, State
from splitft.ranks.splitft import end_in, server_end
from splitft.types import Profile

# float32 each: the parameter, its gradient, AdamW's two moments.
TRAINING_BYTES = 16


@dataclass(frozen=True)
class BudgetRanks(RankPolicy):
    """Each client's own blocks get one rank: the largest up to `lora.rank` that its budgets allow at its present cut.

    `upload_bytes`: most bytes of adapters a client sends per round (as many a value as the adapters take on the wire, 4 in float32;
    packet headers, and whatever an upload in segments saves, are left out); `upload_s`: most seconds of its own uplink they may take,
    so that slow links get small ranks. `memory_share`: share of the device's memory, after
    weights and activations (the cost model's figures at that cut and `lora.rank`), that adapters in training may take: parameter,
    gradient and two moments, 16 bytes a parameter. 0 is no limit. Adapters on the server keep `lora.rank`.

    A cut at which not even rank 1 fits is refused: at the start if no cut allowed fits the client, else in the round that would use
    it. Ranks then differ between clients and change when a cut moves, so an aggregation rule for unequal ranks is needed. Choose it
    where devices or their links differ by more than the cut can balance. The rule is our own; clients whose rank follows from their
    resources are HetLoRA's premise (Cho et al. 2024, arXiv 2401.06432).
    """

    upload_bytes: int = 0
    memory_share: float = 0.5
    upload_s: float = 0.0

    references: ClassVar[tuple[str, ...]] = ("2401.06432",)

    def __post_init__(self) -> None:
        if isinstance(self.upload_bytes, bool) or not isinstance(self.upload_bytes, int) or self.upload_bytes < 0:
            raise ConfigError(
                f"ranks.upload_bytes is {self.upload_bytes!r}; allowed are whole numbers from 0 (no limit).", "Give bytes per round."
            )
        if isinstance(self.upload_s, bool) or not isinstance(self.upload_s, int | float) or not 0 <= self.upload_s < math.inf:
            raise ConfigError(f"ranks.upload_s is {self.upload_s!r}; allowed are numbers from 0 (no limit).", "Give seconds per round.")
        if isinstance(self.memory_share, bool) or not isinstance(self.memory_share, int | float) or not 0 <= self.memory_share <= 1:
            raise ConfigError(
                f"ranks.memory_share is {self.memory_share!r}; allowed are numbers from 0 (no limit) to 1.",
                "Give a share of the memory that weights and activations leave.",
            )

    def init(self, layout: Layout, profiles: Sequence[Profile], costs: Sequence[CostModel]) -> State:
        needs = [needed_parameters(layout, cut, server_end(costs)) for cut in range(1, costs[0].deepest_cut + 1)]
        known: dict[tuple[CostModel, Profile], list[int]] = {}
        ranks = []
        for client, (cost, profile) in enumerate(zip(costs, profiles, strict=True)):
            if (cost, profile) not in known:
                limits = [self._limit_parameters(cost, profile, cut) for cut in range(1, len(needs) + 1)]
                known[cost, profile] = [bisect_right(need, limit) for need, limit in zip(needs, limits, strict=True)]
            by_cut = known[cost, profile]
            if by_cut[cost.shallowest_cut - 1] == 0:
                raise self._nothing_fits(client, cost, profile, needs[cost.shallowest_cut - 1][0])
            ranks.append(by_cut)
        return {"server_end": server_end(costs), "ranks": ranks}

    def plan(
        self, round_index: int, cuts: Mapping[int, int], importance: Sequence[float], layout: Layout, state: State
    ) -> tuple[dict[int, tuple[int, ...]], State]:
        table, end = state.get("ranks"), end_in(state)
        if not isinstance(table, list) or any(not 0 <= client < len(table) for client in cuts):
            raise CheckpointError(
                f"the state of rank policy 'budget' has no ranks for every participant of {sorted(cuts)}.",
                "The checkpoint belongs to a run with another rank policy or other clients; start a new run.",
            )
        planned: dict[tuple[int, int], tuple[int, ...]] = {}
        answer = {}
        for client, cut in cuts.items():
            rank = int(table[client][cut - 1])
            if rank == 0:
                deepest = sum(1 for one in table[client] if one)
                raise ResourceError(
                    f"client {client} can hold no adapter at cut {cut} within its budget; its deepest cut that holds rank 1 is {deepest}.",
                    f"Set split.maximum_cut to {deepest}, or raise ranks.upload_bytes, ranks.upload_s or ranks.memory_share.",
                )
            if (cut, rank) not in planned:
                planned[cut, rank] = tuple(
                    min(rank, entry.rank) if on_client(entry.key.block, cut, end) else entry.rank for entry in layout.entries
                )
            answer[client] = planned[cut, rank]
        return answer, state

    def _limit_parameters(self, cost: CostModel, profile: Profile, cut: int) -> float:
        """Most adapter parameters this client may have at this cut."""
        by_upload = self._upload_limit_bytes(profile) / cost.adapter_bytes
        return min(by_upload, self.memory_share * left_bytes(cost, profile, cut) / TRAINING_BYTES if self.memory_share else math.inf)

    def _upload_limit_bytes(self, profile: Profile) -> float:
        """Most bytes of adapters this device may send in a round."""
        in_time = self.upload_s * profile.uplink_bytes_per_s if self.upload_s else math.inf
        return min(in_time, self.upload_bytes or math.inf)

    def _nothing_fits(self, client: int, cost: CostModel, profile: Profile, parameters: int) -> ResourceError:
        """Why rank 1 does not fit at this client's shallowest cut, and which setting would let it."""
        cut = cost.shallowest_cut
        who = f"client {client} ({profile.name}) can hold no adapter, not even of rank 1 at cut {cut}"
        upload_bytes = math.ceil(parameters * cost.adapter_bytes)
        if upload_bytes > self._upload_limit_bytes(profile):
            if upload_bytes <= (self.upload_bytes or math.inf):
                return ResourceError(
                    f"{who}: they are {upload_bytes} bytes a round, its uplink sends {self._upload_limit_bytes(profile):.0f} in "
                    f"ranks.upload_s = {self.upload_s:g} s.",
                    f"Set ranks.upload_s to {upload_bytes / profile.uplink_bytes_per_s:.3g} or more, or name fewer lora.targets.",
                )
            return ResourceError(
                f"{who}: they are {upload_bytes} bytes a round, ranks.upload_bytes allows {self.upload_bytes}.",
                f"Set ranks.upload_bytes to {upload_bytes} or more, or name fewer lora.targets.",
            )
        left, need = left_bytes(cost, profile, cut), parameters * TRAINING_BYTES
        figures = f"training them takes {need} bytes, ranks.memory_share {self.memory_share} of the {left:.0f} bytes left is too little"
        if need > left:
            return ResourceError(f"{who}: {figures}.", f"Give it {need - left:.0f} bytes more, smaller batches, or shorter sequences.")
        share = math.ceil(1000 * need / left) / 1000
        return ResourceError(f"{who}: {figures}.", f"Set ranks.memory_share to {share} or more, or name fewer lora.targets.")


def on_client(block: int, cut: int, end: int) -> bool:
    """Whether a client with this cut holds the block; the server's blocks are cut .. end - 1."""
    return block < cut or block >= end


def needed_parameters(layout: Layout, cut: int, end: int) -> list[int]:
    """Adapter parameters of the client's own blocks at rank 1, 2, .. up to the layout's largest."""
    own = [entry for entry in layout.entries if on_client(entry.key.block, cut, end)]
    largest = max(entry.rank for entry in layout.entries)
    return [sum(min(rank, entry.rank) * (entry.inputs + entry.outputs) for entry in own) for rank in range(1, largest + 1)]


def left_bytes(cost: CostModel, profile: Profile, cut: int) -> float:
    """What weights and activations of a step at this cut leave of the device's memory; never below 0."""
    memory = cost.cost(cost.plan(cut)).client_memory
    return max(0.0, profile.memory_bytes - memory.weights_bytes - memory.activations_bytes)
