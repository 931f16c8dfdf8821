"""Enrolment over the network: a one-time token, and the port where it is exchanged for a certificate.

    client                                    server (TLS 1.3, its own certificate only)
                                          <-  greeting: federation, authority certificate
    checks both against the token
    name, secret, signing request         ->
                                          <-  certificate, or one refusal that does not tell what was wrong

Each message is four bytes of length and at most 16 KiB of msgpack. One attempt per connection, every wait bounded.
"""

from __future__ import annotations

import base64
import binascii
import socket
import ssl
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from splitft.clock import monotonic_s
from splitft.deploy import identity
from splitft.deploy.certificates import authority_fingerprint, check_dates, check_issued, read_certificate
from splitft.deploy.disk import locked, private_folder
from splitft.deploy.names import check_name, join_address, one_line, shown, split_address
from splitft.deploy.roster import SECRET_BYTES
from splitft.errors import FederationError, IdentityError, RosterError, UnreachableError, UntrustedError

MESSAGE_BYTES = 16 << 10
TOKEN_CHARACTERS = 1024
TOKEN_MARK = "splitft1."
WAIT_S = 5.0


class _TokenForm(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    address: str
    federation: str
    authority: bytes
    name: str
    secret: bytes


class Greeting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The server's first word."""

    federation: str
    authority: bytes


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A client's one attempt."""

    name: str
    secret: bytes
    request: bytes


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A certificate and the port of the training service, or a refusal."""

    certificate: bytes = b""
    port: int = 0
    refused: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Token:
    """An invitation: where to enrol, which authority to trust (sha256 of its certificate), who one is, and the secret that proves it."""

    address: str
    federation: str
    authority: bytes
    name: str
    secret: bytes = field(repr=False)

    def text(self) -> str:
        """The token as one word to copy."""
        form = msgspec.msgpack.encode(_TokenForm(self.address, self.federation, self.authority, self.name, self.secret))
        return TOKEN_MARK + base64.urlsafe_b64encode(form + zlib.crc32(form).to_bytes(4, "big")).decode().rstrip("=")

    @classmethod
    def read(cls, text: str) -> Token:
        """A token from its text. Raises IdentityError if it was cut, mistyped, or holds a name or address that is not allowed."""
        word = text.strip()
        remedy = "Copy the whole token, or ask for a new one (splitft enroll invite)."
        if len(word) > TOKEN_CHARACTERS or not word.startswith(TOKEN_MARK) or not word.isascii():
            raise IdentityError(f"{shown(word[:12])}... is no token of splitft enroll invite.", remedy)
        body = word.removeprefix(TOKEN_MARK)
        try:
            data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
            form = msgspec.msgpack.decode(data[:-4], type=_TokenForm)
        except (binascii.Error, ValueError, msgspec.MsgspecError) as problem:
            raise IdentityError("the token is damaged.", remedy) from problem
        if zlib.crc32(data[:-4]).to_bytes(4, "big") != data[-4:] or len(form.authority) != 32 or len(form.secret) != SECRET_BYTES:
            raise IdentityError("the token is damaged.", remedy)
        split_address(form.address)
        return cls(form.address, check_name(form.federation, "federation"), form.authority, check_name(form.name), form.secret)


def send_message(stream: ssl.SSLSocket, message: msgspec.Struct, deadline_s: float) -> None:
    """One message, before `deadline_s` of the monotonic clock."""
    body = msgspec.msgpack.encode(message)
    stream.settimeout(max(0.001, deadline_s - monotonic_s()))
    stream.sendall(len(body).to_bytes(4, "big") + body)


def receive_message(stream: ssl.SSLSocket, deadline_s: float) -> bytes:
    """One message's body. Raises FederationError when it is too long, TimeoutError when it trickles, ConnectionError at an early end."""
    size = int.from_bytes(_receive_exactly(stream, 4, deadline_s), "big")
    if size > MESSAGE_BYTES:
        raise FederationError(f"the other side announces a message of {size} bytes; allowed are {MESSAGE_BYTES}.", "Check the address.")
    return _receive_exactly(stream, size, deadline_s)


def _receive_exactly(stream: ssl.SSLSocket, size: int, deadline_s: float) -> bytes:
    data = b""
    while len(data) < size:
        left_s = deadline_s - monotonic_s()
        if left_s <= 0.0:
            raise TimeoutError
        stream.settimeout(left_s)
        piece = stream.recv(size - len(data))
        if not piece:
            raise ConnectionResetError
        data += piece
    return data


def enrol(token: Token, folder: Path, address: str = "", server: str = "", wait_s: float = WAIT_S) -> identity.Identity:
    """Exchange `token` for an identity in `folder`; safe to repeat until it succeeds. `server`: the training service's address, if known.

    Raises UnreachableError (try again), UntrustedError (not the token's authority), RosterError (refused), IdentityError (folder).
    """
    with locked(private_folder(folder) / ".lock"):
        request = identity.begin(folder, token.name, token.federation)
        place = address or token.address
        greeting, answer = _exchange(token, place, request, wait_s)
        if answer.refused or not answer.certificate:
            remedy = one_line(answer.remedy) or "Ask for a new one (splitft enroll invite)."
            raise RosterError(f"{place} refuses: {one_line(answer.refused) or 'no certificate.'}", remedy)
        if not server and 0 < answer.port < 65536:
            server = join_address(split_address(place)[0], answer.port)
        return identity.finish(folder, answer.certificate, greeting.authority, token.name, server, token.authority)


def _exchange(token: Token, address: str, request: bytes, wait_s: float) -> tuple[Greeting, Answer]:
    host, port = split_address(address)
    # Trust comes from the fingerprint in the token: the authority arrives in the greeting, and nothing is sent before it is checked.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    remedy = "Check the address and that splitft server runs; then try again."
    try:
        with socket.create_connection((host, port), timeout=wait_s) as plain, context.wrap_socket(plain) as stream:
            deadline_s = monotonic_s() + wait_s
            greeting = msgspec.msgpack.decode(receive_message(stream, deadline_s), type=Greeting)
            _check_server(token, greeting, ssl.DER_cert_to_PEM_cert(stream.getpeercert(binary_form=True) or b"").encode())
            # The server may wait for a lock on its disk before it answers.
            deadline_s = monotonic_s() + 3 * wait_s
            send_message(stream, Request(token.name, token.secret, request), deadline_s)
            return greeting, msgspec.msgpack.decode(receive_message(stream, deadline_s), type=Answer)
    except (msgspec.MsgspecError, ssl.SSLError) as problem:
        if isinstance(problem, ssl.SSLEOFError):
            raise UnreachableError(f"{address} ended the connection.", remedy) from problem
        raise FederationError(
            f"{address} is no enrolment port of a federation.", "Check the address; it is not that of training."
        ) from problem
    except OSError as problem:
        raise UnreachableError(f"{address} does not answer: {problem.strerror or type(problem).__name__}.", remedy) from problem


def _check_server(token: Token, greeting: Greeting, shown_pem: bytes) -> None:
    """Raises UntrustedError unless the token's authority signed the certificate the server has just proved to hold."""
    try:
        if authority_fingerprint(greeting.authority) != token.authority:
            raise IdentityError("its authority is not the one in the token.")
        certificate = read_certificate(shown_pem)
        holder = check_issued(certificate, read_certificate(greeting.authority), "server")
        check_dates(certificate, "its certificate")
        if not holder.federation == greeting.federation == token.federation:
            raise IdentityError(f"it serves the federation {holder.federation}, not {token.federation}.")
    except IdentityError as problem:
        text = f"the server at the enrolment port is not to be trusted: {problem.message}"
        raise UntrustedError(text, "Nothing was sent to it. Check the address with the operator.") from problem
