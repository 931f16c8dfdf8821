"""A disk that is full, or fails: the run waits, says so, leaves nothing torn behind, and goes on by itself to the same bits."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from splitft.deploy import conduct
from splitft.engine import checkpoint

from .federation_scenes import adapters_of, scene, wait_for
from .process_scenes import Forked, Ground, Nursery, federation
from .reliability_fixtures import Undisturbed

pytestmark = pytest.mark.timeout(90)
ROOM_BYTES = 30_000
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit of a running process is changed from outside")


def limit_files(process: Forked, most_bytes: int) -> None:
    """No file of that process may grow beyond so many bytes from now on: the write fails, as on a full disk."""
    assert hasattr(resource, "prlimit")
    resource.prlimit(process.number, resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))


def room_in(text: str) -> tuple[int, int]:
    """The bytes that a message says are needed, and those that are free."""
    found = re.search(r"about (\d+) bytes are needed, (\d+) are free", text)
    assert found, text
    return int(found[1]), int(found[2])


@LINUX
def test_no_room_for_a_checkpoint(nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    with federation(nursery, ground, tmp_path) as made:
        made.serve()
        made.join_all()
        made.until_round(1)
        tensors = (checkpoint.newest(made.run) / "tensors.safetensors").stat().st_size
        assert max(path.stat().st_size for path in made.run.glob("*.jso*")) < ROOM_BYTES < tensors, "another file would be hit"
        round_before = made.committed()
        limit_files(made.server, ROOM_BYTES)
        wait_for(lambda: "storage:" in (made.run / "server.log").read_text() or made.committed() == 3)
        stuck = made.committed()
        assert stuck < 3
        told = next(line for line in (made.run / "server.log").read_text().splitlines() if "storage:" in line)
        assert "File too large" in told
        assert str(made.run) in told
        needed, free = room_in(told)
        assert tensors <= needed < 2 * tensors + 8192
        assert 0.5 < free / shutil.disk_usage(made.run).free < 2.0
        time.sleep(2.5)
        assert made.committed() == stuck >= round_before, "nothing is acknowledged meanwhile"
        assert made.server.running
        assert all(client.running for client in made.clients.values())
        assert checkpoint.load(checkpoint.newest(made.run)).round == stuck
        limit_files(made.server, resource.RLIM_INFINITY)
        made.finish()
        assert not list((made.run / "checkpoints").glob(".*"))
        undisturbed.must_equal(made)


@LINUX
def test_no_room_for_a_snapshot(nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    with federation(nursery, ground, tmp_path) as made:
        made.serve()
        made.join_all()
        made.until_round(1)
        client = made.clients[1]
        limit_files(client, 4_000)
        wait_for(lambda: "cannot be written" in client.text() or made.committed() == 3)
        stuck = made.committed()
        assert stuck < 3
        time.sleep(2.5)
        assert made.committed() <= stuck + 1
        assert client.running
        needed, free = room_in(next(line for line in client.text().splitlines() if "cannot be written" in line))
        limit_files(client, resource.RLIM_INFINITY)
        made.finish()
        assert not list((tmp_path / "clients" / "client-1" / "state").rglob(".*"))
        newest = sorted((tmp_path / "clients" / "client-1" / "state").glob("*/round-*"))[-1]
        written = sum(path.stat().st_size for path in newest.iterdir())
        assert written <= needed < 2 * written + 8192
        assert 0.5 < free / shutil.disk_usage(newest).free < 2.0
        undisturbed.must_equal(made)


@pytest.mark.parametrize("place", ["journal", "checkpoint"])
def test_a_disk_that_fails_to_sync(
    place: str, ground: Ground, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ground.copy_to(tmp_path)
    monkeypatch.setattr(conduct, "DISK_PAUSE_S", 0.1)
    original, failures = os.fsync, [0]

    def failing(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}") if os.path.exists("/proc/self/fd") else ""
        wanted = "/checkpoints/.round-" if place == "checkpoint" else "/journal.jsonl"
        if wanted in name and "runs" in name and failures[0] < 5:
            failures[0] += 1
            raise OSError(errno.EIO, "Input/output error", name)
        original(handle)

    with scene(tmp_path) as fed:
        monkeypatch.setattr(os, "fsync", failing)
        folder = fed.all_clients().end()
        said = [event["text"] for event in fed.house.status.snapshot()["events"] if event["level"] == "error"]
    assert failures[0] == 5
    assert said
    assert all(place in text and "the run waits and goes on by itself" in text for text in said)
    assert not any("are free" in text for text in said), "room is not what is missing"
    assert torch.equal(adapters_of(folder), undisturbed.adapters)
    assert not list((folder / "checkpoints").glob(".*"))
