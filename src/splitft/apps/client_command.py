"""`splitft client`: take part in a federation with the text of this machine, until its run is over."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from splitft import __version__
from splitft.apps.client_setup import ClientWorkshop
from splitft.apps.report_text import clean
from splitft.apps.server_setup import source_of
from splitft.apps.stopping import Stopping, name_hangs
from splitft.clock import monotonic_s
from splitft.config import parse_config
from splitft.deploy.cache import ModelCache
from splitft.deploy.certificates import fingerprint, read_certificate
from splitft.deploy.host import OFFERED
from splitft.deploy.identity import PENDING_KEY, Identity
from splitft.deploy.letters import PROTOCOL_MAJOR, PROTOCOL_MINOR, Finished, Hello, pack
from splitft.deploy.member import Member
from splitft.deploy.names import check_name
from splitft.deploy.policy import ClientPolicy, check_server, load_policy
from splitft.deploy.preflight import preflight
from splitft.errors import (
    ConfigError,
    ExcludedError,
    FederationError,
    IdentityError,
    Interrupted,
    RosterError,
    UnreachableError,
    VersionError,
)
from splitft.transport.link import Link
from splitft.transport.tls import ClientTls, refuse_plain_text
from splitft.transport.values import Limits, Refused, Timing
from splitft.waits import Waits

# What a refusal at the door, or later, means for the exit code.
REFUSALS: dict[str, type[FederationError]] = {
    "roster": RosterError,
    "version": VersionError,
    "identity": IdentityError,
    "excluded": ExcludedError,
    "superseded": ExcludedError,
    "busy": ExcludedError,
}
# The data source that a file's name chooses.
BY_FILE = "by-file"
# Of refusals, those that pass: the client tries again.
PASSING = ("draining", "full")
# The server may still hold the connection of this client's own former life, cut off without a word, until it has been silent for a while.
BUSY, BUSY_S = "busy", 30.0
# How long an enrolment into this client's folder may be under way when the server already wants its certificate.
ENROLLING_S = 10.0


@dataclass(frozen=True)
class ClientOptions:
    """What the command line says. `server` "": the address in the identity folder."""

    data: Path
    identity: Path
    server: str = ""
    policy: Path | None = None
    model: Path | None = None
    cache: Path | None = None
    device: str = "auto"
    memory_mb: int = 0
    window: int = 2
    insecure: bool = False
    name: str = ""
    takeover: bool = False
    wait_s: float = 0.0
    quiet: bool = False
    overrides: Sequence[str] = ()


def join(options: ClientOptions) -> Finished:
    """Take part until the run is over. Raises Interrupted when stopped, and the error that names why a client cannot come in."""
    console = Console(stderr=True)
    show = Lines(console, options.quiet)
    name_hangs()
    fields = _data_fields(options.overrides)
    source_of(options.data, dict(fields))  # a wrong field is said before anything is asked of the server
    policy = load_policy(options.policy)
    identity = None if options.insecure else Identity.load(options.identity)
    name = check_name(options.name) if identity is None else identity.name
    address = options.server or (identity.server if identity is not None else "")
    if not address:
        raise ConfigError("no server is named, and the identity folder knows none.", "give --server HOST:PORT.")
    if identity is None:
        refuse_plain_text(address)  # before the first byte leaves
    with ExitStack() as stack:
        stopping = stack.enter_context(Stopping(0.0, show).heard())
        asked = stopping.asked
        shown = _knock(address, identity, options.wait_s, asked, show)
        check_server(policy, fingerprint_of(shown))
        options.identity.mkdir(parents=True, exist_ok=True, mode=0o700)
        cache = ModelCache(options.cache or cache_folder(), policy.maximum_model_mb * 1_000_000)
        workshop = ClientWorkshop(
            lambda: source_of(options.data, dict(fields)),
            policy,
            cache,
            options.device,
            options.model,
            options.memory_mb,
            name,
            options.identity / "adapter",
            show.listen,
            server_fingerprint=fingerprint_of(shown),
            tls=None if identity is None else identity.tls,
        )
        hello = pack(Hello(PROTOCOL_MAJOR, PROTOCOL_MINOR, __version__, name, options.takeover, list(OFFERED)))
        waits = Waits()
        link = Link(address, _tls_of(identity, policy, shown), lambda: hello, Limits(), Timing(), show.connection, waits)
        stack.callback(link.close)
        papers = Papers(address, identity, policy, shown, link, workshop, asked)
        member = Member(link, workshop, options.identity / "state", show.listen, asked, waits, options.window, papers.knock, options.wait_s)
        return _take_part(member, papers, stopping, show)


def _take_part(member: Member, papers: Papers, stopping: Stopping, show: Lines) -> Finished:
    """Until the run is over; refusals that pass are waited out."""
    patient_until_s = 0.0
    while True:
        began_as = papers.identity
        try:
            return member.run()
        except Interrupted as stop:
            raise stopping.as_asked(stop) from stop
        except Refused as refused:
            # Of the certificate that this session began with; where there is another by now, that one has not been asked about.
            if refused.code == "roster" and (papers.renewed(ENROLLING_S) or papers.identity is not began_as):
                continue
            if refused.code == BUSY:
                patient_until_s = patient_until_s or monotonic_s() + BUSY_S
            if refused.code not in PASSING and not (refused.code == BUSY and monotonic_s() < patient_until_s):
                raise REFUSALS.get(refused.code, FederationError)(refused.text, refused.remedy) from refused
            show(f"{refused.text} trying again")
            _wait(5.0, stopping.asked)


@dataclass
class Papers:
    """The certificate that a running client shows: that of its folder, as soon as there is another one than it began with."""

    address: str
    identity: Identity | None
    policy: ClientPolicy
    shown: bytes
    link: Link
    workshop: ClientWorkshop
    asked: Callable[[], bool]

    def renewed(self, wait_s: float = 0.0) -> bool:
        """Whether this client was enrolled again meanwhile; then the new certificate is shown from now on."""
        newer = _renewed(self.identity, wait_s, self.asked)
        if newer is not None:
            self.identity, self.workshop.tls = newer, newer.tls
            self.link.renew(_tls_of(newer, self.policy, self.shown))
        return newer is not None

    def knock(self) -> None:
        """The server has been out of reach for a while: raise what is worth giving up for."""
        if not self.renewed():
            _look(self.address, self.identity, self.policy)


def _tls_of(identity: Identity | None, policy: ClientPolicy, shown: bytes) -> ClientTls | None:
    """What this client shows and trusts; with a pinned server, that server's certificate alone."""
    if identity is None:
        return None
    return replace(identity.tls, root_pem=shown) if policy.server_fingerprint else identity.tls


