"""The status page under slow peers, and how it ends: others are served, nothing is left behind."""

from __future__ import annotations

import http.client
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from splitft.clock import monotonic_s
from splitft.deploy.page import PageLimits, StatusPage
from splitft.deploy.status import SeatChanges, ServerStatus

from . import status_scenes as scenes
from .page_client import ask, raw

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def page() -> Iterator[StatusPage]:
    made = StatusPage("127.0.0.1:0", *scenes.running(), limits=PageLimits(connections=8, fresh_s=0.0))
    made.start()
    yield made
    made.stop()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_slow_requests_do_not_keep_others_out(page: StatusPage) -> None:
    threads = threading.active_count()
    slow = []
    try:
        for _ in range(40):
            connection = socket.create_connection(("127.0.0.1", page.port), timeout=5)
            connection.sendall(b"GET / HT")
            slow.append(connection)
        begun_s = monotonic_s()
        for _ in range(5):
            assert ask(page)[0] == 200
        assert monotonic_s() - begun_s < 2.0
        assert threading.active_count() == threads
    finally:
        for connection in slow:
            connection.close()


def test_peers_that_do_not_read_do_not_keep_others_out() -> None:
    names = tuple(f"client-{index}" for index in range(900))
    page = StatusPage("127.0.0.1:0", *scenes.running(names, rounds_done=1), limits=PageLimits(connections=6))
    page.start()
    slow = []
    try:
        assert len(ask(page)[2]) > 400_000
        for _ in range(6):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(("127.0.0.1", page.port))
            connection.sendall(b"GET /status.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
            slow.append(connection)
        threading.Event().wait(1.3)
        assert ask(page, "/health")[0] == 200
    finally:
        for connection in slow:
            connection.close()
        page.stop()


def test_a_half_request_is_ended_by_the_clock() -> None:
    page = StatusPage("127.0.0.1:0", *scenes.running(rounds_done=0), limits=PageLimits(head_s=0.3))
    page.start()
    try:
        begun_s = monotonic_s()
        assert raw(page.port, b"GET / HTTP/1.1\r\n") == b""
        assert 0.2 < monotonic_s() - begun_s < 3.0
    finally:
        page.stop()


def test_nothing_is_left_behind() -> None:
    before, threads = descriptors(), threading.active_count()
    for _ in range(3):
        page = StatusPage("127.0.0.1:0", *scenes.running(rounds_done=0))
        page.start()
        waiting = socket.create_connection(("127.0.0.1", page.port), timeout=5)
        waiting.sendall(b"GET")
        for _ in range(20):
            assert ask(page)[0] == 200
        page.stop()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", page.port), timeout=5)
        waiting.close()
    assert descriptors() <= before
    assert threading.active_count() == threads


def test_it_stops_at_once_while_it_answers() -> None:
    def probe() -> dict[int, SeatChanges]:
        if not stopping:
            stopping.append(threading.Thread(target=page.stop))
            stopping[0].start()
            threading.Event().wait(0.05)  # the stop is there when the answer is
        return {}

    stopping: list[threading.Thread] = []
    _, metrics = scenes.running(rounds_done=0)
    page = StatusPage("127.0.0.1:0", ServerStatus("run", 1, probe=probe), metrics, limits=PageLimits(fresh_s=0.0))
    page.start()
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=5)
    with suppress(OSError, http.client.HTTPException):
        for _ in range(50):
            connection.request("GET", "/status.json")
            connection.getresponse().read()
        pytest.fail("it went on answering")
    connection.close()
    stopping[0].join(5)
    assert not stopping[0].is_alive()
