"""`splitft server`: the run of a federation from its configuration, resumed by itself where it stopped."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console

from splitft import __version__
from splitft.apps.console import starting
from splitft.apps.execute import Display, Warnings, show_end
from splitft.apps.server_setup import ServedParts, assemble_server, checkpoint_folder, costs_for, shared_config
from splitft.apps.session import FederatedRun
from splitft.clock import monotonic_s
from splitft.config import RunConfig
from splitft.deploy.conduct import Conductor
from splitft.deploy.enrolment_server import EnrolmentServer
from splitft.deploy.host import OFFERED, Doorkeeper, Host
from splitft.deploy.identity import ServerIdentity
from splitft.deploy.letters import PROTOCOL_MAJOR, PROTOCOL_MINOR, Hello, Welcome
from splitft.deploy.logs import log, log_to
from splitft.deploy.metrics import Metrics
from splitft.deploy.names import check_name
from splitft.deploy.page import StatusPage
from splitft.deploy.parts import ModelParts, model_digest
from splitft.deploy.roster import Roster
from splitft.deploy.status import ServerStatus
from splitft.engine import checkpoint
from splitft.engine.points import POINTS
from splitft.errors import ConfigError, Interrupted, SplitftError
from splitft.transport.listener import Listener
from splitft.transport.tls import is_loopback
from splitft.transport.values import Limits, Peer, Refusal, Timing
from splitft.waits import Waits

LOGGER = logging.getLogger("splitft.server")
LINGER_S = 20.0
FAILPOINT = "SPLITFT_FAILPOINT"


@dataclass
class ByCertificate:
    """Seats by the federation's roster: the certificate says who a client is, never the message."""

    roster: Roster
    seats: int

    def find(self, peer: Peer, hello: Hello) -> tuple[int, str] | Refusal:
        member = self.roster.find(peer.certificate_pem or b"")
        if isinstance(member, str):
            return Refusal("roster", member, "ask the federation's operator for an invitation (splitft enroll invite).")
        if hello.name and hello.name != member.name:
            return Refusal(
                "identity", f"the certificate is {member.name}'s, the client calls itself {hello.name!r:.80}.", "use one identity folder."
            )
        if member.seat >= self.seats:
            text = f"{member.name} has seat {member.seat}, this run has {self.seats} (clients.count)."
            return Refusal("roster", text, "the operator can raise clients.count when a new run begins.")
        return member.seat, member.name

    def listed(self, seat: int) -> bool:
        return any(one.seat == seat and not one.revoked and one.fingerprint for one in self.roster.register().clients)


@dataclass
class ByName:
    """Seats on loopback without TLS, by name: kept in the run folder, so that a name finds its seat again."""

    path: Path
    seats: int
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.is_file():
            self.names = [check_name(one) for one in self.path.read_text(encoding="utf-8").split()]

    def find(self, peer: Peer, hello: Hello) -> tuple[int, str] | Refusal:
        try:
            name = check_name(hello.name)
        except SplitftError as problem:
            return Refusal("identity", problem.message, problem.remedy)
        if name not in self.names:
            if len(self.names) >= self.seats:
                return Refusal(
                    "roster", f"all {self.seats} seats (clients.count) are taken.", "use the name of a client that was here before."
                )
            self.names.append(name)
            from splitft.deploy.disk import write_atomically

            write_atomically(self.path, ("\n".join(self.names) + "\n").encode())
        return self.names.index(name), name

    def listed(self, seat: int) -> bool:
        return seat < self.seats