def _renewed(identity: Identity | None, wait_s: float, asked: Any) -> Identity | None:
    """The identity in the folder, if it is another one than that in use; while an enrolment is under way there, it is waited for: the
    server knows of the new certificate a moment before this machine has it."""
    if identity is None:
        return None
    until_s = monotonic_s() + wait_s
    while True:
        enrolling = (identity.folder / PENDING_KEY).exists()
        with suppress(IdentityError):
            newer = Identity.load(identity.folder)
            if newer.fingerprint != identity.fingerprint:
                return newer
        if not enrolling or monotonic_s() >= until_s:
            return None
        _wait(0.2, asked)


def fingerprint_of(certificate: bytes) -> str:
    """SHA-256 of the certificate a server has shown; empty without one."""
    return fingerprint(read_certificate(certificate)) if certificate else ""


def _look(address: str, identity: Identity | None, policy: ClientPolicy) -> None:
    """Raise what is worth giving up for; a server that does not answer is not."""
    with suppress(UnreachableError):
        check_server(policy, fingerprint_of(preflight(address, identity)))


def _knock(address: str, identity: Identity | None, wait_s: float, asked: Any, show: Lines) -> bytes:
    """Tell apart why a client cannot come in, before the real connection is made; only a server that does not answer is tried again, for
    `wait_s` (0: for ever). Returns the certificate it shows."""
    began_s, pause_s = monotonic_s(), 1.0
    while True:
        try:
            return preflight(address, identity)
        except UnreachableError as problem:
            if wait_s and monotonic_s() - began_s >= wait_s:
                raise
            show(f"{problem.message} trying again")
            _wait(pause_s, asked)
            pause_s = min(15.0, 1.6 * pause_s)


