"""Steps out of order, of another round, of a dead session; peers of other versions; bytes of every release, which decode for ever."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from splitft import __version__, messages
from splitft.deploy import letters
from splitft.deploy.letters import PROTOCOL_MAJOR, PROTOCOL_MINOR, Letter
from splitft.errors import ProtocolError
from splitft.messages import Frame, Type
from splitft.transport import framing
from splitft.transport.link import Link
from splitft.transport.values import Limits, Refused

from .federation_scenes import QUICK, adapters_of, events_of, scene, wait_for
from .hostile import bent, hello
from .process_scenes import Ground
from .reliability_fixtures import Undisturbed, absent_in, without

pytestmark = pytest.mark.timeout(60)
WIRE = Path(__file__).with_name("wire")


class Disorder:
    """A client's link that keeps its steps of round 1, and in round 2 sends something else in between."""

    def __init__(self, how: str) -> None:
        self.how, self.kept, self.sent_s = how, list[bytes](), 0.0
        self.held: bytes | None = None

    def __call__(self, kind: int, payload: bytes) -> list[tuple[int, bytes]]:
        frame = messages.decode(payload) if kind == Letter.FRAME else None
        if frame is None or frame.kind != Type.STEP_UP:
            return [(kind, payload)]
        fields = frame.step()
        if fields.round == 1:
            self.kept.append(payload)
        if fields.round != 2 or fields.step != 1:
            return [(kind, payload)]
        self.sent_s = time.monotonic()
        if self.how == "of the round before":
            return [(kind, self.kept[1]), (kind, payload)]
        if self.how == "of the round after":
            return [(kind, self._as(frame, round=3)), (kind, payload)]
        if self.how == "sent twice":
            return [(kind, payload), (kind, payload)]
        return [(kind, self._as(frame, step=2)), (kind, payload)]  # the next step first

    @staticmethod
    def _as(frame: Frame, **changes: Any) -> bytes:
        return replace(frame, fields=replace(frame.step(), **changes).pack()).encode()


