"""Who this process is in a federation: the client's identity folder, and the server's half of the federation folder.

A client's folder: key.pem (made there, never leaves), certificate.pem, authority.pem, identity.json; pending-key.pem while it enrols.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec
from cryptography import x509

from splitft.deploy.authority import AUTHORITY_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY, check_pair
from splitft.deploy.certificates import (
    PEM_BYTES,
    authority_fingerprint,
    certificate_pem,
    check_dates,
    check_issued,
    hosts_of,
    key_pem,
    make_request,
    new_key,
    public_bytes,
    read_certificate,
    read_key,
)
from splitft.deploy.disk import private_folder, read_bounded, read_private, sync_folder, write_atomically, write_private
from splitft.deploy.names import check_name, split_address
from splitft.errors import IdentityError
from splitft.transport.tls import ClientTls, ServerTls

KEY, PENDING_KEY, CERTIFICATE, AUTHORITY, FACTS = "key.pem", "pending-key.pem", "certificate.pem", "authority.pem", "identity.json"
FACTS_BYTES = 4096


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What identity.json holds: for people and defaults; who the client is, its certificate says."""

    federation: str
    name: str
    server: str = ""


@dataclass(frozen=True)
class Identity:
    """A client: its place in a federation, and what it shows and trusts. `server` is the server's address, if it is known."""

    folder: Path
    federation: str
    name: str
    fingerprint: str
    expires: datetime
    server: str
    certificate: x509.Certificate
    tls: ClientTls

    @classmethod
    def load(cls, folder: Path, server_name: str = "") -> Identity:
        """The identity in `folder`, checked: private key, pair, days, authority. Raises IdentityError saying what to do."""
        if not (folder / CERTIFICATE).is_file():
            raise IdentityError(f"{folder} holds no identity: it has no {CERTIFICATE}.", "Enrol: splitft enroll join TOKEN --identity DIR")
        root = read_bounded(folder / AUTHORITY, PEM_BYTES, "the authority's certificate")
        pem = read_bounded(folder / CERTIFICATE, PEM_BYTES, "the client's certificate")
        certificate, authority = read_certificate(pem), read_certificate(root, "the authority's certificate")
        _settle(folder, certificate)
        secret = read_private(folder / KEY, PEM_BYTES, "the private key")
        check_pair(certificate, read_key(secret, "the private key"), "the client's")
        holder = check_issued(certificate, authority, "client")
        check_dates(certificate, "this client's certificate", remedy="Ask for a new invitation (splitft enroll invite).")
        check_dates(authority, "the federation authority's certificate")
        facts = read_facts(folder)
        server = facts.server if facts is not None else ""
        tls = ClientTls(root, pem, secret, server_name)
        until = certificate.not_valid_after_utc
        return cls(folder, holder.federation, holder.name, holder.fingerprint, until, server, certificate, tls)

    def check_dates(self) -> None:
        """Raises IdentityError once the certificate has expired, which may happen while the client runs."""
        check_dates(self.certificate, "this client's certificate", remedy="Ask for a new invitation (splitft enroll invite).")


@dataclass(frozen=True)
class ServerIdentity:
    """A federation's server: what it shows and trusts. The authority's key is not needed for that."""

    folder: Path
    federation: str
    fingerprint: str
    expires: datetime
    hosts: tuple[str, ...]
    tls: ServerTls

    @classmethod
    def load(cls, folder: Path) -> ServerIdentity:
        """The server's identity in `folder`, checked like a client's. Raises IdentityError saying what to do."""
        root = read_bounded(folder / AUTHORITY_CERTIFICATE, PEM_BYTES, "the authority's certificate")
        pem = read_bounded(folder / SERVER_CERTIFICATE, PEM_BYTES, "the server's certificate")
        secret = read_private(folder / SERVER_KEY, PEM_BYTES, "the server's private key")
        certificate, authority = read_certificate(pem), read_certificate(root, "the authority's certificate")
        check_pair(certificate, read_key(secret, "the server's private key"), "the server's")
        holder = check_issued(certificate, authority, "server")
        check_dates(certificate, "the server's certificate", remedy=f"Run: splitft enroll renew-server {folder}")
        check_dates(authority, "the federation authority's certificate", remedy="Make a new federation.")
        hosts, until = tuple(hosts_of(certificate)), certificate.not_valid_after_utc
        return cls(folder, holder.federation, holder.fingerprint, until, hosts, ServerTls(root, pem, secret))


