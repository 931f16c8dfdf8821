"""What an operator relies on: a pinned server, a client revoked in the middle of a round, what is said and counted meanwhile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from splitft.apps.client_command import ClientOptions, Lines, join
from splitft.apps.doors import ByCertificate
from splitft.deploy import roster
from splitft.deploy.identity import Identity, ServerIdentity
from splitft.errors import PolicyError, RosterError, UnreachableError
from splitft.transport.link import Link
from splitft.transport.values import Limits, Refused, SessionClosed, Timing

from .federation_scenes import events_of, scene, wait_for
from .identities import federation, member

pytestmark = pytest.mark.timeout(60)


def authority(folder: Path, names: tuple[str, ...]) -> tuple[ServerIdentity, dict[str, Identity]]:
    home = federation(folder / "authority")
    people = {name: member(home, name, folder / f"identity-{name}") for name in names}
    return ServerIdentity.load(home), people


def told(folder: Path, identity: Identity, port: int, pin: str) -> None:
    """A client with a policy that believes one certificate only, to the end of the run."""
    policy = folder / "policy.toml"
    policy.write_text(f'server_fingerprint = "{pin}"\n', "utf-8")
    data = folder / "texts" / "c0.txt"
    join(ClientOptions(data, identity.folder, f"127.0.0.1:{port}", policy, cache=folder / "cache", device="cpu", memory_mb=500, quiet=True))


def test_a_pinned_server_is_believed_and_no_other(tmp_path: Path) -> None:
    server, people = authority(tmp_path, ("c0",))
    options: dict[str, Any] = {"federation": {"identity": str(server.folder)}, "rounds": 1, "train": {"local_steps": 1}}
    with scene(tmp_path, 1, server, **options) as made:
        with pytest.raises(PolicyError, match=f"certificate {server.fingerprint}; .*server_fingerprint"):
            told(tmp_path, people["c0"], made.port, "ab" * 32)
        assert not made.house.host.seats, "nothing was said to it"
        colons = ":".join(server.fingerprint[at : at + 2] for at in range(0, 64, 2)).upper()
        told(tmp_path, people["c0"], made.port, colons)
        assert [event["round"] for event in events_of(made.end())] == [1]


def test_a_pin_holds_in_the_session_itself(tmp_path: Path) -> None:
    """Another certificate of the same authority, shown after the pinned one was seen, gets no session."""
    server, people = authority(tmp_path, ("c0",))
    other, _ = authority(tmp_path / "other", ())
    with scene(tmp_path, 1, server, federation={"identity": str(server.folder)}) as made:
        for pem, opens in ((server.tls.certificate_pem, True), (other.tls.certificate_pem, False)):
            tls = replace(people["c0"].tls, root_pem=pem)
            heard: list[str] = []
            link = Link(f"127.0.0.1:{made.port}", tls, lambda: b"", Limits(), Timing(backoff_s=(0.02, 0.1)), heard.append)
            try:
                with pytest.raises(Refused if opens else UnreachableError) as problem:  # an empty greeting: the door answers, so TLS stands
                    link.open(1.0)
                assert ("Hello" in str(problem.value)) is opens, heard
            finally:
                link.close()


def test_a_client_revoked_in_a_round_does_not_hold_it_up(tmp_path: Path) -> None:
    server, people = authority(tmp_path, ("c0", "c1"))
    changes: dict[str, Any] = {
        "federation": {"identity": str(server.folder), "absence_s": 600.0},
        "clients": {"count": 2, "minimum": 2},
        "rounds": 1,
        "train": {"local_steps": 300},
    }
    with scene(tmp_path, 2, server, **changes) as made:
        assert isinstance(made.house.host.doorkeeper, ByCertificate)
        threads = [made.client(number, tls=people[f"c{number}"].tls, name=f"c{number}") for number in (0, 1)]
        wait_for(
            lambda: made.run.engine.state.round == 0 and "training" in {str(one) for one, n in made.house.status.states().items() if n}
        )
        roster.revoke(server.folder, "c1")
        with pytest.raises((Refused, RosterError, SessionClosed)):
            threads[1].end(20)
        wait_for(lambda: events_of(made.run.folder), 20)
        [first] = events_of(made.run.folder)[:1]
        assert {one["client"]: one["status"] for one in first["clients"]} == {0: "done", 1: "lost"}
        wait_for(lambda: b"splitft_round_seconds_count 1.0" in made.house.metrics.text(), 20)
        assert torch.isfinite(made.run.engine.state.adapters).all()


def test_an_outage_is_one_line_however_often_it_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    lines = Lines(Console(stderr=True), quiet=False)
    for _ in range(5):
        for state in ("connecting", "broken: nobody is there"):
            lines.connection(state)
    lines.connection("connecting")
    lines.connection("connected")
    assert capsys.readouterr().err.splitlines() == ["broken: nobody is there", "connected"]
