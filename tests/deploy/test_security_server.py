"""A server that lies, and a client that holds to its own policy: it leaves with the documented code and nothing of its data goes out."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from splitft.apps import server_setup
from splitft.deploy.letters import Finished, Letter, Open, Part, PartInfo, Welcome, pack, read
from splitft.deploy.parts import model_digest
from splitft.deploy.policy import parse_policy
from splitft.errors import ConfigError, ModelError, PolicyError, ProtocolError, SplitftError
from splitft.messages import Frame, RoundStart, ScoreStart, Type, decode

from ..net.proxy import Proxy
from .federation_scenes import federation_config, scene
from .hostile import MIB, Said, Tamper, bent, filled, lying, rss_bytes
from .process_scenes import Ground
from .security_runs import COMMON, merged
from .test_security_numbers import LARGE, NAN

pytestmark = pytest.mark.timeout(60)
# HTTP/2's own end of a connection.
HANGING_UP_BYTES = 64
CODES = {PolicyError: 17, ProtocolError: 7, ModelError: 4}
LEAVES = {Type.STEP_UP, Type.GRADIENT_UP, Type.ROUND_END, Type.SCORE_UP, Type.SCORE_END}


def told(**changes: Any) -> Callable[[Welcome], Welcome]:
    """A welcome with another configuration."""
    return lambda honest: msgspec.structs.replace(honest, config=json.dumps(merged(json.loads(honest.config), changes)))


def opening(form: Any, kind: Type, **fields: Any) -> Tamper:
    """Every opening of this kind with other fields."""

    def tamper(number: int, payload: bytes) -> list[Said]:
        if number == Letter.OPEN:
            opened = read(Open, payload)
            frame = decode(opened.frame)
            if frame.kind == kind:
                bad = msgspec.structs.replace(frame.read(form), **fields)
                changed = Frame(kind, msgspec.msgpack.encode(bad), (), frame.packets).encode()
                return [(number, pack(msgspec.structs.replace(opened, frame=changed)))]
        return [(number, payload)]

    return tamper


def opened(**fields: Any) -> Tamper:
    def tamper(number: int, payload: bytes) -> list[Said]:
        if number == Letter.OPEN and decode(read(Open, payload).frame).kind == Type.ROUND_START:
            return [(number, pack(msgspec.structs.replace(read(Open, payload), **fields)))]
        return [(number, payload)]

    return tamper


def framed(change: Callable[[Frame], bytes], kind: Type) -> Tamper:
    def tamper(number: int, payload: bytes) -> list[Said]:
        if number == Letter.FRAME and (frame := decode(payload)).kind == kind:
            return [(number, change(frame))]
        if number == Letter.OPEN and decode(read(Open, payload).frame).kind == kind:
            letter = read(Open, payload)
            return [(number, pack(msgspec.structs.replace(letter, frame=change(decode(letter.frame)))))]
        return [(number, payload)]

    return tamper


def wrong_shape(frame: Frame) -> bytes:
    packet = bytearray(frame.packets[0])
    packet[4:8] = (int.from_bytes(packet[4:8], "little") + 1).to_bytes(4, "little")
    return Frame(frame.kind, frame.fields, frame.lengths, (bytes(packet),)).encode()


def with_part(honest: Welcome, part: PartInfo) -> Welcome:
    """One part more, and the digest that belongs to all of them."""
    parts = [*honest.parts, part]
    return msgspec.structs.replace(honest, parts=parts, model=model_digest(parts))


POLICY = {"minimum_cut": 2, "maximum_rounds": 100, "maximum_local_steps": 50, "maximum_step_rows": 64}
HIDDEN = {"secure_aggregation": "required"}
CUTS = {"name": "fixed", "cuts": [2, 2]}
HONEST_WELCOME: Callable[[Welcome], Welcome] = lambda honest: honest  # noqa: E731
SILENT: Tamper = lambda kind, payload: [(kind, payload)]  # noqa: E731
# What the server says; the client's policy; what the client raises; a word of its message.
LIES: dict[str, tuple[Callable[[Welcome], Welcome], Tamper, dict[str, Any], type[SplitftError], str]] = {
    "a cut of nothing": (HONEST_WELCOME, opening(RoundStart, Type.ROUND_START, cut=0), {}, PolicyError, "minimum_cut"),
    "a cut below the minimum": (HONEST_WELCOME, opening(RoundStart, Type.ROUND_START, cut=1), POLICY, PolicyError, "minimum_cut"),
    "a cut of a billion blocks": (HONEST_WELCOME, opening(RoundStart, Type.ROUND_START, cut=10**9), POLICY, ProtocolError, "1000000000"),
    "a million blocks at the end": (
        HONEST_WELCOME,
        opening(RoundStart, Type.ROUND_START, tail_blocks=10**9, exit_on_client=True),
        POLICY,
        ProtocolError,
        "tail_blocks",
    ),
    "a measurement below the minimum": (
        HONEST_WELCOME,
        opening(ScoreStart, Type.SCORE_START, cut=1),
        {"minimum_cut": 2},
        PolicyError,
        "measurement",
    ),
    "a million rounds": (told(rounds=10**6), SILENT, POLICY, PolicyError, "maximum_rounds"),
    "round one million": (HONEST_WELCOME, opening(RoundStart, Type.ROUND_START, round=10**6), POLICY, PolicyError, "maximum_rounds"),
    "a million steps": (
        HONEST_WELCOME,
        opening(RoundStart, Type.ROUND_START, local_steps=10**6),
        POLICY,
        PolicyError,
        "maximum_local_steps",
    ),
    "another base model": (HONEST_WELCOME, SILENT, {"base_model": "0" * 64}, PolicyError, "base_model"),
    "labels, in the welcome": (HONEST_WELCOME, SILENT, {"labels": "client"}, PolicyError, "labels"),
    "a gradient of a billion": (
        HONEST_WELCOME,
        framed(lambda frame: filled(frame, 0, b"\x6e\x4e"), Type.STEP_DOWN),
        POLICY,
        PolicyError,
        "gradient_norm_limit",
    ),
    "a gradient of another shape": (HONEST_WELCOME, framed(wrong_shape, Type.STEP_DOWN), POLICY, SplitftError, ""),
    "adapters that are none": (
        HONEST_WELCOME,
        framed(lambda frame: filled(frame, 0, NAN[4]), Type.ROUND_START),
        POLICY,
        SplitftError,
        "",
    ),
    "adapters of 1e30": (
        HONEST_WELCOME,
        framed(lambda frame: filled(frame, 0, LARGE[4]), Type.ROUND_START),
        POLICY,
        PolicyError,
        "adapter_norm_limit",
    ),
    "moments of blocks that are none": (HONEST_WELCOME, opened(moments=b"x" * 40, gives=(0, 10**9)), POLICY, SplitftError, ""),
    "a model by path": (told(model={"path": "/etc/passwd"}), SILENT, POLICY, ProtocolError, "by path"),
    "an adapter by path": (told(lora={"adapter": "/etc"}), SILENT, POLICY, ProtocolError, "by path"),
    "the client's data": (told(data={"name": "text", "path": "/etc/passwd"}), SILENT, POLICY, ProtocolError, "data"),
    "where the client writes": (told(run={"folder": "/tmp"}), SILENT, POLICY, ProtocolError, "run"),
    "a run named by a path": (told(name="../../x\x1b[31m"), SILENT, POLICY, SplitftError, ""),
    "a part that is no part": (
        lambda honest: with_part(honest, PartInfo("../../x", "0" * 64, 5)),
        SILENT,
        POLICY,
        ProtocolError,
        "no model has",
    ),
    "a part of no digest": (
        lambda honest: with_part(honest, PartInfo("file:merges.txt", "../../x", 5)),
        SILENT,
        POLICY,
        ProtocolError,
        "gives file:merges.txt",
    ),
    "parts of another model": (
        lambda honest: msgspec.structs.replace(honest, model="0" * 64),
        SILENT,
        POLICY,
        ProtocolError,
        "calls the model",
    ),
    "adapters in the clear": (HONEST_WELCOME, SILENT, HIDDEN, PolicyError, "secure_aggregation"),
    "a sum, and adapters in the clear after all": (
        told(secure_aggregation={"enabled": True}, train={"moments": "reset"}),
        SILENT,
        HIDDEN,
        PolicyError,
        "in the clear at the end of a round",
    ),
    "a sum of three": (told(secure_aggregation={"enabled": True}), SILENT, {**HIDDEN, "least_owners": 5}, PolicyError, "least_owners"),
    "a sum that half can open": (
        told(secure_aggregation={"enabled": True, "threshold": 0.51}),
        SILENT,
        {**HIDDEN, "least_threshold": 0.6},
        PolicyError,
        "least_threshold",
    ),
    "rows as long as they are": (HONEST_WELCOME, SILENT, {"least_bucket_tokens": 8}, PolicyError, "least_bucket_tokens"),
    "less noise than the floor": (
        told(uplink={"name": "entropy", "inner": {"name": "noise", "multiple": 0.4}}, split={"labels": "client"}),
        SILENT,
        {"noise_floor": 0.5, "labels": "client"},
        PolicyError,
        "noise of 0.4 rms",
    ),
    "noise, and gradients without": (
        told(uplink={"name": "noise", "multiple": 0.5}, split={"labels": "client"}),
        SILENT,
        {"noise_floor": 0.5, "labels": "client"},
        PolicyError,
        "exit_uplink",
    ),
    "a seat of its own": (lambda honest: msgspec.structs.replace(honest, seat=2**40), SILENT, POLICY, ProtocolError, "seat"),
}


def everything_below(folder: Path) -> set[Path]:
    """Every file but what belongs to the run and the client."""
    own = {"runs", "home-0", "model", "texts"}
    return {path for path in folder.rglob("*") if not own & set(path.relative_to(folder).parts)}


@pytest.mark.parametrize("lie", LIES)
def test_a_client_does_not_follow_a_lie(tmp_path: Path, ground: Ground, monkeypatch: pytest.MonkeyPatch, lie: str) -> None:
    welcome, say, policy, error, word = LIES[lie]
    ground.copy_to(tmp_path)
    cut = 1 if lie == "a cut of nothing" else 2
    changes = {"rounds": 2, "clients": {"minimum": 1}, "policy": {"name": "fixed", "cuts": [cut, cut]}, "federation": {"join_s": 0.0}}
    with scene(tmp_path, 2, **merged(COMMON, changes)) as fed, Proxy("127.0.0.1", fed.port) as proxy:
        after = lying(fed, monkeypatch, welcome, say)
        before, began_s, files = rss_bytes(), time.monotonic(), everything_below(tmp_path)
        victim = fed.client(0, port=proxy.port, policy=parse_policy(policy))
        with pytest.raises(error) as raised:
            victim.end(20)
        del fed.members[0]
        assert time.monotonic() - began_s < 15
        assert rss_bytes() - before < 200 * MIB
        assert everything_below(tmp_path) == files
        assert word in str(raised.value)
        assert all(character.isprintable() for character in str(raised.value)), str(raised.value)
        if type(raised.value) in CODES:
            assert raised.value.exit_code == CODES[type(raised.value)]
        up_bytes = proxy.bytes_up
        time.sleep(0.2)
        assert proxy.bytes_up <= up_bytes + HANGING_UP_BYTES, "a client that has left sends nothing"
        if lie not in ("a gradient of a billion", "a gradient of another shape", "moments of blocks that are none"):
            sent = [decode(payload).kind for kind, payload in after if kind == Letter.FRAME]
            assert not LEAVES & set(sent), (sent, "a frame went out after the lie")


def test_held_out_rows_do_not_leave_without_the_noise_of_the_run(tmp_path: Path, ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured rows pass no codec. An honest server does not start such a run; a client does not answer another one's question."""
    ground.copy_to(tmp_path)
    changes = merged(COMMON, {"rounds": 1, "clients": {"minimum": 1}, "uplink": "noise", "policy": CUTS, "federation": {"join_s": 0.0}})
    with pytest.raises(ConfigError, match=r"set tokens.held_out = 0 and federation.held_out"):
        server_setup.assemble_server(federation_config(tmp_path, 2, **changes))
    monkeypatch.setattr(server_setup, "noise_in", lambda codec: None)
    sent: list[Type] = []

    def note(kind: int, payload: bytes) -> list[Said]:
        sent.extend([decode(payload).kind] if kind == Letter.FRAME else [])
        return [(kind, payload)]

    with scene(tmp_path, 2, **changes) as fed:
        victim = fed.client(0, link_of=bent(note))
        with pytest.raises(PolicyError, match="held-out rows, which are measured without the run's noise"):
            victim.end(20)
        del fed.members[0]
    assert Type.STEP_UP in sent
    assert Type.SCORE_UP not in sent


