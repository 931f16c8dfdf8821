"""A client whose policy refuses the run stays at the door, says why, and costs the others nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitft.deploy.policy import parse_policy
from splitft.errors import PolicyError

from .federation_scenes import Faulty, Scene, events_of, scene, wait_for

pytestmark = pytest.mark.timeout(60)


def come_in(made: Scene, seat: int, wanted: dict[str, int]) -> Faulty:
    """A client with a policy; without certificates a seat goes to who comes first, so each waits for the one before it."""
    thread = made.client(seat, policy=parse_policy(wanted))
    wait_for(lambda: seat in made.house.host.seats)
    return thread


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"minimum_cut": 3}, "at most 2 blocks on the client"),
        ({"maximum_cut": 1}, "2 blocks on the client or more"),
        ({"maximum_rounds": 1}, "2 rounds"),
    ],
)
def test_the_operator_reads_why_and_no_round_is_begun(tmp_path: Path, wanted: dict[str, int], words: str) -> None:
    """Cuts are 1, 2, 3 by seat: the second client's policy refuses its own, and the two others train without it."""
    with scene(tmp_path, 3, rounds=2, clients={"count": 3, "minimum": 2}) as made:
        refusing = None
        for seat in range(3):
            thread = come_in(made, seat, wanted if seat == 1 else {})
            if seat == 1:
                with pytest.raises(PolicyError, match=words) as raised:
                    thread.end(20)
                refusing = raised.value
                made.members.pop(1)
        folder = made.end(40)
        told = [event["text"] for event in made.house.status.snapshot()["events"] if event["text"].startswith("does not take part")]
    assert refusing is not None
    assert refusing.exit_code == 17
    assert [one.removeprefix("does not take part: ") for one in told] == [refusing.message]
    rounds = events_of(folder)
    assert [sorted(one["client"] for one in event["clients"]) for event in rounds] == [[0, 2], [0, 2]]


def test_a_cut_that_the_policy_allows_is_not_refused_for_the_others(tmp_path: Path) -> None:
    """The first seat's cut is 1 and the third's 3; each client refuses the other's."""
    with scene(tmp_path, 3, rounds=1) as made:
        for seat in range(3):
            come_in(made, seat, {"minimum_cut": seat + 1, "maximum_cut": seat + 1})
        folder = made.end(40)
    assert [one["cut"] for one in events_of(folder)[0]["clients"]] == [1, 2, 3]
