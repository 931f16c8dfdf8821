"""Who comes late, leaves, returns, has lost its disk or changed its text; cuts that move; rounds that close without everybody."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from splitft.adapt.fixed import Fixed
from splitft.engine.client import Client
from splitft.errors import Interrupted

from ..tiny_run import text_file
from .federation_scenes import Scene, adapters_of, events_of, scene, simulated, wait_for
from .process_scenes import Ground
from .reliability_fixtures import Gates, absent_in, without

pytestmark = pytest.mark.timeout(90)
TWO: dict[str, Any] = {"rounds": 6, "clients": {"minimum": 2}, "federation": {"join_s": 0.0}}


def leave(fed: Scene, number: int) -> None:
    """Ask a client to stop, and wait until it has."""
    thread, _, stop = fed.members.pop(number)
    stop.set()
    with pytest.raises(Interrupted):
        thread.end(20)


def come(fed: Scene, number: int, text: Path | None = None) -> None:
    fed.client(number, text=text)
    wait_for(lambda: number in fed.house.host.seats and fed.house.host.seats[number].session is not None)


def words(fed: Scene) -> str:
    return " ".join(event["text"] for event in fed.house.status.snapshot()["events"])


def test_a_client_that_comes_in_the_midst_of_a_run(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ground.copy_to(tmp_path)
    with monkeypatch.context() as patch:
        gates = Gates({3})
        gates.put_up(patch)
        with scene(tmp_path, **TWO) as fed:
            come(fed, 0)
            come(fed, 1)
            wait_for(lambda: fed.run.state.round >= 2)
            come(fed, 2)
            wait_for(lambda: fed.house.host.seats[2].ready is not None)
            gates.shut.clear()
            folder = fed.end()
    absent = absent_in(folder)
    assert absent == {1: {2}, 2: {2}, 3: set(), 4: set(), 5: set(), 6: set()}
    assert torch.equal(adapters_of(folder), without(tmp_path, absent, monkeypatch, rounds=6, clients={"minimum": 2}))


def test_a_client_that_leaves_and_returns(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ground.copy_to(tmp_path)
    with monkeypatch.context() as patch:
        gates = Gates({1, 3, 5})
        gates.put_up(patch)
        with scene(tmp_path, **TWO) as fed:
            fed.all_clients()
            wait_for(lambda: all(seat.ready is not None for seat in fed.house.host.seats.values()))
            gates.shut.discard(1)
            wait_for(lambda: fed.run.state.round >= 2)
            leave(fed, 1)
            wait_for(lambda: not fed.house.host.seats[1].here)
            gates.shut.discard(3)
            wait_for(lambda: fed.run.state.round >= 4)
            come(fed, 1)
            wait_for(lambda: fed.house.host.seats[1].ready is not None)
            gates.shut.clear()
            folder = fed.end()
    absent = absent_in(folder)
    assert absent == {1: set(), 2: set(), 3: {1}, 4: {1}, 5: set(), 6: set()}
    assert torch.equal(adapters_of(folder), without(tmp_path, absent, monkeypatch, rounds=6, clients={"minimum": 2}))


def test_cuts_that_move_between_rounds(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up and down, by one block and by two, with kept moments that travel with their blocks: the bits of the simulation."""
    ground.copy_to(tmp_path)
    plan = {1: (1, 2, 3), 2: (2, 1, 3), 3: (3, 3, 1), 4: (1, 2, 2), 5: (1, 1, 3)}
    monkeypatch.setattr(Fixed, "plan", lambda self, index, who, seen, state: ({client: plan[index][client] for client in who}, state))
    reference = simulated(tmp_path, rounds=5)
    with scene(tmp_path, rounds=5) as fed:
        folder = fed.all_clients().end()
    assert [[one["cut"] for one in event["clients"]] for event in events_of(folder)] == [list(cuts) for cuts in plan.values()]
    assert torch.equal(adapters_of(folder), adapters_of(reference))


def test_a_client_whose_disk_was_wiped_begins_afresh(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its moments are lost on both sides; it goes on in its data, and nobody else notices."""
    ground.copy_to(tmp_path)
    gates = Gates({3})
    gates.put_up(monkeypatch)
    with scene(tmp_path, **TWO) as fed:
        fed.all_clients()
        wait_for(lambda: fed.run.state.round >= 2)
        leave(fed, 1)
        shutil.rmtree(tmp_path / "home-1" / "state")
        come(fed, 1)
        gates.shut.clear()
        folder = fed.end()
        assert "has lost its state: it begins afresh" in words(fed)
        assert fed.run.state.clients[1].batches == 3 * sum(1 not in clients for clients in absent_in(folder).values())
        kept = sorted((tmp_path / "home-1" / "state").glob("*/round-*"))[-1]
        assert json.loads((kept / "state.json").read_text())["batches"] == fed.run.state.clients[1].batches, "it is elsewhere in its data"
    last = events_of(folder)[-1]["clients"]
    assert [(one["client"], one["status"], one["steps"]) for one in last] == [(0, "done", 3), (1, "done", 3), (2, "done", 3)]


def test_a_client_with_other_data_than_before_begins_afresh(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ground.copy_to(tmp_path)
    gates = Gates({3})
    gates.put_up(monkeypatch)
    with scene(tmp_path, **TWO) as fed:
        fed.all_clients()
        wait_for(lambda: fed.run.state.round >= 2)
        leave(fed, 1)
        come(fed, 1, text_file(tmp_path / "other.txt", documents=20, seed=77))
        gates.shut.clear()
        folder = fed.end()
        assert "its training data is another than before" in words(fed)
    assert 1 not in absent_in(folder)[6]
    assert bool(torch.isfinite(adapters_of(folder)).all())


@pytest.mark.parametrize("late", ["partial", "drop"])
def test_a_straggler_at_the_deadline(late: str, ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for what it has done, it ends with fewer steps; or it is lost and the round is one without it."""
    ground.copy_to(tmp_path)
    changes: dict[str, Any] = {
        "rounds": 2,
        "clients": {"minimum": 2, "deadline_s": 1.0, "quorum": 0.6, "late": late},
        "train": {"local_steps": 40},
        "federation": {"grace_s": 10.0, "join_s": 10.0},
    }
    original = Client.round

    def slowly(self: Client, opening: bytes) -> Any:
        talk, reply = original(self, opening), None
        try:
            message = next(talk)
            while True:
                reply = yield message
                if self.client == 2:
                    time.sleep(0.15)
                message = talk.send(reply)
        except StopIteration as end:
            return end.value

    monkeypatch.setattr(Client, "round", slowly)
    with scene(tmp_path, **changes) as fed:
        folder = fed.all_clients().end()
    rows = [next((one for one in event["clients"] if one["client"] == 2), None) for event in events_of(folder)]
    for event in events_of(folder):
        assert [one["status"] for one in event["clients"] if one["client"] != 2] == ["done", "done"]
        assert all(one["steps"] == 40 for one in event["clients"] if one["client"] != 2)
    for row in rows:
        assert row is not None
        if late == "partial":
            assert row["status"] == "partial"
            assert 0 < row["steps"] < 40
        else:
            assert row["status"] == "lost"
    if late == "drop":
        monkeypatch.setattr(Client, "round", original)
        absent = absent_in(folder)
        assert absent == {1: {2}, 2: {2}}
        again = without(tmp_path, absent, monkeypatch, rounds=2, clients={"minimum": 2}, train={"local_steps": 40})
        assert torch.equal(adapters_of(folder), again)
