"""A server that returns zeros to all but one client, to read that one's update from the sum: what it would get, and that clients leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from splitft.deploy.letters import Letter
from splitft.deploy.sealing import Returned, SealedLetter
from splitft.errors import PolicyError
from splitft.messages import Frame, Type

from .federation_scenes import Scene, adapters_of, events_of, scene
from .hostile import Tamper, filled, in_frames, lying
from .test_sealed_federation import SEATS, changes_of, people, start

pytestmark = pytest.mark.timeout(60)

VICTIM = 0
RUN: dict[str, Any] = {"policy": {"name": "fixed", "cuts": [2]}, "train": {"moments": "reset", "local_steps": 3}}


def attack(begins: int) -> Tamper:
    """From this round on, zeros to all but the victim."""

    def zeros(frame: Frame) -> bytes | None:
        step = frame.step()
        return filled(frame, 0, b"\0") if step.round >= begins and step.client != VICTIM else None

    return in_frames(zeros, Type.STEP_DOWN)


def test_clients_that_got_zeros_alone_leave_and_nothing_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second round: each is looked at by itself."""
    server, known = people(tmp_path)
    with scene(tmp_path, SEATS, server, **changes_of(server, rounds=2, federation={"absence_s": 4.0}, **RUN)) as made:
        after = lying(made, monkeypatch, say=attack(2))
        for thread in start(made, known)[VICTIM + 1 :]:
            with pytest.raises(PolicyError, match="all 3 gradients that the server returned in this round are exactly zero") as raised:
                thread.end(40)
            assert raised.value.exit_code == 17
        folder = made.thread.end(40)
    kinds = [kind for kind, _ in after]
    assert kinds.count(Letter.REFUSED) == SEATS - 1
    assert kinds.count(SealedLetter.SEALED_KEYS) <= 1, "of those who leave nothing; at most the victim has begun"
    assert SealedLetter.SEALED_INPUT not in kinds
    first, last = events_of(folder)
    assert (first["aggregated"], first["metrics"]["sealed_clients"]) == (True, SEATS)
    assert (last["aggregated"], last["metrics"]) == (False, {})


def test_without_the_check_the_sum_is_the_one_client_s_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack works, so the check guards against something: what the server reads from the sum are the victim's very adapters."""
    monkeypatch.setattr(Returned, "check", lambda self: None)
    server, known = people(tmp_path)
    with scene(tmp_path, SEATS, server, **changes_of(server, rounds=1, **RUN)) as made:
        lying(made, monkeypatch, say=attack(1))
        start(made, known)
        folder = made.end(40)
        begun = made.run.assembly.federation.start.double()
        read, own = stolen(made, adapters_of(folder).double(), begun), row_of(made, VICTIM)
        [sealing] = [made.members[VICTIM][1].sealing]
    assert sealing is not None
    columns = torch.from_numpy(np.concatenate([np.arange(*one) for one in sealing.columns]))
    moved = (own - begun)[columns].abs().max()
    assert moved > 1e-3
    assert (read - own)[columns].abs().max() < 1e-3 * moved


def row_of(made: Scene, number: int) -> torch.Tensor:
    sealing = made.members[number][1].sealing
    assert sealing is not None
    return torch.from_numpy(sealing.row).double()


def stolen(made: Scene, mean: torch.Tensor, begun: torch.Tensor) -> torch.Tensor:
    """By the server's own knowledge: the mean, the weights, and that the others' adapters are those that it has sent."""
    weights = [made.members[number][1].sealing.weight for number in range(SEATS)]  # type: ignore[union-attr]
    others = sum(weights) - weights[VICTIM]
    return (mean * sum(weights) - begun * others) / weights[VICTIM]


@pytest.mark.parametrize(
    ("gradients", "refused"),
    [
        ([], False),  # all blocks are on the client: nothing comes back
        ([0.0, 0.0, 0.0], True),
        ([0.0], True),
        ([0.0, 1e-30, 0.0], False),
        ([1.0, 0.0, 0.0], False),
        ([0.0, 0.0, -0.5], False),
    ],
)
def test_only_a_whole_round_of_exact_zeros_is_refused(gradients: list[float], refused: bool) -> None:
    returned = Returned()
    for value in gradients:
        returned.note(torch.zeros(2, 3, 4).index_put((torch.tensor(1), torch.tensor(2), torch.tensor(3)), torch.tensor(value)))
    assert returned.gradients == len(gradients)
    if not refused:
        returned.check()
        return
    with pytest.raises(PolicyError, match="exactly zero"):
        returned.check()
