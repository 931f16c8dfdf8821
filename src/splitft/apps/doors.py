"""Who may come into a federation: by certificate and roster, or by name on this machine alone."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from splitft.deploy.disk import write_atomically
from splitft.deploy.letters import Hello
from splitft.deploy.names import check_name
from splitft.deploy.roster import Roster
from splitft.errors import IdentityError, SplitftError
from splitft.transport.values import Peer, Refusal


@dataclass
class ByCertificate:
    """Seats by the federation's roster: the certificate says who a client is, never the message."""

    roster: Roster
    seats: int

    def find(self, peer: Peer, hello: Hello) -> tuple[int, str] | Refusal:
        try:
            member = self.roster.find(peer.certificate_pem or b"")
        except IdentityError as problem:
            return Refusal("roster", "the federation's roster cannot be read.", f"its operator has to mend it: {problem.remedy}")
        if isinstance(member, str):
            return Refusal("roster", member, "ask the federation's operator for an invitation (splitft enroll invite).")
        if hello.name and hello.name != member.name:
            return Refusal(
                "identity", f"the certificate is {member.name}'s, the client calls itself {hello.name!r:.80}.", "use one identity folder."
            )
        if member.seat >= self.seats:
            text = f"{member.name} has seat {member.seat}, this run has {self.seats} (clients.count)."
            return Refusal("roster", text, "the operator can raise clients.count when a new run begins.")
        return member.seat, member.name

    def listed(self, seat: int) -> bool:
        try:
            return any(one.seat == seat and not one.revoked and one.fingerprint for one in self.roster.register().clients)
        except IdentityError:
            return True  # a slip of the operator's pen must not put everybody out; at the door it does

    def still(self, peer: Peer) -> str:
        try:
            member = self.roster.find(peer.certificate_pem or b"")
        except IdentityError:
            return ""
        return member if isinstance(member, str) else ""


@dataclass
class ByName:
    """Seats on loopback without TLS, by name: kept in the run folder, so that a name finds its seat again."""

    path: Path
    seats: int
    names: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.path.is_file():
            self.names = [check_name(one) for one in self.path.read_text(encoding="utf-8").split()]

    def find(self, peer: Peer, hello: Hello) -> tuple[int, str] | Refusal:
        try:
            name = check_name(hello.name)
        except SplitftError as problem:
            return Refusal("identity", problem.message, problem.remedy)
        with self._lock:  # several clients may be at the door
            return self._seat(name)

    def _seat(self, name: str) -> tuple[int, str] | Refusal:
        if name not in self.names:
            if len(self.names) >= self.seats:
                return Refusal(
                    "roster", f"all {self.seats} seats (clients.count) are taken.", "use the name of a client that was here before."
                )
            self.names.append(name)
            write_atomically(self.path, ("\n".join(self.names) + "\n").encode())
        seat = self.names.index(name)
        if seat >= self.seats:
            return Refusal(
                "roster", f"{name} has seat {seat}, this run has {self.seats} (clients.count).", "raise clients.count for a new run."
            )
        return seat, name

    def listed(self, seat: int) -> bool:
        return seat < self.seats

    def still(self, peer: Peer) -> str:
        return ""
