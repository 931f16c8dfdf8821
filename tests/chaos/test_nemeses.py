"""Kills, cuts and pauses at the same time; long cuts and long pauses; many rounds and many clients that come and go."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from net.proxy import Proxy

from splitft.deploy.identity import Identity
from splitft.deploy.letters import Letter, pack
from splitft.transport.link import Link
from splitft.transport.values import Limits, Timing

from ..deploy.federation_scenes import events_of, wait_for
from ..deploy.hostile import READY, hello
from ..deploy.process_scenes import Federation, Ground, Nursery, federation
from ..deploy.reliability_fixtures import Undisturbed
from ..deploy.test_reliability_disk import room_in

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(280)]
LONG: dict[str, Any] = {"rounds": 80, "evaluate": {"max_rows": 2, "every_rounds": 20}}


@contextmanager
def proxied(made: Federation) -> Iterator[Proxy]:
    with Proxy("127.0.0.1", made.port) as proxy:
        made.client_port = proxy.port
        yield proxy


def revived(made: Federation) -> None:
    """What a supervisor does: start again whatever is not there. A client may have been told that its dead self is still connected."""
    if not made.server.running and made.committed() < LONG["rounds"]:
        made.serve()
    for seat, client in made.clients.items():
        if not client.running and client.code != 0:
            assert client.code == -signal.SIGKILL or "connected already" in client.text(), client.text()[-2000:]
            made.join(seat)


@pytest.mark.parametrize("number", range(2))
def test_three_nemeses(number: int, chaos_seed: int, nursery: Nursery, ground: Ground, tmp_path: Path) -> None:
    """A minute of them, then peace: rounds rise by one, nothing counts twice, nothing committed is lost, and the bits are the same."""
    draw = random.Random(f"nemeses {chaos_seed} {number}")
    with federation(nursery, ground, tmp_path / "calm", **LONG) as calm:
        calm.serve()
        calm.join_all().finish(120)
        expected = Undisturbed.of(calm)
    done: dict[str, int] = {"kill": 0, "cut": 0, "pause": 0}
    with federation(nursery, ground, tmp_path / "wild", **LONG) as made, proxied(made) as proxy:
        made.serve()
        made.join_all()
        end_s, seen = time.monotonic() + 60.0, -1
        while time.monotonic() < end_s and made.committed() < LONG["rounds"] - 2:
            what = draw.choice(list(done))
            done[what] += 1
            victims = [made.server, *made.clients.values()]
            victim = draw.choice(victims)
            if what == "kill":
                victim.kill()
            elif what == "cut":
                proxy.black_hole_up, proxy.black_hole_down = draw.choice(((True, True), (True, False), (False, True)))
            else:
                victim.send(signal.SIGSTOP)
            time.sleep(draw.uniform(0.1, 2.5))
            proxy.black_hole_up = proxy.black_hole_down = False
            for one in (made.server, *made.clients.values()):
                one.send(signal.SIGCONT)
            revived(made)
            assert made.committed() >= seen, "a committed round was lost"
            seen = made.committed()
            time.sleep(draw.uniform(0.0, 0.6))
        print(f"seed {chaos_seed}/{number}: {done}, round {made.committed()} committed")
        until_s = time.monotonic() + 90.0
        while made.committed() < LONG["rounds"] and time.monotonic() < until_s:
            revived(made)
            time.sleep(0.2)
        made.finish(90)
        assert [event["round"] for event in events_of(made.run)] == list(range(1, LONG["rounds"] + 1))
        assert sum(done.values()) >= 10, "the run was over too soon"
        expected.must_equal(made)


def test_a_cut_of_thirty_seconds(nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    with federation(nursery, ground, tmp_path) as made, proxied(made) as proxy:
        made.serve()
        made.join_all()
        made.until_round(1)
        before = made.committed()
        proxy.black_hole_up = proxy.black_hole_down = True
        cut_s = time.monotonic()
        wait_for(lambda: "connection lost" in (made.run / "server.log").read_text(), 10)
        print(f"noticed by the server after {time.monotonic() - cut_s:.1f} s (liveness 2 s)")
        time.sleep(30.0 - (time.monotonic() - cut_s))
        assert made.server.running
        assert all(client.running for client in made.clients.values())
        proxy.black_hole_up = proxy.black_hole_down = False
        healed_s = time.monotonic()
        wait_for(lambda: made.committed() > before, 30)
        print(f"next round committed {time.monotonic() - healed_s:.1f} s after the cut was healed")
        made.finish()
        undisturbed.must_equal(made)


def test_a_server_that_stands_still_for_fifteen_seconds(nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    with federation(nursery, ground, tmp_path) as made:
        made.serve()
        made.join_all()
        made.until_round(1)
        made.server.send(signal.SIGSTOP)
        time.sleep(15.0)
        assert all(client.running for client in made.clients.values())
        made.server.send(signal.SIGCONT)
        made.finish()
        undisturbed.must_equal(made)


def test_a_client_whose_former_life_fell_silent(nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """As when a machine loses power behind a dead line: the server holds the old connection for a while, and the new process waits."""
    with federation(nursery, ground, tmp_path, federation={"liveness_s": 6.0}) as made:
        made.serve()
        made.join_all()
        made.until_round(1)
        former = made.clients[2]
        former.send(signal.SIGSTOP)
        again = made.join(2)
        wait_for(lambda: "connected already" in again.text(), 5)
        made.finish()
        former.end()
        undisturbed.must_equal(made)


def test_a_second_process_of_an_identity_gives_up(nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    with federation(nursery, ground, tmp_path) as made:
        made.serve()
        made.join(0)
        made.join(1)
        wait_for(lambda: "ready, waiting" in made.clients[0].text())
        first = made.clients[0]
        second = made.join(0)
        assert second.wait(45) == 18
        assert "connected already" in second.text()
        made.clients[0] = first
        made.join(2)
        made.finish()
        undisturbed.must_equal(made)


def held(process: psutil.Process) -> tuple[int, int, float]:
    """Descriptors, threads, and resident MiB."""
    return process.num_fds(), process.num_threads(), process.memory_info().rss / 2**20


def test_two_hundred_rounds_hold_no_more_than_twenty(nursery: Nursery, ground: Ground, tmp_path: Path) -> None:
    with federation(nursery, ground, tmp_path, rounds=200, evaluate={"max_rows": 2, "every_rounds": 50}) as made:
        made.serve()
        made.join_all()
        made.until_round(40, 60)
        watched = [psutil.Process(one.number) for one in (made.server, *made.clients.values())]
        early, early_bytes, early_round = [held(one) for one in watched], (made.run / "journal.jsonl").stat().st_size, made.committed()
        wait_for(lambda: made.committed() >= 195, 120)
        late, late_bytes, late_round = [held(one) for one in watched], (made.run / "journal.jsonl").stat().st_size, made.committed()
        print("descriptors, threads, MiB at round", early_round, early, "at round", late_round, late)
        made.finish()
    for before, after in zip(early, late, strict=True):
        assert abs(after[0] - before[0]) <= 5
        assert abs(after[1] - before[1]) <= 5
        assert after[2] - before[2] < 8.0
    assert late_bytes / late_round < 1.2 * early_bytes / early_round, "the journal grows linearly"


def test_two_thousand_clients_come_and_go(nursery: Nursery, ground: Ground, tmp_path: Path) -> None:
    """One after the other with mutual TLS: in, ready, gone. The server keeps nothing of them."""
    with federation(nursery, ground, tmp_path, clients={"minimum": 3}) as made:
        made.serve()
        wait_for(lambda: (made.run / "server.log").exists() and "listening" in (made.run / "server.log").read_text())
        tls = Identity.load(tmp_path / "clients" / "client-0").tls
        link = Link(f"127.0.0.1:{made.port}", tls, lambda: hello("client-0"), Limits(), Timing())

        def cycles(count: int) -> None:
            for _ in range(count):
                link.open(20.0)
                link.send(Letter.READY, pack(READY))
                link.close()

        server = psutil.Process(made.server.number)
        cycles(500)
        early, began_s = held(server), time.monotonic()
        cycles(1500)
        late = held(server)
        print(f"descriptors, threads, MiB after 500: {early}, after 2000: {late}; {1500 / (time.monotonic() - began_s):.0f} cycles/s")
        assert made.server.running
        assert abs(late[0] - early[0]) <= 5
        assert abs(late[1] - early[1]) <= 5
        assert late[2] - early[2] < 3.0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_file_system_that_is_full(nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The run folder on a tmpfs of half a megabyte that another file fills to the brim."""
    import subprocess

    runs = tmp_path / "runs"
    runs.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=640k", "splitft-test", str(runs)], check=True)
    try:
        with federation(nursery, ground, tmp_path) as made:
            made.serve()
            made.join_all()
            made.until_round(1)
            filler = runs / "filler"
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
            wait_for(lambda: made.committed() == 3 or "storage:" in made.server.text() or "No space" in made.server.text(), 20)
            stuck = made.committed()
            assert stuck < 3
            time.sleep(4.0)
            assert made.server.running
            assert made.committed() == stuck
            needed, free = room_in(next(line for line in made.server.text().splitlines() if "storage:" in line))
            assert free < needed
            filler.unlink()
            made.finish()
            undisturbed.must_equal(made)
    finally:
        subprocess.run(["umount", "-l", str(runs)], check=False)
