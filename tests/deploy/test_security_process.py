"""The commands as an operator meets them: what each refusal is called, which code it ends with; a secret of the text is sought in all."""

from __future__ import annotations

import base64
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from splitft.deploy import roster
from splitft.deploy.identity import Identity

from ..net.proxy import Proxy
from .hostile import hello, raw
from .identities import unlisted
from .process_scenes import Federation, Forked, Ground, Nursery, federation
from .test_preflight import wrong_clients

pytestmark = pytest.mark.timeout(110)
AUTHORITY = "authority.pem"


def listening(made: Federation) -> None:
    end_s = time.monotonic() + 40
    while "server   " not in made.server.text():
        assert made.server.running, made.server.text()
        assert time.monotonic() < end_s
        time.sleep(0.05)


def ends(client: Forked, code: int, *words: str) -> None:
    """With this code, within seconds, and one clear message without a traceback."""
    began_s = time.monotonic()
    assert client.wait(30) == code, client.text()[-3000:]
    text = client.text()
    assert time.monotonic() - began_s < 20
    assert "Traceback" not in text
    assert "trying again" not in text, text
    for word in words:
        assert word in text, text


def test_every_refusal_has_its_code_and_its_sentence(nursery: Nursery, ground: Ground, tmp_path: Path) -> None:
    with federation(nursery, ground, tmp_path, rounds=500, clients={"minimum": 1}, federation={"join_s": 0.0}) as made:
        fed = tmp_path / "federation"
        made.serve()
        made.join(0)
        listening(made)
        (tmp_path / "w").mkdir()
        homes = wrong_clients(fed, tmp_path / "w")
        homes["stranger"] = unlisted(fed, "stranger", tmp_path / "stranger")
        for home in homes.values():
            os.chmod(home / "key.pem", 0o600)

        def join(home: Path, *more: str, address: str = "") -> Forked:
            arguments = [
                "client",
                "--data",
                str(tmp_path / "texts" / "c1.txt"),
                "--server",
                address or f"127.0.0.1:{made.port}",
                "--device",
                "cpu",
            ]
            made.all.append(Forked(nursery, [*arguments, "--identity", str(home), *more], tmp_path / f"{home.name}-{len(made.all)}.log"))
            return made.all[-1]

        clients = {
            "expired": (join(homes["expired"]), 14, "expired"),
            "not yet valid": (join(homes["not yet valid"]), 14, "not valid"),
            "not on the roster": (join(homes["stranger"]), 15, ""),
            "nobody there": (join(tmp_path / "clients" / "client-1", "--wait", "0.5", address="127.0.0.1:1"), 12, "cannot be reached"),
            "a server's certificate": (join(homes["server's as client"]), 14, ""),
            "no identity": (join(tmp_path / "nothing"), 14, "no identity"),
        }
        other = homes["other authority"]
        other_root = (tmp_path / "w" / "other" / AUTHORITY).read_bytes()
        (other / AUTHORITY).write_bytes(other_root)
        clients["another authority"] = (join(other), 13, "not from the authority")
        for name, (client, code, word) in clients.items():
            if name == "nobody there":
                assert client.wait(30) == code, client.text()
                assert word in client.text()
            else:
                ends(client, code, word)
        assert len({code for _, code, _ in clients.values()}) == 4
        roster.revoke(fed, "client-0")
        began_s = time.monotonic()
        assert made.clients[0].wait(10) == 15, made.clients[0].text()
        assert time.monotonic() - began_s < 6.0
        assert made.server.running


def test_what_refuses_to_start(nursery: Nursery, ground: Ground, tmp_path: Path) -> None:
    """Defaults that would leave a door open: each says which command closes it."""
    with federation(nursery, ground, tmp_path) as made:
        text = made.config.read_text()

        def server(name: str, *more: str, **fields: str) -> Forked:
            config = tmp_path / f"{name}.toml"
            changed = text
            for field, value in fields.items():
                changed = re.sub(rf"(?m)^{field} = .*$", f'{field} = "{value}"', changed)
            config.write_text(changed)
            made.all.append(Forked(nursery, ["server", str(config), *more], tmp_path / f"{name}.log"))
            return made.all[-1]

        open_key = tmp_path / "open"
        shutil.copytree(tmp_path / "federation", open_key)
        os.chmod(open_key / "server-key.pem", 0o644)
        home = tmp_path / "clients" / "client-1"
        os.chmod(home / "key.pem", 0o644)
        data = ["client", "--data", str(tmp_path / "texts" / "c1.txt"), "--device", "cpu"]
        insecure = Forked(
            nursery,
            [*data, "--server", "example.invalid:7443", "--insecure", "--name", "alice", "--identity", str(tmp_path / "x")],
            tmp_path / "insecure.log",
        )
        readable = Forked(nursery, [*data, "--server", f"127.0.0.1:{made.port}", "--identity", str(home)], tmp_path / "readable.log")
        made.all += [insecure, readable]
        found = {
            "no certificates, all interfaces": (server("bare", address="0.0.0.0:0", identity=str(tmp_path / "none")), 14, "splitft enroll"),
            "no certificates, loopback": (server("loop", address="127.0.0.1:0", identity=str(tmp_path / "none")), 14, "splitft enroll"),
            "insecure, all interfaces": (server("wide", "--insecure", address="0.0.0.0:0"), 2, "splitft enroll init"),
            "a key that all can read": (server("key", identity=str(open_key)), 14, "chmod"),
            "an insecure client to elsewhere": (insecure, 2, ""),
            "a client's key that all can read": (readable, 14, "chmod"),
        }
        for name, (process, code, word) in found.items():
            assert process.wait(40) == code, (name, process.text()[-2000:])
            assert word in process.text(), (name, process.text()[-2000:])
            assert "Traceback" not in process.text()


