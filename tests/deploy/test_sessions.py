"""Sessions between one listener and its links, on a network without faults: who comes in, who is turned away, what both ends are told."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import trustme
from deploy.transport_scenes import CALM, ECHO, QUICK, client, client_tls, echo_server, server_tls, take, tls_pair, wait_until
from net.proxy import Proxy

from splitft.errors import ConfigError, FederationError, ResourceError, UnreachableError
from splitft.transport import listener as listener_module
from splitft.transport.link import Link
from splitft.transport.listener import Broken, Closed, Listener, Opened, Resumed
from splitft.transport.values import Admitted, Limits, Peer, Refusal, Refused, SessionClosed, SessionLost

pytestmark = pytest.mark.timeout(60)
BOTH = pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])


@BOTH
@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 5_000_000])
def test_messages_come_back(secure: bool, size: int) -> None:
    payload = bytes(range(251)) * (size // 251) + bytes(size % 251)
    with echo_server(secure) as server, client(server.port, secure=secure) as link:
        assert link.open(10.0) == b"welcome a"
        assert link.epoch == 1
        link.send(ECHO, payload)
        message = take(link)
        assert (message.kind, bytes(message.payload)) == (ECHO, payload)
        assert server.session().peer.certificate_pem == (tls_pair(True)[1].certificate_pem if secure else None)  # type: ignore[union-attr]
        link.close()
        wait_until(lambda: server.closed() == ["closed"], what="Closed")
        assert [type(event) for event in server.events] == [Opened, Closed]
        assert not server.listener.sessions
        with pytest.raises(SessionClosed):
            link.send(ECHO, b"late")


def test_messages_sent_before_close_arrive() -> None:
    heard: list[bytes] = []
    with echo_server(answer=lambda session, message: (heard.append(bytes(message.payload)), message.release())[-1]) as server:
        with client(server.port) as link:
            link.open(10.0)
            for number in range(40):
                link.send(ECHO, b"%d" % number)
            link.close()
        wait_until(lambda: len(heard) == 40)
    assert heard == [b"%d" % number for number in range(40)]


def test_a_welcome_of_three_mebibytes() -> None:
    big = bytes(range(256)) * (3 << 12)
    with echo_server(admit=lambda peer, greeting: Admitted("a", big, 1 << 20)) as server, client(server.port) as link:
        assert link.open(10.0) == big


@BOTH
def test_refused_at_the_door(secure: bool) -> None:
    with echo_server(secure) as server, client(server.port, "xavier", secure) as link:
        with pytest.raises(Refused, match="not on the list") as caught:
            link.open(10.0)
        assert (caught.value.code, caught.value.remedy) == ("roster", "Ask for an invitation.")
        assert not server.events


@BOTH
def test_closed_by_the_server_after_what_was_sent(secure: bool) -> None:
    with echo_server(secure) as server, client(server.port, secure=secure) as link:
        link.open(10.0)
        for number in range(5):
            server.session().send(ECHO, b"%d" % number)
        session = server.session()
        session.close("excluded", "three strikes.", "Ask the operator.")
        assert [bytes(take(link).payload) for _ in range(5)] == [b"%d" % number for number in range(5)]
        for _ in range(2):
            with pytest.raises(Refused) as caught:
                link.receive(10.0)
            assert (caught.value.code, caught.value.text, caught.value.remedy) == ("excluded", "three strikes.", "Ask the operator.")
        with pytest.raises(Refused):
            link.send(ECHO, b"more")
        wait_until(lambda: server.closed() == ["excluded"])
        with pytest.raises(SessionClosed):
            session.send(ECHO, b"more")


def test_a_client_that_was_away_learns_why_it_was_closed() -> None:
    with echo_server(timing=QUICK) as server, Proxy("127.0.0.1", server.port) as proxy, client(proxy.port, timing=QUICK) as link:
        link.open(10.0)
        proxy.refuse = True
        proxy.reset()
        wait_until(lambda: not server.session().connected)
        server.session().close("policy", "no more.", "Read the rules.")
        wait_until(lambda: server.closed() == ["policy"])
        proxy.refuse = False
        with pytest.raises(Refused) as caught:
            link.receive(10.0)
        assert (caught.value.code, caught.value.remedy) == ("policy", "Read the rules.")


def test_busy_takeover_and_superseded() -> None:
    with echo_server() as server, client(server.port) as first, client(server.port) as second, client(server.port, "a!") as third:
        first.open(10.0)
        with pytest.raises(Refused, match="connected already") as caught:
            second.open(10.0)
        assert caught.value.code == "busy"
        first.send(ECHO, b"still here")
        assert take(first).payload == b"still here"
        third.open(10.0)
        assert third.epoch == 2
        with pytest.raises(Refused) as caught:
            first.receive(10.0)
        assert caught.value.code == "superseded"
        assert server.closed() == ["superseded"]
        third.send(ECHO, b"mine now")
        assert take(third).payload == b"mine now"


def test_a_broken_holder_is_superseded_without_asking() -> None:
    with echo_server() as server, Proxy("127.0.0.1", server.port) as proxy, client(proxy.port) as first, client(server.port) as second:
        first.open(10.0)
        proxy.refuse = True
        proxy.reset()
        wait_until(lambda: not server.session().connected)
        second.open(10.0)
        assert second.epoch == 2
        proxy.refuse = False
        with pytest.raises(Refused) as caught:
            first.receive(10.0)
        assert caught.value.code == "superseded"


def test_races_of_one_identity_leave_exactly_one_session() -> None:
    def try_open(link: Link) -> bool:
        try:
            link.open(10.0)
        except Refused as refused:
            ends.append(refused.code)
            return False
        return True

    ends: list[str] = []

    with echo_server() as server, ThreadPoolExecutor(2) as pool:
        for turn in range(50):
            with client(server.port, "a!" if turn % 2 else "a") as one, client(server.port, "a!" if turn % 3 else "a") as other:
                opened = [link for link, came_in in zip((one, other), pool.map(try_open, (one, other)), strict=True) if came_in]
                assert opened
                alive = []
                for link in opened:
                    try:
                        link.send(ECHO, b"%d" % turn)
                        alive += [take(link).payload]
                    except Refused as refused:
                        ends.append(refused.code)
                assert alive == [b"%d" % turn]
                assert len(server.listener.sessions) == 1
            wait_until(lambda: not server.listener.sessions)
        assert set(ends) == {"busy", "superseded"}


def test_a_restarted_server_does_not_know_the_session() -> None:
    with echo_server(timing=QUICK) as server:
        port = server.port
        link = Link(f"127.0.0.1:{port}", None, lambda: b"a", Limits(), QUICK)
        link.open(10.0)
        link.send(ECHO, b"one")
        take(link)
    try:
        with echo_server(timing=QUICK, port=port) as server:
            with pytest.raises(SessionLost):
                link.receive(15.0)
            with pytest.raises(SessionLost):
                link.send(ECHO, b"two")
            assert link.open(10.0) == b"welcome a"
            link.send(ECHO, b"three")
            assert take(link).payload == b"three"
            assert not any(isinstance(event, Resumed) for event in server.events)
    finally:
        link.close(0.0)


def test_a_session_is_forgotten_after_a_while() -> None:
    quick = replace(QUICK, heartbeat_s=0.05, liveness_s=0.2)
    with echo_server(timing=quick) as server, Proxy("127.0.0.1", server.port) as proxy, client(proxy.port, timing=quick) as link:
        link.open(10.0)
        proxy.refuse = True
        proxy.reset()
        wait_until(lambda: server.closed() == ["gone"], quick.forget_s + 3.0)
        assert [type(event) for event in server.events] == [Opened, Broken, Closed]
        proxy.refuse = False
        with pytest.raises(SessionLost):
            link.receive(10.0)


def test_nobody_answers() -> None:
    states: list[str] = []
    with client(1, states=states, timing=QUICK) as link:
        with pytest.raises(UnreachableError, match="does not answer"):
            link.open(0.3)
        assert states[0] == "connecting"
        assert states[1].startswith("broken: ")


def test_a_server_that_comes_later() -> None:
    with echo_server() as server:
        port = server.port
    with client(port, timing=QUICK) as link:
        opened = threading.Thread(target=link.open)
        opened.start()
        with echo_server(port=port) as server:
            opened.join(15.0)
            assert not opened.is_alive()
            link.send(ECHO, b"at last")
            assert take(link).payload == b"at last"


def test_a_link_has_one_session_at_a_time() -> None:
    with echo_server() as server, client(server.port) as link:
        with pytest.raises(SessionClosed):
            link.receive(0.0)
        link.open(10.0)
        with pytest.raises(FederationError, match="already"):
            link.open(10.0)


def test_release_makes_room() -> None:
    """A window of messages goes out; the next waits until the other side has dealt with one."""
    kept = []
    limits = Limits(window=4)
    with (
        echo_server(limits=limits, answer=lambda session, message: kept.append(message)) as server,
        client(server.port, limits=limits) as link,
    ):
        link.open(10.0)
        sender = threading.Thread(target=lambda: [link.send(ECHO, b"%d" % number) for number in range(10)])
        sender.start()
        wait_until(lambda: len(kept) == 4)
        sender.join(0.3)
        assert sender.is_alive()
        assert len(kept) == 4
        taken = 0
        while taken < 10:
            wait_until(lambda: len(kept) > taken)  # noqa: B023 - called at once
            kept[taken].release()
            kept[taken].release()
            taken += 1
            assert len(kept) <= taken + 4
        sender.join(10.0)
        assert not sender.is_alive()
        assert [bytes(message.payload) for message in kept] == [b"%d" % number for number in range(10)]
        wait_until(lambda: server.listener.buffered_bytes == 0)


def test_connections_are_counted() -> None:
    with (
        echo_server(limits=Limits(connections=2)) as server,
        client(server.port, "a") as first,
        client(server.port, "b") as second,
        client(server.port, "c") as third,
    ):
        first.open(10.0)
        second.open(10.0)
        with pytest.raises(Refused) as caught:
            third.open(10.0)
        assert caught.value.code == "full"
        first.close()
        wait_until(lambda: len(server.listener.sessions) == 1)
        third.open(10.0)


def test_certificates_of_others_do_not_get_in() -> None:
    asked = []

    def admit(peer: Peer, greeting: bytes) -> Admitted | Refusal:
        asked.append(peer)
        return Admitted("a", b"", 1)

    with echo_server(True, admit=admit) as server:
        other = client_tls(ca=trustme.CA())
        for tls in (other, None):
            link = Link(f"127.0.0.1:{server.port}", tls, lambda: b"a", Limits(), QUICK)
            with pytest.raises(UnreachableError):
                link.open(0.3)
        assert not asked
        named = Link(f"localhost:{server.port}", client_tls(server_name="elsewhere"), lambda: b"a", Limits(), QUICK)
        with pytest.raises(UnreachableError):
            named.open(0.3)
        assert not asked


def test_a_server_of_another_authority_is_not_believed() -> None:
    listener = Listener("127.0.0.1:0", server_tls(trustme.CA()), lambda *_: Refusal("roster", ""), lambda event: None, Limits(), QUICK)
    port = listener.start()
    try:
        link = Link(f"127.0.0.1:{port}", client_tls(), lambda: b"a", Limits(), QUICK)
        with pytest.raises(UnreachableError):
            link.open(0.3)
    finally:
        listener.stop(0.0)


def test_a_renewed_certificate_is_shown_to_the_next_client() -> None:
    stranger = trustme.CA()
    listener = Listener("127.0.0.1:0", server_tls(stranger), lambda *_: Admitted("a", b"in", 1), lambda event: None, Limits(), QUICK)
    port = listener.start()
    link = Link(f"127.0.0.1:{port}", client_tls(), lambda: b"a", Limits(), QUICK)
    try:
        with pytest.raises(UnreachableError):
            link.open(0.3)
        listener.renew(server_tls())
        assert link.open(10.0) == b"in"
    finally:
        link.close(0.0)
        listener.stop(0.0)


def test_a_client_shows_its_renewed_certificate_at_the_next_connection() -> None:
    """The session goes on; only who carries it has changed."""
    shown: list[bytes | None] = []

    def admit(peer: Peer, greeting: bytes) -> Admitted:
        shown.append(peer.certificate_pem)
        return Admitted("a", b"in", 1 << 20)

    with echo_server(True, admit=admit, timing=QUICK) as server, Proxy("127.0.0.1", server.port) as proxy:
        old, new = client_tls("a"), client_tls("a")
        link = Link(f"127.0.0.1:{proxy.port}", old, lambda: b"a", Limits(), QUICK)
        try:
            link.open(10.0)
            link.renew(new)
            link.send(ECHO, b"one")
            assert take(link).payload == b"one"
            assert len(shown) == 1, "a connection that stands is left alone"
            proxy.reset()
            link.send(ECHO, b"two")
            assert take(link).payload == b"two"
            assert shown == [old.certificate_pem, new.certificate_pem]
            assert server.session().peer.certificate_pem == new.certificate_pem
            assert (link.epoch, link.counts.reconnects) == (1, 1)
        finally:
            link.close(0.0)


def test_ended_sessions_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last ones are told why they ended; what came before costs nothing any more."""
    monkeypatch.setattr(listener_module, "REMEMBERED_ENDS", 4)
    with echo_server() as server:
        for number in range(12):
            with client(server.port, f"c{number}") as link:
                link.open(10.0)
                link.close()
        wait_until(lambda: len(server.closed()) == 12)
        assert len(server.listener._ends) == 4
        assert not server.listener.sessions


def test_plain_text_stays_on_loopback() -> None:
    for address in ("0.0.0.0:0", "[::]:0", "192.0.2.1:7443", "example.org:7443", ":7443"):
        with pytest.raises(ConfigError, match="without TLS"):
            Listener(address, None, lambda *_: Refusal("roster", ""), lambda event: None, Limits(), CALM)
        with pytest.raises(ConfigError, match="without TLS"):
            Link(address, None, lambda: b"", Limits(), CALM)


def test_an_address_that_is_taken() -> None:
    with echo_server() as server:
        second = Listener(f"127.0.0.1:{server.port}", None, lambda *_: Refusal("roster", ""), lambda event: None, Limits(), CALM)
        with pytest.raises(ResourceError, match="cannot be listened at"):
            second.start()


def test_keys_are_not_shown() -> None:
    tls, other = server_tls(), client_tls()
    assert "PRIVATE" not in repr(tls) + repr(other)
    assert "key_pem" not in repr(tls) + repr(other)
