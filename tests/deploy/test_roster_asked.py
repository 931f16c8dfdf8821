"""A server asks the roster of every client every second: answers that still hold are not worked out again, those that do not are."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from splitft.clock import utc_time
from splitft.deploy import roster
from splitft.deploy.roster import Member, Roster

from .identities import federation, member


@pytest.fixture
def asked(tmp_path: Path) -> tuple[Path, Roster, bytes]:
    folder = federation(tmp_path / "federation")
    member(folder, "north", tmp_path / "north")
    found = Roster.load(folder), (tmp_path / "north" / "certificate.pem").read_bytes()
    assert isinstance(found[0].find(found[1]), Member)
    return folder, *found


def test_an_answer_that_holds_is_not_worked_out_again(asked: tuple[Path, Roster, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(pem: bytes) -> None:
        raise AssertionError("the certificate was parsed again")

    monkeypatch.setattr(roster, "identify", parsed)
    assert isinstance(asked[1].find(asked[2]), Member)


def test_revocation_is_seen_at_once(asked: tuple[Path, Roster, bytes]) -> None:
    folder, ours, certificate = asked
    roster.revoke(folder, "north")
    assert "taken off" in str(ours.find(certificate))


def test_expiry_is_seen_without_a_change_of_the_file(asked: tuple[Path, Roster, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours, certificate = asked
    later = utc_time() + timedelta(days=4000)
    monkeypatch.setattr(roster, "utc_time", lambda: later)
    assert "expired" in str(ours.find(certificate))
