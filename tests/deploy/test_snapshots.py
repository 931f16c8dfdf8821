"""A client's snapshots: what is kept, what is never removed, what is found damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from splitft.deploy.letters import Snapshot
from splitft.deploy.snapshots import KEPT, TENSORS, Snapshots
from splitft.engine.settings import ClientState
from splitft.errors import CheckpointError


def state(number: int) -> ClientState:
    row = torch.full((6,), float(number))
    return ClientState(batches=10 * number, steps=number, first=row, second=row + 1)


def filled(folder: Path, rounds: int = 6) -> Snapshots:
    made = Snapshots(folder, "data")
    for number in range(1, rounds + 1):
        made.save(number, f"digest-{number}", state(number))
    return made


def test_a_snapshot_comes_back_as_it_was(tmp_path: Path) -> None:
    found = filled(tmp_path).load(Snapshot(3, "digest-3"))
    assert (found.batches, found.steps) == (30, 3)
    assert found.first is not None
    assert torch.equal(found.first, torch.full((6,), 3.0))


def test_rounds_before_the_committed_one_are_kept_for_a_server_that_goes_back(tmp_path: Path) -> None:
    made = filled(tmp_path)
    made.prune(5)
    assert [one.round for one in made.list()] == list(range(5 - KEPT, 7))


def test_other_text_finds_none_and_removes_none(tmp_path: Path) -> None:
    made = filled(tmp_path, 2)
    assert Snapshots(tmp_path, "other data").list() == []
    assert [one.round for one in made.list()] == [1, 2]


def test_what_a_crash_left_half_written_is_removed(tmp_path: Path) -> None:
    made = filled(tmp_path, 1)
    (tmp_path / ".round-00002.part").mkdir()
    made.list()
    assert not (tmp_path / ".round-00002.part").exists()


@pytest.mark.parametrize("harm", ["another digest", "a flipped bit", "gone"])
def test_a_snapshot_that_is_not_the_one_is_refused(tmp_path: Path, harm: str) -> None:
    made, wanted = filled(tmp_path, 1), Snapshot(1, "another" if harm == "another digest" else "digest-1")
    file = tmp_path / "round-00001" / TENSORS
    if harm == "a flipped bit":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif harm == "gone":
        file.unlink()
    with pytest.raises(CheckpointError):
        made.load(wanted)