# -- code from data, and bytes that are not what they are said to be -----------------------------------------------------------------------


class Evil:
    """A pickle of this writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def pieces(change: Callable[[Part], bytes]) -> Tamper:
    def tamper(number: int, payload: bytes) -> list[Said]:
        if number == Letter.PART:
            part = read(Part, payload)
            return [(number, pack(msgspec.structs.replace(part, data=change(part))))]
        return [(number, payload)]

    return tamper


@pytest.mark.parametrize("what", ["auto_map", "pickle", "endless", "empty"])
def test_a_model_that_brings_code(tmp_path: Path, ground: Ground, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Parts that name code under their true digest, or that are pickles, or that do not end: refused, nothing is run or kept."""
    import pickle

    ground.copy_to(tmp_path)
    sentinel, evil = tmp_path / "sentinel", b""
    if what == "auto_map":
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        evil = json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}).encode()
    elif what == "pickle":
        evil = pickle.dumps(Evil(sentinel))
    name, digest = "file:config.json", hashlib.sha256(evil).hexdigest()

    def welcome(honest: Welcome) -> Welcome:
        if not evil:
            return honest
        parts = [
            PartInfo(one.name, digest, len(evil)) if one.name == name or (what == "pickle" and one.name == "block:0") else one
            for one in honest.parts
        ]
        return msgspec.structs.replace(honest, parts=parts, model=model_digest(parts))

    def change(part: Part) -> bytes:
        if what == "endless":
            return part.data + b"x"
        return b"" if what == "empty" else part.data

    changes = {"rounds": 1, "clients": {"minimum": 1}, "policy": {"name": "fixed", "cuts": [2, 2]}, "federation": {"join_s": 0.0}}
    with scene(tmp_path, 2, **merged(COMMON, changes)) as fed:
        honest_read = fed.house.parts.read

        def read_evil(sha256: str, offset: int, count: int) -> bytes:
            return evil[offset : offset + count] if sha256 == digest else honest_read(sha256, offset, count)

        monkeypatch.setattr(fed.house.parts, "read", read_evil)
        lying(fed, monkeypatch, welcome, pieces(change) if what in ("endless", "empty") else SILENT)
        victim = fed.client(0)
        with pytest.raises(SplitftError) as raised:
            victim.end(20)
        del fed.members[0]
    assert isinstance(raised.value, ModelError | ProtocolError)
    assert not sentinel.exists()


