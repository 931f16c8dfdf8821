"""Before a client opens its session: is the server there, is it the right one, and does it take this client's certificate?

gRPC reports all of these as "unavailable". Here each is an error of its own, and only UnreachableError is worth trying again.
"""

from __future__ import annotations

import queue
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from splitft.clock import monotonic_s
from splitft.deploy.identity import CERTIFICATE, KEY, Identity
from splitft.deploy.names import split_address
from splitft.errors import FederationError, IdentityError, UnreachableError, UntrustedError

WAIT_S = 5.0
LISTEN_S = 0.5
SETTINGS_FRAME = 4
# The client's first bytes of HTTP/2 (RFC 9113, section 3.4) and an empty SETTINGS frame.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, SETTINGS_FRAME, 0, 0, 0, 0, 0])
TRY_AGAIN = "Check the address, the network and that splitft server runs."
# OpenSSL's numbers (X509_V_ERR_*) for what is wrong with a certificate.
EXPIRED, NOT_YET_VALID, WRONG_PURPOSE, WRONG_HOST, WRONG_IP = 10, 9, 26, 62, 64


class _EndedEarly(Exception):  # noqa: N818 - not an error yet: asked once more first
    """The server ended the connection before its HTTP/2 settings, without saying why."""


def preflight(address: str, identity: Identity | None, wait_s: float = WAIT_S) -> bytes:
    """Returns when a gRPC server at `address` has let this client in, with the certificate it has shown as PEM; `identity` None: plain
    text, no certificate.

    Raises UnreachableError, UntrustedError, IdentityError, or FederationError when something else listens there; within `wait_s`.
    """
    deadline_s = monotonic_s() + wait_s
    if identity is not None:
        identity.check_dates()
    try:
        return _knock(address, identity, deadline_s)
    except _EndedEarly:
        try:
            # A server that is being restarted looks the same for a moment; one that refuses a certificate does it every time.
            return _knock(address, identity, deadline_s)
        except _EndedEarly:
            raise _ended(address, identity) from None


def _ended(address: str, identity: Identity | None) -> FederationError:
    if identity is None:
        return FederationError(f"{address} ended the connection: it wants TLS, or is no splitft server.", "Give --identity.")
    return _refused(address, identity, "no reason given")


def _refused(address: str, identity: Identity, why: str) -> IdentityError:
    return IdentityError(
        f"{address} refuses the certificate of {identity.name} ({why}).",
        "It is the right server: ask its operator for a new invitation (splitft enroll invite), and check this clock and --identity.",
    )


def _knock(address: str, identity: Identity | None, deadline_s: float) -> bytes:
    with _connection(address, deadline_s) as plain:
        if identity is None:
            _await_settings(plain, address, None, deadline_s)
            return b""
        with _handshake(plain, address, identity, deadline_s) as stream:
            _await_settings(stream, address, identity, deadline_s)
            return ssl.DER_cert_to_PEM_cert(stream.getpeercert(binary_form=True) or b"").encode("ascii")


@contextmanager
def _connection(address: str, deadline_s: float) -> Iterator[socket.socket]:
    """A TCP connection to the first address that answers."""
    host, port = split_address(address)
    problem: OSError | None = None
    for family, kind, protocol, _, place in _resolved(host, port, deadline_s):
        try:
            plain = socket.socket(family, kind, protocol)
        except OSError as fault:
            problem = fault
            continue
        with plain:
            try:
                plain.settimeout(_left_s(deadline_s))
                plain.connect(place)
            except OSError as fault:
                problem = fault
                continue
            yield plain
            return
    why = "no answer in time" if isinstance(problem, TimeoutError) else str((problem and problem.strerror) or "no address")
    raise UnreachableError(f"{address} cannot be reached: {why}.", TRY_AGAIN) from problem


def _resolved(host: str, port: int, deadline_s: float) -> list[tuple[int, int, int, str, tuple[str, int]]]:
    """The addresses of `host`. The resolver knows no time-out, so it works in a thread that is left behind if need be."""
    found: queue.SimpleQueue[object] = queue.SimpleQueue()

    def resolve() -> None:
        try:
            found.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as problem:
            found.put(problem)

    threading.Thread(target=resolve, name="resolver", daemon=True).start()
    try:
        result = found.get(timeout=_left_s(deadline_s))
    except queue.Empty:
        raise UnreachableError(f"the name {host} was not resolved in time.", TRY_AGAIN) from None
    if isinstance(result, list):
        return result
    raise UnreachableError(f"the host {host} is unknown: {getattr(result, 'strerror', None) or result}.", TRY_AGAIN)


