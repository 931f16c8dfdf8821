"""Real processes are killed, at random moments and at every point of a commit, and started again: the run gives the same bits."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import pytest

from splitft.engine.points import POINTS

from .federation_scenes import wait_for
from .process_scenes import Federation, Ground, Nursery, federation
from .reliability_fixtures import Undisturbed

pytestmark = pytest.mark.timeout(90)
SOURCE = Path(__file__).parents[2] / "src" / "splitft"
# The kills of the fast tier; the slow one draws its own.
SEED = 6


def committed_bytes(made: Federation) -> bytes:
    """The part of the journal that the newest checkpoint answers for: whatever happens, it stays, times included."""
    found = sorted((made.run / "checkpoints").glob("round-*")) if made.run.is_dir() else []
    for path in reversed(found):
        state = json.loads((path / "state.json").read_text())
        return (made.run / "journal.jsonl").read_bytes()[: state["journal_bytes"]]
    return b""


def restart_server(made: Federation, undisturbed: Undisturbed) -> float:
    """After the server has died: nothing left behind is torn, nothing committed is done again, the bits are the same. Returns seconds
    from the new start to the next committed round."""
    before, round_before = committed_bytes(made), made.committed()
    began_s = time.monotonic()
    server = made.serve()
    wait_for(lambda: made.committed() > round_before or not server.running, 40)
    recovery_s = time.monotonic() - began_s
    made.finish()
    assert (made.run / "journal.jsonl").read_bytes().startswith(before)
    assert not list((made.run / "checkpoints").glob(".*")), "a crash left something over"
    undisturbed.must_equal(made)
    return recovery_s


@pytest.mark.parametrize("moment", range(4))
def test_server_killed_at_a_random_moment(
    moment: int, nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    draw = random.Random(f"{SEED}-{moment}")
    with federation(nursery, ground, tmp_path) as made:
        made.serve()
        made.join_all()
        wait_for(lambda: "listening" in made.server.text() or (made.run / "server.log").exists())
        time.sleep((moment + draw.random()) / 4 * undisturbed.seconds)
        made.server.kill()
        assert restart_server(made, undisturbed) < 10.0


@pytest.mark.parametrize("point", POINTS)
def test_server_dies_at_every_point_of_a_round(
    point: str, nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """In the second round, or the third that a point is passed in where it is passed once a round and before training too."""
    passes = {"opening_sent": 5, "step_served": 14, "update_taken": 5, "aggregated": 2, "commit_told": 2}.get(point, 3)
    with federation(nursery, ground, tmp_path) as made:
        made.serve(failpoint=f"{point}:{passes}")
        made.join_all()
        assert made.server.wait(40) == 137, "the point was never reached"
        assert restart_server(made, undisturbed) < 10.0


def test_every_point_of_the_source_is_in_the_catalogue_and_the_other_way_round() -> None:
    found = [name for path in sorted(SOURCE.rglob("*.py")) for name in re.findall(r"\breached\(\"(\w+)\"\)", path.read_text())]
    assert sorted(found) == sorted(POINTS), "a point in the source that no test crashes at, or one that is gone"
    others = [
        f"{path.name}: {line.strip()}"
        for path in sorted(SOURCE.rglob("*.py"))
        for line in path.read_text().splitlines()
        if re.search(r"\breached\((?!\")", line) and "def " not in line and path.parent.name in ("engine", "deploy")
    ]
    assert not others, "points have plain names"


@pytest.mark.parametrize("seat", range(3))
def test_client_killed_in_a_step_and_back(
    seat: int, nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """The others wait, and see no error."""
    with federation(nursery, ground, tmp_path) as made:
        made.serve()
        made.join_all()
        made.until_round(seat)
        wait_for(lambda: f"round {made.committed() + 1:>3}/3  cut" in made.clients[seat].text().replace("   ", " " * 3))
        made.clients[seat].kill()
        made.join(seat)
        made.finish()
        undisturbed.must_equal(made)
        for other in range(3):
            assert other == seat or "joining again" not in made.clients[other].text()
            assert other == seat or "broken" not in made.clients[other].text()