def _wait(seconds: float, asked: Any) -> None:
    """A pause that ends early when the client is asked to stop."""
    pause, waited_s = threading.Event(), 0.0
    while waited_s < seconds:
        if asked():
            raise Interrupted("Stopped before the server was reached.", "start the same command again to go on.")
        pause.wait(0.2)
        waited_s += 0.2


def _data_fields(overrides: Sequence[str]) -> dict[str, Any]:
    """`data.FIELD=VALUE` of the command line. Raises ConfigError for anything else: the rest is the server's to say."""
    if wrong := [one for one in overrides if not one.startswith("data.")]:
        raise ConfigError(f"{wrong[0]!r} cannot be set by a client.", "only data.FIELD=VALUE; the rest comes from the server.")
    chosen = parse_config({"data": {"name": BY_FILE}}, overrides).data
    return {**chosen.fields, **({} if chosen.name == BY_FILE else {"name": chosen.name})}


def cache_folder() -> Path:
    """Where base models lie between runs."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root else Path.home() / ".cache") / "splitft"


class Lines:
    """What a client's operator sees: a line for every event that matters, none for a single step."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self.console, self.quiet = console, quiet
        self.fetched = -1
        self.rounds = 0
        self.state = ""

    def __call__(self, text: str, style: str = "") -> None:
        if not self.quiet:
            self.console.print(Text(clean(text), style=style), soft_wrap=True, highlight=False)

    def connection(self, state: str) -> None:
        if state != self.state and not state.startswith("connecting"):
            self(state, "dim" if state == "connected" else "yellow")
            self.state = state

    def listen(self, event: str, facts: dict[str, Any]) -> None:
        """An event of the member or its workshop."""
        if event == "fetching":
            self._fetching(facts["done"], facts["total"])
            return
        if event == "welcome":
            self.rounds = facts["welcome"].rounds
        text = _sentence(event, facts, self.rounds)
        if text:
            self(text, "yellow" if event in ("dropped", "rejoining", "away", "refused", "warning") else "")

    def _fetching(self, done: int, total: int) -> None:
        share = 10 * done // total if total else 10
        if share != self.fetched and done < total:
            self(f"fetching the base model: {done / 1e6:.1f} of {total / 1e6:.1f} MB", "dim")
        self.fetched = share


def _sentence(event: str, facts: dict[str, Any], rounds: int) -> str:
    """An event in words; nothing for those nobody needs to read."""
    if event == "welcome":
        welcome = facts["welcome"]
        return f"run {welcome.run}, seat {welcome.seat}, {welcome.rounds} rounds"
    if event == "finished":
        return f"all {facts['rounds']} rounds are done" + (f"; adapter in {facts['adapter']}" if facts["adapter"] else "")
    if event == "done":
        loss = "" if facts.get("loss") is None else f", loss {facts['loss']:.3f}"
        return f"round {facts['round']:>3}/{rounds}  done{loss}"
    if event == "refused":
        return f"the server refused a message: {facts['text']} {facts['remedy']}"
    forms = {
        "reading": "reading the data",
        "loading": "loading blocks: {blocks}",
        "ready": "ready, waiting for the next round ({round} are done)",
        "round": "round {round:>3}/{rounds}  cut {cut}, {steps} steps",
        "dropped": "round {round}: out of it; waiting for the next",
        "rejoining": "the server was restarted: joining again",
        "away": "{text}",
        "warning": "{text}",
    }
    return forms.get(event, "").format(**{"rounds": rounds, **facts})
