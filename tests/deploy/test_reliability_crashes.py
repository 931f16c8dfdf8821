"""Real processes are killed, at random moments and at every point of a commit, and started again: the run gives the same bits."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import pytest

from splitft.engine import checkpoint
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
    wait_for(lambda: made.committed() > round_before or made.committed() == 3 or not server.running, 40)
    recovery_s = time.monotonic() - began_s
    made.finish()
    assert (made.run / "journal.jsonl").read_bytes().startswith(before)
    assert not list((made.run / "checkpoints").glob(".*")), "a crash left something over"
    undisturbed.must_equal(made)
    return recovery_s


@pytest.mark.parametrize("moment", range(4))
def test_server_killed_at_a_random_moment(moment: int, nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    draw = random.Random(f"{SEED}-{moment}")
    with federation(nursery, ground, tmp_path) as made:
        made.serve()
        made.join_all()
        wait_for(lambda: "listening" in made.server.text() or (made.run / "server.log").exists())
        time.sleep((moment + draw.random()) / 4 * undisturbed.seconds)
        made.server.kill()
        assert restart_server(made, undisturbed) < 10.0


# Where in the run each point is met, the second one of a kind on: a server that crashes there is started again with the next.
CHAIN = {
    "commit_told": 1,
    "opening_sent": 1,
    "step_served": 4,
    "update_taken": 2,
    "aggregated": 1,
    "journal_written": 1,
    "checkpoint_begun": 1,
    "tensors_written": 1,
    "state_written": 1,
    "checkpoint_synced": 1,
    "checkpoint_renamed": 1,
    "checkpoint_committed": 1,
}


def test_server_dies_at_every_point_of_a_round(nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """One run, twelve crashes, never twice at the same place (tests/chaos has each point alone)."""
    assert set(CHAIN) == set(POINTS)
    with federation(nursery, ground, tmp_path) as made:
        made.join_all()
        for point, passes in CHAIN.items():
            before = committed_bytes(made)
            assert made.serve(failpoint=f"{point}:{passes}").wait(40) == 137, f"{point} was never reached"
            assert (made.run / "journal.jsonl").read_bytes().startswith(before), point
            newest = checkpoint.newest(made.run)
            assert checkpoint.load(newest).round == int(newest.name.split("-")[1]), point
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


def kill_client(made: Federation, seat: int, undisturbed: Undisturbed) -> None:
    """In the midst of a round; it comes back, the others wait and see no error."""
    made.serve()
    made.join_all()
    made.until_round(seat)
    wait_for(lambda: f"round   {made.committed() + 1}/3  cut" in made.clients[seat].text())
    made.clients[seat].kill()
    made.join(seat)
    made.finish()
    undisturbed.must_equal(made)
    for other in {0, 1, 2} - {seat}:
        assert "joining again" not in made.clients[other].text()
        assert "broken" not in made.clients[other].text()


def test_client_killed_in_a_step_and_back(nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    with federation(nursery, ground, tmp_path) as made:
        kill_client(made, 1, undisturbed)
