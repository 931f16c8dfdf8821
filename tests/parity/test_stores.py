"""Rows kept in one place, in memory or on disk, give the numbers of rows that are new every round, bit for bit; also after a failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from splitft.apps.session import FederatedRun
from splitft.config import RunConfig
from splitft.engine import checkpoint
from splitft.engine.cohort import CohortExecutor
from splitft.engine.settings import RoundResult
from splitft.engine.shelf import KINDS

from ..tiny_run import tiny_config
from .test_resume import elsewhere, outcome, train

# Everything that keeps rows: moments with clients that get lost or stay away, own adapters, the server's common set, updates on the way.
MODES: dict[str, dict[str, Any]] = {
    "lost": {"clients": {"count": 4, "dropout": 0.4, "participation": 0.75}, "policy": {"name": "fixed", "cuts": [1, 2, 3, 1]}},
    "unaveraged": {
        "split": {"server": "unaveraged"},
        "clients": {"count": 4, "participation": 0.75},
        "policy": {"name": "fixed", "cuts": [1, 2, 3, 1]},
    },
    "drift": {"synchronisation": {"name": "drift", "max_rounds": 3}},
    "sequential": {"split": {"server": "sequential"}},
    "asynchronous": {"clients": {"count": 3, "buffer": 2}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


def config_of(folder: Path, mode: str, store: str = "memory", **changes: Any) -> RunConfig:
    return tiny_config(folder, **{"name": f"{mode}-{store}", **MODES[mode], "engine": {"store": store, "cohort_size": 2}, **changes})


def kept(folder: Path) -> dict[tuple[int, str], torch.Tensor]:
    """The rows of all clients in the newest checkpoint."""
    clients = checkpoint.load(checkpoint.newest(folder)).clients.items()
    return {(client, kind): row for client, state in clients for kind in KINDS if (row := getattr(state, kind)) is not None}


def same(found: Path, expected: Path) -> None:
    adapters, events = outcome(found)
    wanted, wanted_events = outcome(expected)
    assert torch.equal(adapters, wanted)
    assert events == wanted_events
    rows, wanted_rows = kept(found), kept(expected)
    assert rows.keys() == wanted_rows.keys()
    assert all(torch.equal(row, wanted_rows[name]) for name, row in rows.items())


@pytest.mark.parametrize("mode", MODES)
def test_stores_give_the_numbers_of_no_store(folder: Path, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("splitft.apps.assemble.open_shelf", lambda *facts: None)
        expected = train(elsewhere(config_of(folder, mode), tmp_path / "none"))
    if mode in ("lost", "unaveraged"):
        assert kept(expected)
    for store in ("memory", "disk"):
        found = train(elsewhere(config_of(folder, mode, store), tmp_path))
        same(found, expected)
        assert not (found / "store").exists()


@pytest.mark.parametrize("store", ["memory", "disk"])
@pytest.mark.parametrize("mode", ["lost", "unaveraged"])
def test_a_run_that_is_stopped_in_a_round_goes_on_in_the_same_process(
    folder: Path, tmp_path: Path, mode: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop comes when half of a round's cohorts have written over what their clients had."""
    expected = train(elsewhere(config_of(folder, mode), tmp_path / "whole"))
    run = FederatedRun(elsewhere(config_of(folder, mode, store), tmp_path))
    executor = run.assembly.executor
    assert isinstance(executor, CohortExecutor)
    train_cohort, begun = executor.train_cohort, 0

    def stopped(*facts: Any) -> RoundResult:
        """Two cohorts a round: the second one fails once in every round."""
        nonlocal begun
        begun += 1
        if begun in (2, 6, 10):
            raise KeyboardInterrupt
        return train_cohort(*facts)

    monkeypatch.setattr(executor, "train_cohort", stopped)
    stops = 0
    while run.state.round < 3:
        try:
            for _ in run.rounds():
                pass
        except KeyboardInterrupt:
            stops += 1
    assert (stops, begun) == (3, 12)
    run.finish()
    run.close()
    same(tmp_path / run.config.name, expected)


def test_a_run_on_disk_is_resumed_from_its_checkpoint_alone(folder: Path, tmp_path: Path) -> None:
    """The files of the store are scratch: a process that died leaves them, and the next one does not trust them."""
    expected = train(elsewhere(config_of(folder, "lost"), tmp_path / "whole"))
    config = elsewhere(config_of(folder, "lost", "disk"), tmp_path)
    run = FederatedRun(config)
    records = run.rounds()
    for _ in range(3):
        next(records)
    run.assembly.close()
    run._lock.close()  # as if the process had died
    stale = tmp_path / config.name / "store" / "first.safetensors"
    stale.write_bytes(b"\xff" * stale.stat().st_size)
    same(train(config, tmp_path / config.name), expected)


def test_a_run_may_change_its_store_when_it_is_resumed(folder: Path, tmp_path: Path) -> None:
    expected = train(elsewhere(config_of(folder, "unaveraged"), tmp_path / "whole"))
    run = FederatedRun(elsewhere(config_of(folder, "unaveraged"), tmp_path))
    records = run.rounds()
    for _ in range(2):
        next(records)
    run.close()
    on_disk = config_of(folder, "unaveraged", "disk", name="unaveraged-memory")
    same(train(elsewhere(on_disk, tmp_path), tmp_path / "unaveraged-memory"), expected)


def test_a_resumed_run_keeps_the_size_of_its_cohorts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever memory is free the second time: the shape of a pass shows in the last bits."""
    config = elsewhere(config_of(folder, "lost", engine={"memory_mb": 1}), tmp_path)
    run = FederatedRun(config)
    records = run.rounds()
    for _ in range(2):
        next(records)
    size = run.assembly.executor.size  # type: ignore[attr-defined]
    run.close()
    monkeypatch.setattr("splitft.apps.assemble.largest_pass", lambda *facts: size + 1)
    resumed = FederatedRun(config, tmp_path / config.name)
    assert resumed.assembly.executor.size == size  # type: ignore[attr-defined]
    resumed.close()
