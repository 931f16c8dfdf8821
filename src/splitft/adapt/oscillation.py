"""Does a client's cut swing to and fro? A policy that does not settle wastes the moves: blocks fetched, codec caches void."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def oscillates(history: Sequence[int], window: int = 8, turns: int = 3) -> bool:
    """Whether the last `window` cuts of `history` (oldest first) change direction `turns` times or more.

    Rounds without a move neither count nor interrupt; a long way in one direction is adaptation and no oscillation.
    """
    recent = history[-window:] if window > 0 else ()
    ways = [after > before for before, after in pairwise(recent) if after != before]
    return sum(one != other for one, other in pairwise(ways)) >= turns
