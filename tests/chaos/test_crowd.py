"""Two hundred clients with mutual TLS that have nothing to do, and all of them coming back when the server is restarted."""

from __future__ import annotations

import threading
import time
from collections import Counter

import psutil
import pytest

from splitft.transport.link import Link
from splitft.transport.values import Limits, Message, SessionLost, Timing

from ..deploy.transport_scenes import ECHO, client_tls, echo_server, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]
CROWD = 200


class Regular(threading.Thread):
    """A client that comes back by itself, as a member does; it notes when it tries."""

    def __init__(self, name: str, port: int) -> None:
        super().__init__(daemon=True)
        self.tries: list[float] = []
        self.link = Link(f"127.0.0.1:{port}", client_tls(), name.encode, Limits(), Timing(), self.note)
        self.leaving = threading.Event()

    def note(self, state: str) -> None:
        if state == "connecting":
            self.tries.append(time.monotonic())

    def run(self) -> None:
        while not self.leaving.is_set():
            try:
                if not self.link.connected:
                    self.link.open()
                while not self.leaving.is_set():
                    self.take(self.link.receive(0.5))
            except SessionLost:
                continue

    def take(self, message: Message | None) -> None:
        if message is not None:
            message.release()


def test_two_hundred_idle_clients_and_a_restart() -> None:
    process = psutil.Process()
    everybody: list[Regular] = []
    try:
        with echo_server(secure=True, timing=Timing()) as server:
            port, before_mib = server.port, process.memory_info().rss / 2**20
            began_s = time.monotonic()
            for number in range(CROWD):
                everybody.append(Regular(f"n{number}", port))
                everybody[-1].start()
            wait_until(lambda: len(server.listener.sessions) == CROWD, 60.0, "everybody is in")
            connect_s, grown_mib = time.monotonic() - began_s, process.memory_info().rss / 2**20 - before_mib
            time.sleep(1.0)
            cpu_s, from_s = sum(process.cpu_times()[:2]), time.monotonic()
            time.sleep(10.0)
            share = (sum(process.cpu_times()[:2]) - cpu_s) / (time.monotonic() - from_s)
            steps = []
            session = server.session("n0")
            for _ in range(20):
                sent = server.listener.sessions["n0"].counts.messages_received
                began_s = time.monotonic()
                everybody[0].link.send(ECHO, b"x" * 1000)
                wait_until(lambda sent=sent: session.counts.messages_received > sent)  # type: ignore[misc]
                steps.append(time.monotonic() - began_s)
        time.sleep(5.0)
        with echo_server(secure=True, timing=Timing(), port=port) as server:
            back_s = time.monotonic()
            wait_until(lambda: len(server.listener.sessions) == CROWD, 45.0, "everybody is back")
            took_s = time.monotonic() - back_s
            tries = Counter(int(at - back_s) for one in everybody for at in one.tries if at >= back_s)
            for one in everybody:
                one.leaving.set()
            for one in everybody:
                one.join(5.0)
                one.link.close(0.0)
    finally:
        for one in everybody:
            one.leaving.set()
    print(f"connected in {connect_s:.1f} s, both ends together +{grown_mib:.0f} MiB, {100 * share:.1f} % of a core idle,", end=" ")
    print(f"slowest of 20 messages {1000 * max(steps):.0f} ms; back in {took_s:.1f} s, tries a second {sorted(tries.items())}")
    assert grown_mib < 200, "both ends are in this process; each may have a hundred"
    assert share < 0.06, "both ends, and a thread each on the clients' side that looks twice a second"
    assert sorted(steps)[len(steps) // 2] < 0.05
    assert took_s < 30.0
    assert max(tries.values()) <= 0.25 * sum(tries.values()) + 10
