"""Whole federations over ways that are cut, lose, repeat, damage and trickle: the same bits, or a round without whom it concerns."""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from net.proxy import Proxy

from splitft.transport import link as link_module
from splitft.transport import listener as listener_module
from splitft.transport.pipe import Pipe
from splitft.transport.values import Timing

from .federation_scenes import Scene, adapters_of, events_of, scene, wait_for
from .process_scenes import Ground, Nursery, federation
from .reliability_fixtures import Undisturbed

pytestmark = pytest.mark.timeout(90)
HASTY = Timing(heartbeat_s=0.05, liveness_s=0.6, connect_s=0.15, backoff_s=(0.01, 0.1))
ONCE = [(3, "done")] * 3


def each_step_once(run: Path) -> None:
    """Every client's three steps of every round are in the journal, each round once."""
    events = events_of(run)
    assert [event["round"] for event in events] == [1, 2, 3]
    for event in events:
        assert [(one["steps"], one["status"]) for one in event["clients"]] == ONCE


def joined(fed: Scene, port: int, timing: Timing) -> Scene:
    """All clients, through a proxy."""
    for number in range(3):
        fed.client(number, port=port, timing=timing)
        wait_for(lambda number=number: number in fed.house.host.seats)  # type: ignore[misc]
    return fed


