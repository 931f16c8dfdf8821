"""engine/checkpoint.py: what is saved is what is loaded, damage is named, half-written folders are ignored, old ones dropped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from splitft.engine import checkpoint
from splitft.engine.checkpoint import FOLDER, RunState, load, newest, require_same, save
from splitft.engine.settings import ClientState
from splitft.engine.shelf import KINDS, DiskShelf, MemoryShelf
from splitft.errors import CheckpointError
from splitft.rng import torch_stream


def state(number: int = 3, **changes: Any) -> RunState:
    generator = torch_stream(number, "checkpoint-test")
    rows = torch.randn(4, 50, generator=generator)
    fields: dict[str, Any] = {
        "round": number,
        "adapters": rows[0],
        "clients": {0: ClientState(7, 12, rows[1], rows[2]), 11: ClientState(2)},
        "policy": {"cuts": [1, 2], "seen": {"0": 1.25}, "none": None},
        "aggregator": {"momentum": rows[3], "count": torch.tensor([5], dtype=torch.int64)},
        "observations": [{"client": 0, "round": number, "loss": 1.5, "held_out_loss": None}],
        "virtual_s": 0.1 + 0.2,
        "wall_s": 1 / 3,
        "journal_bytes": 12345,
        "identity": {"model": "abc", "threads": 1, "evaluated": True},
    }
    return RunState(**{**fields, **changes})


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    before = state()
    after = load(save(tmp_path, before, 2))
    assert torch.equal(after.adapters, before.adapters)
    assert after.clients[0].batches == 7
    assert after.clients[0].steps == 12
    for name in ("first", "second"):
        assert torch.equal(getattr(after.clients[0], name), getattr(before.clients[0], name))
    assert after.clients[11] == ClientState(2)
    for name in ("round", "policy", "observations", "virtual_s", "wall_s", "journal_bytes", "identity"):
        assert getattr(after, name) == getattr(before, name), name


@pytest.mark.parametrize("shelf", ["memory", "disk"])
def test_a_checkpoint_of_another_run_is_refused_before_its_rows_are_put_away(tmp_path: Path, shelf: str) -> None:
    """With other adapters or fewer clients its rows have no place; what is wrong is the run, not the checkpoint."""
    path = save(tmp_path, state(), 1)
    places = MemoryShelf(7) if shelf == "memory" else DiskShelf(tmp_path, 1, 7, KINDS)
    with pytest.raises(CheckpointError, match="was made with model = abc, now it is other"):
        load(path, places, {"model": "other"})
    assert load(path, None, {"model": "abc"}).round == 3


def test_rows_that_a_resumed_run_no_longer_keeps_need_no_place(tmp_path: Path) -> None:
    before = state()
    after = load(save(tmp_path, before, 1), DiskShelf(tmp_path, 12, 50, ("second",)))
    for name in ("first", "second"):
        assert torch.equal(getattr(after.clients[0], name), getattr(before.clients[0], name))


def test_an_aggregator_s_own_tensors_survive(tmp_path: Path) -> None:
    before = state()
    after = load(save(tmp_path, before, 1))
    assert set(after.aggregator) == {"momentum", "count"}
    for name, tensor in before.aggregator.items():
        assert torch.equal(after.aggregator[name], tensor)
        assert after.aggregator[name].dtype == tensor.dtype


def test_the_newest_is_chosen_by_number_not_by_name(tmp_path: Path) -> None:
    for number in (2, 9, 10, 100_000, 99_999):
        save(tmp_path, state(number), 9)
    assert newest(tmp_path).name == "round-100000"
    assert load(newest(tmp_path)).round == 100_000


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_only_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    for number in range(1, 5):
        save(tmp_path, state(number), keep)
    names = sorted(path.name for path in (tmp_path / FOLDER).iterdir())
    assert names == [f"round-{number:05d}" for number in range(1, 5)][-keep:]


def test_a_half_written_folder_is_ignored_and_replaced(tmp_path: Path) -> None:
    save(tmp_path, state(1), 2)
    half = tmp_path / FOLDER / ".round-00002.part"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes(b"half")
    (half / "other").write_bytes(b"left over")
    assert newest(tmp_path).name == "round-00001"
    path = save(tmp_path, state(2), 2)
    assert newest(tmp_path) == path
    assert sorted(file.name for file in path.iterdir()) == ["state.json", "tensors.safetensors"]
    assert not half.exists()


def test_a_round_that_is_run_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, state(2, wall_s=1.0), 2)
    save(tmp_path, state(2, wall_s=2.0), 2)
    assert load(newest(tmp_path)).wall_s == 2.0


@pytest.mark.parametrize("fails_at", range(1, 5))
def test_a_failure_at_any_point_of_writing_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    """The disk is full at the k-th fsync: three for the folder and its files, then the rename, then the parent."""
    save(tmp_path, state(1), 1)
    calls, real = 0, os.fsync

    def failing(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, state(2), 1)
    monkeypatch.undo()
    found = load(newest(tmp_path))
    assert found.round == (2 if fails_at == 4 else 1)
    assert load(save(tmp_path, state(2), 1)).round == 2


def test_no_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "round-x").mkdir()
    (tmp_path / FOLDER / ".round-00001.part").mkdir()
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="has no checkpoint") as caught:
            newest(folder)
        assert "start it again" in caught.value.remedy


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_missing_or_emptied_file_is_refused_with_the_way_back(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, state(), 2)
    (path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=str(path)) as caught:
        load(path)
    assert f"delete {path}" in caught.value.remedy
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load(path)


def test_one_flipped_bit_in_the_tensors_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, state(), 2)
    damage(path / "tensors.safetensors")
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors is damaged: its checksum"):
        load(path)


@pytest.mark.parametrize("content", ["{", "[]", "null", "3", '"text"', "{}", '{"format": 1}', '{"format": 1, "sha256": 5}'])
def test_a_state_file_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    path = save(tmp_path, state(), 2)
    (path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=str(path)):
        load(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("clients", []), ("clients", {"x": {}}), ("round", "one"), ("observations", 3), ("policy", None), ("journal_bytes", [])],
)
def test_a_state_file_with_a_wrong_field_is_refused(tmp_path: Path, field: str, value: object) -> None:
    path = save(tmp_path, state(), 2)
    facts = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**facts, field: value}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(path)


def test_another_format_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, state(), 2)
    monkeypatch.setattr(checkpoint, "FORMAT", 9)
    with pytest.raises(CheckpointError, match=r"has format 2, this version reads 9") as caught:
        load(path)
    assert "the splitft version that wrote it" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("threads", "engine.threads=1"), ("data", "texts or the partition"), ("model", "weights have changed"), ("device", "start a new run")],
)
def test_what_differs_between_two_runs_is_named_with_a_remedy(tmp_path: Path, name: str, remedy: str) -> None:
    saved = {"threads": 1, "data": "d", "model": "m", "device": "cpu", "evaluated": True}
    now = {key: value for key, value in saved.items() if key != "evaluated"}
    require_same(saved, now, tmp_path)
    with pytest.raises(CheckpointError, match=f"{name} = {saved[name]}, now it is other") as caught:
        require_same(saved, {**now, name: "other"}, tmp_path)
    assert remedy in caught.value.remedy
    with pytest.raises(CheckpointError, match=f"{name} = None"):
        require_same({}, {name: "new"}, tmp_path)
