"""`splitft enroll` as operators and clients type it: over the network, by files, and with everything that can be mistyped."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from splitft.apps.enroll_command import duration, enroll_app
from splitft.clock import utc_time
from splitft.deploy import roster
from splitft.deploy.certificates import new_key
from splitft.deploy.enrolment import Token
from splitft.deploy.enrolment_server import EnrolmentServer
from splitft.deploy.identity import Identity, ServerIdentity
from splitft.deploy.roster import Member, Roster
from splitft.errors import ConfigError, IdentityError, RosterError, SplitftError

from .identities import HOSTILE_NAMES

pytestmark = pytest.mark.timeout(60)


def enroll(*words: object, stdin: str | None = None) -> str:
    """What the command prints; an error comes out as it is."""
    result = CliRunner().invoke(enroll_app, [str(word) for word in words], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*words: object) -> SplitftError:
    with pytest.raises(SplitftError) as caught:
        enroll(*words)
    return caught.value


@pytest.fixture
def fed(tmp_path: Path) -> Path:
    folder = tmp_path / "fed"
    enroll("init", folder, "--name", "hospitals", "--host", "fed.example.org", "--host", "10.0.0.7")
    return folder


def test_from_nothing_to_a_client_on_the_roster(fed: Path, tmp_path: Path) -> None:
    assert ServerIdentity.load(fed).hosts == ("fed.example.org", "localhost", "10.0.0.7", "127.0.0.1")
    server = EnrolmentServer(fed, "127.0.0.1", 0, service_port=7443)
    port = server.start()
    try:
        token = enroll("invite", fed, "alice", "--address", f"127.0.0.1:{port}").strip()
        assert Token.read(token).name == "alice"
        told = enroll("join", "-", "--identity", tmp_path / "alice", stdin=token + "\n")
    finally:
        server.stop()
    assert "alice in hospitals" in told
    assert "--server 127.0.0.1:7443" in told
    alice = Identity.load(tmp_path / "alice")
    assert isinstance(Roster.load(fed).find(alice.tls.certificate_pem), Member)
    assert "active" in enroll("list", fed)
    assert enroll("revoke", fed, "alice").startswith("alice is off the roster")
    assert "revoked" in enroll("list", fed)
    assert "taken off" in str(Roster.load(fed).find(alice.tls.certificate_pem))


def test_the_same_by_files_alone(fed: Path, tmp_path: Path) -> None:
    home = tmp_path / "bob"
    enroll("request", "--name", "bob", "--identity", home)
    assert b"PRIVATE" not in (home / "request.pem").read_bytes()
    told = enroll("sign", fed, home / "request.pem", "--out", tmp_path / "bob.pem")
    pin = told.split("--authority ")[1].strip()
    assert "11" not in fails("accept", tmp_path / "bob.pem", "--identity", home, "--authority", "11").remedy
    assert "fingerprint" in fails("accept", tmp_path / "bob.pem", "--identity", home, "--authority", "0" * 64).message
    assert not (home / "certificate.pem").exists()
    enroll("accept", tmp_path / "bob.pem", "--identity", home, "--authority", pin, "--server", "fed.example.org:7443")
    bob = Identity.load(home)
    assert bob.server == "fed.example.org:7443"
    assert isinstance(Roster.load(fed).find(bob.tls.certificate_pem), Member)
    assert isinstance(fails("sign", fed, home / "request.pem", "--out", tmp_path / "again.pem"), RosterError)
    assert not (tmp_path / "again.pem").exists()
    enroll("request", "--name", "bob", "--identity", home)
    enroll("sign", fed, home / "request.pem", "--out", tmp_path / "again.pem", "--replace")
    enroll("accept", tmp_path / "again.pem", "--identity", home, "--authority", pin)
    assert Identity.load(home).server == "fed.example.org:7443"
    assert "replaced" in str(Roster.load(fed).find(bob.tls.certificate_pem))


def test_a_certificate_for_another_key_is_not_accepted(fed: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        enroll("request", "--name", "bob", "--identity", tmp_path / name)
    told = enroll("sign", fed, tmp_path / "one" / "request.pem", "--out", tmp_path / "bob.pem")
    pin = told.split("--authority ")[1].strip()
    assert "another key" in fails("accept", tmp_path / "bob.pem", "--identity", tmp_path / "two", "--authority", pin).message


def test_an_existing_federation_is_never_overwritten(fed: Path) -> None:
    before = {path.name: path.read_bytes() for path in fed.iterdir() if path.is_file()}
    assert isinstance(fails("init", fed, "--name", "other"), IdentityError)
    assert {path.name: path.read_bytes() for path in fed.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("name", [name for name in HOSTILE_NAMES if "\0" not in name])
def test_hostile_names_leave_no_trace(fed: Path, tmp_path: Path, name: str) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    faults = [
        fails("invite", fed, "--", name),
        fails("revoke", fed, "--", name),
        fails("request", f"--name={name}", "--identity", tmp_path / "x"),
        fails("init", tmp_path / "y", f"--name={name}") if name != "server" else IdentityError("", ""),
    ]
    assert {type(fault) for fault in faults} == {IdentityError}
    assert all(str(fault).isprintable() and len(str(fault)) < 250 for fault in faults)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "y").exists()


def test_invite_says_where_by_default_and_takes_only_sensible_times(fed: Path) -> None:
    token = Token.read(enroll("invite", fed, "alice", "--valid", "30m").strip())
    assert token.address == "fed.example.org:7444"
    expires = roster.read_register(fed).invitations[0].expires
    assert timedelta(minutes=29) < datetime.fromisoformat(expires) - utc_time() <= timedelta(minutes=30)
    enroll("renew-server", fed, "--host", "10.0.0.7")
    assert Token.read(enroll("invite", fed, "alice").strip()).address == "10.0.0.7:7444"
    assert duration("7d") == timedelta(days=7)
    for bad in ("", "24", "0h", "-1h", "31d", "1w", "1h ", "\u0662h", "99999999d"):
        with pytest.raises(ConfigError):
            duration(bad)


def test_renewing_the_server_changes_its_hosts_only_if_told(fed: Path) -> None:
    first = ServerIdentity.load(fed)
    enroll("renew-server", fed)
    assert ServerIdentity.load(fed).hosts == first.hosts
    enroll("renew-server", fed, "--host", "new.example")
    assert ServerIdentity.load(fed).hosts == ("new.example", "localhost", "127.0.0.1")
    assert fails("renew-server", fed, "--host", "bad host").exit_code == 14


def test_the_list_tells_who_expires_soon(fed: Path) -> None:
    roster.sign(fed, "soon", new_key().public_key(), now=utc_time() - timedelta(days=80))
    roster.sign(fed, "late", new_key().public_key(), now=utc_time() - timedelta(days=95))
    roster.invite(fed, "new", timedelta(hours=1))
    lines = {line.split()[1]: line for line in enroll("list", fed).splitlines() if line.strip()[:1].isdigit()}
    assert "expires soon" in lines["soon"]
    assert "expired" in lines["late"]
    assert "invited" in lines["new"]


def test_a_folder_that_is_no_federation_is_named(tmp_path: Path) -> None:
    for words in (("list", tmp_path), ("invite", tmp_path, "a"), ("revoke", tmp_path, "a"), ("renew-server", tmp_path)):
        assert isinstance(fails(*words), IdentityError)
    assert list(tmp_path.iterdir()) == []


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from splitft.apps.enroll_command import enroll_app; import splitft.apps.enroll_command as m;"
        "heavy = {'cryptography', 'torch', 'grpc', 'rich.table', 'msgspec'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)