@pytest.mark.parametrize("how", ["of the round before", "of the round after", "sent twice", "out of order"])
def test_steps_that_do_not_belong_here(
    how: str, ground: Ground, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another round: passed over, the bits stay. Out of order, or twice with the session saying they are new: the sender loses the
    round, is told within a tenth of a second, and the result is that of a round without it."""
    ground.copy_to(tmp_path)
    disorder = Disorder(how)
    told: list[float] = []
    with scene(tmp_path) as fed:
        strike = fed.house.host.strike
        monkeypatch.setattr(fed.house.host, "strike", lambda *facts: (told.append(time.monotonic()), strike(*facts))[1])
        for number in range(3):
            fed.client(number, link_of=bent(disorder) if number == 1 else Link)
            wait_for(lambda number=number: number in fed.house.host.seats)  # type: ignore[misc]
        folder = fed.end()
    absent = absent_in(folder)
    assert disorder.sent_s > 0
    assert [one["status"] for event in events_of(folder) for one in event["clients"] if one["client"] != 1] == ["done"] * 6
    if how.startswith("of the round"):
        assert not told
        assert torch.equal(adapters_of(folder), undisturbed.adapters)
    else:
        assert absent == {1: set(), 2: {1}, 3: set()}
        assert 0 <= told[0] - disorder.sent_s < 0.1 + 0.4, "a loaded machine has a little longer"
        assert torch.equal(adapters_of(folder), without(tmp_path, absent, monkeypatch))


def test_another_major_version_is_refused_with_both_named(ground: Ground, tmp_path: Path) -> None:
    ground.copy_to(tmp_path)
    with scene(tmp_path) as fed:
        for changes, words in (
            (
                {"major": PROTOCOL_MAJOR + 1, "minor": 3, "version": "9.9"},
                (f"{PROTOCOL_MAJOR + 1}.3 (splitft 9.9)", f"{PROTOCOL_MAJOR}.{PROTOCOL_MINOR}"),
            ),
            ({"needs": ["frames-1", "secure-sums-7"]}, ("needs secure-sums-7",)),
        ):
            greeting = hello("client-0", **changes)
            link = Link(f"127.0.0.1:{fed.port}", None, lambda greeting=greeting: greeting, Limits(), QUICK)  # type: ignore[misc]
            with pytest.raises(Refused) as caught:
                link.open(10.0)
            link.close(0.0)
            assert caught.value.code == "version"
            assert caught.value.remedy
            for word in (*words, __version__) if "major" in changes else words:
                assert word in caught.value.text
        fed.all_clients().end()


def test_fields_of_a_newer_minor_version_are_passed_over(ground: Ground, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """HELLO, READY and the reports of a newer client carry fields that this server does not know."""
    ground.copy_to(tmp_path)

    def newer(kind: int, payload: bytes) -> list[tuple[int, bytes]]:
        if kind in (Letter.READY, Letter.OPENED, Letter.REPORT):
            payload = msgspec.msgpack.encode({**msgspec.msgpack.decode(payload), "of_tomorrow": [1, {"two": 3}]})
        return [(kind, payload)]

    with scene(tmp_path) as fed:
        for number in range(3):
            fed.client(number, link_of=bent(newer))
            wait_for(lambda number=number: number in fed.house.host.seats)  # type: ignore[misc]
        folder = fed.end()
    assert torch.equal(adapters_of(folder), undisturbed.adapters)
    letters.read(letters.Hello, hello("client-0", minor=PROTOCOL_MINOR + 1, of_tomorrow="x"))
    with pytest.raises(ProtocolError):
        letters.read(letters.Hello, b"\x81\xa5major\xc3")


# What the places of records without names mean, in every release.
STEP = ("round", "client", "step", "micro", "normaliser", "targets", "squared_norm", "loss_sum")
NOTES = {
    "HELLO": ("process", "server", "received", "filled", "greeting"),
    "WELCOME": ("server", "epoch", "received", "filled", "greeting", "heartbeat_s"),
    "CLOSE": ("code", "text", "remedy", "lost"),
}


def decoded(layer: str, form: str, data: bytes) -> Any:
    """Recorded bytes as plain values, by this version."""
    if layer == "letter":
        return msgspec.to_builtins(letters.read(getattr(letters, form), data))
    if layer == "chunk":
        chunk = framing.decode(data)
        note = {"HELLO": framing.Hello, "WELCOME": framing.Welcome, "CLOSE": framing.Close}.get(form)
        facts = [chunk.form.name, chunk.kind, chunk.total, chunk.offset, chunk.sequence, chunk.received, chunk.released]
        if note is None:
            return [facts, bytes(chunk.piece).hex()]
        said = framing.read_note(note, chunk.piece)  # a list without names: what is meant is which name each place has
        return [facts, msgspec.to_builtins([getattr(said, name) for name in NOTES[form]])]
    frame = messages.decode(data)
    step = len(frame.fields) == messages.STEP_BYTES and frame.kind not in (Type.ROUND_END, Type.SCORE_START, Type.SCORE_END)
    kinds: dict[Type, Any] = {
        Type.ROUND_START: messages.RoundStart,
        Type.ROUND_END: messages.RoundEnd,
        Type.ROUND_ACCEPTED: messages.RoundAccepted,
        Type.SCORE_START: messages.ScoreStart,
        Type.SCORE_END: messages.ScoreEnd,
    }
    fields = [getattr(frame.step(), name) for name in STEP] if step else msgspec.to_builtins(frame.read(kinds[frame.kind]))
    return [frame.kind.name, fields, list(frame.lengths), [bytes(packet).hex() for packet in frame.packets]]


RECORDED = sorted(WIRE.glob("*.json"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_bytes_decode_for_ever(path: Path) -> None:
    """A file of a release is never changed. Newer versions may know more fields; those that were sent keep their meaning."""
    entries = json.loads(path.read_text())
    assert len(entries) >= 20
    for entry in entries:
        found = json.loads(json.dumps(decoded(entry["layer"], entry["form"], bytes.fromhex(entry["bytes"])), default=lambda one: one.hex()))
        expected = entry["means"]
        if isinstance(expected, dict):
            found = {name: found[name] for name in expected}
        assert found == expected, (entry["layer"], entry["form"])


def test_this_release_is_recorded() -> None:
    assert f"protocol-{PROTOCOL_MAJOR}.{PROTOCOL_MINOR}" in [path.stem for path in RECORDED]
    entries = json.loads((WIRE / f"protocol-{PROTOCOL_MAJOR}.{PROTOCOL_MINOR}.json").read_text())
    found = {(entry["layer"], entry["form"]) for entry in entries}
    assert {form for layer, form in found if layer == "frame"} == {kind.name for kind in Type}
    assert {form for layer, form in found if layer == "chunk"} == {form.name for form in framing.Form}
    names = {name for name, one in vars(letters).items() if isinstance(one, type) and issubclass(one, msgspec.Struct)} - {
        "PartInfo",
        "Snapshot",
        "Struct",
    }
    assert {form for layer, form in found if layer == "letter"} == names