def _settle(folder: Path, certificate: x509.Certificate) -> None:
    """Finish an enrolment that was cut off after its certificate had been written: its key takes the place of the earlier one."""
    pending = folder / PENDING_KEY
    if not pending.is_file():
        return
    try:
        key = read_key(read_private(pending, PEM_BYTES, "the pending key"), "the pending key")
        check_pair(certificate, key, "the client's")
    except IdentityError:
        return  # an enrolment under way: the present pair still counts
    with suppress(FileNotFoundError):  # whoever enrolled, and a client that runs, may both be here
        pending.replace(folder / KEY)
        sync_folder(folder)


def read_facts(folder: Path) -> Facts | None:
    """What identity.json says, if it is there. Raises IdentityError if it is damaged."""
    path = folder / FACTS
    if not path.is_file():
        return None
    try:
        facts = msgspec.json.decode(read_bounded(path, FACTS_BYTES, "identity.json"), type=Facts)
    except (msgspec.MsgspecError, UnicodeDecodeError) as problem:
        raise IdentityError(f"{path} is damaged: {problem}.", "Enrol again.") from problem
    if facts.server:
        split_address(facts.server)
    return facts


def begin(folder: Path, name: str, federation: str = "") -> bytes:
    """A signing request for `name`, with a key made in `folder`; asked again before an answer has come, for the same key.

    Raises IdentityError if the folder is another client's or another federation's.
    """
    check_name(name)
    facts = read_facts(folder)
    if facts is not None and (facts.name != name or (federation and facts.federation != federation)):
        raise IdentityError(f"{folder} is the identity of {facts.name} in {facts.federation}.", "Choose another folder.")
    pending = private_folder(folder) / PENDING_KEY
    if pending.is_file():
        key = read_key(read_private(pending, PEM_BYTES, "the pending key"), "the pending key")
    else:
        key = new_key()
        write_private(pending, key_pem(key))
    return make_request(name, key)


def finish(folder: Path, certificate: bytes, authority: bytes, name: str = "", server: str = "", pin: bytes = b"") -> Identity:
    """Take the certificate for the pending key into `folder`. `pin`: the sha256 the authority must have. Raises IdentityError."""
    if pin and authority_fingerprint(authority) != pin:
        raise IdentityError("the authority's certificate is not the one with the given fingerprint.", "Ask the operator; do not go on.")
    issuer, own = read_certificate(authority, "the authority's certificate"), read_certificate(certificate)
    holder = check_issued(own, issuer, "client")
    if name and holder.name != name:
        raise IdentityError(f"the certificate is for {holder.name}, not for {name}.", "Ask the operator for the right one.")
    facts = read_facts(folder)
    if facts is not None and (facts.federation, facts.name) != (holder.federation, holder.name):
        raise IdentityError(f"{folder} is the identity of {facts.name} in {facts.federation}.", "Choose another folder.")
    key = read_key(read_private(folder / PENDING_KEY, PEM_BYTES, "the pending key"), "the pending key")
    held = own.public_key()
    if public_bytes(key.public_key()) != public_bytes(held):  # type: ignore[arg-type]
        raise IdentityError("the certificate is for another key than the pending one.", "Enrol again with a new request.")
    check_dates(own, "the new certificate")
    if server:
        split_address(server)
    facts = Facts(holder.federation, holder.name, server or (facts.server if facts is not None else ""))
    write_atomically(folder / AUTHORITY, certificate_pem(issuer))
    write_atomically(folder / FACTS, msgspec.json.format(msgspec.json.encode(facts), indent=1) + b"\n")
    write_atomically(folder / CERTIFICATE, certificate_pem(own))
    return Identity.load(folder)
