"""Who may come in, and as whom: certificates of every kind, names and numbers of others. An honest client trains beside."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
import torch

from splitft.deploy import letters, roster
from splitft.deploy.identity import Identity, ServerIdentity
from splitft.deploy.letters import Letter, Open, Opened, pack
from splitft.messages import Frame, RoundAccepted, RoundStart, ScoreEnd, ScoreStart, StepFields, Type, decode, round_frame
from splitft.transport import framing
from splitft.transport.tls import ClientTls

from .federation_scenes import Scene, adapters_of, scene, wait_for
from .hostile import Liar, Lie, Said, bent, hello, liars, raw
from .identities import HOSTILE_NAMES, unlisted
from .process_scenes import Ground
from .security_runs import COMMON, honest_alone, honest_first, merged
from .test_preflight import wrong_clients

pytestmark = pytest.mark.timeout(60)


def tls_of(home: Path, root: Path) -> ClientTls:
    return ClientTls(root.read_bytes(), (home / "certificate.pem").read_bytes(), (home / "key.pem").read_bytes())


@pytest.fixture
def secure(tmp_path: Path, ground: Ground) -> Iterator[tuple[Scene, Path]]:
    """A federation with certificates in which client-0 trains round after round."""
    ground.copy_to(tmp_path)
    fed = tmp_path / "federation"
    changes = merged(COMMON, {"rounds": 400, "clients": {"minimum": 1}, "federation": {"identity": str(fed), "enroll_address": "off"}})
    with scene(tmp_path, 3, ServerIdentity.load(fed), **merged(changes, {"federation": {"join_s": 0.0}})) as made:
        made.client(0, tls=Identity.load(tmp_path / "clients" / "client-0").tls)
        wait_for(lambda: made.run.engine.state.round >= 1)
        yield made, fed
        before = made.run.engine.state.round
        wait_for(lambda: made.run.engine.state.round > before)
        assert made.house.host.seats[0].strikes == 0
        assert list(made.house.listener.sessions) == ["client-0"]  # type: ignore[union-attr]


def test_certificates(secure: tuple[Scene, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, fed = secure
    asked: list[str] = []
    admit = made.house.host.admit
    monkeypatch.setattr(made.house.listener, "_admit", lambda peer, greeting: (asked.append(peer.address), admit(peer, greeting))[1])
    (tmp_path / "w").mkdir()
    wrong = {name: tls_of(home, fed / "authority.pem") for name, home in wrong_clients(fed, tmp_path / "w").items()}
    wrong["none"] = ClientTls((fed / "authority.pem").read_bytes(), b"", b"")
    for name, tls in wrong.items():
        with raw(made.port, tls) as one:
            assert one.greet(hello("client-1")) is None, name
            assert one.call.code() is grpc.StatusCode.UNAVAILABLE, name
    assert asked == [], "a certificate that TLS must refuse has reached the door"
    stranger = tls_of(unlisted(fed, "stranger", tmp_path / "stranger"), fed / "authority.pem")
    with raw(made.port, stranger) as one:
        close = framing.read_note(framing.Close, one.greet(hello("stranger")).piece)  # type: ignore[union-attr]
        assert close.code == "roster"
    assert len(asked) == 1


def test_a_client_that_is_revoked_while_it_is_connected(secure: tuple[Scene, Path], tmp_path: Path) -> None:
    made, fed = secure
    with liars([Liar(made.port, "client-1", [], Identity.load(tmp_path / "clients" / "client-1").tls)]) as (one,):
        wait_for(lambda: "client-1" in made.house.listener.sessions)  # type: ignore[union-attr]
        began_s = time.monotonic()
        roster.revoke(fed, "client-1")
        wait_for(lambda: one.end is not None, 6.0)
        assert time.monotonic() - began_s <= 5.0
        assert one.end is not None
        assert one.end.code == "roster"
    with raw(made.port, Identity.load(tmp_path / "clients" / "client-1").tls) as again:
        assert framing.read_note(framing.Close, again.greet(hello("client-1")).piece).code == "roster"  # type: ignore[union-attr]


def test_the_name_of_another_and_names_that_are_none(secure: tuple[Scene, Path], tmp_path: Path) -> None:
    made, _ = secure
    tls = Identity.load(tmp_path / "clients" / "client-1").tls
    before = sorted(path for path in tmp_path.rglob("*") if "runs" not in path.parts and "home-0" not in path.parts)
    for name in ("client-0", "client-2", "stranger", *HOSTILE_NAMES):
        if not name:
            continue
        with raw(made.port, tls) as one:
            chunk = one.greet(hello(name))
            assert chunk is not None, name
            close = framing.read_note(framing.Close, chunk.piece)
            assert close.code == "identity", name
            assert "\n" not in close.text
            assert "\x1b" not in close.text
            assert len(close.text) < 1000
    after = sorted(path for path in tmp_path.rglob("*") if "runs" not in path.parts and "home-0" not in path.parts)
    assert before == after


def test_names_that_are_none_without_certificates(tmp_path: Path, ground: Ground) -> None:
    ground.copy_to(tmp_path)
    changes = merged(COMMON, {"rounds": 1, "clients": {"minimum": 1}, "federation": {"join_s": 0.2}})
    with scene(tmp_path, 3, **changes) as made:
        for name in ("", "../x", "/etc/passwd", "a\nb", "a" * 10_000, "\x1b[31mred", "\u0430", "client 1", "server"):
            with raw(made.port) as one:
                close = framing.read_note(framing.Close, one.greet(hello(name)).piece)  # type: ignore[union-attr]
            assert close.code == "identity", name
            assert all(character.isprintable() for character in close.text), name
        assert not (made.run.folder / "names.txt").exists()


# -- numbers of others -------------------------------------------------------------------------------------------------------------------


def test_no_letter_of_a_client_says_who_sends_it() -> None:
    """The session says that, and behind it the certificate; a new letter with a field for it would have to be checked like a frame's."""
    for name, form in vars(letters).items():
        if isinstance(form, type) and issubclass(form, msgspec.Struct) and form is not msgspec.Struct and name not in ("Hello", "Welcome"):
            found = {one.name for one in msgspec.structs.fields(form)}
            assert not found & {"client", "seat", "sender", "identity", "key"}, name


