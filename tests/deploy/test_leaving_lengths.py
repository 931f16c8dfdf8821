"""Sizes of what leaves a client whose rows are lengthened to buckets, and what is computed and sent again: the same bytes."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from splitft.apps import client_setup
from splitft.deploy.letters import Letter, Ready, read
from splitft.engine.exchange import packet_of
from splitft.errors import Interrupted
from splitft.messages import Frame, RoundEnd, Type, decode

from .federation_scenes import Scene, adapters_of, scene, simulated, wait_for
from .hostile import Said, Tamper, bent
from .process_scenes import Ground

pytestmark = pytest.mark.timeout(60)

BUCKET = 8
# Tokens of a client's documents, its end token counted: equal in buckets of eight, never equal in themselves.
LENGTHS = ([3, 9, 17, 12, 25, 6, 20, 30, 11, 15], [8, 16, 22, 9, 31, 1 + 1, 24, 26, 14, 10])
TOKENS = {"packing": "documents", "block_tokens": 32, "held_out": 0.2}
# Frames whose bytes are of a fixed form; the letters behind them name counts, a number of one to five bytes each.
FIXED = (Type.STEP_UP, Type.GRADIENT_UP, Type.SCORE_UP)


def texts(folder: Path, ground: Ground, lengths: list[int]) -> Path:
    """A folder with the tiny model and three clients whose documents have so many tokens."""
    (folder / "texts").mkdir(parents=True)
    (folder / "model").symlink_to(ground.folder / "model")
    draw = np.random.default_rng(len(folder.name))
    for client in range(3):
        words = ["".join(draw.choice(list("abcdefgh "), count - 2)).strip().ljust(count - 2, "x") + "." for count in lengths]
        (folder / "texts" / f"c{client}.txt").write_text("\n\n".join(words) + "\n")
    return folder


def listening(sent: list[tuple[int, bytes]]) -> Tamper:
    def note(kind: int, payload: bytes) -> list[Said]:
        sent.append((kind, payload))
        return [(kind, payload)]

    return note


def played(folder: Path, bucket: int, **changes: Any) -> tuple[Path, list[tuple[int, bytes]]]:
    """A whole federation, and all that its clients sent."""
    sent: list[tuple[int, bytes]] = []
    with scene(folder, rounds=2, tokens={**TOKENS, "bucket_tokens": bucket}, **changes) as fed:
        fed.all_clients(link_of=bent(listening(sent)))
        return fed.end(), sent


def frames(sent: list[tuple[int, bytes]]) -> list[Frame]:
    return [decode(payload) for kind, payload in sent if kind == Letter.FRAME]


def sizes(sent: list[tuple[int, bytes]]) -> dict[tuple[Any, ...], int]:
    """Bytes of every frame of a fixed form, by what it is."""
    found = {}
    for frame in frames(sent):
        if frame.kind in FIXED:
            step = frame.step()
            found[frame.kind, step.round, step.client, step.step, step.micro] = frame.size_bytes
    return found


SHAPES: dict[str, dict[str, Any]] = {
    "labels on the server": {},
    "u-shape": {"split": {"labels": "client"}},
    "caches": {"uplink": {"name": "residual"}, "downlink": {"name": "residual"}, "train": {"local_steps": 6}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_only_multiples_leave_and_the_numbers_are_those_of_one_process(tmp_path: Path, ground: Ground, shape: str) -> None:
    folder, changes = texts(tmp_path / "one", ground, LENGTHS[0]), SHAPES[shape]
    run, sent = played(folder, BUCKET, **changes)
    named = [length for frame in frames(sent) if frame.kind in (Type.STEP_UP, Type.SCORE_UP) for length in frame.lengths[:2]]
    assert named
    assert all(length % BUCKET == 0 for length in named)
    for kind, payload in sent:
        if kind == Letter.READY:
            assert read(Ready, payload).tokens % BUCKET == 0
    for frame in frames(sent):
        if frame.kind in FIXED and frame.kind != Type.SCORE_UP:
            assert packet_of(frame, 0).shape[0] % BUCKET == 0
    reference = simulated(folder, rounds=2, tokens={**TOKENS, "bucket_tokens": BUCKET}, **changes)
    assert torch.equal(adapters_of(run), adapters_of(reference))


@pytest.mark.parametrize("shape", ["labels on the server", "u-shape"])
def test_two_texts_alike_in_buckets_are_alike_in_every_size(tmp_path: Path, ground: Ground, shape: str) -> None:
    """Somebody who sees sizes alone, as a network does, cannot tell the two; without buckets it can."""
    seen = []
    for name, lengths in zip(("first", "other"), LENGTHS, strict=True):
        folder = texts(tmp_path / name, ground, lengths)
        seen.append([sizes(played(folder, bucket, name=f"fed-{bucket}", **SHAPES[shape])[1]) for bucket in (BUCKET, 0)])
    assert len(seen[0][0]) > 3 * 2 * 3
    assert seen[0][0] == seen[1][0]
    assert seen[0][1] != seen[1][1]


def test_what_sizes_no_longer_say_the_server_still_sees(tmp_path: Path, ground: Ground) -> None:
    """The limit of the option, as docs/privacy.md has it: no target in the labels, or zeros in a U-shape's gradient, end the text; the
    counts of targets say how many there are. What is added is there too for whoever reads the activations back."""
    folder = texts(tmp_path / "server", ground, LENGTHS[0])
    _, sent = played(folder, BUCKET)
    step = next(frame for frame in frames(sent) if frame.kind == Type.STEP_UP)
    labels = np.frombuffer(packet_of(step, 1).payload, np.uint16)
    assert 0 < int((labels != 65_535).sum()) == step.step().targets < sum(step.lengths) - len(step.lengths)
    _, sent = played(folder, BUCKET, name="shaped", split={"labels": "client"}, exit_uplink="identity")
    up = next(frame for frame in frames(sent) if frame.kind == Type.STEP_UP)
    of_it = [frame for frame in frames(sent) if frame.kind == Type.GRADIENT_UP and frame.step().client == up.step().client]
    back = next(frame for frame in of_it if (frame.step().step, frame.step().micro) == (up.step().step, up.step().micro))
    packet = packet_of(back, 0)
    rows = np.frombuffer(packet.payload, np.float32).reshape(packet.shape)
    assert int((np.abs(rows).max(1) > 0).sum()) == up.step().targets
    ends = [frame.read(RoundEnd).tokens for frame in frames(sent) if frame.kind == Type.ROUND_END]
    assert all(count > 0 for count in ends)


# -- sent again ----------------------------------------------------------------------------------------------------

NOISY = {"name": "noise", "multiple": 0.5, "inner": {"name": "quantize", "bits": 8}}


def twice_sent(folder: Path, **changes: Any) -> tuple[dict[tuple[Any, ...], list[bytes]], Scene]:
    """What clients sent, by what it is, of a run in which each stops in the midst of its first round and is started again."""
    sent: list[tuple[int, bytes]] = []

    def until(kind: int, payload: bytes) -> list[Said]:
        sent.append((kind, payload))
        if kind == Letter.FRAME and (frame := decode(payload)).kind == Type.STEP_UP and frame.step().step == 2:
            raise Interrupted("killed in the midst of a round.")
        return [(kind, payload)]

    # Measured rows would leave without noise: a server with noise in its run has a public text instead.
    public = {
        "tokens": {**TOKENS, "bucket_tokens": BUCKET, "held_out": 0.0, "common_held_out": 0.1},
        "federation": {"held_out": str(folder / "texts" / "c0.txt")},
    }
    with scene(folder, rounds=2, **public, **changes) as fed:
        fed.all_clients(link_of=bent(until))
        for number in range(3):
            with pytest.raises(Interrupted):
                fed.members.pop(number)[0].end(20)
        for number in range(3):
            fed.client(number, link_of=bent(listening(sent)))
            wait_for(lambda number=number: fed.house.host.seats[number].session is not None)  # type: ignore[misc]
        fed.end()
    found = defaultdict(list)
    for frame in frames(sent):
        if frame.kind in (Type.STEP_UP, Type.GRADIENT_UP):
            step = frame.step()
            found[frame.kind, step.round, step.client, step.step, step.micro].append(frame.encode())
    return found, fed


@pytest.mark.parametrize("labels", ["server", "client"])
def test_what_is_computed_again_after_a_restart_leaves_as_the_same_bytes(tmp_path: Path, ground: Ground, labels: str) -> None:
    """With noise: a second draw of it on the same states would average out."""
    folder = texts(tmp_path / "again", ground, LENGTHS[0])
    changes = {"split": {"labels": labels}, "uplink": NOISY, "exit_uplink": NOISY}
    found, _ = twice_sent(folder, **changes)
    again = {what: made for what, made in found.items() if len(made) > 1}
    assert len(again) >= 3 * (3 if labels == "server" else 5)
    for what, made in again.items():
        assert len(set(made)) == 1, what


def test_another_key_would_be_other_bytes(tmp_path: Path, ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a client that does not keep its key sends a second sample of the noise."""
    folder = texts(tmp_path / "twin", ground, LENGTHS[0])
    monkeypatch.setattr(client_setup.ClientWorkshop, "_noise_key", lambda self: np.random.default_rng().bytes(32))
    found, _ = twice_sent(folder, uplink=NOISY)
    assert any(len(set(made)) > 1 for made in found.values())