def test_a_silent_cut_in_both_directions(ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Three seconds in which nothing passes and nothing is reset: noticed, survived, nothing lost."""
    ground.copy_to(tmp_path)
    quick = Timing(heartbeat_s=0.2, liveness_s=1.0, connect_s=1.0, backoff_s=(0.02, 0.3))
    with scene(tmp_path, federation={"liveness_s": 1.0}) as fed, Proxy("127.0.0.1", fed.port) as proxy:
        joined(fed, proxy.port, quick)
        wait_for(lambda: fed.run.state.round >= 1)
        proxy.black_hole_up = proxy.black_hole_down = True
        began_s = time.monotonic()
        wait_for(lambda: not any(seat.session.connected for seat in fed.house.host.seats.values() if seat.session is not None), 3.0)
        noticed_s = time.monotonic() - began_s
        assert noticed_s < 1.0 + 2 * 0.2 + 0.8, "silence is noticed after liveness_s and a beat"
        time.sleep(max(0.0, 3.0 - noticed_s))
        assert fed.thread.is_alive()
        round_before, healed_s = fed.run.state.round, time.monotonic()
        proxy.black_hole_up = proxy.black_hole_down = False
        wait_for(lambda: fed.run.state.round > round_before or not fed.thread.is_alive(), 10.0)
        assert time.monotonic() - healed_s < 10.0
        folder = fed.end()
    assert torch.equal(adapters_of(folder), undisturbed.adapters)
    each_step_once(folder)


def test_a_hasty_server_hears_from_a_calm_client(ground: Ground, tmp_path: Path) -> None:
    """The server loses patience after a second, the client speaks every five by itself: it answers beats, so an idle connection stands."""
    ground.copy_to(tmp_path)
    with scene(tmp_path, federation={"heartbeat_s": 0.1, "liveness_s": 0.8}) as fed:
        fed.client(0, timing=Timing())
        wait_for(lambda: 0 in fed.house.host.seats and fed.house.host.seats[0].ready is not None)
        session = fed.house.host.seats[0].session
        assert session is not None
        time.sleep(2.5)
        assert session.connected
        assert session.counts.reconnects == 0
        assert not any("lost" in event["text"] for event in fed.house.status.snapshot()["events"])


class Unsteady:
    """Makes pipes that lose and repeat chunks."""

    def __init__(self, seed: int, lost: float, repeated: float) -> None:
        self.lost = self.repeated = 0
        draw = random.Random(seed)

        class UnsteadyPipe(Pipe):
            async def write(pipe, data: bytes) -> bool:  # noqa: N805 - self is the maker
                if draw.random() < lost:
                    self.lost += 1
                    return True
                if draw.random() < repeated:
                    self.repeated += 1
                    if not await super().write(data):
                        return False
                return await super().write(data)

        self.pipe = UnsteadyPipe


@pytest.mark.parametrize("seed", [0, *(pytest.param(one, marks=pytest.mark.chaos) for one in (1, 2))])
def test_messages_lost_and_sent_twice(
    seed: int, ground: Ground, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fifth of all chunks is lost and a fifth comes twice, both ways, greetings included: each step is applied exactly once."""
    ground.copy_to(tmp_path)
    unsteady = Unsteady(seed, 0.2, 0.2)
    with scene(tmp_path, federation={"heartbeat_s": 0.05, "liveness_s": 0.6}) as fed:
        fed.all_clients(timing=HASTY)
        with monkeypatch.context() as patch:
            patch.setattr(listener_module, "Pipe", unsteady.pipe)
            patch.setattr(link_module, "Pipe", unsteady.pipe)
            for session in fed.house.listener.sessions.values():  # from now on every connection is one of those
                session.flow.mail.post(lambda session=session: session.flow.abandon("the test"))  # type: ignore[misc]
            folder = fed.end(60)
        assert unsteady.lost > 10
        assert unsteady.repeated > 10
    assert torch.equal(adapters_of(folder), undisturbed.adapters)
    each_step_once(folder)


def test_flipped_bits_on_a_plain_way(ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    ground.copy_to(tmp_path)
    with scene(tmp_path) as fed, Proxy("127.0.0.1", fed.port, seed=3) as proxy:
        proxy.flip_every_bytes = 30_000
        joined(fed, proxy.port, Timing(heartbeat_s=0.2, liveness_s=2.0, connect_s=1.0, backoff_s=(0.02, 0.3)))
        folder = fed.end()
        assert proxy.flips > 10
        assert proxy.connections > 6, "damage ends a connection"
    assert torch.equal(adapters_of(folder), undisturbed.adapters)
    each_step_once(folder)


def test_flipped_bits_under_tls(nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    with federation(nursery, ground, tmp_path) as made, Proxy("127.0.0.1", made.port, seed=4) as proxy:
        made.client_port = proxy.port
        made.serve()
        wait_for(lambda: "listening" in (made.run / "server.log").read_text() if (made.run / "server.log").exists() else False)
        proxy.flip_every_bytes = 150_000
        made.join_all().finish()
        assert proxy.flips > 2
        undisturbed.must_equal(made)


def test_a_slow_client_holds_up_nobody_in_its_steps(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One client behind 64 kB/s: its bytes move, so nothing times out; the others' steps take as long as without it."""
    ground.copy_to(tmp_path)
    steps: dict[str, dict[int, list[float]]] = {}
    longer: dict[str, Any] = {"tokens": {"block_tokens": 64, "common_held_out": 0.0}, "train": {"local_steps": 4, "batch_size": 4}}
    for name, bytes_per_s in (("even", 0.0), ("slow", 64_000.0)):
        seen = steps.setdefault(name, defaultdict(list))
        with scene(tmp_path, rounds=2, name=name, **longer) as fed, Proxy("127.0.0.1", fed.port) as proxy:
            status = fed.house.status
            done = status.step_done

            def note(client: int, *facts: Any, seen: Any = seen, done: Any = done) -> None:
                seen[client].append(time.monotonic())
                done(client, *facts)

            monkeypatch.setattr(status, "step_done", note)
            proxy.bytes_per_s = bytes_per_s
            for number in range(3):
                fed.client(number, port=proxy.port if number == 1 else None)
                wait_for(lambda number=number: number in fed.house.host.seats)  # type: ignore[misc]
            fed.end()
            assert proxy.connections == 1, "a slow way is no broken way"
    gaps = {
        name: {client: statistics.median(b - a for a, b in pairwise(times)) for client, times in seen.items()}
        for name, seen in steps.items()
    }
    assert gaps["slow"][1] > 2 * gaps["even"][1], "the proxy did not slow it"
    for other in (0, 2):
        assert gaps["slow"][other] < max(1.25 * gaps["even"][other], gaps["even"][other] + 0.02), gaps