def test_every_frame_that_names_a_client_is_known_here() -> None:
    assert "client" in {one.name for one in fields(StepFields)}
    assert set(FORGED) == set(Type), "a new type of frame needs a forgery here"


def forged_round(form: Any, kind: Type, **values: Any) -> Any:
    return lambda index: round_frame(kind, form(**{"round": index, "client": 0, **values}), ()).encode()


def forged_step(kind: Type) -> Any:
    return lambda index: Frame(kind, StepFields(index, 0, 0, 0, 4, 4).pack(), (4, 4), ()).encode()


START = {"cut": 1, "tail_blocks": 0, "exit_on_client": False}
ROUND = {"local_steps": 1, "gradient_accumulation": 1, "batch_size": 1, "rank": 1, "clip_norm": 0.0, "first_step": 0, "rates": [0.1]}
FORGED: dict[Type, Any] = {
    Type.ROUND_START: forged_round(RoundStart, Type.ROUND_START, **START, **ROUND),
    Type.STEP_UP: "recorded",
    Type.HIDDEN_DOWN: forged_step(Type.HIDDEN_DOWN),
    Type.GRADIENT_UP: forged_step(Type.GRADIENT_UP),
    Type.STEP_DOWN: forged_step(Type.STEP_DOWN),
    Type.ROUND_END: "recorded",
    Type.ROUND_ACCEPTED: forged_round(RoundAccepted, Type.ROUND_ACCEPTED),
    Type.SCORE_START: forged_round(ScoreStart, Type.SCORE_START, **START, batch_size=1, max_rows=1),
    Type.SCORE_UP: "recorded",
    Type.SCORE_DOWN: forged_step(Type.SCORE_DOWN),
    Type.SCORE_END: forged_round(ScoreEnd, Type.SCORE_END, loss_sum=0.5, correct=0, tokens=1),
}


