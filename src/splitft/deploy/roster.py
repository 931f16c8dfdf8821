"""The roster: who belongs to a federation, by fingerprint of the certificate. Taking a client off it is revocation.

`roster.json` is replaced as a whole, under a lock that the command line and the server share; running servers see a change by its stamp.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from splitft.clock import utc_time
from splitft.deploy.authority import Authority
from splitft.deploy.certificates import certificate_pem, fingerprint, identify, public_bytes
from splitft.deploy.disk import locked, private_folder, read_bounded, write_atomically, write_private
from splitft.deploy.names import check_name
from splitft.errors import IdentityError, RosterError
from splitft.rng import fresh_bytes

ROSTER_FILE, LOCK_FILE, ISSUED_FOLDER = "roster.json", "roster.lock", "issued"
ROSTER_BYTES = 64 << 20
SCHEMA = 1
SECRET_BYTES = 16
REFUSED_INVITATION = "the invitation is not valid: wrong, used, or expired."


class Client(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One client: its number for good, the certificate it has now (none until it has enrolled), when it was taken off (empty: it is on)."""

    name: str
    seat: int
    fingerprint: str = ""
    issued: str = ""
    expires: str = ""
    revoked: str = ""


class Invitation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A token given out, by the hash of its secret; `used_by`: hash of the key that was certified with it."""

    name: str
    secret_sha256: str
    expires: str
    used_by: str = ""


class Register(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What roster.json holds."""

    schema: int
    federation: str
    clients: tuple[Client, ...] = ()
    invitations: tuple[Invitation, ...] = ()

    def client(self, name: str) -> Client | None:
        """The client of that name."""
        return next((client for client in self.clients if client.name == name), None)


@dataclass(frozen=True)
class Member:
    """A client that is let in."""

    name: str
    seat: int
    fingerprint: str
    expires: str


def read_register(folder: Path) -> Register:
    """The roster on disk. Raises IdentityError if there is none or it is damaged."""
    content = read_bounded(folder / ROSTER_FILE, ROSTER_BYTES, "the roster")
    try:
        register = msgspec.json.decode(content, type=Register)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as problem:
        raise IdentityError(f"the roster {folder / ROSTER_FILE} is damaged: {problem}.", "Correct it or restore a copy.") from problem
    seats, names = {one.seat for one in register.clients}, {one.name for one in register.clients}
    if register.schema != SCHEMA or len(seats) != len(register.clients) or len(names) != len(register.clients):
        raise IdentityError(f"the roster {folder / ROSTER_FILE} has another schema, or a name or a seat twice.", "Restore a copy of it.")
    check_name(register.federation, "federation")
    for one in register.clients:
        check_name(one.name)
    return register


def write_register(folder: Path, register: Register) -> None:
    """Replace the roster; the caller holds the lock."""
    text = msgspec.json.format(msgspec.json.encode(register), indent=1) + b"\n"
    write_private(folder / ROSTER_FILE, text)


@contextmanager
def edited(folder: Path) -> Iterator[list[Register]]:
    """The roster in a list of one, under the lock; what the list holds at the end is written, if it is another."""
    if not (folder / ROSTER_FILE).is_file():
        raise IdentityError(f"{folder} is no federation: it has no {ROSTER_FILE}.", f"Make one: splitft enroll init {folder} --name NAME")
    with locked(folder / LOCK_FILE):
        before = read_register(folder)
        box = [before]
        yield box
        if box[0] != before:
            write_register(folder, box[0])


class Roster:
    """The roster as a server asks it: always the file's present state, read again when it has changed. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._register = Register(SCHEMA, "")
        # Members by certificate, true of this very register and until the certificate expires: a server asks of every client every second.
        self._known: dict[bytes, tuple[Register, Member, datetime]] = {}

    @classmethod
    def load(cls, folder: Path) -> Roster:
        """The roster of a federation's folder. Raises IdentityError."""
        roster = cls(Path(folder))
        roster.register()
        return roster

    def register(self) -> Register:
        """Everything in it, now. Raises IdentityError when the file has become unreadable: the caller decides what that means."""
        with self._lock:
            try:
                status = os.stat(self.folder / ROSTER_FILE)
            except OSError as problem:
                raise IdentityError(f"the roster in {self.folder} is gone: {problem.strerror}.", "Restore a copy of it.") from problem
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp != self._stamp:
                self._register, self._stamp = read_register(self.folder), stamp
            return self._register

    def find(self, certificate: bytes) -> Member | str:
        """The member whose certificate this PEM is, or why there is none. Raises IdentityError when the roster cannot be read."""
        register = self.register()
        known = self._known.get(certificate)
        if known is not None and known[0] is register and utc_time() <= known[2]:
            return known[1]
        found = self._find(register, certificate)
        if isinstance(found, Member):
            if len(self._known) > 2 * len(register.clients):
                self._known.clear()
            self._known[certificate] = (register, found, datetime.fromisoformat(found.expires))
        return found

    @staticmethod
    def _find(register: Register, certificate: bytes) -> Member | str:
        try:
            holder = identify(certificate)
        except IdentityError as problem:
            return problem.message
        if holder.federation != register.federation:
            return f"the certificate is of the federation {holder.federation}, not of {register.federation}."
        client = register.client(holder.name)
        if client is None:
            return f"{holder.name} is not on the roster."
        if client.revoked:
            return f"{client.name} was taken off the roster on {client.revoked}."
        if not hmac.compare_digest(client.fingerprint, holder.fingerprint):
            return (
                f"the certificate of {client.name} was replaced by a newer one."
                if client.fingerprint
                else f"{client.name} has not enrolled."
            )
        if state_of(client) == "expired":
            return f"the certificate of {client.name} expired on {client.expires}."
        return Member(client.name, client.seat, client.fingerprint, client.expires)


