"""Who is waited for, and for how long: clients that do nothing, cannot take part, or come and go; and letters nobody asked for."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from splitft.apps.stopping import Stopping
from splitft.deploy.letters import Letter, Report, pack
from splitft.deploy.status import ServerStatus

from .federation_scenes import Scene, events_of, scene, wait_for
from .hostile import READY, Liar, liars
from .process_scenes import Ground

pytestmark = pytest.mark.timeout(90)
IMPATIENT: dict[str, Any] = {"rounds": 2, "federation": {"absence_s": 1.0, "join_s": 0.0}}


def honest(fed: Scene, count: int = 2) -> None:
    for number in range(count):
        fed.client(number)
        wait_for(lambda number=number: number in fed.house.host.seats)  # type: ignore[misc]


def statuses(folder: Path) -> list[list[str]]:
    return [[one["status"] for one in event["clients"]] for event in events_of(folder)]


@pytest.mark.parametrize("labels", ["server", "client"])
def test_a_client_that_is_there_and_does_nothing_holds_nobody_for_ever(ground: Ground, tmp_path: Path, labels: str) -> None:
    """It gives signs of life and nothing else, in rounds and in measurements; in a U-shape it may even sit in a shared pass."""
    ground.copy_to(tmp_path)
    changes = {**IMPATIENT, "split": {"labels": labels}, "engine": {"deterministic": False}}
    with scene(tmp_path, **changes) as fed:
        honest(fed)
        with liars([Liar(fed.port, "client-2", [], ready=msgspec.structs.replace(READY, held_out_rows=5))]):
            folder = fed.thread.end(60)
    assert statuses(folder) == [["done", "done", "lost"]] * 2


def test_readiness_again_and_again_is_refused(ground: Ground, tmp_path: Path) -> None:
    ground.copy_to(tmp_path)
    with scene(tmp_path, **IMPATIENT) as fed:
        honest(fed)
        again = [[lambda index: (Letter.READY, pack(READY))] * 3]
        with liars([Liar(fed.port, "client-2", again)]) as (liar,):
            folder = fed.thread.end(60)
    assert statuses(folder)[0] == ["done", "done", "lost"]
    assert any("in the middle of a round" in text for text in liar.refusals())


def test_a_client_that_fits_no_cut_is_not_waited_for(ground: Ground, tmp_path: Path) -> None:
    """However often it comes back: the others train meanwhile."""
    ground.copy_to(tmp_path)
    patient = {"rounds": 2, "federation": {"absence_s": 60.0, "join_s": 30.0}, "clients": {"minimum": 2}}
    with scene(tmp_path, **patient) as fed:
        small = msgspec.structs.replace(READY, memory_bytes=0)
        with liars([Liar(fed.port, "client-0", [], ready=small)]):
            fed.client(1)
            fed.client(2)
            folder = fed.thread.end(20)
    assert [[one["client"] for one in event["clients"]] for event in events_of(folder)] == [[1, 2]] * 2


def test_letters_nobody_asked_for_keep_no_place(ground: Ground, tmp_path: Path) -> None:
    ground.copy_to(tmp_path)
    with scene(tmp_path, rounds=1) as fed:
        liar = Liar(fed.port, "client-0", [])
        with liars([liar]):
            done = threading.Event()

            def chatter() -> None:
                for index in range(60):  # many times a window of them
                    liar.link.send(Letter.REPORT, pack(Report(index)))
                done.set()

            threading.Thread(target=chatter, daemon=True).start()
            assert done.wait(20), "the server takes what it does not need"
        assert fed.house.listener.buffered_bytes == 0


def test_a_round_below_its_quorum_begins_again(ground: Ground, tmp_path: Path) -> None:
    """Two of three break off the first time: what one client made alone is nobody's model."""
    ground.copy_to(tmp_path)
    broken: Any = [[lambda index: (Letter.FRAME, b"no frame")]]
    with scene(tmp_path, rounds=1, clients={"quorum": 0.9, "minimum": 3}, federation={"strikes": 100}) as fed:
        fed.client(0)
        wait_for(lambda: 0 in fed.house.host.seats)
        with liars([Liar(fed.port, f"client-{number}", broken) for number in (1, 2)]) as made:
            wait_for(lambda: all(liar.refusals() for liar in made))
            wait_for(lambda: any("begins again" in event["text"] for event in fed.house.status.snapshot()["events"]))
        for number in (1, 2):
            fed.client(number)
        folder = fed.end()
    assert statuses(folder) == [["done", "done", "done"]]


def test_a_signal_in_the_midst_of_a_lock_stops_and_does_not_hang() -> None:
    """The handler runs in whatever the main thread is doing; here it holds the very lock that telling the status would take."""
    status, told = ServerStatus("run", 1), threading.Event()
    stopping = Stopping(0.0, lambda text: told.set())
    stopping.on_ask = lambda: status.begin_phase("draining")
    import os
    import signal

    with stopping.heard():
        with status._lock:
            os.kill(os.getpid(), signal.SIGTERM)
        assert not told.is_set()
        assert stopping.asked()
    assert told.is_set()
    assert status.phase == "draining"