class Stopping:
    """Ctrl-C and SIGTERM. The first lets the round under way end within the grace time, the second ends the process at once."""

    def __init__(self, grace_s: float, say: Callable[[str], None]) -> None:
        self.grace_s, self.say = grace_s, say
        self.asked_s: float | None = None
        self.number = 0
        self.on_ask: Callable[[], None] = lambda: None

    @contextmanager
    def heard(self) -> Iterator[Stopping]:
        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked_s is not None:
                os._exit(128 + number)  # what is on the disk is whole at any moment
            self.asked_s, self.number = monotonic_s(), number
            self.say(f"stopping within {self.grace_s:g} s; once more to stop at once")
            self.on_ask()

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raise Interrupted when the grace time is over."""
        if self.asked_s is not None and monotonic_s() - self.asked_s >= self.grace_s:
            raise Interrupted("Stopped; everything up to the last finished round is on disk.", "start the same command again to go on.")


def serve(config: RunConfig, insecure: bool = False, quiet: bool = False, logs: str = "plain") -> Path:
    """Run a federation to its end and return the run folder. Raises Interrupted when stopped, and whatever error the run meets."""
    config = _for_server(config)
    _refuse_open_door(config, insecure)
    console = Console(stderr=True)
    display = Display(console, config.rounds, quiet)
    folder = Path(config.run.folder) / config.name
    _name_hangs()
    with ExitStack() as stack:
        stopping = stack.enter_context(Stopping(config.federation.grace_s, lambda text: display.warn(text)).heard())
        identity = None if insecure else ServerIdentity.load(Path(config.federation.identity))
        with starting(freeze=True):
            run = FederatedRun(config, folder if checkpoint.exists(folder) else None, display.listen, assemble_server)
        stack.callback(run.close)
        stream = stack.enter_context((folder / "server.log").open("a", encoding="utf-8"))
        handler = log_to(stream, "json" if logs == "json" else "text")
        stack.callback(logging.getLogger("splitft").removeHandler, handler)
        house = House(config, run, identity, stopping)
        stack.callback(house.close)
        house.open()
        if not quiet:
            console.print(house.describe(), highlight=False, soft_wrap=True)
        with display.progress:
            _conduct(config, run, house, display, stopping)
    if not quiet:
        show_end(folder)
    return folder


def _conduct(config: RunConfig, run: FederatedRun, house: House, display: Display, stopping: Stopping) -> None:
    """All rounds that are left, and the end of the run."""
    conductor = house.conductor
    warnings = Warnings(run.folder / "journal.jsonl")
    display.expect(config.clients.minimum * config.train.local_steps, run.state.round)
    try:
        for record in run.rounds():
            conductor.committed(record)
            log(LOGGER, "round committed", round=record.round)
            for text in warnings.new():
                display.warn(text)
            if stopping.asked_s is not None:
                raise Interrupted("Stopped; everything up to the last finished round is on disk.", "start the same command again to go on.")
        house.status.begin_phase("finished")
        run.finish()
        house.offer(run.folder / "adapter")
        conductor.finish(config.rounds, True, "")
        conductor.linger(LINGER_S)
    except Interrupted as stop:
        run.note_interruption()
        conductor.finish(config.rounds, False, "the server stops; it goes on when it is started again")
        log(LOGGER, "stopped", round=run.state.round)
        if stopping.number == signal.SIGTERM:
            raise _StoppedInOrder(stop.message, stop.remedy) from stop
        raise


class _StoppedInOrder(Interrupted):
    """SIGTERM: what a service manager sends; nothing has gone wrong."""

    exit_code = 0


class House:
    """What a server opens to the outside: the listener, the enrolment port, the status page; and the conductor behind them."""

    def __init__(self, config: RunConfig, run: FederatedRun, identity: ServerIdentity | None, stopping: Stopping) -> None:
        self.config, self.run, self.identity = config, run, identity
        section, built = config.federation, run.assembly
        self.waits = Waits()
        self.status = ServerStatus(config.name, config.rounds, version=__version__, model=config.model.path, waits=self.waits)
        self.metrics = Metrics(self.status, __version__, f"{PROTOCOL_MAJOR}.{PROTOCOL_MINOR}")
        model = ModelParts.of(checkpoint_folder(config), built.base.anatomy, run.folder / "parts.json")
        self.parts, self.table = ServedParts(model), list(model.table())
        self.digest, self.shared = model_digest(self.table), shared_config(config, built.base)
        door: Doorkeeper = (
            ByName(run.folder / "names.txt", config.clients.count)
            if identity is None
            else ByCertificate(Roster.load(Path(section.identity)), config.clients.count)
        )
        self.host = Host(door, self.parts, self.greet, self.status, self.metrics, self.waits, config.name)
        self.conductor = Conductor(self.host, section, stopping.check, costs_for(config, built), config.engine.deterministic)
        self.conductor.plug_into(run.engine)
        run.engine.reached = failpoint()
        stopping.on_ask = self.drain
        self.enrolment: EnrolmentServer | None = None
        self.page: StatusPage | None = None

    def open(self) -> None:
        """Listen. Raises ResourceError for an address that is taken."""
        section = self.config.federation
        timing = Timing(section.heartbeat_s, section.liveness_s)
        limits = Limits(connections=section.max_clients, buffer_bytes=section.buffer_mb << 20)
        tls = None if self.identity is None else self.identity.tls
        self.listener = Listener(section.address, tls, self.host.admit, self.host.deliver, limits, timing)
        self.host.listener = self.listener
        self.port = self.listener.start()
        if section.status_address != "off":
            self.page = StatusPage(section.status_address, self.status, self.metrics, tls)
            self.page.start()
        host, _, port = section.address.rpartition(":")
        if self.identity is not None and section.enroll_address != "off":
            enroll = section.enroll_address or f"{host}:{int(port) + 1 if int(port) else 0}"
            with suppress(ValueError):
                where, _, number = enroll.rpartition(":")
                self.enrolment = EnrolmentServer(Path(section.identity), where, int(number), self.port)
                self.enrolment.start()
        self.status.begin_phase("running")
        log(LOGGER, "listening", address=section.address, port=self.port, tls=tls is not None)

    def greet(self, seat: int, name: str) -> Welcome:
        state = self.run.state
        return Welcome(
            PROTOCOL_MAJOR,
            PROTOCOL_MINOR,
            __version__,
            self.config.name,
            seat,
            state.round,
            self.config.rounds,
            self.shared,
            self.digest,
            self.table,
            list(OFFERED),
        )

    def offer(self, adapter: Path) -> None:
        """Let clients fetch the joined adapter."""
        if self.config.federation.share_adapter:
            self.parts.folder = adapter
            self.host.offers = self.parts.adapter()

    def drain(self) -> None:
        self.host.draining = True
        self.status.begin_phase("draining")

    def describe(self) -> str:
        """Where everything is, for the operator's eyes."""
        how, host = "TLS" if self.identity else "no TLS, this machine only", self.config.federation.address.rpartition(":")[0]
        lines = [f"server   {host}:{self.port}  ({how})"]
        if self.enrolment is not None:
            lines.append(f"enrol    {self.enrolment.host}:{self.enrolment.port}")
        if self.page is not None:
            lines.append(f"status   {self.page.url}")
        lines.append(f"run      {self.run.folder}" + (f", going on after round {self.run.state.round}" if self.run.state.round else ""))
        return "\n".join(lines)

    def close(self) -> None:
        with suppress(SplitftError):
            self.host.close(2.0)
        if self.enrolment is not None:
            self.enrolment.stop()
        if self.page is not None:
            self.page.stop()


