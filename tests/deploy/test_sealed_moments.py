"""Kept moments under secure aggregation: allowed with one cut for all, which clients are not told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .federation_scenes import adapters_of, events_of, scene, simulated
from .test_sealed_federation import SEALED, SEATS, changes_of, people, start

pytestmark = pytest.mark.timeout(60)


def test_clients_follow_a_run_with_one_cut_and_kept_moments(tmp_path: Path) -> None:
    kept = {"train": {"moments": "keep", "local_steps": 3}, "policy": {"name": "fixed", "cuts": [2]}, "rounds": 2}
    server, known = people(tmp_path)
    hidden = simulated(tmp_path, SEATS, **{**SEALED, **kept})
    with scene(tmp_path, SEATS, server, **changes_of(server, **kept)) as made:
        start(made, known)
        folder = made.end(40)
    assert torch.equal(adapters_of(folder), adapters_of(hidden))
    assert [event["metrics"]["sealed_clients"] for event in events_of(folder)] == [SEATS] * 2