def state_of(client: Client, now: datetime | None = None) -> str:
    """ "invited", "revoked", "expired" or "active"."""
    if client.revoked:
        return "revoked"
    if not client.fingerprint:
        return "invited"
    return "expired" if datetime.fromisoformat(client.expires) < (now or utc_time()) else "active"


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def _with(register: Register, client: Client) -> Register:
    others = [one for one in register.clients if one.name != client.name]
    return msgspec.structs.replace(register, clients=tuple(sorted((*others, client), key=lambda one: one.seat)))


def _seated(register: Register, name: str) -> Client:
    seat = max((one.seat for one in register.clients), default=-1) + 1
    return register.client(name) or Client(name, seat)


def invite(folder: Path, name: str, valid: timedelta, now: datetime | None = None) -> bytes:
    """Give `name` a seat, if it has none, and a secret to enrol with once. Earlier open invitations of that name end."""
    check_name(name)
    now, secret = now or utc_time(), fresh_bytes(SECRET_BYTES)
    with edited(folder) as box:
        register = box[0]
        kept = [one for one in register.invitations if one.name != name and datetime.fromisoformat(one.expires) > now]
        new = Invitation(name, hashlib.sha256(secret).hexdigest(), _text(now + valid))
        box[0] = msgspec.structs.replace(_with(register, _seated(register, name)), invitations=(*kept, new))
    return secret


def redeem(folder: Path, name: str, secret: bytes, key: ec.EllipticCurvePublicKey, now: datetime | None = None) -> bytes:
    """The certificate an invitation gives, once; the same key gets the same again, as its answer may have been lost.

    Raises RosterError, with one text for a wrong name and a wrong secret.
    """
    now, used_by = now or utc_time(), hashlib.sha256(public_bytes(key)).hexdigest()
    given = hashlib.sha256(secret).hexdigest()
    with edited(folder) as box:
        register = box[0]
        found = next((one for one in register.invitations if one.name == name), Invitation(name, "0" * 64, _text(now)))
        right = hmac.compare_digest(found.secret_sha256, given)
        repeated = hmac.compare_digest(found.used_by, used_by)
        if not right or datetime.fromisoformat(found.expires) <= now or (found.used_by and not repeated):
            raise RosterError(REFUSED_INVITATION, "Ask for a new one (splitft enroll invite).")
        if found.used_by:
            return _issued_again(folder, register, name)
        used = msgspec.structs.replace(found, used_by=used_by)
        others = [one for one in register.invitations if one is not found]
        register = msgspec.structs.replace(register, invitations=(*others, used))
        box[0], certificate = _issue(folder, register, name, key, now)
    return certificate_pem(certificate)


def _issued_again(folder: Path, register: Register, name: str) -> bytes:
    pem = read_bounded(folder / ISSUED_FOLDER / f"{name}.pem", 1 << 16, "the issued certificate")
    client = register.client(name)
    if client is None or client.revoked or identify(pem).fingerprint != client.fingerprint:
        raise RosterError(REFUSED_INVITATION, "Ask for a new one (splitft enroll invite).")
    return pem


def _issue(folder: Path, register: Register, name: str, key: ec.EllipticCurvePublicKey, now: datetime) -> tuple[Register, x509.Certificate]:
    """A certificate for `name`, kept in the folder, and the roster that lists it instead of an earlier one."""
    certificate = Authority.load(folder).issue(name, key, now)
    write_atomically(private_folder(folder / ISSUED_FOLDER) / f"{name}.pem", certificate_pem(certificate))
    until = _text(certificate.not_valid_after_utc)
    client = msgspec.structs.replace(
        _seated(register, name), fingerprint=fingerprint(certificate), issued=_text(now), expires=until, revoked=""
    )
    return _with(register, client), certificate


def sign(folder: Path, name: str, key: ec.EllipticCurvePublicKey, replace: bool = False, now: datetime | None = None) -> bytes:
    """A certificate for a request the operator vouches for. Raises RosterError if `name` has one already, unless `replace`."""
    with edited(folder) as box:
        client = box[0].client(check_name(name))
        if client is not None and client.fingerprint and not replace:
            raise RosterError(f"{name} has a certificate already.", "If the request is really its own, add --replace.")
        kept = tuple(one for one in box[0].invitations if one.name != name)
        box[0], certificate = _issue(folder, msgspec.structs.replace(box[0], invitations=kept), name, key, now or utc_time())
    return certificate_pem(certificate)


def revoke(folder: Path, name: str, now: datetime | None = None) -> Client:
    """Take a client off the roster and end its invitations; its seat stays its own. Raises RosterError for an unknown name."""
    with edited(folder) as box:
        client = box[0].client(check_name(name))
        if client is None:
            raise RosterError(f"{name} is not on the roster.", f"See who is: splitft enroll list {folder}")
        client = msgspec.structs.replace(client, revoked=client.revoked or _text(now or utc_time()))
        kept = tuple(one for one in box[0].invitations if one.name != name)
        box[0] = msgspec.structs.replace(_with(box[0], client), invitations=kept)
    return client