def _for_server(config: RunConfig) -> RunConfig:
    """The run as a server sees it: real sessions, whatever engine a simulation would use."""
    return config.model_copy(update={"engine": config.engine.model_copy(update={"name": "workers"})})


def _refuse_open_door(config: RunConfig, insecure: bool) -> None:
    """Without certificates nothing but this machine may be listened to."""
    if insecure and not is_loopback(config.federation.address):
        raise ConfigError(
            f"--insecure with federation.address = {config.federation.address!r} would let anybody in.",
            "make certificates: splitft enroll init; or listen on 127.0.0.1.",
        )


def _name_hangs() -> None:
    """SIGUSR1 prints where every thread stands."""
    if hasattr(signal, "SIGUSR1"):
        with suppress(ValueError, OSError, AttributeError, RuntimeError):
            faulthandler.register(signal.SIGUSR1, all_threads=True)


def failpoint() -> Callable[[str], None]:
    """For crash tests: SPLITFT_FAILPOINT=name:n ends the process, as a power cut would, when that point is passed for the n-th time."""
    wanted = os.environ.get(FAILPOINT, "")
    if not wanted:
        return lambda point: None
    name, _, number = wanted.partition(":")
    if name not in POINTS:
        raise ConfigError(f"{FAILPOINT}={wanted}: there is no point {name!r}.", f"choose one of {', '.join(POINTS)}.")
    left = [int(number or 1)]

    def reached(point: str) -> None:
        if point == name:
            left[0] -= 1
            if left[0] <= 0:
                os._exit(137)

    return reached
