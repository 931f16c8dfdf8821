"""Updates that are finite and wicked: refused where they are absurd, and outvoted by a robust rule where they are not. Over the network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from splitft.compress.base import Packet
from splitft.deploy.letters import Letter, Ready, pack, read
from splitft.engine.exchange import packet_bytes, parse_packet
from splitft.messages import Frame, RoundEnd, Type

from .federation_scenes import adapters_of, events_of, federation_values, scene
from .hostile import Said, bent, in_frames
from .security_runs import honest_alone, honest_first, merged

pytestmark = [pytest.mark.timeout(120), pytest.mark.chaos]
SEATS = 5
RUN: dict[str, Any] = {
    "rounds": 3,
    "clients": {"minimum": SEATS - 1},
    "policy": {"name": "fixed", "cuts": [2] * SEATS},
    "train": {"local_steps": 3, "batch_size": 2, "moments": "keep", "learning_rate": 5e-3},
    "evaluate": {"every_rounds": 3, "max_rows": 0},
    "adapter_uplink": {"name": "identity"},
    "federation": {"join_s": 5.0},
}


def scaled(factor: float, from_round: int = 1) -> Any:
    """Multiply the adapters that an update brings."""

    def change(frame: Frame) -> bytes | None:
        if frame.read(RoundEnd).round < from_round:
            return None
        packet = parse_packet(frame.packets[0])
        vector = torch.frombuffer(bytearray(packet.payload), dtype=packet.dtype) * factor
        other = Packet(packet.codec, packet.dtype, packet.shape, vector.numpy().tobytes())
        return replace(frame, packets=(packet_bytes(other),)).encode()

    return in_frames(change, Type.ROUND_END)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("poison")
    federation_values(folder, SEATS)
    return folder


def played(folder: Path, tamper: Any, name: str, **changes: Any) -> Path:
    """The run with an offender in the last seat; without one where there is no `tamper`."""
    with scene(folder, SEATS, **merged(RUN, {**changes, "name": name})) as fed:
        honest_first(fed, SEATS - 1)
        if tamper is not None:
            fed.client(SEATS - 1, link_of=bent(tamper))
        offender = fed.members.pop(SEATS - 1, (None,))[0]
        run = fed.end()
        if offender is not None:
            offender.join(20)
    return run


def loss_of(folder: Path) -> float:
    """The joined model on the held-out rows of the honest."""
    clients = [one for one in events_of(folder, "evaluation")[-1]["clients"] if one["client"] != SEATS - 1]
    return sum(one["loss"] for one in clients) / len(clients)


@pytest.mark.parametrize("from_round", [1, 2])
def test_an_update_a_thousand_times_too_large_is_refused(place: Path, from_round: int) -> None:
    """After a warm round it is held against those before; in the first round against the others'."""
    run = played(place, scaled(1e3, from_round), f"large-{from_round}", **{"rounds": from_round})
    statuses = {event["round"]: {one["client"]: one["status"] for one in event["clients"]} for event in events_of(run)}
    assert statuses[from_round][SEATS - 1] != "done", statuses
    assert all(status == "done" for client, status in statuses[from_round].items() if client != SEATS - 1)
    if from_round == 1:
        assert torch.equal(adapters_of(run), honest_alone(place, SEATS, SEATS - 1, **merged(RUN, {"rounds": 1})))


RULES: dict[str, dict[str, Any]] = {
    "trimmed_mean": {"name": "trimmed_mean", "share": 0.2},
    "median": {"name": "median"},
    "norm_clip": {"name": "norm_clip"},
}


@pytest.fixture(scope="module")
def clean_loss(place: Path) -> float:
    return loss_of(played(place, None, "clean", federation={"join_s": 0.0}))


def test_the_mean_does_not_withstand(place: Path, clean_loss: float) -> None:
    """So that the next test can fail: a flipped and enlarged update, let through, ruins the average."""
    loss = loss_of(played(place, scaled(-30.0), "mean", federation={"update_norm_factor": 0}))
    assert loss > 1.10 * clean_loss, (loss, clean_loss)


@pytest.mark.parametrize("rule", RULES)
def test_robust_rules_withstand(place: Path, clean_loss: float, rule: str) -> None:
    run = played(place, scaled(-30.0), rule, aggregator=RULES[rule], federation={"update_norm_factor": 0})
    assert abs(loss_of(run) - clean_loss) <= 0.05 * clean_loss, (loss_of(run), clean_loss)


def test_a_billion_samples_weigh_no_more(place: Path) -> None:
    """Updates are weighed by the targets that went through the server, whatever a client says of its data."""

    def claim(kind: int, payload: bytes) -> list[Said]:
        if kind == Letter.READY:
            ready = read(Ready, payload)
            return [(kind, pack(msgspec.structs.replace(ready, rows=10**9, tokens=10**9 * 16, documents=10**9)))]
        return [(kind, payload)]

    lied = played(place, claim, "claims", rounds=1)
    honest = played(place, lambda kind, payload: [(kind, payload)], "honest", rounds=1)
    assert torch.equal(adapters_of(lied), adapters_of(honest))
