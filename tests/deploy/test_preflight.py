"""Who gets past a real gRPC server's door, and what a client's preflight says of each kind of failure."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from cryptography.x509 import load_pem_x509_certificate

from splitft.clock import monotonic_s, utc_time
from splitft.deploy import preflight as module
from splitft.deploy import roster
from splitft.deploy.authority import Authority
from splitft.deploy.certificates import certificate_pem, make_leaf, read_key
from splitft.deploy.identity import Identity, ServerIdentity
from splitft.deploy.preflight import preflight
from splitft.deploy.roster import Member, Roster
from splitft.errors import FederationError, IdentityError, UnreachableError, UntrustedError
from splitft.transport.tls import ClientTls, ServerTls

from .identities import federation, member, unlisted

pytestmark = pytest.mark.timeout(60)


class Door(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Counts the calls that reach a handler, and those of clients on the roster."""

    def __init__(self, folder: Path) -> None:
        self.roster, self.calls, self.let_in = Roster.load(folder), 0, 0

    def service(self, _: Any) -> Any:
        def answer(requests: Any, context: Any) -> Iterator[bytes]:
            self.calls += 1
            found = self.roster.find(context.auth_context()["x509_pem_cert"][0])
            if not isinstance(found, Member):
                context.abort(grpc.StatusCode.PERMISSION_DENIED, found)
            self.let_in += 1
            yield b"hello"

        return grpc.stream_stream_rpc_method_handler(answer)


@contextmanager
def serving(tls: ServerTls, door: Door) -> Iterator[int]:
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool, handlers=[door], options=[("grpc.so_reuseport", 0)])
        pair = [(tls.key_pem, tls.certificate_pem)]
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair, tls.root_pem, require_client_auth=True))
        server.start()
        try:
            yield port
        finally:
            server.stop(None).wait(5)


def call(port: int, root: bytes, key: bytes | None, certificate: bytes | None) -> grpc.StatusCode:
    credentials = grpc.ssl_channel_credentials(root, key, certificate)
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(f"localhost:{port}", credentials, options) as channel:
        try:
            list(channel.stream_stream("/test/Call")(iter([b"x"]), timeout=5))
        except grpc.RpcError as problem:
            return problem.code()
        return grpc.StatusCode.OK


@pytest.fixture
def fed(tmp_path: Path) -> Path:
    return federation(tmp_path / "fed")


@pytest.fixture
def alice(fed: Path, tmp_path: Path) -> Identity:
    return member(fed, "alice", tmp_path / "alice")


def raw(home: Path) -> Identity:
    """An identity from its files without the checks of `Identity.load`: a client that does not look."""
    pem = (home / "certificate.pem").read_bytes()
    tls = ClientTls((home / "authority.pem").read_bytes(), pem, (home / "key.pem").read_bytes())
    return Identity(home, "hospitals", home.name, "", utc_time(), "", load_pem_x509_certificate(pem), tls)


def wrong_clients(fed: Path, tmp_path: Path) -> dict[str, Path]:
    """Identity folders that TLS itself must refuse."""
    homes = {
        "expired": unlisted(fed, "late", tmp_path / "expired", begins_days=-10, days=5),
        "not yet valid": unlisted(fed, "early", tmp_path / "early", begins_days=5),
        "other authority": member(federation(tmp_path / "other"), "alice", tmp_path / "stranger").folder,
        "server's as client": tmp_path / "posing",
        "trustme": tmp_path / "trustme",
    }
    for home in (homes["server's as client"], homes["trustme"]):
        home.mkdir()
    for source, target in (("server.pem", "certificate.pem"), ("server-key.pem", "key.pem")):
        (homes["server's as client"] / target).write_bytes((fed / source).read_bytes())
    issued = trustme.CA().issue_cert(common_name="alice")
    (homes["trustme"] / "certificate.pem").write_bytes(issued.cert_chain_pems[0].bytes())
    (homes["trustme"] / "key.pem").write_bytes(issued.private_key_pem.bytes())
    for home in homes.values():
        (home / "authority.pem").write_bytes((fed / "authority.pem").read_bytes())
    return homes


