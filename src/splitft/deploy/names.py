"""Which names and addresses are allowed. Everything else is refused before it reaches a path, a certificate or a log."""

from __future__ import annotations

import ipaddress
import re

from splitft.errors import IdentityError

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
HOST = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,62})(?:\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*\.?")
# The server's own place in the names of certificates: splitft://FEDERATION/server.
SERVER_NAME = "server"


def shown(value: object) -> str:
    """A foreign value fit for one line of a log or message: ASCII, escaped, at most 60 characters."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def one_line(text: str) -> str:
    """A foreign sentence fit for a message: printable ASCII, at most 200 characters."""
    return "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in text[:200])


def check_name(name: str, what: str = "client") -> str:
    """`name`, if it is one. Raises IdentityError."""
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise IdentityError(
            f"{shown(name)} is no name of a {what}.", "Use 1 to 63 of a-z, 0-9 and hyphen, and begin with a letter or a digit."
        )
    if what == "client" and name == SERVER_NAME:
        raise IdentityError(f"{name!r} is the server's own name.", "Choose another name for the client.")
    return name


def check_host(host: str) -> str:
    """`host`, if it is a host name or an IP address. Raises IdentityError."""
    if is_ip(host) or (isinstance(host, str) and HOST.fullmatch(host)):
        return host
    raise IdentityError(f"{shown(host)} is no host name and no IP address.", "Give a name such as server.example.org, or an address.")


def is_ip(host: str) -> bool:
    """Whether `host` is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT` or `[IPV6]:PORT`. Raises IdentityError."""
    host, colon, port = address.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    # int() takes other scripts' digits and underscores, too.
    if not (colon and port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        raise IdentityError(f"{shown(address)} is no address.", "Give HOST:PORT, such as server.example.org:7443.")
    return check_host(host), int(port)


def join_address(host: str, port: int) -> str:
    """`HOST:PORT`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
