"""Enrolment over a real TLS port: one certificate per token, trust by fingerprint, and a port that nobody can clog."""

from __future__ import annotations

import base64
import logging
import select
import socket
import ssl
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest

from splitft.clock import monotonic_s, utc_time
from splitft.deploy import enrolment, roster
from splitft.deploy.authority import Authority
from splitft.deploy.certificates import authority_fingerprint, make_request, new_key
from splitft.deploy.enrolment import Answer, Request, Token, enrol
from splitft.deploy.enrolment_server import EnrolmentServer, Failures
from splitft.deploy.identity import Identity
from splitft.deploy.roster import Member, Roster
from splitft.errors import FederationError, IdentityError, ResourceError, RosterError, UnreachableError, UntrustedError
from splitft.rng import numpy_stream

from .identities import HOSTILE_NAMES, federation

pytestmark = pytest.mark.timeout(60)
DAY = timedelta(days=1)


@contextmanager
def serving(folder: Path, **options: float) -> Iterator[EnrolmentServer]:
    server = EnrolmentServer(folder, "127.0.0.1", 0, service_port=7443, **options)  # type: ignore[arg-type]
    server.start()
    try:
        yield server
    finally:
        server.stop()


def token_for(folder: Path, port: int, name: str = "alice") -> Token:
    pin = authority_fingerprint((folder / "authority.pem").read_bytes())
    return Token(f"127.0.0.1:{port}", "hospitals", pin, name, roster.invite(folder, name, DAY))


def connected(port: int) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=10))


def ask(port: int, name: str, secret: bytes, request: bytes) -> Answer:
    """One attempt, by hand: what a hostile client would send."""
    with connected(port) as stream:
        enrolment.receive_message(stream, monotonic_s() + 10)
        enrolment.send_message(stream, Request(name, secret, request), monotonic_s() + 10)
        return msgspec.msgpack.decode(enrolment.receive_message(stream, monotonic_s() + 10), type=Answer)


