"""How often a server may open a round: a few times where noise protects what leaves, and that is remembered on the disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from splitft.compress.base import Codec
from splitft.compress.entropy import Entropy
from splitft.compress.identity import Identity
from splitft.compress.noise import Noise
from splitft.deploy.letters import Letter
from splitft.deploy.openings import FILE, MOST_NOISY, MOST_OPENINGS, Openings
from splitft.errors import Interrupted, PolicyError, ResourceError, SplitftError
from splitft.messages import Type, decode

from ..tiny_run import text_file
from .federation_scenes import scene, wait_for
from .hostile import Said, bent

pytestmark = pytest.mark.timeout(60)


def settings(*codecs: Codec, adapters: Codec | None = None) -> Any:
    return SimpleNamespace(codecs=codecs, adapter_uplink=adapters or Identity())


NOISY, PLAIN = settings(Entropy(Noise()), Identity()), settings(Identity())


def refused(problem: SplitftError) -> None:
    raise problem


def test_a_noisy_round_is_opened_a_few_times_and_a_restart_forgets_nothing(tmp_path: Path) -> None:
    for number in range(MOST_NOISY):
        Openings(tmp_path / "kept").count(5, "train", NOISY, refused)
        assert (tmp_path / "kept" / FILE).stat().st_mode & 0o077 == 0, number
    with pytest.raises(PolicyError, match=rf"opened round 5 more than {MOST_NOISY} times"):
        Openings(tmp_path / "kept").count(5, "train", NOISY, refused)
    Openings(tmp_path / "kept").count(6, "train", NOISY, refused)
    Openings(tmp_path / "other").count(5, "train", NOISY, refused)


def test_noise_on_adapters_counts_too_and_without_any_noise_a_round_may_be_opened_often(tmp_path: Path) -> None:
    openings = Openings(tmp_path)
    for _ in range(MOST_OPENINGS):
        openings.count(1, "train", PLAIN, refused)
    assert not (tmp_path / FILE).exists()
    with pytest.raises(PolicyError, match="more than 100 times"):
        openings.count(1, "train", PLAIN, refused)
    for _ in range(MOST_NOISY):
        openings.count(2, "train", settings(Identity(), adapters=Noise()), refused)
    with pytest.raises(PolicyError):
        openings.count(2, "train", settings(Identity(), adapters=Noise()), refused)


def test_a_count_that_was_changed_is_refused_and_a_disk_that_refuses_is_waited_for(tmp_path: Path) -> None:
    waited: list[str] = []
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder belongs")

    def wait(problem: SplitftError) -> None:
        assert isinstance(problem, ResourceError)
        waited.append(problem.message)
        blocked.unlink()

    Openings(blocked / "kept").count(1, "train", NOISY, wait)
    assert len(waited) == 1
    assert (blocked / "kept" / FILE).is_file()
    (blocked / "kept" / FILE).write_text("[1]")
    with pytest.raises(PolicyError, match="how often rounds were opened"):
        Openings(blocked / "kept").count(1, "train", NOISY, refused)


def test_a_server_that_goes_back_again_and_again_is_left(tmp_path: Path) -> None:
    """A client is stopped and started in the midst of round 1: each time the server opens it again, until the client has had enough."""
    public = {
        "tokens": {"held_out": 0.0, "common_held_out": 0.1},
        "federation": {"held_out": str(text_file(tmp_path / "public.txt", documents=12, seed=9))},
    }

    def until(kind: int, payload: bytes) -> list[Said]:
        if kind == Letter.FRAME and decode(payload).kind == Type.STEP_UP:
            raise Interrupted("killed in the midst of a round.")
        return [(kind, payload)]

    with scene(tmp_path, seats=1, uplink={"name": "noise", "multiple": 0.1}, **public) as fed:
        for _ in range(MOST_NOISY):
            with pytest.raises(Interrupted):
                fed.client(0, link_of=bent(until)).end(20)
            wait_for(lambda: fed.house.host.seats[0].session is None)
        with pytest.raises(PolicyError, match="noise on what leaves averages out"):
            fed.client(0).end(20)
        fed.members.clear()
