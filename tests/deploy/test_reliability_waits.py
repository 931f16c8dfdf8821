"""No wait without an end or a name: a hang can be looked up from outside; and the wall clock decides nothing."""

from __future__ import annotations

import ast
import itertools
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from net.proxy import Proxy

from splitft import clock
from splitft.deploy.host import Host

from .federation_scenes import adapters_of, scene, wait_for
from .process_scenes import Ground, Nursery, federation
from .reliability_fixtures import Gates, Undisturbed

pytestmark = pytest.mark.timeout(60)
SOURCE = Path(__file__).parents[2] / "src" / "splitft"
BLOCKING = ("get", "join", "wait", "result", "acquire", "put")


def named(fed: Any, what: str, peer: str = "", least_s: float = 0.0) -> bool:
    waits = fed.house.status.snapshot()["waits"]
    return any(what in one["what"] and peer in one["peer"] and one["seconds"] >= least_s for one in waits)


def test_the_server_names_what_it_waits_for(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients of three; then three of which one has stopped answering; each within two seconds."""
    ground.copy_to(tmp_path)
    with scene(tmp_path) as fed, Proxy("127.0.0.1", fed.port) as proxy:
        fed.client(0)
        wait_for(lambda: 0 in fed.house.host.seats)
        fed.client(1)
        wait_for(lambda: 1 in fed.house.host.seats)
        wait_for(lambda: named(fed, "clients for round 1"), 2.0)
        fed.client(2, port=proxy.port)
        wait_for(lambda: fed.run.state.round >= 1)
        proxy.black_hole_up = True
        wait_for(lambda: named(fed, "messages of the round", "client-2") or named(fed, "held-out measurements", "client-2"), 2.0)
        members = {number: member for number, (_, member, _) in fed.members.items()}
        wait_for(lambda: any(one.what in ("the server's answer", "the next round") for one in members[0].waits.now()), 2.0)
        proxy.black_hole_up = False
        fed.end()


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal here")
def test_a_signal_prints_where_every_thread_stands(nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    with federation(nursery, ground, tmp_path) as made:
        made.serve()
        made.join(0)
        made.join(1)
        wait_for(lambda: "ready, waiting" in made.clients[0].text())
        for process, where in ((made.server, "conduct.py"), (made.clients[0], "member.py")):
            os.kill(process.number, signal.SIGUSR1)
            wait_for(lambda process=process, where=where: where in process.text(), 2.0)  # type: ignore[misc]
            assert "Thread 0x" in process.text()
        made.join(2)
        made.finish()
        undisturbed.must_equal(made)


def _unbounded(tree: ast.AST) -> list[ast.Call]:
    """Calls that may block a thread for ever: no time-out is given. What is awaited blocks no thread, and ends when it is cancelled."""
    awaited = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Await)}
    found = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in BLOCKING):
            continue
        bounded = any(keyword.arg in ("timeout", "block", "blocking", "grace") for keyword in node.keywords)
        if not node.args and not bounded and id(node) not in awaited:
            found.append(node)
    return found


def test_no_wait_without_a_bound() -> None:
    found = []
    for path in sorted(itertools.chain((SOURCE / "deploy").glob("*.py"), (SOURCE / "transport").glob("*.py"))):
        tree = ast.parse(path.read_text())
        done = {id(call) for call in _unbounded(tree)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and id(node) in done:
                assert isinstance(node.func, ast.Attribute)
                found.append(f"{path.parent.name}/{path.name}:{node.lineno} {ast.unparse(node)}")
    # A future that is done has its result at once; the shared loop is made at its first use.
    allowed = [one for one in found if "ended.result()" in one or "_SHARED.get()" in one]
    assert [one for one in found if one not in allowed] == []
    sample = ast.parse("queue.get()\nthread.join()\nfuture.result(3)\nqueue.get(timeout=1)\n', '.join(names)\n")
    assert [node.lineno for node in _unbounded(sample)] == [1, 2], "the search finds nothing at all"


def test_the_wall_clock_jumps(ground: Ground, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour ahead and an hour back at every event, for server and clients: no time-out fires and the bits are the same."""
    ground.copy_to(tmp_path)
    jumps = itertools.cycle((timedelta(hours=1), timedelta(hours=-1), timedelta(days=400)))
    real, asked, note = clock.datetime, [0], Host._note

    class Jumping(real):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, zone: Any = None) -> Any:
            asked[0] += 1
            return real.now(zone) + next(jumps)

    closed: list[Any] = []

    def noted(self: Host, event: Any) -> None:
        closed.append(type(event).__name__)
        note(self, event)

    monkeypatch.setattr(clock, "datetime", Jumping)
    monkeypatch.setattr(time, "time", lambda: float(1_700_000_000 + 3600 * next(jumps).days))
    monkeypatch.setattr(Host, "_note", noted)
    with scene(tmp_path) as fed:
        folder = fed.all_clients().end()
    assert asked[0] > 10, "nobody looked at the clock"
    assert "Broken" not in closed[: closed.index("Closed")]
    assert torch.equal(adapters_of(folder), undisturbed.adapters)


def test_gates_hold(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The instrument itself: a round behind a gate does not begin."""
    ground.copy_to(tmp_path)
    gates = Gates({2})
    gates.put_up(monkeypatch)
    with scene(tmp_path, rounds=2) as fed:
        fed.all_clients()
        wait_for(lambda: fed.run.state.round >= 1)
        time.sleep(0.3)
        assert fed.run.state.round == 1
        gates.shut.clear()
        fed.end()
