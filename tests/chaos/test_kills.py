"""kill -9 at moments drawn from the whole length of a run, twenty times each: server, clients, and every point of a commit alone."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from splitft.engine.points import POINTS

from ..deploy.federation_scenes import wait_for
from ..deploy.process_scenes import Federation, Ground, Nursery, federation
from ..deploy.reliability_fixtures import Undisturbed
from ..deploy.test_reliability_crashes import kill_client, restart_server

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(120)]
RUN_S = 1.8


def begun(made: Federation) -> None:
    made.serve()
    made.join_all()
    wait_for(lambda: (made.run / "server.log").exists())


@pytest.mark.parametrize("number", range(20))
def test_server(number: int, chaos_seed: int, nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    delay_s = random.Random(f"server {chaos_seed} {number}").uniform(0.0, RUN_S)
    with federation(nursery, ground, tmp_path) as made:
        begun(made)
        time.sleep(delay_s)
        made.server.kill()
        print(f"seed {chaos_seed}: killed after {delay_s:.3f} s with round {made.committed()} committed")
        recovery_s = restart_server(made, undisturbed)
        print(f"next round committed {recovery_s:.2f} s after the new start")
        assert recovery_s < 10.0


@pytest.mark.parametrize("number", range(20))
def test_client(number: int, chaos_seed: int, nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    draw = random.Random(f"client {chaos_seed} {number}")
    delay_s, seat = draw.uniform(0.0, RUN_S), draw.randrange(3)
    with federation(nursery, ground, tmp_path) as made:
        begun(made)
        time.sleep(delay_s)
        over = not made.clients[seat].running
        made.clients[seat].kill()
        print(f"seed {chaos_seed}: client {seat} killed after {delay_s:.3f} s with round {made.committed()} committed")
        if made.committed() < 3 and not over:
            made.join(seat)
        else:  # it has heard of the end, or nobody will be there any more to tell it
            made.clients.pop(seat)
        made.finish()
        undisturbed.must_equal(made)


@pytest.mark.parametrize("seat", range(3))
def test_client_in_a_step(seat: int, nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    with federation(nursery, ground, tmp_path) as made:
        kill_client(made, seat, undisturbed)


@pytest.mark.parametrize("point", POINTS)
def test_server_at_a_point(point: str, nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    passes = {"opening_sent": 5, "step_served": 14, "update_taken": 5, "aggregated": 2, "commit_told": 2}.get(point, 3)
    with federation(nursery, ground, tmp_path) as made:
        made.serve(failpoint=f"{point}:{passes}")
        made.join_all()
        assert made.server.wait(40) == 137, "the point was never reached"
        assert restart_server(made, undisturbed) < 10.0


def test_everybody_at_once(chaos_seed: int, nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A power cut for all: four times in one run."""
    draw = random.Random(f"all {chaos_seed}")
    with federation(nursery, ground, tmp_path) as made:
        begun(made)
        for _ in range(4):
            time.sleep(draw.uniform(0.5, 1.5))
            if not made.server.running:
                break
            for one in (made.server, *made.clients.values()):
                one.kill()
            made.serve()
            made.join_all()
        made.finish()
        undisturbed.must_equal(made)
