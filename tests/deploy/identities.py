"""Federations, clients and hostile names for the tests of identities."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from cryptography import x509

from splitft.clock import utc_time
from splitft.deploy import identity, roster
from splitft.deploy.authority import Authority
from splitft.deploy.certificates import certificate_pem, make_leaf, read_request

HOSTILE_NAMES = (
    "",
    "../x",
    "/etc/passwd",
    "a/../b",
    "..",
    "a\0b",
    "a\n",
    "a\nb",
    "a" * 10_000,
    "a" * 64,
    "\u0430lice",  # Cyrillic a
    "alice\u0662",  # a digit of another script
    "\x1b[31mred",
    "Alice",
    "-a",
    "a b",
    "a.b",
    "server",
)


def federation(folder: Path, name: str = "hospitals", hosts: tuple[str, ...] = ()) -> Path:
    """A federation in `folder`, as `splitft enroll init` makes it."""
    Authority.create(folder, name, hosts)
    roster.write_register(folder, roster.Register(roster.SCHEMA, name))
    return folder


def member(folder: Path, name: str, home: Path) -> identity.Identity:
    """A client on the roster, with its identity in `home`."""
    _, key = read_request(identity.begin(home, name))
    return identity.finish(home, roster.sign(folder, name, key), (folder / "authority.pem").read_bytes())


def unlisted(folder: Path, name: str, home: Path, begins_days: float = 0.0, days: float = 90.0) -> Path:
    """An identity folder with a certificate of the right authority that is not on the roster, perhaps outside its days."""
    authority = Authority.load(folder)
    _, key = read_request(identity.begin(home, name))
    now = utc_time() + timedelta(days=begins_days)
    leaf = make_leaf((authority.certificate, authority.key), (authority.federation, name), key, days=days, now=now)
    return place(home, leaf, authority.certificate)


def place(home: Path, leaf: x509.Certificate, authority: x509.Certificate) -> Path:
    """The files of an identity, unchecked."""
    (home / "certificate.pem").write_bytes(certificate_pem(leaf))
    (home / "authority.pem").write_bytes(certificate_pem(authority))
    (home / "pending-key.pem").rename(home / "key.pem")
    return home
