"""`splitft enroll`: make a federation, invite its clients, join one, list and revoke.

Over the network: init, invite (operator), join (client). Without: request (client), sign (operator), accept (client).
"""

from __future__ import annotations

import re
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitft.errors import ConfigError, IdentityError

if TYPE_CHECKING:
    from splitft.deploy.identity import Identity

enroll_app = typer.Typer(
    name="enroll", help="Identities of a federation: make it, invite clients, join, list, revoke.", no_args_is_help=True
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The federation's folder, on the server.", show_default=False)]
OptionalFolder = Annotated[Path, typer.Argument(metavar="[DIR]", help="The federation's folder, on the server.")]
ClientName = Annotated[str, typer.Argument(metavar="CLIENT", help="The client's name.", show_default=False)]
IdentityFolder = Annotated[Path, typer.Option("--identity", metavar="DIR", help="The client's identity folder.")]
Hosts = Annotated[
    list[str] | None, typer.Option("--host", metavar="HOST", help="Name or IP address clients reach the server by; repeatable.")
]
DURATION = re.compile(r"([1-9][0-9]{0,4})([mhd])")
UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}
LONGEST_VALID = timedelta(days=30)
SOON = timedelta(days=14)
DEFAULT_ENROLMENT_PORT = 7444
SMALL_FILE_BYTES = 64 << 10


def duration(text: str) -> timedelta:
    """Such as 30m, 24h or 7d. Raises ConfigError."""
    found = DURATION.fullmatch(text)
    length = int(found[1]) * UNITS[found[2]] if found else None
    if length is None or length > LONGEST_VALID:
        raise ConfigError(f"--valid {text!r} is no length of time.", "Give one such as 30m, 24h or 7d, at most 30d.")
    return length


@enroll_app.command()
def init(
    folder: OptionalFolder = Path("federation"),
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="The federation's name.", show_default=False)] = "",
    host: Hosts = None,
) -> None:
    """Make a federation: its authority, the server's certificate, an empty roster. Never overwrites one."""
    from splitft.deploy.authority import Authority
    from splitft.deploy.disk import locked, private_folder
    from splitft.deploy.names import check_host, check_name
    from splitft.deploy.roster import LOCK_FILE, ROSTER_FILE, SCHEMA, Register, write_register

    check_name(name, "federation")
    for one in host or ():
        check_host(one)
    with locked(private_folder(folder) / LOCK_FILE):
        if (folder / ROSTER_FILE).exists():
            raise IdentityError(f"{folder} holds a federation already.", "Choose another folder; it is never overwritten.")
        Authority.create(folder, name, host or ())
        write_register(folder, Register(SCHEMA, name))
    typer.echo(f"{folder} holds the federation {name}. Keep authority-key.pem safe: who has it can make clients.")
    if not host:
        typer.echo(f"Its server is good for this machine only; for others: splitft enroll renew-server {folder} --host NAME")
    typer.echo(f"Next: start the server (splitft server CONFIG), and invite clients: splitft enroll invite {folder} CLIENT")


@enroll_app.command("renew-server")
def renew_server(folder: OptionalFolder = Path("federation"), host: Hosts = None) -> None:
    """Make a new certificate for the server; with --host for these hosts instead of the present ones."""
    from splitft.deploy.authority import Authority
    from splitft.deploy.certificates import hosts_of
    from splitft.deploy.disk import locked
    from splitft.deploy.roster import LOCK_FILE, read_register

    read_register(folder)
    with locked(folder / LOCK_FILE):
        certificate = Authority.load(folder).renew_server(host or ())
    typer.echo(f"The server's certificate is good until {certificate.not_valid_after_utc:%Y-%m-%d} for {', '.join(hosts_of(certificate))}.")


@enroll_app.command()
def invite(
    folder: Folder,
    client: ClientName,
    address: Annotated[
        str, typer.Option("--address", metavar="HOST:PORT", help="Enrolment port as the client reaches it.", show_default=False)
    ] = "",
    valid: Annotated[str, typer.Option("--valid", metavar="TIME", help="How long the token is good: 30m, 24h, 7d.")] = "24h",
) -> None:
    """Print a token a client joins with, once. Inviting a client again lets it fetch a new certificate; its seat stays."""
    from splitft.deploy import roster
    from splitft.deploy.authority import AUTHORITY_CERTIFICATE, LOOPBACK_HOSTS
    from splitft.deploy.certificates import PEM_BYTES, authority_fingerprint
    from splitft.deploy.disk import read_bounded
    from splitft.deploy.enrolment import Token
    from splitft.deploy.identity import ServerIdentity
    from splitft.deploy.names import check_name, join_address, split_address

    length = duration(valid)
    check_name(client)
    register = roster.read_register(folder)
    if not address:
        hosts = ServerIdentity.load(folder).hosts
        others = [host for host in hosts if host not in LOOPBACK_HOSTS]
        address = join_address((others or hosts)[0], DEFAULT_ENROLMENT_PORT)
    split_address(address)
    authority = authority_fingerprint(read_bounded(folder / AUTHORITY_CERTIFICATE, PEM_BYTES, "the authority's certificate"))
    secret = roster.invite(folder, client, length)
    typer.echo(f"For {client}, once, within {valid}, at {address}; hand it over in private:", err=True)
    typer.echo(Token(address, register.federation, authority, client, secret).text())