def test_only_a_valid_listed_client_gets_past_the_door(fed: Path, tmp_path: Path, alice: Identity) -> None:
    door, root = Door(fed), (fed / "authority.pem").read_bytes()
    with serving(ServerIdentity.load(fed).tls, door) as port:
        assert call(port, root, alice.tls.key_pem, alice.tls.certificate_pem) is grpc.StatusCode.OK
        assert (door.calls, door.let_in) == (1, 1)
        for home in wrong_clients(fed, tmp_path).values():
            got = call(port, root, (home / "key.pem").read_bytes(), (home / "certificate.pem").read_bytes())
            assert got is grpc.StatusCode.UNAVAILABLE
        assert call(port, root, None, None) is grpc.StatusCode.UNAVAILABLE
        assert door.calls == 1  # none of them saw a handler
        stranger = unlisted(fed, "stranger", tmp_path / "stranger2")
        refused = call(port, root, (stranger / "key.pem").read_bytes(), (stranger / "certificate.pem").read_bytes())
        assert refused is grpc.StatusCode.PERMISSION_DENIED
        roster.revoke(fed, "alice")
        assert call(port, root, alice.tls.key_pem, alice.tls.certificate_pem) is grpc.StatusCode.PERMISSION_DENIED
        assert door.let_in == 1


def test_the_preflight_of_a_good_client_passes_and_reaches_no_handler(fed: Path, alice: Identity) -> None:
    door = Door(fed)
    with serving(ServerIdentity.load(fed).tls, door) as port:
        preflight(f"127.0.0.1:{port}", alice)
        preflight(f"localhost:{port}", alice)
        assert door.calls == 0


