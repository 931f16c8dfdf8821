"""The points of a round at which a crash is tried in the tests: between any two of them nothing that was acknowledged may be lost."""

from __future__ import annotations

from collections.abc import Callable

POINTS = (
    "opening_sent",
    "step_served",
    "update_taken",
    "aggregated",
    "journal_written",
    "checkpoint_begun",
    "tensors_written",
    "state_written",
    "checkpoint_synced",
    "checkpoint_renamed",
    "checkpoint_committed",
    "commit_told",
)
# Told of every point that is passed.
Reached = Callable[[str], None]


def nothing(point: str) -> None:
    """Nobody is interested."""