@pytest.mark.parametrize("where", ["training", "measuring"])
def test_the_number_of_another_in_every_frame_and_every_letter(tmp_path: Path, ground: Ground, where: str) -> None:
    """Right but for the number of the client, which is that of the honest one in seat 0."""
    ground.copy_to(tmp_path)
    said: list[Said] = []

    def record(kind: int, payload: bytes) -> list[Said]:
        said.append((kind, payload))
        return [(kind, payload)]

    changes: dict[str, Any] = {"clients": {"minimum": 1}, "policy": {"name": "fixed", "cuts": [1, 1]}, "federation": {"join_s": 0.0}}
    with scene(tmp_path, 2, **merged(COMMON, merged(changes, {"rounds": 1, "name": "recorded"}))) as fed:
        fed.client(0, link_of=bent(record))
        fed.end()
    frames = {frame.kind: frame for kind, data in said if kind == Letter.FRAME for frame in [decode(data)]}

    def forgery(kind: Type) -> Lie:
        if FORGED[kind] != "recorded":
            return lambda index: (Letter.FRAME, FORGED[kind](index))
        if kind == Type.ROUND_END:
            honest = msgspec.to_builtins(msgspec.msgpack.decode(frames[kind].fields))
            return lambda index: (
                Letter.FRAME,
                Frame(kind, msgspec.msgpack.encode({**honest, "round": index}), (), frames[kind].packets).encode(),
            )
        step = vars(frames[kind].step())
        return lambda index: (
            Letter.FRAME,
            Frame(kind, StepFields(**{**step, "round": index}).pack(), frames[kind].lengths, frames[kind].packets).encode(),
        )

    theirs: list[Lie] = [lambda index, kind=kind: (kind, b"\x80") for kind in Letter if kind not in (Letter.FRAME, Letter.FETCH)]
    last: Lie = lambda index: (150, b"")  # noqa: E731
    scripts = [[forgery(kind), last] for kind in Type] + [[lie, last] for lie in theirs]
    rounds = len(scripts) if where == "training" else 6
    run = merged(changes, {"rounds": rounds, "federation": {"join_s": 5.0, "strikes": 1000}, "evaluate": {"every_rounds": rounds}})
    ready = letters.Ready(10, 160, 10, 0, "0" * 64, 1 << 33)
    if where == "measuring":
        run = merged(run, {"evaluate": {"every_rounds": 1}})
        ready = msgspec.structs.replace(ready, held_out_rows=3)
        scripts = [[forgery(Type.SCORE_UP)], [last], [forgery(Type.SCORE_END)], [last]]
    with scene(tmp_path, 2, **merged(COMMON, merged(run, {"name": where}))) as fed:
        honest_first(fed, 1)
        one = Liar(fed.port, "a-liar", scripts, ready=ready)
        if where == "measuring":
            one.answer = lambda opened: answer_measuring(one, opened, forgery)  # type: ignore[method-assign]
        with liars([one]):
            folder = fed.end()
        strikes = {number: seat.strikes for number, seat in fed.house.host.seats.items()}
    assert strikes[0] == 0
    assert strikes[1] >= rounds
    if where == "training":  # all but the two of measuring, which nobody waits for in a round, are refused for themselves
        texts = [text for text in one.refusals() if "letter 150" not in text]
        assert len(texts) >= len(Type) - 2 + 5, texts
        assert sum("sent client 0" in text or "as client 0" in text for text in texts) == 2, texts
    assert torch.equal(adapters_of(folder), honest_alone(tmp_path, 2, 1, **merged(run, {"federation": {"join_s": 0.0}})))


def answer_measuring(one: Liar, opened: Open, forgery: Any) -> None:
    one.link.send(Letter.OPENED, pack(Opened(opened.round)))
    if opened.purpose == "evaluate":
        one.told += 1
        one.link.send(*forgery(Type.SCORE_UP if one.told % 2 else Type.SCORE_END)(opened.round))
    else:
        one.link.send(150, b"")
