"""As much of HTTP/1.1 as a read-only page needs: a bounded request head, an answer with the headers that keep a browser strict."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

HEAD_BYTES = 8 << 10
_REQUEST = re.compile(rb"([A-Z]{1,16}) (/[\x21-\x7e]{0,1000}) HTTP/1\.([01])\Z")
_HEADER = re.compile(rb"([A-Za-z0-9-]{1,64}):[ \t]*([\x20-\x7e\t\x80-\xff]{0,4096}?)[ \t]*\Z")
# What every answer carries besides the page's own policy.
STRICT = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class BadRequest(Exception):  # noqa: N818 - it is an answer, not a fault of ours
    """A request that is answered with `code` and nothing else."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Asked:
    """A request's head. `again`: another one may follow on the same connection."""

    method: str
    path: str
    host: str
    again: bool = False


@dataclass(frozen=True)
class Answer:
    """An answer with its body."""

    code: int
    body: bytes
    content_type: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def encode(self, head_only: bool, again: bool, policy: str) -> bytes:
        """The bytes to send; without the body for HEAD."""
        fields = {
            "Content-Type": self.content_type,
            "Content-Length": str(len(self.body)),
            "Content-Security-Policy": policy,
            **STRICT,
            **self.headers,
            "Connection": "keep-alive" if again else "close",
        }
        lines = [f"HTTP/1.1 {self.code} {HTTPStatus(self.code).phrase}", *(f"{name}: {value}" for name, value in fields.items())]
        head = "\r\n".join(lines).encode("ascii") + b"\r\n\r\n"
        return head if head_only else head + self.body


async def read_request(reader: asyncio.StreamReader, wait_s: float, head_s: float) -> Asked:
    """The next request: its first byte within `wait_s`, the whole head within `head_s` of that. Raises BadRequest, TimeoutError, or
    EOFError when the peer has gone."""
    # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with the result.
    async with asyncio.timeout(wait_s):
        first = await reader.readexactly(1)
    try:
        async with asyncio.timeout(head_s):
            rest = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise BadRequest(431, "the request's head is too long") from None
    head = first + rest
    if len(head) > HEAD_BYTES:
        raise BadRequest(431, "the request's head is too long")
    return parse_head(head)


def parse_head(head: bytes) -> Asked:
    """A request's head, from its first byte to the empty line. Raises BadRequest."""
    request, *lines = head[:-4].split(b"\r\n")
    found = _REQUEST.match(request)
    if found is None:
        raise BadRequest(400, "this is not an HTTP/1.1 request")
    fields: dict[str, str] = {}
    for line in lines:
        pair = _HEADER.match(line)
        if pair is None:
            raise BadRequest(400, "a header is malformed")
        name = pair[1].decode("ascii").lower()
        if name == "host" and name in fields:
            raise BadRequest(400, "more than one Host header")
        fields[name] = pair[2].decode("latin-1")
    path = found[2].decode("ascii").partition("?")[0]
    # A body is never read, so what follows on such a connection is not a request.
    body = fields.get("content-length", "0").strip() != "0" or "transfer-encoding" in fields
    again = found[3] == b"1" and not body and "close" not in fields.get("connection", "").lower()
    return Asked(found[1].decode("ascii"), path, fields.get("host", ""), again)
