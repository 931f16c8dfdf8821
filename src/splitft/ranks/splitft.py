"""Rank policy `splitft`: another rank beside the cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from splitft.adapt.cost import CostModel
from splitft.errors import CheckpointError, ConfigError
from splitft.lora import Layout
from splitft.ranks.base import RankPolicy, State
from splitft.types import Profile

SIDES = ("client", "both")
OTHER_RUN = "The checkpoint belongs to a run with another rank policy; start a new run."


@dataclass(frozen=True)
class CutRank(RankPolicy):
    """Rank `rank_at_cut` in the block at the cut, `lora.rank` everywhere else (SplitFT, arXiv 2604.26388).

    `side`: "client" lowers the client's last block only, which is what the byte counts of the paper's tables amount to; "both" also
    lowers the server's first block, if it has one. `rank_at_cut`: 1 to `lora.rank`; 0 takes half of `lora.rank`, as the paper's 8 of 16.

    Do not choose it for its traffic. In the paper's own setting (GPT-2 small, cut 2, batches of 4 x 128 tokens) going from 16 to 8
    saves 14.7 of 3490.1 MB, 0.42 %: the rank has no part in the size of the activations and gradients that cross the cut, which are
    98.3 % of the bytes, so no rank could save more than 1.7 %. The codec (`uplink`, `downlink`) is what saves traffic. It serves to
    reproduce the paper, and to hold back the adapter nearest the cut. A block changes its rank when the cut moves past it; `product`
    aggregation then loses only what truncation must.
    """

    rank_at_cut: int = 0
    side: str = "client"

    references: ClassVar[tuple[str, ...]] = ("2604.26388",)

    def __post_init__(self) -> None:
        if isinstance(self.rank_at_cut, bool) or not isinstance(self.rank_at_cut, int) or self.rank_at_cut < 0:
            raise ConfigError(
                f"ranks.rank_at_cut is {self.rank_at_cut!r}; allowed are whole numbers from 0 (half of lora.rank) to lora.rank.",
                "Choose a rank in that range, such as half of lora.rank.",
            )
        if self.side not in SIDES:
            raise ConfigError(f"ranks.side is {self.side!r}; allowed: {', '.join(SIDES)}.", "Choose one of these.")

    def init(self, layout: Layout, profiles: Sequence[Profile], costs: Sequence[CostModel]) -> State:
        largest = max(entry.rank for entry in layout.entries)
        if self.rank_at_cut > largest:
            raise ConfigError(
                f"ranks.rank_at_cut is {self.rank_at_cut}; allowed is 1..{largest}, since no adapter may exceed lora.rank.",
                f"Choose at most {largest}, or set lora.rank to {self.rank_at_cut} or more.",
            )
        return {"server_end": server_end(costs), "rank_at_cut": self.rank_at_cut or max(1, largest // 2)}

    def plan(
        self, round_index: int, cuts: Mapping[int, int], importance: Sequence[float], layout: Layout, state: State
    ) -> tuple[dict[int, tuple[int, ...]], State]:
        end = end_in(state)
        lower = state.get("rank_at_cut")
        if isinstance(lower, bool) or not isinstance(lower, int):
            raise CheckpointError(f"the state of rank policy 'splitft' has no rank_at_cut: {dict(state)}.", OTHER_RUN)
        ranks = {cut: self._ranks(layout, cut, end, lower) for cut in sorted(set(cuts.values()))}
        return {client: ranks[cut] for client, cut in cuts.items()}, state

    def _ranks(self, layout: Layout, cut: int, end: int, lower: int) -> tuple[int, ...]:
        """Ranks [e] of a client with this cut; the server's blocks are cut .. end - 1."""
        lowered = {cut - 1} | ({cut} if self.side == "both" and cut < end else set())
        return tuple(min(lower, entry.rank) if entry.key.block in lowered else entry.rank for entry in layout.entries)


def server_end(costs: Sequence[CostModel]) -> int:
    """The first block behind the server's: a client with cut c holds blocks below c and from here on (its tail blocks). The same for
    every client of a run."""
    return len(costs[0].shape.blocks) - costs[0].tail_blocks


def end_in(state: State) -> int:
    """What `server_end` gave when the state was made; CheckpointError if the state has none."""
    end = state.get("server_end")
    if isinstance(end, bool) or not isinstance(end, int):
        raise CheckpointError(
            f"the state of a rank policy has no server_end: {dict(state)}.",
            OTHER_RUN,
        )
    return end
