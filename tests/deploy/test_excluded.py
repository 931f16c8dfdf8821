"""Whoever was excluded stays out, even when the server is killed and started again, until the operator says otherwise."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from splitft.deploy.excluded import NAME, Excluded, Exclusions
from splitft.deploy.host import Host
from splitft.deploy.identity import Identity
from splitft.errors import CheckpointError, ProtocolError, ResourceError
from splitft.transport import framing

from .federation_scenes import adapters_of, scene, wait_for
from .hostile import Liar, Lie, hello, liars, raw
from .process_scenes import Federation, Ground, Nursery, federation
from .reliability_fixtures import absent_in, without

pytestmark = pytest.mark.timeout(90)
LIE: Lie = lambda index: (150, b"")  # noqa: E731
TWO: dict[str, Any] = {"rounds": 40, "clients": {"minimum": 2}, "evaluate": {"max_rows": 2, "every_rounds": 40}}
ONCE: dict[str, Any] = {"federation": {"strikes": 2, "join_s": 0.5}}


def listening(made: Federation) -> None:
    wait_for(lambda: made.server.text().count("server   ") == len(made.servers) or not made.server.running, 40)


def told(made: Federation, tls: Any) -> tuple[framing.Form, str]:
    """What the door says to client-2."""
    with raw(made.port, tls) as one:
        chunk = one.greet(hello("client-2"), os.urandom(16))
        assert chunk is not None
        return chunk.form, framing.read_note(framing.Close, chunk.piece).code if chunk.form is framing.Form.CLOSE else ""


def test_a_killed_server_lets_nobody_in_again(nursery: Nursery, ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the run ends with the bits of one without the offender. Taken out of the file, it may come in."""
    with federation(nursery, ground, tmp_path, **TWO, **ONCE) as made:
        made.serve()
        listening(made)
        tls = Identity.load(tmp_path / "clients" / "client-2").tls
        made.join(0)
        made.join(1)
        with liars([Liar(made.port, "client-2", [[LIE]], tls)]) as (one,):
            wait_for(lambda: one.end is not None)
            assert one.end is not None
            assert one.end.code == "excluded"
        assert told(made, tls)[1] == "excluded"
        made.server.kill()
        assert made.committed() < 38, "the run was over too soon"
        kept = json.loads((made.run / NAME).read_text())
        assert kept["client-2"]["seat"] == 2
        assert kept["client-2"]["strikes"] == 2
        assert "150" in kept["client-2"]["why"]
        made.serve()
        listening(made)
        assert told(made, tls) == (framing.Form.CLOSE, "excluded")
        assert f"stays excluded; take it out of {made.run / NAME}" in (made.run / "server.log").read_text()
        made.finish()
        absent = absent_in(made.run)
        assert all(2 in missing for missing in absent.values())
        reference = without(tmp_path, absent, monkeypatch, **{**TWO, "federation": {}})
        assert torch.equal(adapters_of(made.run), reference)


def test_a_name_that_is_taken_out_may_come_in(nursery: Nursery, ground: Ground, tmp_path: Path) -> None:
    with federation(nursery, ground, tmp_path, **TWO, **ONCE) as made:
        made.serve()
        listening(made)
        made.server.send(signal.SIGTERM)
        assert made.server.wait(20) == 0
        tls = Identity.load(tmp_path / "clients" / "client-2").tls
        Exclusions.load(made.run).add("client-2", Excluded(2, 3, "it lied"))
        Exclusions.load(made.run).add("client-1", Excluded(1, 3, "it lied as well"))
        made.serve()
        listening(made)
        assert told(made, tls) == (framing.Form.CLOSE, "excluded")
        made.server.kill()
        kept = json.loads((made.run / NAME).read_text())
        del kept["client-2"]
        (made.run / NAME).write_text(json.dumps(kept))
        made.serve()
        listening(made)
        assert told(made, tls)[0] is framing.Form.WELCOME


def test_a_file_that_says_nothing_stops_the_server(tmp_path: Path) -> None:
    for content in (b"", b"[]", b'{"a": 1}', b'{"a": {"seat": "x", "strikes": 1}}', b"\xff"):
        (tmp_path / NAME).write_bytes(content)
        with pytest.raises(CheckpointError, match="does not say who is excluded"):
            Exclusions.load(tmp_path)
    (tmp_path / NAME).unlink()
    assert Exclusions.load(tmp_path).clients == {}


def test_a_full_disk_excludes_all_the_same(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as this server runs, which is said."""

    def full(self: Exclusions, name: str, client: Excluded) -> None:
        raise ResourceError("storage is full.", "")

    ground.copy_to(tmp_path)
    monkeypatch.setattr(Exclusions, "add", full)
    with scene(tmp_path, **{**TWO, "rounds": 1}) as fed:
        host: Host = fed.house.host
        liar = Liar(fed.port, "client-2", [])
        wait_for(lambda: host.seats and next(iter(host.seats.values())).ready is not None)
        seat = next(iter(host.seats.values()))
        for _ in range(3):
            host.strike(seat, 1, ProtocolError("no.", ""))
        assert seat.excluded
        assert "excluded until the server ends only" in " ".join(event["text"] for event in fed.house.status.snapshot()["events"])
        liar.link.close(0.0)
