"""A client's new certificate, put into its folder while it runs: taken up by itself, at the next connection, with nothing lost."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
import torch

from splitft.apps import client_command
from splitft.apps.client_command import ClientOptions
from splitft.clock import utc_time
from splitft.deploy import identity, member, roster
from splitft.deploy.authority import Authority
from splitft.deploy.certificates import certificate_pem, fingerprint, make_leaf, read_request
from splitft.deploy.identity import Identity, ServerIdentity
from splitft.errors import IdentityError, RosterError

from ..net.proxy import Proxy
from .federation_scenes import QUICK, adapters_of, events_of, scene, wait_for
from .process_scenes import Ground, Nursery, federation
from .reliability_fixtures import Undisturbed

pytestmark = pytest.mark.timeout(90)


def signed_again(fed: Path, name: str, home: Path) -> bytes:
    """Another certificate for this client: the server knows it at once, the client has only made its key."""
    _, key = read_request(identity.begin(home, name))
    return roster.sign(fed, name, key, replace=True)


@pytest.mark.parametrize("late_s", [0.0, 3.0], ids=["at once", "three seconds late"])
def test_a_client_that_is_enrolled_again_while_it_trains(
    late_s: float, nursery: Nursery, ground: Ground, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Its old certificate is refused from then on, so it comes in with the new one, even if that is there a moment after."""
    with federation(nursery, ground, tmp_path) as made:
        made.serve()
        made.join(0)
        made.join(1)
        wait_for(lambda: "ready, waiting" in made.clients[1].text())
        home, fed = tmp_path / "clients" / "client-1", tmp_path / "federation"
        before = Identity.load(home).fingerprint
        certificate = signed_again(fed, "client-1", home)
        time.sleep(late_s)
        assert identity.finish(home, certificate, (fed / "authority.pem").read_bytes()).fingerprint != before
        wait_for(lambda: made.clients[1].text().count("ready, waiting") == 2, 20)
        assert "was replaced by a newer one" in (made.run / "server.log").read_text()
        made.join(2)
        made.finish()
        undisturbed.must_equal(made)


def test_a_client_whose_certificate_was_replaced_elsewhere_leaves(nursery: Nursery, ground: Ground, tmp_path: Path) -> None:
    """Enrolled into another folder: this one's certificate is good for nothing any more, and nobody is waited for."""
    with federation(nursery, ground, tmp_path) as made:
        made.serve()
        made.join(0)
        made.join(1)
        wait_for(lambda: "ready, waiting" in made.clients[1].text())
        signed_again(tmp_path / "federation", "client-1", tmp_path / "elsewhere")
        assert made.clients[1].wait(6) == RosterError.exit_code
        assert "was replaced by a newer one" in made.clients[1].text()


def short_lived(fed: Path, name: str, home: Path, seconds: float) -> float:
    """Give a client a certificate that ends so many seconds from now, on the roster as well; returns when."""
    authority, now = Authority.load(fed), utc_time()
    _, key = read_request(identity.begin(home, name))
    days = 30.0
    begin = now - timedelta(days=days) + timedelta(seconds=seconds)
    leaf = make_leaf((authority.certificate, authority.key), (authority.federation, name), key, days=days, now=begin)
    (home / "certificate.pem").write_bytes(certificate_pem(leaf))
    (home / "pending-key.pem").rename(home / "key.pem")
    with roster.edited(fed) as box:
        old = box[0].client(name)
        assert old is not None
        end = leaf.not_valid_after_utc
        new = msgspec.structs.replace(old, fingerprint=fingerprint(leaf), expires=end.isoformat(timespec="seconds"))
        others = tuple(one for one in box[0].clients if one.name != name)
        box[0] = msgspec.structs.replace(box[0], clients=tuple(sorted((*others, new), key=lambda one: one.seat)))
    return (end - now).total_seconds()


def test_a_certificate_that_ends_and_is_renewed_between_two_connections(
    ground: Ground, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line is cut, another certificate is put into the folder, the first one ends: when the line is back, the client is in again."""
    ground.copy_to(tmp_path)
    fed, home = tmp_path / "federation", tmp_path / "clients" / "client-2"
    monkeypatch.setattr(member, "KNOCK_S", 1.0)
    monkeypatch.setattr(client_command, "Timing", lambda: QUICK)
    with (
        scene(tmp_path, 3, ServerIdentity.load(fed), federation={"identity": str(fed), "enroll_address": "off"}) as made,
        Proxy("127.0.0.1", made.port) as proxy,
    ):
        for number in range(2):
            made.client(number, tls=Identity.load(tmp_path / "clients" / f"client-{number}").tls)
        left_s = short_lived(fed, "client-2", home, 6.0)
        began_s, troubles = time.monotonic(), list[BaseException]()

        def operator() -> None:
            try:
                wait_for(lambda: made.run.state.round >= 1)
                proxy.refuse = True
                proxy.reset()
                old = Identity.load(home)
                certificate = signed_again(fed, "client-2", home)
                identity.finish(home, certificate, (fed / "authority.pem").read_bytes())
                time.sleep(max(0.0, left_s + 2.5 - (time.monotonic() - began_s)))
                with pytest.raises(IdentityError, match="expired"):
                    old.check_dates()
                proxy.refuse = False
            except BaseException as trouble:
                troubles.append(trouble)

        helper = threading.Thread(target=operator)
        helper.start()
        options = ClientOptions(tmp_path / "texts" / "c2.txt", home, f"127.0.0.1:{proxy.port}", device="cpu", quiet=True, window=1)
        client_command.join(options)
        helper.join(20)
        assert not troubles, troubles
        folder = made.end()
    assert torch.equal(adapters_of(folder), undisturbed.adapters)
    assert [event["round"] for event in events_of(folder)] == [1, 2, 3]
