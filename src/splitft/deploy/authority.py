"""A federation's authority: the key that makes identities, and the server's own certificate.

The folder: authority-key.pem (only enrolling needs it), authority.pem, server-key.pem, server.pem, roster.json, issued/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from splitft.deploy.certificates import (
    PEM_BYTES,
    certificate_pem,
    check_dates,
    hosts_of,
    key_pem,
    make_authority,
    make_leaf,
    new_key,
    public_bytes,
    read_certificate,
    read_key,
)
from splitft.deploy.disk import private_folder, read_bounded, read_private, write_atomically, write_private
from splitft.deploy.names import SERVER_NAME, check_host, check_name
from splitft.errors import IdentityError

AUTHORITY_KEY, AUTHORITY_CERTIFICATE = "authority-key.pem", "authority.pem"
SERVER_KEY, SERVER_CERTIFICATE = "server-key.pem", "server.pem"
LOOPBACK_HOSTS = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class Authority:
    """The authority of a federation, with its key."""

    folder: Path
    federation: str
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def create(cls, folder: Path, federation: str, hosts: Sequence[str], now: datetime | None = None) -> Authority:
        """Make an authority and its server's certificate; clients reach it as one of `hosts`. Raises IdentityError if there is one."""
        check_name(federation, "federation")
        for host in hosts:
            check_host(host)
        for name in (AUTHORITY_KEY, AUTHORITY_CERTIFICATE, SERVER_KEY, SERVER_CERTIFICATE):
            if (folder / name).exists():
                raise IdentityError(f"{folder} holds a federation already ({name}).", "Choose another folder; it is never overwritten.")
        private_folder(folder)
        key = new_key()
        authority = cls(folder, federation, make_authority(federation, key, now), key)
        write_private(folder / AUTHORITY_KEY, key_pem(key))
        write_atomically(folder / AUTHORITY_CERTIFICATE, certificate_pem(authority.certificate))
        authority.renew_server(hosts, now)
        return authority

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """The authority in `folder`. Raises IdentityError if its key is missing, open to others, or not the certificate's."""
        key = read_key(read_private(folder / AUTHORITY_KEY, PEM_BYTES, "the authority's key"), "the authority's key")
        certificate = read_certificate(read_bounded(folder / AUTHORITY_CERTIFICATE, PEM_BYTES, "the authority's certificate"))
        check_pair(certificate, key, "the authority's")
        check_dates(certificate, "the authority's certificate", remedy="Make a new federation.")
        names = certificate.subject.get_attributes_for_oid(x509.oid.NameOID.COMMON_NAME)
        return cls(folder, check_name(str(names[0].value) if names else "", "federation"), certificate, key)

    def issue(self, name: str, public_key: ec.EllipticCurvePublicKey, now: datetime | None = None) -> x509.Certificate:
        """A client's certificate. The caller lists it on the roster."""
        return make_leaf((self.certificate, self.key), (self.federation, check_name(name)), public_key, now=now)

    def renew_server(self, hosts: Sequence[str] = (), now: datetime | None = None) -> x509.Certificate:
        """A new certificate for the server, for `hosts` or else those of the present certificate."""
        path = self.folder / SERVER_CERTIFICATE
        if not hosts and path.exists():
            hosts = hosts_of(read_certificate(read_bounded(path, PEM_BYTES, "the server's certificate")))
        wanted = list(dict.fromkeys([*(check_host(host) for host in hosts), *LOOPBACK_HOSTS]))
        # One key for all renewals: a server that reads the folder between two writes finds a pair that fits.
        if (self.folder / SERVER_KEY).exists():
            key = read_key(read_private(self.folder / SERVER_KEY, PEM_BYTES, "the server's key"), "the server's key")
        else:
            key = new_key()
            write_private(self.folder / SERVER_KEY, key_pem(key))
        certificate = make_leaf((self.certificate, self.key), (self.federation, SERVER_NAME), key.public_key(), wanted, now=now)
        write_atomically(path, certificate_pem(certificate))
        return certificate


def check_pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, whose: str) -> None:
    """Raises IdentityError if the key is not the certificate's."""
    held = certificate.public_key()
    if not isinstance(held, ec.EllipticCurvePublicKey) or public_bytes(held) != public_bytes(key.public_key()):
        raise IdentityError(f"{whose} certificate and key do not belong together.", "Restore the pair, or enrol again.")