CANARY = "zebrafinch quintessence 7194 obsidian"
SENTINELS = ("-----BEGIN PRIVATE KEY", "-----BEGIN EC PRIVATE KEY")


def runs_of(ids: list[int], length: int = 16) -> list[bytes]:
    """The token ids of the canary as little runs in every width of number."""
    window = np.array(ids[4 : 4 + length])
    return [window.astype(kind).tobytes() for kind in ("uint8", "<u2", "<i4", "<i8", ">u2", ">i4")] + [
        ", ".join(map(str, window)).encode(),
        ",".join(map(str, window)).encode(),
    ]


def found_in(blob: bytes, patterns: dict[str, bytes]) -> list[str]:
    return [name for name, pattern in patterns.items() if pattern in blob]


class Tap(Proxy):
    """A proxy that keeps what passes."""

    def _flipped(self, data: bytes, up: bool) -> bytes:
        self.kept.append(data)
        return data

    kept: list[bytes]


def test_a_secret_of_the_text_is_nowhere(nursery: Nursery, ground: Ground, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("\n\n".join(f"{CANARY} and more of it {CANARY} number {n} " + "round client server " * 6 for n in range(20)) + "\n")
    with federation(nursery, ground, tmp_path, seats=3, clients={"minimum": 1}, rounds=2, federation={"join_s": 0.0}) as made:
        made.serve()
        listening(made)
        with Tap("127.0.0.1", made.port) as tap:
            tap.kept = []
            tls = Identity.load(tmp_path / "clients" / "client-1").tls
            for name in ("client-0", "a\nERROR forged line", "\x1b[31mred\u2028x"):
                for fields in ({}, {"major": 9}):  # what a client of another protocol calls its version is told to the operator
                    with raw(made.port, tls) as one:
                        one.greet(hello(name, version="1\nERROR forged version", **fields))
            made.join(0, port=tap.port, text=secret)
            made.finish(80)
            wire = b"".join(tap.kept)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer.encode(CANARY, add_special_tokens=False)
    plain = {f"utf {code}": CANARY.encode(code) for code in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le")}
    base = {f"base64 {k}": base64.b64encode(CANARY.encode()[k : k + 24])[4:-4] for k in range(3)}
    tokens = {f"tokens {k}": run for k, run in enumerate(runs_of(ids)) if len(set(run)) > 3}
    patterns = plain | base | tokens | {f"word {word}": word.encode() for word in CANARY.split() if not word.isdigit()}
    keys = {word: word.encode() for word in SENTINELS}
    looked = 0
    for path in [*(tmp_path / "runs").rglob("*"), tmp_path / "server.log", tmp_path / "client-0.log"]:
        if path.is_file():
            looked += 1
            assert not found_in(path.read_bytes(), patterns | keys), path
    assert looked > 10, "the run folder was looked at"
    assert len(wire) > 100_000
    assert not found_in(wire, patterns | keys)
    assert found_in(secret.read_bytes(), patterns), "the search finds what is there"
    assert found_in(b"x" + np.array(ids).astype("<i8").tobytes(), patterns), "and tokens"
    state = [path for path in (tmp_path / "clients" / "client-0" / "state").rglob("*") if path.is_file()]
    assert state
    assert not [path for path in state if found_in(path.read_bytes(), patterns)]
    log = (tmp_path / "runs" / "fed" / "server.log").read_text()
    assert "forged version" in log
    for line in log.splitlines():
        assert not line.startswith("ERROR forged"), line
        assert line.isprintable(), line
