"""The status page's server: read-only, strict, on loopback or behind the federation's certificates, unmoved by slow peers."""

from __future__ import annotations

import http.client
import random
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trustme
from prometheus_client.parser import text_string_to_metric_families

from splitft.clock import monotonic_s
from splitft.deploy import page as page_module
from splitft.deploy.page import PageLimits, StatusPage, is_own_host, split_address
from splitft.deploy.page_request import BadRequest, parse_head
from splitft.deploy.status import SeatChanges, ServerStatus
from splitft.errors import ConfigError, IdentityError, ResourceError
from splitft.transport.tls import ServerTls

from . import status_scenes as scenes
from .page_client import ask, raw

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def page() -> Iterator[StatusPage]:
    made = StatusPage("127.0.0.1:0", *scenes.running(), limits=PageLimits(connections=8, fresh_s=0.0))
    made.start()
    yield made
    made.stop()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/status.json", "application/json"),
        ("/metrics", "text/plain"),
        ("/health", "text/plain"),
        ("/ready", "text/plain"),
    ],
)
def test_what_is_served(page: StatusPage, path: str, kind: str) -> None:
    code, headers, body = ask(page, path)
    assert code == 200
    assert headers["Content-Type"].startswith(kind)
    assert body
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    code, headers, nothing = ask(page, path, "HEAD")
    assert code == 200
    assert nothing == b""
    assert int(headers["Content-Length"]) > 0


def test_metrics_parse(page: StatusPage) -> None:
    names = {family.name for family in text_string_to_metric_families(ask(page, "/metrics")[2].decode())}
    assert {"splitft_round", "splitft_clients", "splitft_bytes", "splitft_step_seconds"} <= names


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"])
def test_other_methods_are_refused(page: StatusPage, method: str) -> None:
    request = f"{method} /status.json HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 3\r\n\r\nabc".encode()
    answer = raw(page.port, request)
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert b"Allow: GET, HEAD" in answer
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("path", ["/nothing", "/../etc/passwd", "/status.json/", "//", "/%2e%2e/"])
def test_there_is_nothing_else(page: StatusPage, path: str) -> None:
    assert ask(page, path)[0] == 404


def test_a_body_is_never_taken_for_a_second_request(page: StatusPage) -> None:
    inner = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    head = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(inner)
    assert raw(page.port, head + inner).count(b"HTTP/1.1 ") == 1


def test_two_requests_on_one_connection(page: StatusPage) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=5)
    for _ in range(3):
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b"live\n"
    connection.close()


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"GET  / HTTP/1.1\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET / HTTP/1.1\r\n folded: header\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\n\r\n",
    ],
)
def test_malformed_requests(page: StatusPage, data: bytes) -> None:
    assert raw(page.port, data).startswith(b"HTTP/1.1 400 ")
    assert ask(page, "/health")[0] == 200


@pytest.mark.parametrize("size", [9_000, 100_000])
def test_a_head_that_is_too_long(page: StatusPage, size: int) -> None:
    with socket.create_connection(("127.0.0.1", page.port), timeout=5) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * size)
        connection.sendall(b"\r\n\r\n" if size < 16_000 else b"")
        assert connection.recv(100).startswith(b"HTTP/1.1 431 ")


def test_a_thousand_mutated_heads_are_read_or_refused() -> None:
    stream = random.Random(5)
    good = b"GET /status.json?x=1 HTTP/1.1\r\nHost: 127.0.0.1:7480\r\nAccept: */*\r\nConnection: keep-alive\r\n\r\n"
    outcomes = set()
    for _ in range(1000):
        head = bytearray(good)
        for _ in range(stream.randint(1, 5)):
            head[stream.randrange(len(head) - 4)] = stream.randrange(256)
        try:
            outcomes.add(parse_head(bytes(head)).path == "/status.json")
        except BadRequest as refusal:
            outcomes.add(refusal.code)
    assert outcomes == {True, False, 400}


@pytest.mark.parametrize(("host", "code"), [("evil.example", 421), ("127.0.0.1.evil.example:80", 421), ("", 421), ("LOCALHOST:9", 200)])
def test_another_name_that_points_here_is_not_served(page: StatusPage, host: str, code: int) -> None:
    assert ask(page, "/status.json", Host=host)[0] == code
    assert ask(page, "/", Host=host)[0] == code


def test_host_names() -> None:
    for good in ("localhost", "127.0.0.1:80", "[::1]:7480", "[::1]"):
        assert is_own_host(good, "127.0.0.1")
    for bad in ("", ":80", "evil", "localhost.evil", "10.0.0.1:7480", "localhost:80:80"):
        assert not is_own_host(bad, "127.0.0.1")


def test_ready_only_while_running() -> None:
    status, metrics = scenes.running(rounds_done=0)
    page = StatusPage("127.0.0.1:0", status, metrics)
    page.start()
    try:
        for phase, code in (("starting", 503), ("running", 200), ("draining", 503), ("finished", 503)):
            status.begin_phase(phase)  # type: ignore[arg-type]
            assert ask(page, "/ready")[::2] == (code, f"{phase}\n".encode())
            assert ask(page, "/health")[0] == 200
    finally:
        page.stop()


