"""The roster: seats that stay, one certificate per invitation, revocation, and edits of several processes at once."""

from __future__ import annotations

import base64
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest

from splitft.clock import utc_time
from splitft.deploy import disk, roster
from splitft.deploy.certificates import identify, new_key
from splitft.deploy.roster import Member, Roster
from splitft.errors import IdentityError, ResourceError, RosterError

from .identities import HOSTILE_NAMES, federation, member, unlisted

DAY = timedelta(days=1)


def state(folder: Path) -> bytes:
    return (folder / "roster.json").read_bytes()


def test_only_the_newest_certificate_of_a_listed_client_is_found(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    found = Roster.load(folder)
    first = member(folder, "alice", tmp_path / "a")
    second = member(folder, "bob", tmp_path / "b")
    assert found.find(first.tls.certificate_pem) == Member("alice", 0, first.fingerprint, first.expires.isoformat(timespec="seconds"))
    assert isinstance(found.find(second.tls.certificate_pem), Member)
    stranger = (unlisted(folder, "carol", tmp_path / "c") / "certificate.pem").read_bytes()
    assert found.find(stranger) == "carol is not on the roster."
    copy = (unlisted(folder, "alice", tmp_path / "a2") / "certificate.pem").read_bytes()
    assert "replaced by a newer" in str(found.find(copy))
    assert "of the federation banks" in str(
        found.find(member(federation(tmp_path / "o", "banks"), "alice", tmp_path / "oa").tls.certificate_pem)
    )
    assert "no certificate" in str(found.find(b"junk"))
    assert "server is not on the roster" in str(found.find((folder / "server.pem").read_bytes()))


def test_revocation_is_seen_at_once_and_an_invitation_lifts_it_only_when_used(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    found, alice = Roster.load(folder), member(folder, "alice", tmp_path / "a")
    assert isinstance(found.find(alice.tls.certificate_pem), Member)
    roster.revoke(folder, "alice")
    assert "taken off the roster" in str(found.find(alice.tls.certificate_pem))
    secret = roster.invite(folder, "alice", DAY)
    assert "taken off the roster" in str(found.find(alice.tls.certificate_pem))
    new = roster.redeem(folder, "alice", secret, new_key().public_key())
    held = found.find(new)
    assert isinstance(held, Member)
    assert held.seat == 0
    assert "replaced" in str(found.find(alice.tls.certificate_pem))
    with pytest.raises(RosterError):
        roster.revoke(folder, "nobody")


def test_an_expired_certificate_is_not_found_even_if_listed(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    pem = roster.sign(folder, "alice", new_key().public_key(), now=utc_time() - timedelta(days=100))
    assert "expired on" in str(Roster.load(folder).find(pem))


def test_seats_are_stable_and_never_reused(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    for name in ("a", "b", "c"):
        roster.invite(folder, name, DAY)
    roster.revoke(folder, "c")
    for name in ("b", "d", "a"):
        roster.invite(folder, name, DAY)
    assert [(one.name, one.seat) for one in roster.read_register(folder).clients] == [("a", 0), ("b", 1), ("c", 2), ("d", 3)]


def test_the_secret_is_not_on_disk(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    secret = roster.invite(folder, "alice", DAY)
    for form in (secret, secret.hex().encode(), base64.b64encode(secret), base64.urlsafe_b64encode(secret)):
        assert all(form not in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_an_invitation_is_good_once_in_its_time_for_its_name(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    now, key = utc_time(), new_key().public_key()
    secret = roster.invite(folder, "alice", DAY)
    roster.invite(folder, "bob", DAY)
    before = state(folder)
    texts = set()
    refused: list[Callable[[], bytes]] = [
        lambda: roster.redeem(folder, "alice", b"x" * 16, key),
        lambda: roster.redeem(folder, "bob", secret, key),
        lambda: roster.redeem(folder, "nobody", secret, key),
        lambda: roster.redeem(folder, "alice", b"", key),
        lambda: roster.redeem(folder, "alice", secret, key, now + DAY + timedelta(minutes=1)),
    ]
    for attempt in refused:
        with pytest.raises(RosterError) as caught:
            attempt()
        texts.add(str(caught.value))
    assert len(texts) == 1  # no telling which was wrong
    assert state(folder) == before
    first = roster.redeem(folder, "alice", secret, key)
    assert identify(first)[:2] == ("hospitals", "alice")
    with pytest.raises(RosterError):
        roster.redeem(folder, "alice", secret, new_key().public_key())
    assert roster.redeem(folder, "alice", secret, key) == first  # its answer was lost: the same key, the same certificate
    roster.revoke(folder, "alice")
    with pytest.raises(RosterError):
        roster.redeem(folder, "alice", secret, key)


def test_a_second_invitation_ends_the_first(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    first = roster.invite(folder, "alice", DAY)
    second = roster.invite(folder, "alice", DAY)
    with pytest.raises(RosterError):
        roster.redeem(folder, "alice", first, new_key().public_key())
    assert roster.redeem(folder, "alice", second, new_key().public_key())


def test_eight_threads_with_one_invitation_get_one_certificate(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    secret = roster.invite(folder, "alice", DAY)

    def attempt(_: int) -> bytes | None:
        try:
            return roster.redeem(folder, "alice", secret, new_key().public_key())
        except RosterError:
            return None

    with ThreadPoolExecutor(8) as pool:
        got = [pem for pem in pool.map(attempt, range(8)) if pem]
    assert len(got) == 1
    assert isinstance(Roster.load(folder).find(got[0]), Member)


def invite_many(folder: str, who: int, count: int) -> None:
    for number in range(count):
        roster.invite(Path(folder), f"c{who}-{number}", DAY)


@pytest.mark.timeout(60)
def test_four_processes_lose_no_edit(tmp_path: Path) -> None:
    folder, count = federation(tmp_path / "fed"), 15
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=invite_many, args=(str(folder), who, count)) for who in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(40)
        assert worker.exitcode == 0
    register = roster.read_register(folder)
    assert {one.name for one in register.clients} == {f"c{who}-{number}" for who in range(4) for number in range(count)}
    assert sorted(one.seat for one in register.clients) == list(range(4 * count))
    assert len(register.invitations) == 4 * count
    assert not list(folder.glob("*.part")) + list(folder.glob(".*.part"))


def test_without_the_lock_edits_would_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin of the test above, made certain: a second edit between the first one's reading and its writing."""
    folder, write = federation(tmp_path / "fed"), roster.write_register
    monkeypatch.setattr(roster, "locked", lambda path: nullcontext())

    def write_late(where: Path, register: roster.Register) -> None:
        monkeypatch.setattr(roster, "write_register", write)
        roster.invite(where, "bob", DAY)
        write(where, register)

    monkeypatch.setattr(roster, "write_register", write_late)
    roster.invite(folder, "alice", DAY)
    assert [one.name for one in roster.read_register(folder).clients] == ["alice"]


def test_an_unchanged_roster_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = federation(tmp_path / "fed")
    alice, found = member(folder, "alice", tmp_path / "a"), Roster.load(folder)
    reads, read = [], roster.read_register
    monkeypatch.setattr(roster, "read_register", lambda where: reads.append(where) or read(where))  # type: ignore[func-returns-value]
    for _ in range(5):
        found.find(alice.tls.certificate_pem)
    assert reads == []
    roster.revoke(folder, "alice")
    reads.clear()
    assert isinstance(found.find(alice.tls.certificate_pem), str)
    assert len(reads) == 1


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"schema": 2, "federation": "x"}', b'{"schema": 1, "federation": "../x"}', b"\xff"]
)
def test_a_damaged_roster_lets_nobody_in(tmp_path: Path, content: bytes) -> None:
    folder = federation(tmp_path / "fed")
    alice, found = member(folder, "alice", tmp_path / "a"), Roster.load(folder)
    (folder / "roster.json").write_bytes(content)
    with pytest.raises(IdentityError):
        found.find(alice.tls.certificate_pem)
    with pytest.raises(IdentityError):
        roster.invite(folder, "bob", DAY)
    assert state(folder) == content


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_change_nothing(tmp_path: Path, name: str) -> None:
    folder = federation(tmp_path / "fed")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    key = new_key().public_key()
    attempts: list[Callable[[], object]] = [
        lambda: roster.invite(folder, name, DAY),
        lambda: roster.sign(folder, name, key),
        lambda: roster.revoke(folder, name),
    ]
    for attempt in attempts:
        with pytest.raises(IdentityError):
            attempt()
    with pytest.raises(RosterError):
        roster.redeem(folder, name, b"x" * 16, key)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "roster.lock"}
    assert after == before


def test_a_certificate_is_not_replaced_by_a_signed_request_unless_asked(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    first = roster.sign(folder, "alice", new_key().public_key())
    with pytest.raises(RosterError, match="already"):
        roster.sign(folder, "alice", new_key().public_key())
    second = roster.sign(folder, "alice", new_key().public_key(), replace=True)
    assert isinstance(Roster.load(folder).find(second), Member)
    assert "replaced" in str(Roster.load(folder).find(first))


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = federation(tmp_path / "fed")
    before = state(folder)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"storage is full: .*roster.json needs [0-9]+ bytes"):
        roster.invite(folder, "alice", DAY)
    assert state(folder) == before
    assert not list(folder.glob(".*"))


def test_a_held_lock_is_waited_for_only_so_long(tmp_path: Path) -> None:
    with disk.locked(tmp_path / "lock"), pytest.raises(ResourceError, match="has held"), disk.locked(tmp_path / "lock", timeout_s=0.05):
        pass
    with disk.locked(tmp_path / "lock", timeout_s=0.05):
        pass


def test_a_private_file_is_never_open_to_others(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        path = disk.write_private(tmp_path / "key", b"x")
        assert path.stat().st_mode & 0o777 == 0o600
        assert disk.private_folder(tmp_path / "d").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(old)