def _handshake(plain: socket.socket, address: str, identity: Identity, deadline_s: float) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=identity.tls.root_pem.decode("ascii"))
    context.load_cert_chain(identity.folder / CERTIFICATE, identity.folder / KEY)
    context.set_alpn_protocols(["h2"])
    plain.settimeout(_left_s(deadline_s))
    try:
        stream = context.wrap_socket(plain, server_hostname=identity.tls.server_name or split_address(address)[0])
    except ssl.SSLCertVerificationError as problem:
        raise _untrusted(address, identity, problem) from problem
    except (ssl.SSLEOFError, ConnectionError) as problem:
        raise UnreachableError(f"{address} took the connection and dropped it.", TRY_AGAIN) from problem
    except TimeoutError as problem:
        raise UnreachableError(f"{address} took the connection and says nothing.", TRY_AGAIN) from problem
    except OSError as problem:
        reason = getattr(problem, "reason", None) or problem.strerror
        raise FederationError(f"{address} is no splitft server with TLS 1.3 ({reason}).", "Check the address and the port.") from problem
    if stream.selected_alpn_protocol() != "h2":
        stream.close()
        raise FederationError(f"{address} speaks TLS but not HTTP/2: something else listens there.", "Check the address and the port.")
    return stream


def _untrusted(address: str, identity: Identity, problem: ssl.SSLCertVerificationError) -> UntrustedError:
    host = identity.tls.server_name or split_address(address)[0]
    if problem.verify_code == EXPIRED:
        return UntrustedError(f"the certificate of {address} has expired.", "Ask its operator to run: splitft enroll renew-server DIR")
    if problem.verify_code == NOT_YET_VALID:
        return UntrustedError(f"the certificate of {address} is not valid yet.", "Check this machine's clock, then the server's.")
    if problem.verify_code in (WRONG_HOST, WRONG_IP):
        remedy = f"Use a name the certificate holds, or ask its operator to run: splitft enroll renew-server DIR --host {host}"
        return UntrustedError(f"the certificate of {address} is not for {host}.", remedy)
    if problem.verify_code == WRONG_PURPOSE:
        return UntrustedError(f"{address} shows a certificate that is not a server's.", "Do not go on: a client poses as the server.")
    return UntrustedError(
        f"the certificate of {address} is not from the authority of {identity.federation} ({problem.verify_message}).",
        "Check the address and --identity; if both are right, do not go on.",
    )


def _await_settings(stream: socket.socket, address: str, identity: Identity | None, deadline_s: float) -> None:
    """With TLS 1.3 a refused client certificate shows only here: an alert or the end instead of the server's HTTP/2 settings."""
    header = b""
    try:
        # A server sends its settings unasked. Whoever is spoken to first may answer a refusal by a reset, which swallows the alert.
        spoken = False
        while len(header) < 9:
            stream.settimeout(_left_s(deadline_s) if spoken else min(LISTEN_S, _left_s(deadline_s)))
            try:
                piece = stream.recv(9 - len(header))
            except TimeoutError:
                if spoken:
                    raise
                spoken = True
                stream.sendall(PREFACE)
                continue
            if not piece:
                raise _EndedEarly
            header += piece
    except TimeoutError as problem:
        raise UnreachableError(f"{address} took the connection and says nothing.", TRY_AGAIN) from problem
    except (ssl.SSLEOFError, ConnectionError) as problem:
        raise _EndedEarly from problem
    except ssl.SSLError as problem:
        if identity is None or "ALERT" not in (problem.reason or ""):
            raise FederationError(f"{address} is no splitft server ({problem.reason}).", "Check the address and the port.") from problem
        why = str(problem.reason).partition("ALERT_")[2].replace("_", " ").lower()
        raise _refused(address, identity, why) from problem
    except OSError as problem:
        raise UnreachableError(f"{address} was lost: {problem.strerror}.", TRY_AGAIN) from problem
    if header[3] != SETTINGS_FRAME or header[5:9] != bytes(4):
        raise FederationError(f"{address} is no gRPC server: something else listens there.", "Check the address and the port.")


def _left_s(deadline_s: float) -> float:
    left_s = deadline_s - monotonic_s()
    return max(left_s, 0.001)
