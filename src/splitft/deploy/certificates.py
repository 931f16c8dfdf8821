"""Certificates: made, read and checked. Elliptic curve P-256; an identity is the URI splitft://FEDERATION/NAME in a certificate.

Server certificates are good for servers only and client certificates for clients only, so neither can play the other.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Literal, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from splitft.clock import utc_time
from splitft.deploy.names import NAME, SERVER_NAME, check_name, is_ip, shown
from splitft.errors import IdentityError

Role = Literal["server", "client"]
# Clocks differ: a certificate made now is good on a machine a day behind.
BACKDATED = timedelta(hours=24)
AUTHORITY_DAYS, LEAF_DAYS = 3650, 90
PEM_BYTES = 16 << 10
URI = re.compile(rf"splitft://({NAME.pattern})/({NAME.pattern})")
USAGE = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}


class Holder(NamedTuple):
    """Whose certificate it is, and the sha256 of its DER in hexadecimal."""

    federation: str
    name: str
    fingerprint: str


def new_key() -> ec.EllipticCurvePrivateKey:
    """A new private key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as PEM, not encrypted: the file's mode guards it."""
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def read_key(pem: bytes, what: str) -> ec.EllipticCurvePrivateKey:
    """A private key from PEM. Raises IdentityError."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as problem:
        raise IdentityError(f"{what} is no private key in PEM.", "Enrol again (splitft enroll).") from problem
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{what} is a key of another kind than elliptic curve.", "Enrol again (splitft enroll).")
    return key


def public_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key as DER, the same for equal keys."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """A certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def read_certificate(pem: bytes, what: str = "the certificate") -> x509.Certificate:
    """The first certificate in `pem`. Raises IdentityError."""
    try:
        if len(pem) > PEM_BYTES:
            raise ValueError(f"{len(pem)} bytes")
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, UnsupportedAlgorithm) as problem:
        raise IdentityError(f"{what} is no certificate in PEM.", "Enrol again (splitft enroll).") from problem


def fingerprint(certificate: x509.Certificate) -> str:
    """Sha256 of the certificate's DER, in hexadecimal."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def authority_fingerprint(pem: bytes) -> bytes:
    """Sha256 of an authority certificate's DER."""
    return hashlib.sha256(read_certificate(pem).public_bytes(serialization.Encoding.DER)).digest()


def _subject(unit: str, name: str) -> x509.Name:
    # The unit keeps a client that is called like its federation from having the authority's own subject.
    parts = (NameOID.ORGANIZATION_NAME, "splitft"), (NameOID.ORGANIZATIONAL_UNIT_NAME, unit), (NameOID.COMMON_NAME, name)
    return x509.Name([x509.NameAttribute(kind, value) for kind, value in parts])


def _key_usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def make_authority(federation: str, key: ec.EllipticCurvePrivateKey, now: datetime | None = None) -> x509.Certificate:
    """The self-signed certificate of a federation's authority; it can sign servers and clients and no further authority."""
    now, subject = now or utc_time(), _subject("authority", check_name(federation, "federation"))
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - BACKDATED).not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(authority=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return builder.sign(key, hashes.SHA256())


def make_leaf(
    authority: tuple[x509.Certificate, ec.EllipticCurvePrivateKey],
    holder: tuple[str, str],
    public_key: ec.EllipticCurvePublicKey,
    hosts: Sequence[str] = (),
    days: float = LEAF_DAYS,
    now: datetime | None = None,
) -> x509.Certificate:
    """A certificate for `holder` (federation, name); the name "server" makes a server's, for `hosts`, any other a client's."""
    (issuer, issuer_key), (federation, name), now = authority, holder, now or utc_time()
    role: Role = "server" if name == SERVER_NAME else "client"
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(f"splitft://{federation}/{name}")]
    names += [x509.IPAddress(ipaddress.ip_address(host)) if is_ip(host) else x509.DNSName(host) for host in hosts]
    until = min(now + timedelta(days=days), issuer.not_valid_after_utc)
    builder = x509.CertificateBuilder().subject_name(_subject(role, name)).issuer_name(issuer.subject).public_key(public_key)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(min(now, until) - BACKDATED).not_valid_after(until)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(authority=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([USAGE[role]]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return builder.add_extension(issuer_id, critical=False).sign(issuer_key, hashes.SHA256())


def make_request(name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A signing request for a client's key, as PEM."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, check_name(name))])
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def read_request(pem: bytes) -> tuple[str, ec.EllipticCurvePublicKey]:
    """The name and the key of a signing request whose signature holds. Raises IdentityError; nothing else in it is looked at."""
    try:
        if len(pem) > PEM_BYTES:
            raise ValueError(f"{len(pem)} bytes")
        request = x509.load_pem_x509_csr(pem)
        names, key = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME), request.public_key()
        sound = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm) as problem:
        raise IdentityError("the signing request is no valid PEM request.", "Make it with splitft enroll request.") from problem
    if not (sound and len(names) == 1 and isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)):
        raise IdentityError("the signing request is not one of splitft: P-256, one name, signed.", "Make it with splitft enroll request.")
    return check_name(str(names[0].value)), key


def identify(pem: bytes) -> Holder:
    """Whose certificate `pem` is, by its only splitft URI; its signature is TLS's business. Raises IdentityError."""
    return holder_of(read_certificate(pem))


def holder_of(certificate: x509.Certificate) -> Holder:
    """`identify`, of a certificate that is parsed already."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = [uri for uri in names.get_values_for_type(x509.UniformResourceIdentifier) if uri.startswith("splitft:")]
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        uris = []
    found = URI.fullmatch(uris[0]) if len(uris) == 1 else None
    if found is None:
        raise IdentityError(f"the certificate names nobody in a federation ({shown(uris)}).", "Use a certificate of splitft enroll.")
    return Holder(found[1], found[2], fingerprint(certificate))


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The host names and IP addresses a server certificate is good for."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*names.get_values_for_type(x509.DNSName), *(str(one) for one in names.get_values_for_type(x509.IPAddress))]


def check_issued(certificate: x509.Certificate, authority: x509.Certificate, role: Role) -> Holder:
    """Whose certificate it is, if `authority` signed it for this role. Raises IdentityError."""
    try:
        certificate.verify_directly_issued_by(authority)
        usage = list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as problem:
        raise IdentityError(f"the {role}'s certificate is not signed by this federation's authority.", "Enrol again.") from problem
    except x509.ExtensionNotFound:
        usage = []
    holder = holder_of(certificate)
    if usage != [USAGE[role]] or (holder.name == SERVER_NAME) != (role == "server"):
        raise IdentityError(f"the certificate of {holder.name} is not that of a {role}.", "Use the certificate made for this side.")
    return holder


def check_dates(certificate: x509.Certificate, what: str, now: datetime | None = None, remedy: str = "") -> None:
    """Raises IdentityError outside the certificate's days, saying by how much."""
    now, since, until = now or utc_time(), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > until:
        raise IdentityError(f"{what} expired {span(now - until)} ago, on {until:%Y-%m-%d %H:%M} UTC.", remedy or "Enrol again.")
    if now < since:
        raise IdentityError(f"{what} is not valid for another {span(since - now)}, until {since:%Y-%m-%d %H:%M} UTC.", "Check this clock.")


def span(length: timedelta) -> str:
    """A length of time in its largest fitting unit."""
    seconds = length.total_seconds()
    for unit, unit_s in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds:.0f} seconds"
