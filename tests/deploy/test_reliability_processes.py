"""Real processes that never return, stand still, come twice, or are asked to stop."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from splitft.deploy.identity import Identity
from splitft.transport.link import Link
from splitft.transport.values import Limits, Refused, Timing

from .federation_scenes import adapters_of, events_of, wait_for
from .hostile import hello
from .process_scenes import Ground, Nursery, federation
from .reliability_fixtures import Undisturbed, absent_in, without

pytestmark = pytest.mark.timeout(90)
# Two of three are enough once the deadline has come.
DEADLINE: dict[str, Any] = {"clients": {"minimum": 2, "deadline_s": 1.5, "quorum": 0.6, "late": "drop"}}


def test_a_client_that_never_returns(nursery: Nursery, ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds close at the deadline with the quorum, the journal names who is missing, and the result is that of a run without it."""
    with federation(nursery, ground, tmp_path, federation={"liveness_s": 0.6, "join_s": 3.0}, **DEADLINE) as made:
        made.serve()
        made.join_all()
        made.until_round(1)
        wait_for(lambda: "round   2/3  cut" in made.clients[2].text())
        made.clients.pop(2).kill()
        killed_s = time.monotonic()
        made.until_round(2)
        assert time.monotonic() - killed_s < 1.5 + 2.0
        made.finish()
        absent = absent_in(made.run)
        assert absent[1] == set()
        assert absent[2] == {2}
        assert "lost to round 2" in (made.run / "server.log").read_text()
        assert torch.equal(adapters_of(made.run), without(tmp_path, absent, monkeypatch, clients={"minimum": 2}))


def test_a_client_that_stands_still_and_goes_on(nursery: Nursery, ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped for twice the deadline: rounds close on time, what it sends late changes nothing, and it takes part again."""
    with federation(nursery, ground, tmp_path, rounds=6, **DEADLINE) as made:
        made.serve()
        made.join_all()
        made.until_round(1)
        wait_for(lambda: "round   2/6  cut" in made.clients[1].text())
        os.kill(made.clients[1].number, signal.SIGSTOP)
        stopped_s = time.monotonic()
        made.until_round(2)
        assert time.monotonic() - stopped_s < 1.5 + 2.0
        time.sleep(max(0.0, 2 * 1.5 - (time.monotonic() - stopped_s)))
        os.kill(made.clients[1].number, signal.SIGCONT)
        made.finish()
        absent = absent_in(made.run)
        assert 1 in absent[2]
        assert 1 not in absent[6], "it did not come back"
        assert torch.equal(adapters_of(made.run), without(tmp_path, absent, monkeypatch, rounds=6, clients={"minimum": 2}))


def test_two_processes_of_one_identity(nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The second is told how long the first has been there; taking over, it goes on and the first ends. Nothing counts twice."""
    with federation(nursery, ground, tmp_path) as made:
        made.serve()
        made.join_all()
        made.until_round(1)
        first = made.clients[0]
        tls = Identity.load(tmp_path / "clients" / "client-0").tls
        second = Link(f"127.0.0.1:{made.port}", tls, lambda: hello("client-0"), Limits(), Timing())
        with pytest.raises(Refused, match=r"client-0 is connected already, .* since \d+ s") as caught:
            second.open(10.0)
        second.close()
        assert caught.value.code == "busy"
        third = made.join(0, "--takeover")
        assert first.wait(30) == 18
        assert "taken over" in first.text()
        assert third is made.clients[0]
        made.finish()
        undisturbed.must_equal(made)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "ctrl-c"])
def test_a_server_that_is_asked_to_stop(
    number: signal.Signals, nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """In a step: it ends within its grace time, with 0 or 130; started again, the run gives the same bits."""
    with federation(nursery, ground, tmp_path, train={"local_steps": 3}, federation={"grace_s": 2.0}) as made:
        made.serve()
        made.join_all()
        made.until_round(1)
        made.server.send(number)
        asked_s = time.monotonic()
        assert made.server.wait(10) == (0 if number == signal.SIGTERM else 130)
        assert time.monotonic() - asked_s < 2.0 + 2.0
        assert made.committed() < 3, "the run was over before the signal"
        assert all(client.running for client in made.clients.values())
        assert "the server stops" in made.clients[0].text()
        made.serve()
        made.finish()
        undisturbed.must_equal(made)


def test_a_round_that_does_not_end_holds_a_server_for_its_grace_time_only(
    nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """A client stands still and the round waits for it; the server does not."""
    with federation(nursery, ground, tmp_path, federation={"grace_s": 1.5}) as made:
        made.serve()
        made.join_all()
        made.until_round(1)
        made.clients[2].send(signal.SIGSTOP)
        time.sleep(0.3)
        made.server.send(signal.SIGTERM)
        asked_s = time.monotonic()
        assert made.server.wait(10) == 0
        assert 1.0 < time.monotonic() - asked_s < 1.5 + 2.0
        assert made.committed() < 3
        made.clients[2].send(signal.SIGCONT)
        made.serve()
        made.finish()
        undisturbed.must_equal(made)


def test_the_second_signal_ends_a_server_at_once(nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A stopped client holds the round open; the first signal waits for it, the second does not."""
    with federation(nursery, ground, tmp_path, federation={"grace_s": 60.0}) as made:
        made.serve()
        made.join_all()
        made.until_round(1)
        os.kill(made.clients[2].number, signal.SIGSTOP)
        time.sleep(0.3)
        made.server.send(signal.SIGTERM)
        time.sleep(1.0)
        assert made.server.running
        made.server.send(signal.SIGTERM)
        asked_s = time.monotonic()
        assert made.server.wait(10) == 128 + signal.SIGTERM
        assert time.monotonic() - asked_s < 1.0
        os.kill(made.clients[2].number, signal.SIGCONT)
        made.serve()
        made.finish()
        undisturbed.must_equal(made)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "ctrl-c"])
def test_a_client_that_is_asked_to_stop(
    number: signal.Signals, nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    with federation(nursery, ground, tmp_path) as made:
        made.serve()
        made.join_all()
        made.until_round(1)
        made.clients[1].send(number)
        asked_s = time.monotonic()
        assert made.clients[1].wait(10) == (0 if number == signal.SIGTERM else 130)
        assert time.monotonic() - asked_s < 2.0 + 2.0
        made.join(1)
        made.finish()
        undisturbed.must_equal(made)
        assert len(events_of(made.run)) == 3