def test_figures_that_fail_do_not_take_the_page_down() -> None:
    def probe() -> dict[int, SeatChanges]:
        raise RuntimeError("canary")

    _, metrics = scenes.running(rounds_done=0)
    page = StatusPage("127.0.0.1:0", ServerStatus("run", 1, probe=probe), metrics)
    page.start()
    try:
        code, _, body = ask(page)
        assert code == 500
        assert b"canary" not in body
        assert ask(page, "/health")[0] == 200
    finally:
        page.stop()


# Who may look


@pytest.mark.parametrize("address", ["0.0.0.0:7480", "[::]:7480", "192.0.2.7:7480", "server.example:7480"])
def test_other_addresses_need_certificates(address: str) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        StatusPage(address, *scenes.running(rounds_done=0))


@pytest.mark.parametrize("address", ["", "127.0.0.1", "127.0.0.1:", ":80", "127.0.0.1:x", "127.0.0.1:70000", "::1:80", "[::1]"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ConfigError):
        split_address(address)


def test_an_address_that_is_taken(page: StatusPage) -> None:
    with pytest.raises(ResourceError, match="status page"):
        StatusPage(f"127.0.0.1:{page.port}", *scenes.running(rounds_done=0)).start()


def server_tls(authority: trustme.CA) -> ServerTls:
    issued = authority.issue_cert("127.0.0.1")
    chain = b"".join(part.bytes() for part in issued.cert_chain_pems)
    return ServerTls(authority.cert_pem.bytes(), chain, issued.private_key_pem.bytes())


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def guarded(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> Iterator[StatusPage]:
    # As on an address that others reach, without opening one.
    monkeypatch.setattr(page_module, "is_loopback", lambda host: False)
    made = StatusPage("127.0.0.1:0", *scenes.running(), server_tls(authority), limits=PageLimits(connections=8, handshake_s=3.0))
    made.start()
    yield made
    made.stop()


def client_context(authority: trustme.CA, shown: trustme.CA | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    if shown is not None:
        shown.issue_cert("client@federation").configure_cert(context)
    return context


def ask_tls(port: int, context: ssl.SSLContext, path: str = "/status.json") -> bytes:
    """The whole answer, or what TLS says."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        secure.sendall(f"GET {path} HTTP/1.1\r\nHost: any.example\r\nConnection: close\r\n\r\n".encode())
        found = b""
        while part := secure.recv(65_536):
            found += part
        return found


def test_a_client_of_the_federation_may_look(guarded: StatusPage, authority: trustme.CA) -> None:
    assert guarded.url.startswith("https://")
    assert b"discharge-letters" in ask_tls(guarded.port, client_context(authority, authority))


def heard(port: int, context: ssl.SSLContext) -> bytes:
    """What a peer gets to see, an end of the connection included."""
    try:
        return ask_tls(port, context)
    except (ssl.SSLError, ConnectionError):
        return b""


def test_nobody_else_may(guarded: StatusPage, authority: trustme.CA) -> None:
    assert heard(guarded.port, client_context(authority, None)) == b""
    assert heard(guarded.port, client_context(authority, trustme.CA())) == b""
    older = client_context(authority, authority)
    older.maximum_version = ssl.TLSVersion.TLSv1_2
    assert heard(guarded.port, older) == b""
    with suppress(ConnectionError):
        assert b"HTTP" not in raw(guarded.port, b"GET /status.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert b"discharge-letters" in heard(guarded.port, client_context(authority, authority))


def test_a_revoked_certificate_is_shown_the_door(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "is_loopback", lambda host: False)
    seen: list[bytes] = []

    def accept(certificate_pem: bytes) -> bool:
        seen.append(certificate_pem)
        return False

    page = StatusPage("127.0.0.1:0", *scenes.running(), server_tls(authority), accept)
    page.start()
    try:
        for path in ("/", "/status.json", "/metrics"):
            answer = ask_tls(page.port, client_context(authority, authority), path)
            assert answer.startswith(b"HTTP/1.1 403 ")
            assert b"discharge-letters" not in answer
        assert len(seen) == 3
        assert seen[0].startswith(b"-----BEGIN CERTIFICATE-----")
    finally:
        page.stop()


def test_a_certificate_is_exchanged_while_it_runs(guarded: StatusPage) -> None:
    other = trustme.CA()
    guarded.renew(server_tls(other))
    assert b"discharge-letters" in ask_tls(guarded.port, client_context(other, other))


def test_certificates_that_do_not_fit_and_a_key_that_stays_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    one, other = server_tls(trustme.CA()), server_tls(trustme.CA())
    mixed = ServerTls(one.root_pem, one.certificate_pem, other.key_pem)
    with pytest.raises(IdentityError, match="certificates"):
        page_module.tls_context(mixed)
    page_module.tls_context(one)
    assert list(tmp_path.iterdir()) == []
    assert "PRIVATE" not in repr(one)


def test_silent_handshakes_do_not_keep_others_out(guarded: StatusPage, authority: trustme.CA) -> None:
    silent = [socket.create_connection(("127.0.0.1", guarded.port), timeout=5) for _ in range(30)]
    try:
        begun_s = monotonic_s()
        assert b"discharge-letters" in ask_tls(guarded.port, client_context(authority, authority))
        assert monotonic_s() - begun_s < 2.0
    finally:
        for connection in silent:
            connection.close()
