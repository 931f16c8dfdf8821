"""Authorities, certificates and identity folders: what they are good for, and what is refused before it is used."""

from __future__ import annotations

import base64
import stat
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from splitft.clock import utc_time
from splitft.deploy import identity
from splitft.deploy.authority import Authority
from splitft.deploy.certificates import (
    certificate_pem,
    check_issued,
    identify,
    key_pem,
    make_leaf,
    make_request,
    new_key,
    read_certificate,
    read_request,
)
from splitft.deploy.identity import Identity, ServerIdentity
from splitft.deploy.names import check_host, check_name, split_address
from splitft.errors import IdentityError, ResourceError

from .identities import HOSTILE_NAMES, federation, member, unlisted


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_federation_has_private_keys_and_certificates_for_one_purpose_each(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed", hosts=("fed.example.org", "10.0.0.7"))
    assert mode(folder) == 0o700
    assert {mode(folder / name) for name in ("authority-key.pem", "server-key.pem", "roster.json")} == {0o600}
    root = read_certificate((folder / "authority.pem").read_bytes())
    constraints = root.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (constraints.ca, constraints.path_length) == (True, 0)
    assert timedelta(days=3650) <= root.not_valid_after_utc - root.not_valid_before_utc <= timedelta(days=3652)
    leaf = read_certificate((folder / "server.pem").read_bytes())
    leaf.verify_directly_issued_by(root)
    assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert identify(certificate_pem(leaf))[:2] == ("hospitals", "server")
    assert ServerIdentity.load(folder).hosts == ("fed.example.org", "localhost", "10.0.0.7", "127.0.0.1")
    now = utc_time()
    assert now - timedelta(hours=25) < leaf.not_valid_before_utc < now - timedelta(hours=23)
    assert now + timedelta(days=89) < leaf.not_valid_after_utc <= now + timedelta(days=90)


def test_an_authority_is_never_overwritten(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(IdentityError, match="already"):
        Authority.create(folder, "other", ())
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_renewed_server_keeps_its_hosts_or_gets_new_ones(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed", hosts=("a.example",))
    first = ServerIdentity.load(folder)
    Authority.load(folder).renew_server()
    second = ServerIdentity.load(folder)
    assert second.fingerprint != first.fingerprint
    assert second.hosts == first.hosts
    Authority.load(folder).renew_server(["b.example", "::1"])
    assert ServerIdentity.load(folder).hosts == ("b.example", "localhost", "::1", "127.0.0.1")


def test_the_server_needs_no_authority_key(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    (folder / "authority-key.pem").unlink()
    found = ServerIdentity.load(folder)
    assert found.federation == "hospitals"
    assert "PRIVATE" not in repr(found)
    with pytest.raises(IdentityError, match="authority's key cannot be read"):
        Authority.load(folder)


@pytest.mark.parametrize("file", ["key.pem", "server-key.pem", "authority-key.pem"])
@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620])
def test_a_key_open_to_others_is_refused_with_the_command_that_closes_it(tmp_path: Path, file: str, bits: int) -> None:
    folder = federation(tmp_path / "fed")
    home = member(folder, "alice", tmp_path / "alice").folder
    path = (home if file == "key.pem" else folder) / file
    path.chmod(bits)
    loads: dict[str, Callable[[], object]] = {
        "key.pem": lambda: Identity.load(home),
        "server-key.pem": lambda: ServerIdentity.load(folder),
        "authority-key.pem": lambda: Authority.load(folder),
    }
    load = loads[file]
    with pytest.raises(IdentityError) as caught:
        load()
    assert f"chmod 600 {path}" in caught.value.remedy


def test_an_identity_that_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    home = member(folder, "alice", tmp_path / "alice").folder
    good = {path.name: path.read_bytes() for path in home.iterdir() if path.is_file()}
    (home / "key.pem").write_bytes(key_pem(new_key()))
    with pytest.raises(IdentityError, match="do not belong together"):
        Identity.load(home)
    (home / "key.pem").write_bytes(good["key.pem"])
    other = federation(tmp_path / "other")
    (home / "authority.pem").write_bytes((other / "authority.pem").read_bytes())
    with pytest.raises(IdentityError, match="not signed by this federation's authority"):
        Identity.load(home)
    (home / "authority.pem").write_bytes(good["authority.pem"])
    assert Identity.load(home).name == "alice"
    for file, content in (("key.pem", b"nonsense"), ("certificate.pem", b"nonsense"), ("identity.json", b"[")):
        (home / file).write_bytes(content)
        with pytest.raises(IdentityError):
            Identity.load(home)
        (home / file).write_bytes(good[file])


def test_an_identity_outside_its_days_is_refused_saying_by_how_much(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    with pytest.raises(IdentityError, match="expired 5 days ago"):
        Identity.load(unlisted(folder, "alice", tmp_path / "alice", begins_days=-10, days=5))
    with pytest.raises(IdentityError, match="not valid for another 4 days"):
        Identity.load(unlisted(folder, "bob", tmp_path / "bob", begins_days=5))


def test_server_and_client_cannot_play_each_other(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    own = member(folder, "alice", tmp_path / "alice").certificate
    root = read_certificate((folder / "authority.pem").read_bytes())
    server = read_certificate((folder / "server.pem").read_bytes())
    assert check_issued(own, root, "client").name == "alice"
    assert check_issued(server, root, "server").name == "server"
    with pytest.raises(IdentityError, match="not that of a server"):
        check_issued(own, root, "server")
    with pytest.raises(IdentityError, match="not that of a client"):
        check_issued(server, root, "client")


def test_the_usage_counts_not_only_the_name(tmp_path: Path) -> None:
    root, key, now = Authority.create(tmp_path / "fed", "hospitals", ()), new_key(), utc_time()
    for name, usage, role in (("server", ExtendedKeyUsageOID.CLIENT_AUTH, "server"), ("alice", ExtendedKeyUsageOID.SERVER_AUTH, "client")):
        base = x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(root.certificate.subject).serial_number(7)
        base = base.public_key(key.public_key()).not_valid_before(now).not_valid_after(now + timedelta(days=1))
        uri = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"splitft://hospitals/{name}")])
        leaf = base.add_extension(x509.ExtendedKeyUsage([usage]), False).add_extension(uri, True).sign(root.key, hashes.SHA256())
        with pytest.raises(IdentityError, match="is not that of a"):
            check_issued(leaf, root.certificate, role)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_are_refused_everywhere_and_shown_on_one_short_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(IdentityError) as caught:
        check_name(name)
    assert len(caught.value.message) < 120
    assert caught.value.message.isprintable()
    assert caught.value.message.isascii()
    with pytest.raises(IdentityError):
        make_request(name, new_key())
    with pytest.raises(IdentityError):
        identity.begin(tmp_path / "home", name)
    if name != "server":
        with pytest.raises(IdentityError):
            Authority.create(tmp_path / "fed", name, ())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in HOSTILE_NAMES if 0 < len(name) <= 64])