def test_a_token_becomes_an_identity_the_roster_knows(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    with serving(folder) as server:
        got = enrol(Token.read(token_for(folder, server.port).text()), tmp_path / "id")
    assert (got.federation, got.name, got.server) == ("hospitals", "alice", "127.0.0.1:7443")
    assert Identity.load(tmp_path / "id") == got
    assert (tmp_path / "id" / "key.pem").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "id" / "pending-key.pem").exists()
    held = Roster.load(folder).find(got.tls.certificate_pem)
    assert isinstance(held, Member)
    assert held.seat == 0
    assert all(got.tls.key_pem not in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_inviting_again_replaces_the_certificate_and_keeps_the_seat(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    with serving(folder) as server:
        first = enrol(token_for(folder, server.port), tmp_path / "id")
        enrol(token_for(folder, server.port, "bob"), tmp_path / "bob")
        second = enrol(token_for(folder, server.port), tmp_path / "id")
    found = Roster.load(folder)
    held = found.find(second.tls.certificate_pem)
    assert isinstance(held, Member)
    assert held.seat == 0
    assert second.tls.key_pem != first.tls.key_pem
    assert "replaced" in str(found.find(first.tls.certificate_pem))


def test_a_token_is_good_once(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    with serving(folder) as server:
        token = token_for(folder, server.port)
        enrol(token, tmp_path / "one")
        before = (folder / "roster.json").read_bytes()
        with pytest.raises(RosterError, match="wrong, used, or expired"):
            enrol(token, tmp_path / "two")
        assert (folder / "roster.json").read_bytes() == before
        assert not (tmp_path / "two" / "certificate.pem").exists()


def test_eight_clients_with_one_token_get_one_certificate(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    with serving(folder) as server:
        token = token_for(folder, server.port)

        def attempt(number: int) -> Identity | None:
            try:
                return enrol(token, tmp_path / str(number))
            except RosterError:
                return None

        with ThreadPoolExecutor(8) as pool:
            got = [one for one in pool.map(attempt, range(8)) if one]
    assert len(got) == 1
    assert isinstance(Roster.load(folder).find(got[0].tls.certificate_pem), Member)


def test_a_lost_answer_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = federation(tmp_path / "fed")
    with serving(folder) as server:
        token, receive, count = token_for(folder, server.port), enrolment.receive_message, [0]

        def cut(stream: ssl.SSLSocket, deadline_s: float) -> bytes:
            body = receive(stream, deadline_s)
            count[0] += 1
            if count[0] == 2:  # the answer
                raise ConnectionResetError
            return body

        # The server has its own name for the function, so only the client is cut off.
        monkeypatch.setattr(enrolment, "receive_message", cut)
        with pytest.raises(UnreachableError):
            enrol(token, tmp_path / "id")
        assert enrol(token, tmp_path / "id").name == "alice"
    assert len(list((folder / "issued").iterdir())) == 1


def test_refusals_do_not_tell_what_was_wrong(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    late = roster.invite(folder, "late", DAY, now=utc_time() - 2 * DAY)
    secret = roster.invite(folder, "alice", DAY)
    request = {name: make_request(name, new_key()) for name in ("alice", "late", "nobody")}
    with serving(folder) as server:
        before = (folder / "roster.json").read_bytes()
        answers = {
            ask(server.port, "alice", b"x" * 16, request["alice"]),
            ask(server.port, "nobody", secret, request["nobody"]),
            ask(server.port, "late", late, request["late"]),
            ask(server.port, "alice", secret, request["nobody"]),
            ask(server.port, "alice", secret, b"junk"),
            ask(server.port, "../alice", secret, request["alice"]),
            ask(server.port, "alice", secret[:-1], request["alice"]),
        }
        assert len(answers) == 1
        assert next(iter(answers)).certificate == b""
        assert (folder / "roster.json").read_bytes() == before
        assert ask(server.port, "alice", secret, request["alice"]).certificate


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_reach_neither_disk_nor_log(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = federation(tmp_path / "fed")
    caplog.set_level(logging.DEBUG)
    with serving(folder) as server:
        before = set(tmp_path.rglob("*"))
        answer = ask(server.port, name[:2000], b"x" * 16, make_request("alice", new_key()))
        assert answer.refused
        assert {path for path in tmp_path.rglob("*") if path.name != "roster.lock"} == before
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("splitft")]
    assert len(messages) == 1
    assert messages[0].isprintable()
    assert "x1b" not in messages[0]
    form = msgspec.msgpack.encode(("127.0.0.1:1", "hospitals", b"f" * 32, name, b"s" * 16))
    text = "splitft1." + base64.urlsafe_b64encode(form + zlib.crc32(form).to_bytes(4, "big")).decode().rstrip("=")
    with pytest.raises(IdentityError):
        Token.read(text)


def test_tokens_survive_copying_and_nothing_else() -> None:
    token = Token("server.example.org:7444", "hospitals", b"f" * 32, "alice", b"s" * 16)
    text = token.text()
    assert Token.read(f"  {text}\n") == token
    assert "ssss" not in repr(token)
    for bad in (text[:-1], text[:40], text.replace("splitft1", "splitft2"), text + "A", "", "splitft1.", text[::-1], text * 9, text + "é"):
        with pytest.raises(IdentityError):
            Token.read(bad)
    for place in range(9, len(text)):
        flipped = text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :]
        with suppress(IdentityError):
            assert Token.read(flipped) == token  # the last character has bits that mean nothing


def test_a_server_of_another_authority_is_sent_nothing(tmp_path: Path) -> None:
    folder, other = federation(tmp_path / "fed"), federation(tmp_path / "other")
    with serving(other) as impostor:
        token = token_for(folder, impostor.port)
        heard: list[bytes] = []
        impostor._answer = lambda body, address: heard.append(body) or Answer()  # type: ignore[method-assign, func-returns-value]
        with pytest.raises(UntrustedError, match="authority is not the one in the token"):
            enrol(token, tmp_path / "id")
        assert heard == []
        # The impostor may even show the right authority's certificate: it does not hold a key that authority has signed.
        impostor._greeting = enrolment.Greeting("hospitals", (folder / "authority.pem").read_bytes())
        with pytest.raises(UntrustedError, match="not signed by this federation's authority"):
            enrol(token, tmp_path / "id")
        assert heard == []
        # The test can fail: with the impostor's own authority in the token it is heard.
        impostor._greeting = enrolment.Greeting("hospitals", (other / "authority.pem").read_bytes())
        with pytest.raises(RosterError):
            enrol(token_for(other, impostor.port), tmp_path / "id2")
        assert len(heard) == 1


def test_a_client_certificate_cannot_pose_as_the_enrolment_server(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    with serving(folder) as server:
        mallory = enrol(token_for(folder, server.port, "mallory"), tmp_path / "m")
    for ours, theirs in (("certificate.pem", "server.pem"), ("key.pem", "server-key.pem")):
        (folder / theirs).write_bytes((mallory.folder / ours).read_bytes())
    with serving(folder) as impostor, pytest.raises(UntrustedError, match="not that of a server"):
        enrol(token_for(folder, impostor.port), tmp_path / "id")


def test_nobody_there_and_something_else_there_are_told_apart(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UnreachableError):
        enrol(token_for(folder, port), tmp_path / "id")
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UnreachableError):
        enrol(token_for(folder, silent.getsockname()[1]), tmp_path / "id", wait_s=0.2)
    with socket.create_server(("127.0.0.1", 0)) as talker:

        def talk() -> None:
            with talker.accept()[0] as stream:
                stream.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                stream.recv(4096)

        thread = threading.Thread(target=talk)
        thread.start()
        with pytest.raises(FederationError) as caught:
            enrol(token_for(folder, talker.getsockname()[1]), tmp_path / "id")
        thread.join(5)
        assert type(caught.value) is FederationError


def test_oversize_is_refused_at_its_header(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    with serving(folder) as server:
        for announced in (enrolment.MESSAGE_BYTES + 1, 0xFFFFFFFF):
            with connected(server.port) as stream:
                enrolment.receive_message(stream, monotonic_s() + 5)
                stream.sendall(announced.to_bytes(4, "big"))
                begun = monotonic_s()
                with suppress(ConnectionError):
                    assert stream.recv(1) == b""
                assert monotonic_s() - begun < 1.0
        assert enrol(token_for(folder, server.port), tmp_path / "id").name == "alice"


def test_half_open_and_trickling_connections_are_gone_in_time_and_do_not_keep_others_out(tmp_path: Path) -> None:
    folder, wait_s = federation(tmp_path / "fed"), 1.0
    threads = threading.active_count()
    with serving(folder, wait_s=wait_s, connections=16) as server:
        half_open = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(60)]
        begun = monotonic_s()
        # Sixteen connections, so four from one address: the others are closed unheard, long before the time-out.
        closed = 0
        while closed < 56 and monotonic_s() - begun < wait_s / 2:
            closed = sum(bool(select.select([stream], [], [], 0)[0]) for stream in half_open)
        assert closed == 56
        assert threading.active_count() <= threads + 1 + 4
        token = token_for(folder, server.port)
        while True:
            try:
                got = enrol(token, tmp_path / "id")
                break
            except UnreachableError:
                assert monotonic_s() - begun < wait_s + 2.0
        assert got.name == "alice"
        trickler = connected(server.port)
        trickler.settimeout(0.1)
        begun, ended = monotonic_s(), False
        while not ended and monotonic_s() - begun < wait_s + 2.0:
            try:  # one byte of a legal message now and then
                trickler.sendall(b"\0")
                ended = monotonic_s() - begun > 0.2 and trickler.recv(4096) == b""
            except TimeoutError:
                continue
            except OSError:
                ended = True
        assert ended
        trickler.close()
        for stream in half_open:
            stream.settimeout(5)
            with stream, suppress(ConnectionError):
                assert stream.recv(1) == b""
    assert threading.active_count() <= threads + 1


def test_an_address_that_fails_often_is_not_heard_for_a_while(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    secret, request = roster.invite(folder, "alice", DAY), make_request("alice", new_key())
    with serving(folder) as server:
        server.failures = Failures(most=3, window_s=0.5)
        for _ in range(3):
            assert "wrong" in ask(server.port, "alice", b"x" * 16, request).refused
        assert "too many" in ask(server.port, "alice", secret, request).refused
        threading.Event().wait(0.6)
        assert ask(server.port, "alice", secret, request).certificate


def test_failures_remember_a_bounded_number_of_addresses() -> None:
    failures = Failures(most=1, addresses=10)
    for number in range(100):
        failures.add(str(number))
    assert len(failures._times_s) == 10
    assert failures.too_many("99")
    assert not failures.too_many("0")


def test_random_bytes_leave_the_server_as_it_was(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    before, noise = (folder / "roster.json").read_bytes(), numpy_stream(1, "enrolment fuzz")
    good = msgspec.msgpack.encode(Request("alice", b"x" * 16, make_request("alice", new_key())))
    with serving(folder) as server:
        server.failures = Failures(most=10_000)
        for _ in range(300):
            body = bytearray(good)
            for _ in range(int(noise.integers(1, 8))):
                body[int(noise.integers(len(body)))] = int(noise.integers(256))
            answer = server._answer(bytes(body[: int(noise.integers(1, len(body) + 1))]), "127.0.0.1")
            assert answer.refused
            assert not answer.certificate
        assert (folder / "roster.json").read_bytes() == before
        assert enrol(token_for(folder, server.port), tmp_path / "id").name == "alice"


def test_a_taken_port_and_a_missing_authority_are_named(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    with serving(folder) as server, pytest.raises(ResourceError, match="cannot be opened"):
        EnrolmentServer(folder, "127.0.0.1", server.port).start()
    (folder / "authority-key.pem").chmod(0o644)
    with pytest.raises(IdentityError, match="open to other users"):
        EnrolmentServer(folder, "127.0.0.1", 0).start()


def test_a_renewed_server_certificate_is_shown_at_once(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    with serving(folder) as server:
        Authority.load(folder).renew_server(["new.example"])
        with connected(server.port) as stream:
            assert stream.getpeercert(binary_form=True) == ssl.PEM_cert_to_DER_cert((folder / "server.pem").read_text())


def test_a_folder_of_another_client_is_not_taken_over(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    with serving(folder) as server:
        enrol(token_for(folder, server.port), tmp_path / "id")
        with pytest.raises(IdentityError, match="is the identity of alice in hospitals"):
            enrol(token_for(folder, server.port, "bob"), tmp_path / "id")
    assert Identity.load(tmp_path / "id").name == "alice"