@enroll_app.command()
def join(
    token: Annotated[str, typer.Argument(metavar="TOKEN", help="What splitft enroll invite printed; - reads it from standard input.")],
    identity: IdentityFolder = Path("identity"),
    server: Annotated[
        str, typer.Option("--server", metavar="HOST:PORT", help="The training server's address, if not beside the enrolment port.")
    ] = "",
    address: Annotated[
        str, typer.Option("--address", metavar="HOST:PORT", help="The enrolment port, if not as in the token.", show_default=False)
    ] = "",
) -> None:
    """Fetch this client's certificate with a token. The key is made here and never leaves."""
    from splitft.deploy.enrolment import Token, enrol
    from splitft.deploy.names import split_address

    for given in filter(None, (server, address)):
        split_address(given)
    _show_identity(enrol(Token.read(sys.stdin.readline(4096) if token == "-" else token), identity, address, server))


@enroll_app.command()
def request(
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="The name the operator gives this client.", show_default=False)],
    identity: IdentityFolder = Path("identity"),
) -> None:
    """Write request.pem for an operator to sign, where the client cannot reach the enrolment port."""
    from splitft.deploy.disk import write_atomically
    from splitft.deploy.identity import begin

    path = write_atomically(identity / "request.pem", begin(identity, name))
    typer.echo(f"{path} is for the operator: splitft enroll sign DIR request.pem --out {name}.pem")


@enroll_app.command()
def sign(
    folder: Folder,
    request: Annotated[Path, typer.Argument(metavar="REQUEST", help="A client's request.pem.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="File for the client: its certificate and the authority's.")],
    replace: Annotated[bool, typer.Option("--replace", help="The client has a certificate, and this one takes its place.")] = False,
) -> None:
    """Sign a request that reached you by a way you trust, and put its client on the roster."""
    from splitft.deploy import roster
    from splitft.deploy.authority import AUTHORITY_CERTIFICATE
    from splitft.deploy.certificates import PEM_BYTES, authority_fingerprint, read_request
    from splitft.deploy.disk import read_bounded, write_atomically

    name, key = read_request(read_bounded(request, SMALL_FILE_BYTES, "the request"))
    root = read_bounded(folder / AUTHORITY_CERTIFICATE, PEM_BYTES, "the authority's certificate")
    certificate = roster.sign(folder, name, key, replace)
    write_atomically(out, certificate + root)
    typer.echo(f"{out} is for {name}: splitft enroll accept {out.name} --identity DIR --authority {authority_fingerprint(root).hex()}")


@enroll_app.command()
def accept(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What the operator's sign wrote.", show_default=False)],
    authority: Annotated[
        str, typer.Option("--authority", metavar="SHA256", help="The authority's fingerprint, as sign printed it.", show_default=False)
    ],
    identity: IdentityFolder = Path("identity"),
    server: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="The training server's address.")] = "",
) -> None:
    """Take a signed certificate into the identity folder."""
    from splitft.deploy.disk import read_bounded
    from splitft.deploy.identity import finish

    if not re.fullmatch(r"[0-9a-f]{64}", authority):
        raise IdentityError("--authority is no sha256 fingerprint of 64 hexadecimal digits.", "Copy what splitft enroll sign printed.")
    certificate, end, root = read_bounded(file, SMALL_FILE_BYTES, "the signed certificate").partition(b"-----END CERTIFICATE-----\n")
    _show_identity(finish(identity, certificate + end, root, server=server, pin=bytes.fromhex(authority)))


def _show_identity(found: Identity) -> None:
    typer.echo(f"{found.folder} is {found.name} in {found.federation}, good until {found.expires:%Y-%m-%d}.")
    typer.echo(f"Next: splitft client --server {found.server or 'HOST:PORT'} --data FILE --identity {found.folder}")


@enroll_app.command("list")
def list_clients(folder: OptionalFolder = Path("federation")) -> None:
    """Show the roster: seats, names, states, days left, fingerprints."""
    from datetime import datetime

    from rich.console import Console
    from rich.table import Table

    from splitft.clock import utc_time
    from splitft.deploy.roster import read_register, state_of

    register, now = read_register(folder), utc_time()
    table = Table("seat", "client", "state", "good until", "fingerprint", title=f"federation {register.federation}", box=None)
    for client in register.clients:
        state = state_of(client, now)
        soon = state == "active" and datetime.fromisoformat(client.expires) - now < SOON
        style = "yellow" if soon else {"active": "green", "invited": "cyan"}.get(state, "red")
        state = "expires soon" if soon else state
        table.add_row(str(client.seat), client.name, f"[{style}]{state}[/]", client.expires[:10] or "-", client.fingerprint[:16] or "-")
    Console(highlight=False).print(table)


@enroll_app.command()
def revoke(folder: Folder, client: ClientName) -> None:
    """Take a client off the roster; a running server drops it within seconds."""
    from splitft.deploy import roster

    done = roster.revoke(folder, client)
    typer.echo(f"{done.name} is off the roster since {done.revoked}. Inviting it again brings it back.")