def test_a_refused_client_certificate_is_an_identity_error(fed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door(fed)
    with serving(ServerIdentity.load(fed).tls, door) as port:
        homes = wrong_clients(fed, tmp_path)
        for what in ("expired", "not yet valid"):  # by its own look, before it goes near the network
            with pytest.raises(IdentityError, match=r"expired|not valid for another"):
                preflight("192.0.2.1:1", raw(homes[what]))
        monkeypatch.setattr(Identity, "check_dates", lambda self: None)
        for what, home in homes.items():
            begun = monotonic_s()
            with pytest.raises(IdentityError, match="refuses the certificate") as caught:
                preflight(f"127.0.0.1:{port}", raw(home))
            assert caught.value.exit_code == 14, what
            assert monotonic_s() - begun < 2.0
        assert door.calls == 0


def test_a_server_that_ends_the_connection_once_is_asked_again(fed: Path, alice: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    knocks, knock = [0], module._knock

    def first_fails(address: str, identity: Identity | None, deadline_s: float) -> None:
        knocks[0] += 1
        if knocks[0] == 1:
            raise module._EndedEarly
        knock(address, identity, deadline_s)

    monkeypatch.setattr(module, "_knock", first_fails)
    with serving(ServerIdentity.load(fed).tls, Door(fed)) as port:
        preflight(f"127.0.0.1:{port}", alice)
    assert knocks[0] == 2
    knocks[0] = 0
    with pytest.raises(UnreachableError):  # it was being stopped
        preflight(f"127.0.0.1:{port}", alice)


def bad_servers(fed: Path, tmp_path: Path) -> list[tuple[ServerTls, str, str]]:
    """Server certificates a client must not believe, the host it asks for, and what it must say."""
    good, authority = ServerIdentity.load(fed).tls, Authority.load(fed)
    key = read_key(good.key_pem, "key")

    def leaf(name: str, begins_days: float, days: float, hosts: tuple[str, ...]) -> ServerTls:
        now = utc_time() + timedelta(days=begins_days)
        made = make_leaf((authority.certificate, authority.key), ("hospitals", name), key.public_key(), hosts, days, now)
        return replace(good, certificate_pem=certificate_pem(made))

    here = ("localhost", "127.0.0.1")
    other = ServerIdentity.load(federation(tmp_path / "imposter"))
    ca = trustme.CA()
    issued = ca.issue_cert("localhost", "127.0.0.1")
    foreign = ServerTls(good.root_pem, issued.cert_chain_pems[0].bytes(), issued.private_key_pem.bytes())
    return [
        (leaf("server", -10, 5, here), "127.0.0.1", "has expired"),
        (leaf("server", 5, 90, here), "127.0.0.1", "not valid yet"),
        (leaf("server", 0, 90, ("elsewhere.example",)), "localhost", "is not for localhost"),
        (leaf("server", 0, 90, ("elsewhere.example",)), "127.0.0.1", "is not for 127.0.0.1"),
        (leaf("mallory", 0, 90, here), "127.0.0.1", "not a server's"),
        (replace(other.tls, root_pem=good.root_pem), "127.0.0.1", "not from the authority"),
        (foreign, "127.0.0.1", "not from the authority"),
    ]


def test_an_untrusted_server_is_named_with_what_is_wrong(fed: Path, tmp_path: Path, alice: Identity) -> None:
    door = Door(fed)
    for tls, host, says in bad_servers(fed, tmp_path):
        with serving(tls, door) as port, pytest.raises(UntrustedError, match=says) as caught:
            preflight(f"{host}:{port}", alice)
        assert caught.value.exit_code == 13
        assert caught.value.remedy
    assert door.calls == 0


def test_the_name_to_expect_can_be_given(fed: Path, alice: Identity) -> None:
    Authority.load(fed).renew_server(["fed.example.org"])
    with serving(ServerIdentity.load(fed).tls, Door(fed)) as port:
        preflight(f"127.0.0.1:{port}", Identity.load(alice.folder, server_name="fed.example.org"))
        with pytest.raises(UntrustedError, match=r"is not for other\.example"):
            preflight(f"127.0.0.1:{port}", Identity.load(alice.folder, server_name="other.example"))


@contextmanager
def answering(
    answer: Callable[[socket.socket], None], tls: ServerTls | None = None, alpn: str = "", clients: Path | None = None
) -> Iterator[int]:
    """A server that does `answer` with each connection, over TLS if told so."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        stop = threading.Event()
        context = None
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            folder = tls.certificate_pem  # paths, see below
            context.load_cert_chain(folder.decode(), tls.key_pem.decode())
            if clients is not None:
                context.load_verify_locations(clients)
                context.verify_mode = ssl.CERT_REQUIRED
            if alpn:
                context.set_alpn_protocols([alpn])

        def work() -> None:
            while not stop.is_set():
                with suppress(OSError), listening.accept()[0] as plain:
                    plain.settimeout(3.0)
                    if context is None:
                        answer(plain)
                    else:
                        with context.wrap_socket(plain, server_side=True) as stream:
                            answer(stream)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            stop.set()
            thread.join(5)


def say(what: bytes) -> Callable[[socket.socket], None]:
    def answer(stream: socket.socket) -> None:
        stream.sendall(what)
        while stream.recv(4096):
            pass

    return answer


def silent(stream: socket.socket) -> None:
    while stream.recv(4096):
        pass


def paths(fed: Path) -> ServerTls:
    """Where the files are, in place of what is in them: what Python's own server wants."""
    return ServerTls(b"", str(fed / "server.pem").encode(), str(fed / "server-key.pem").encode())


def test_nobody_there_is_unreachable(alice: Identity) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for identity in (alice, None):
        with pytest.raises(UnreachableError, match="refused") as caught:
            preflight(f"127.0.0.1:{port}", identity)
        assert caught.value.exit_code == 12
    with pytest.raises(UnreachableError, match=r"unknown|resolved"):
        preflight("no-such-host.invalid:1", alice)


def test_a_name_that_does_not_resolve_in_time_is_unreachable(alice: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(10) and [])
    begun = monotonic_s()
    with pytest.raises(UnreachableError, match="not resolved in time"):
        preflight("slow.example:1", alice, wait_s=0.2)
    release.set()
    assert monotonic_s() - begun < 1.0


def test_a_server_that_says_nothing_is_unreachable_in_bounded_time(fed: Path, alice: Identity) -> None:
    for identity, tls in ((alice, None), (None, None), (alice, paths(fed))):
        with answering(silent, tls, "h2" if tls else "") as port:
            begun = monotonic_s()
            with pytest.raises(UnreachableError, match="says nothing"):
                preflight(f"127.0.0.1:{port}", identity, wait_s=0.4)
            assert monotonic_s() - begun < 1.5


def test_a_trickle_does_not_stretch_the_bound(alice: Identity) -> None:
    def trickle(stream: socket.socket) -> None:
        for _ in range(20):
            stream.sendall(b"\x16")
            threading.Event().wait(0.1)

    with answering(trickle) as port:
        begun = monotonic_s()
        with pytest.raises(FederationError):
            preflight(f"127.0.0.1:{port}", None, wait_s=0.4)
        assert monotonic_s() - begun < 1.0


def test_a_dropped_connection_before_tls_is_unreachable(alice: Identity) -> None:
    """A port forwarder with nobody behind it does this."""
    with answering(lambda stream: None) as port, pytest.raises(UnreachableError, match="dropped"):
        preflight(f"127.0.0.1:{port}", alice)


def test_something_else_that_listens_is_neither_retried_nor_blamed_on_certificates(fed: Path, alice: Identity) -> None:
    web = say(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    goaway = say(b"\0\0\0\x07\0\0\0\0\0")
    cases = [
        (alice, goaway, paths(fed), "h2"),
        (None, goaway, None, ""),
        (alice, web, None, ""),
        (None, web, None, ""),
        (alice, web, paths(fed), ""),
        (alice, web, paths(fed), "h2"),
    ]
    for identity, answer, tls, alpn in cases:
        with answering(answer, tls, alpn) as port, pytest.raises(FederationError) as caught:
            preflight(f"127.0.0.1:{port}", identity)
        assert type(caught.value) is FederationError
        assert caught.value.exit_code == 11


def test_the_reason_of_a_refusal_is_passed_on_where_the_server_gives_one(fed: Path, tmp_path: Path) -> None:
    """gRPC's own server only ends the connection; a proxy before it may send the alert of TLS."""
    stranger = member(federation(tmp_path / "other"), "alice", tmp_path / "stranger").folder
    (stranger / "authority.pem").write_bytes((fed / "authority.pem").read_bytes())
    with (
        answering(silent, paths(fed), "h2", clients=fed / "authority.pem") as port,
        pytest.raises(IdentityError, match=r"refuses the certificate of stranger \(unknown ca\)"),
    ):
        preflight(f"127.0.0.1:{port}", raw(stranger))


def test_plain_text_passes_on_a_plain_grpc_server_and_not_on_one_with_tls(fed: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool, handlers=[Door(fed)])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            preflight(f"127.0.0.1:{port}", None)
        finally:
            server.stop(None).wait(5)
    with serving(ServerIdentity.load(fed).tls, Door(fed)) as port, pytest.raises(FederationError) as caught:
        preflight(f"127.0.0.1:{port}", None)
    assert not isinstance(caught.value, UnreachableError)


def test_tls_against_a_plain_server_is_something_else(fed: Path, alice: Identity) -> None:
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool, handlers=[Door(fed)])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with pytest.raises(FederationError) as caught:
                preflight(f"127.0.0.1:{port}", alice)
        finally:
            server.stop(None).wait(5)
    assert not isinstance(caught.value, IdentityError | UntrustedError)