def test_a_welcome_larger_than_any(tmp_path: Path, ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    ground.copy_to(tmp_path)
    changes = {"rounds": 1, "clients": {"minimum": 1}, "policy": {"name": "fixed", "cuts": [2, 2]}}
    with scene(tmp_path, 2, **merged(COMMON, changes)) as fed:
        lying(fed, monkeypatch, lambda honest: msgspec.structs.replace(honest, version="x" * (5 * MIB)))
        before = rss_bytes()
        victim = fed.client(0)
        with pytest.raises(SplitftError, match=r"welcome has \d+ bytes"):
            victim.end(20)
        del fed.members[0]
        assert rss_bytes() - before < 64 * MIB


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "adapter:../x", "adapter:adapter_model.safetensors"])
def test_an_adapter_that_would_lie_elsewhere(tmp_path: Path, ground: Ground, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What is offered at the end is written to the adapter's folder under two known names, or not at all; and is what was promised."""
    ground.copy_to(tmp_path)

    def say(number: int, payload: bytes) -> list[Said]:
        if number == Letter.FINISHED:
            finished = read(Finished, payload)
            return [(number, pack(msgspec.structs.replace(finished, adapter=[PartInfo(name, "0" * 64, 10)])))]
        return [(number, payload)]

    changes = {"rounds": 1, "clients": {"minimum": 1}, "policy": {"name": "fixed", "cuts": [2, 2]}, "federation": {"join_s": 0.0}}
    with scene(tmp_path, 2, **merged(COMMON, changes)) as fed:
        files = everything_below(tmp_path)
        lying(fed, monkeypatch, say=say)
        victim = fed.client(0)
        with pytest.raises(SplitftError):
            victim.end(20)
        del fed.members[0]
        assert everything_below(tmp_path) == files
        assert not list((tmp_path / "home-0").rglob("adapter_model.safetensors"))


def test_letters_without_end_while_a_piece_is_waited_for(tmp_path: Path, ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    ground.copy_to(tmp_path)
    flood = [(int(Letter.COMMITTED), b"\x81\xa5round\x01") for _ in range(1000)]

    def say(number: int, payload: bytes) -> list[Said]:
        return [*flood, (number, payload)] if number == Letter.PART else [(number, payload)]

    changes = {"rounds": 1, "clients": {"minimum": 1}, "policy": {"name": "fixed", "cuts": [2, 2]}, "federation": {"join_s": 0.0}}
    with scene(tmp_path, 2, **merged(COMMON, changes)) as fed:
        lying(fed, monkeypatch, say=say)
        victim = fed.client(0)
        with pytest.raises(ProtocolError, match="letters while"):
            victim.end(20)
        del fed.members[0]
