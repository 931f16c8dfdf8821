"""The plain values of the transport: its times and limits, what a door decides, a message, and how a session ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from splitft.errors import FederationError

HIGHEST_KIND = 199


@dataclass(frozen=True)
class Timing:
    """The three times of a connection: a sign of life when idle, silence that breaks it, and patience for a handshake.

    `backoff_s`: the longest first pause and the longest pause at all between attempts; each is drawn between 0 and that (full jitter).
    """

    heartbeat_s: float = 10.0
    liveness_s: float = 32.0
    connect_s: float = 10.0
    backoff_s: tuple[float, float] = (0.2, 15.0)

    @property
    def forget_s(self) -> float:
        """How long the server keeps a session whose connection is broken."""
        return 6.0 * self.liveness_s


@dataclass(frozen=True)
class Limits:
    """What a connection may cost. `window`: messages a side may have sent that the other has not released yet."""

    chunk_bytes: int = 1 << 20
    greeting_bytes: int = 64 << 10
    welcome_bytes: int = 4 << 20
    window: int = 8
    connections: int = 1000
    buffer_bytes: int = 1 << 30


@dataclass(frozen=True)
class Peer:
    """The other end: its address, and its certificate where TLS is on (already checked against the authority)."""

    address: str
    certificate_pem: bytes | None


@dataclass
class Counts:
    """What a session has moved, every connection and all overhead of ours included (not TLS and HTTP/2, which add about 1 %)."""

    bytes_sent: int = 0
    bytes_received: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    reconnects: int = 0
    duplicates: int = 0


@dataclass(frozen=True)
class Message:
    """A whole message. The sender may not have more than a window of messages out that were not released."""

    kind: int
    payload: bytes | bytearray | memoryview
    _released: Callable[[], None] = field(repr=False, compare=False)

    def release(self) -> None:
        """Tell the transport that this message has been dealt with; again: nothing happens."""
        self._released()


@dataclass(frozen=True)
class Admitted:
    """A client may come in as `key`. `takeover`: even where another process holds that key. `limit_bytes`: its largest message."""

    key: str
    welcome: bytes
    limit_bytes: int
    takeover: bool = False


@dataclass(frozen=True)
class Refusal:
    """A client may not come in, or must go: a word for programs, a sentence for people, and what to do."""

    code: str
    text: str
    remedy: str = ""


Admit: TypeAlias = Callable[[Peer, bytes], Admitted | Refusal]


class Refused(FederationError):  # noqa: N818 - the end of a session, not a fault
    """The server turned this client away, at the door or later; `code` says why."""

    def __init__(self, code: str, text: str, remedy: str = "") -> None:
        super().__init__(text, remedy)
        self.code, self.text = code, text


class SessionLost(FederationError):  # noqa: N818 - the end of a session, not a fault
    """The server no longer knows this session, as after a restart: open the link again and start from the last common point."""


class SessionClosed(FederationError):  # noqa: N818 - the end of a session, not a fault
    """This session is over; nothing can be sent any more."""