def test_hostile_names_in_foreign_requests_and_certificates_are_refused(tmp_path: Path, name: str) -> None:
    key = new_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    with pytest.raises(IdentityError):
        read_request(request.public_bytes(Encoding.PEM))
    if name == "server" or not name.isascii():
        return
    root = Authority.create(tmp_path / "fed", "hospitals", ())
    leaf = make_leaf((root.certificate, root.key), ("hospitals", name), key.public_key())
    with pytest.raises(IdentityError, match="names nobody"):
        identify(certificate_pem(leaf))


def test_two_uris_or_none_name_nobody(tmp_path: Path) -> None:
    key, now = new_key(), utc_time()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "alice")])
    base = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key()).serial_number(7)
    base = base.not_valid_before(now).not_valid_after(now + timedelta(days=1))
    uris = [x509.UniformResourceIdentifier(f"splitft://hospitals/{name}") for name in ("alice", "bob")]
    assert identify(certificate_pem(base.add_extension(x509.SubjectAlternativeName(uris[:1]), False).sign(key, hashes.SHA256())))
    for builder in (base, base.add_extension(x509.SubjectAlternativeName(uris), False)):
        with pytest.raises(IdentityError, match="names nobody"):
            identify(certificate_pem(builder.sign(key, hashes.SHA256())))


@pytest.mark.parametrize("junk", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", b"x" * 100_000])
def test_junk_is_no_certificate_and_no_request(junk: bytes) -> None:
    with pytest.raises(IdentityError):
        identify(junk)
    with pytest.raises(IdentityError):
        read_request(junk)


def test_a_request_with_a_broken_signature_is_refused() -> None:
    pem = make_request("alice", new_key())
    der = bytearray(x509.load_pem_x509_csr(pem).public_bytes(Encoding.DER))
    changed = der.replace(b"alice", b"carol")
    forged = b"-----BEGIN CERTIFICATE REQUEST-----\n" + base64.encodebytes(bytes(changed)) + b"-----END CERTIFICATE REQUEST-----\n"
    with pytest.raises(IdentityError, match="not one of splitft"):
        read_request(forged)
    assert read_request(pem)[0] == "alice"


@pytest.mark.parametrize(
    "address", ["", "host", "host:", "host:0", "host:65536", "host:٤٤", "ho st:1", "a\n:1", "*.x:1", "x" * 300 + ":1", ":1"]
)
def test_bad_addresses_are_refused(address: str) -> None:
    with pytest.raises(IdentityError):
        split_address(address)


def test_good_addresses_pass() -> None:
    assert split_address("server.example.org:7443") == ("server.example.org", 7443)
    assert split_address("[::1]:1") == ("::1", 1)
    assert check_host("my-host_1.local") == "my-host_1.local"


def test_an_enrolment_cut_off_before_its_last_step_is_finished_by_the_next_load(tmp_path: Path) -> None:
    folder = federation(tmp_path / "fed")
    home = member(folder, "alice", tmp_path / "alice").folder
    old_key = (home / "key.pem").read_bytes()
    leaf = unlisted(folder, "alice", tmp_path / "new")
    (home / "pending-key.pem").write_bytes((leaf / "key.pem").read_bytes())
    (home / "pending-key.pem").chmod(0o600)
    assert Identity.load(home).tls.key_pem == old_key  # under way: the present pair counts
    (home / "certificate.pem").write_bytes((leaf / "certificate.pem").read_bytes())
    assert Identity.load(home).tls.key_pem == (leaf / "key.pem").read_bytes()
    assert not (home / "pending-key.pem").exists()


def test_a_folder_that_cannot_be_made_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError):
        Authority.create(tmp_path / "file" / "fed", "hospitals", ())
