"""engine/shelf.py: rows keep their places, lost clients their rows; the files are safetensors, checked for room, removed at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open

from splitft.engine.settings import SHARED_SERVER, ClientState
from splitft.engine.shelf import KINDS, DiskShelf, MemoryShelf, Shelf, settled
from splitft.errors import ResourceError

CLIENTS, PARAMETERS = 3, 5

Open = Callable[[], Shelf]


@pytest.fixture(params=["memory", "disk"])
def open_shelf(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    # Three rows a block: the usual block has millions of rows as small as these.
    monkeypatch.setattr("splitft.engine.shelf.BLOCK_BYTES", 3 * 4 * PARAMETERS)
    return lambda: MemoryShelf(PARAMETERS) if request.param == "memory" else DiskShelf(tmp_path, CLIENTS, PARAMETERS, KINDS)


def row(value: float) -> torch.Tensor:
    return torch.full((PARAMETERS,), value)


def test_a_row_is_kept_in_one_place_for_good(open_shelf: Open) -> None:
    shelf = open_shelf()
    first = shelf.keep("first", 1, row(1.0))
    other = shelf.keep("second", 1, row(2.0))
    shared = shelf.keep("first", SHARED_SERVER, row(3.0))
    again = shelf.keep("first", 1, row(4.0))
    shelf.rest()
    assert again.data_ptr() == first.data_ptr()
    assert [first.tolist(), other.tolist(), shared.tolist()] == [[4.0] * 5, [2.0] * 5, [3.0] * 5]
    assert shelf.keep("first", 1, first) is not None  # a row that is in its place already stays as it is
    assert first.tolist() == [4.0] * 5


def test_the_matrix_of_a_round_has_as_many_rows_as_asked_for(open_shelf: Open) -> None:
    matrix = open_shelf().matrix(2)
    matrix[:] = torch.arange(10.0).view(2, 5)
    assert matrix.shape == (2, 5)
    assert matrix.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_lost_clients_go_back_to_what_they_had(open_shelf: Open) -> None:
    shelf = open_shelf()
    before = settled({k: ClientState(k, 1, row(k), row(10 + k)) for k in range(CLIENTS)}, shelf)
    after = settled({k: ClientState(k + 1, 2, row(20 + k), row(30 + k)) for k in range(CLIENTS)}, shelf, {1})
    assert [after[k].first is None for k in range(CLIENTS)] == [False, True, False]
    assert before[1].first is not None
    assert before[1].second is not None
    assert before[1].first.tolist() == row(1).tolist()
    assert before[1].second.tolist() == row(11).tolist()
    assert after[2].first is not None
    assert after[2].first.tolist() == row(22).tolist()


def test_the_servers_rows_stay_when_all_clients_are_lost(open_shelf: Open) -> None:
    shelf = open_shelf()
    before = settled({SHARED_SERVER: ClientState(first=row(1), second=row(2)), 0: ClientState()}, shelf)
    settled({SHARED_SERVER: ClientState(first=row(3), second=row(4)), 0: ClientState()}, shelf, {0})
    assert before[SHARED_SERVER].first is not None
    assert before[SHARED_SERVER].first.tolist() == row(1).tolist()
    settled({SHARED_SERVER: ClientState(first=row(3), second=row(4)), 0: ClientState(), 1: ClientState()}, shelf, {0})
    assert before[SHARED_SERVER].first.tolist() == row(3).tolist()


def test_the_servers_rows_count_when_others_of_the_round_come_through(open_shelf: Open) -> None:
    """Clients in turn, a part of the round for each: the last of them is lost, the steps it made on the server stand as before it."""
    shelf = open_shelf()
    settled({SHARED_SERVER: ClientState(first=row(1), second=row(2)), 0: ClientState()}, shelf, {1}, (0, 1))
    after = settled({SHARED_SERVER: ClientState(first=row(3), second=row(4)), 1: ClientState(first=row(5))}, shelf, {1}, (0, 1))
    assert after[1].first is None
    assert after[SHARED_SERVER].first is not None
    assert after[SHARED_SERVER].first.tolist() == row(3).tolist()


def test_without_a_shelf_states_are_as_they_were() -> None:
    states = {0: ClientState(first=row(1), second=row(2))}
    assert settled(states, None) == states


def test_the_files_open_in_safetensors_and_are_removed(tmp_path: Path) -> None:
    shelf = DiskShelf(tmp_path, CLIENTS, PARAMETERS, ("first", "second"))
    shelf.keep("second", 2, row(7.0))
    shelf.matrix(1)[0] = row(8.0)
    shelf.rest()
    for name, number, value, rows in (("second", 2, 7.0, CLIENTS + 1), ("round", 0, 8.0, CLIENTS)):
        with safe_open(tmp_path / "store" / f"{name}.safetensors", framework="pt") as file:
            found = file.get_tensor("rows")
            assert found.shape == (rows, PARAMETERS)
            assert found[number].tolist() == [value] * PARAMETERS
    assert not (tmp_path / "store" / "adapter.safetensors").exists()
    shelf.close()
    assert not (tmp_path / "store").exists()
    assert shelf.place("second", 2).tolist() == [7.0] * PARAMETERS  # what is mapped lives on


def test_what_an_earlier_run_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "first.safetensors").write_bytes(b"left over")
    (tmp_path / "store" / "other").write_bytes(b"left over")
    DiskShelf(tmp_path, CLIENTS, PARAMETERS, ())
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["round.safetensors"]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 1_000_000))
    with pytest.raises(ResourceError, match=r"of 3 clients need 4200 MB in .*, where 1 MB are free") as caught:
        DiskShelf(tmp_path, CLIENTS, 70_000_000, KINDS)
    assert 'engine.store = "memory"' in caught.value.remedy
    assert not (tmp_path / "store").exists()


def test_a_disk_that_fills_up_while_room_is_reserved_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*values: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("splitft.engine.tensor_file.reserve", full)
    with pytest.raises(ResourceError, match="of 3 clients need"):
        DiskShelf(tmp_path, CLIENTS, PARAMETERS, KINDS)
    assert not (tmp_path / "store").exists()
