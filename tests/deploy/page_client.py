"""How the tests of the status page ask it."""

from __future__ import annotations

import http.client
import socket

from splitft.deploy.page import StatusPage


def ask(page: StatusPage, path: str = "/status.json", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=5)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def raw(port: int, data: bytes) -> bytes:
    """Everything that comes back for `data` until the other side closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(data)
        found = b""
        while part := connection.recv(65_536):
            found += part
        return found
