"""Client and server that were told to beat at different paces: the client follows, and neither loses patience with the other."""

from __future__ import annotations

import time

import pytest
from deploy.transport_scenes import ECHO, QUICK, client, echo_server, take
from net.proxy import Proxy

from splitft.transport.values import Refused, Timing

pytestmark = pytest.mark.timeout(60)


def test_a_calm_client_beats_as_a_hasty_server_wants() -> None:
    """By itself: nothing reaches it that it could answer, and still the server hears it often enough."""
    with echo_server(timing=QUICK) as server, Proxy("127.0.0.1", server.port) as proxy, client(proxy.port, timing=Timing()) as link:
        link.open(10.0)
        session = server.session()
        proxy.black_hole_down = True
        until_s = time.monotonic() + 4 * QUICK.liveness_s
        while time.monotonic() < until_s:
            assert session.connected
            assert session.silent_s < QUICK.liveness_s
            time.sleep(0.02)
        proxy.black_hole_down = False


def test_a_hasty_client_waits_for_the_beats_of_a_calm_server() -> None:
    """The server, which hears nothing it could answer, beats every second; half a second is this client's own patience."""
    calm = Timing(heartbeat_s=1.0, liveness_s=20.0, connect_s=5.0)
    with echo_server(timing=calm) as server, Proxy("127.0.0.1", server.port) as proxy, client(proxy.port, timing=QUICK) as link:
        link.open(10.0)
        proxy.black_hole_up = True
        until_s = time.monotonic() + 2.5
        while time.monotonic() < until_s:
            assert link.connected
            time.sleep(0.02)
        proxy.black_hole_up = False
        link.send(ECHO, b"still the same")
        assert take(link).payload == b"still the same"
        assert link.counts.reconnects == 0


@pytest.mark.parametrize("heartbeat_s", [0.001, 1e6])
def test_a_pace_that_nobody_keeps_is_refused(heartbeat_s: float) -> None:
    with echo_server(timing=Timing(heartbeat_s=heartbeat_s, liveness_s=5.0)) as server, client(server.port) as link:
        with pytest.raises(Refused, match="sign of life every") as caught:
            link.open(10.0)
        assert caught.value.code == "protocol"
