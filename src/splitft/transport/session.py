"""The server's end of a session, and what a listener tells of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from splitft.transport.flow import Flow
from splitft.transport.framing import Close, Form, encode, pack_note
from splitft.transport.values import Counts, Message, Peer, SessionClosed

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


class Session:
    """One client's session at the server; it outlives its connections. All methods may be called from any thread."""

    def __init__(self, key: str, epoch: int, peer: Peer, process: bytes, flow: Flow, finish: Callable[[Session, Close], None]) -> None:
        self.key, self.epoch, self.peer, self.process, self.flow = key, epoch, peer, process, flow
        self._finish = finish
        self._opened_s = flow.loop.time()
        self.over = False
        self.forget: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"Session({self.key!r}, epoch={self.epoch})"

    @property
    def connected(self) -> bool:
        """Whether a connection carries it now."""
        return self.flow.pipe is not None

    @property
    def age_s(self) -> float:
        """Seconds since it was opened."""
        return self.flow.loop.time() - self._opened_s

    @property
    def silent_s(self) -> float:
        """Seconds since anything came from the client."""
        return self.flow.loop.time() - self.flow.heard_s

    @property
    def counts(self) -> Counts:
        """What has moved so far."""
        return self.flow.counts()

    @property
    def backlog(self) -> int:
        """Messages sent that the client has not received yet."""
        return self.flow.outbox.sent - self.flow.outbox.acknowledged

    @property
    def limit_bytes(self) -> int:
        """The largest message the client may send now; a larger one is refused at its header and ends the session."""
        return self.flow.inbox.limit_bytes

    @limit_bytes.setter
    def limit_bytes(self, value: int) -> None:
        self.flow.inbox.limit_bytes = value

    def send(self, kind: int, payload: bytes | bytearray | memoryview) -> None:
        """Queue a message; `payload` must not change afterwards. Raises SessionClosed when the session is over."""
        if self.over:
            raise SessionClosed(f"the session of {self.key} is over.", "nothing more can be sent to it.")
        self.flow.mail.post(partial(self.flow.push, kind, payload))

    def close(self, code: str, text: str, remedy: str = "") -> None:
        """End the session for good, after what was sent before; the client is told, even if it comes back later."""
        self.flow.mail.post(partial(self._finish, self, Close(code, text, remedy)))


def farewell(close: Close) -> bytes:
    """A refusal as a chunk."""
    return encode(Form.CLOSE, pack_note(close))


@dataclass(frozen=True)
class Opened:
    """A client has come in."""

    session: Session


@dataclass(frozen=True)
class Arrived:
    """A message is there whole."""

    session: Session
    message: Message


@dataclass(frozen=True)
class Broken:
    """The connection is lost; the client may come back."""

    session: Session
    text: str


@dataclass(frozen=True)
class Resumed:
    """The client has come back; nothing was lost."""

    session: Session


@dataclass(frozen=True)
class Closed:
    """The session is over: "closed" by the client, "gone", "superseded", "protocol", or the server's own code."""

    session: Session
    code: str
    text: str


Event: TypeAlias = Opened | Arrived | Broken | Resumed | Closed
