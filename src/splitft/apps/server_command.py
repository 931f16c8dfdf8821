"""`splitft server`: the run of a federation from its configuration, resumed by itself where it stopped."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from splitft import __version__
from splitft.apps.console import starting
from splitft.apps.doors import ByCertificate, ByName
from splitft.apps.execute import Display, Warnings, show_end
from splitft.apps.server_setup import ServedParts, assemble_server, checkpoint_folder, costs_for, shared_config
from splitft.apps.session import FederatedRun
from splitft.apps.stopping import Stopping, name_hangs
from splitft.clock import monotonic_s
from splitft.config import RunConfig
from splitft.deploy.conduct import Conductor
from splitft.deploy.enrolment_server import EnrolmentServer
from splitft.deploy.host import OFFERED, Doorkeeper, Host, Seat
from splitft.deploy.identity import ServerIdentity
from splitft.deploy.letters import PROTOCOL_MAJOR, PROTOCOL_MINOR, Welcome
from splitft.deploy.logs import log, log_to
from splitft.deploy.metrics import Metrics
from splitft.deploy.page import StatusPage, split_address
from splitft.deploy.parts import ModelParts, model_digest
from splitft.deploy.roster import Roster
from splitft.deploy.status import Level, SeatChanges, ServerStatus
from splitft.engine import checkpoint
from splitft.engine.points import POINTS
from splitft.engine.rounds import insist
from splitft.errors import AdapterError, ConfigError, Interrupted, SplitftError
from splitft.transport.listener import Listener
from splitft.transport.tls import is_loopback
from splitft.transport.values import Limits, Peer, Timing
from splitft.waits import Waits

LOGGER = logging.getLogger("splitft.server")
LINGER_S = 20.0
# For what was said last to leave; one that does not take it must not hold up the end by much.
HANG_UP_S = 1.0
RENEW_S = 60.0
FAILPOINT = "SPLITFT_FAILPOINT"
STYLES: dict[Level, str] = {"info": "dim", "warning": "yellow", "error": "red"}


def serve(config: RunConfig, insecure: bool = False, quiet: bool = False, logs: str = "plain") -> Path:
    """Run a federation to its end and return the run folder. Raises Interrupted when stopped, and whatever error the run meets."""
    config = _for_server(config)
    _refuse_open_door(config, insecure)
    console = Console(stderr=True)
    display = Display(console, config.rounds, quiet, measured=True)
    folder = Path(config.run.folder) / config.name
    name_hangs()
    with ExitStack() as stack:
        stopping = stack.enter_context(Stopping(config.federation.grace_s, lambda text: display.warn(text)).heard())
        identity = None if insecure else ServerIdentity.load(Path(config.federation.identity))
        with starting(freeze=True):
            run = FederatedRun(config, folder if checkpoint.exists(folder) else None, display.listen, assemble_server)
        stack.callback(run.close)
        stream = stack.enter_context((folder / "server.log").open("a", encoding="utf-8"))
        handler = log_to(stream, "json" if logs == "json" else "text")
        stack.callback(logging.getLogger("splitft").removeHandler, handler)
        if identity is None and config.secure_aggregation.enabled:
            raise ConfigError("secure aggregation needs certificates: without them nobody knows whose keys are whose.", "drop --insecure.")
        house = House(config, run, identity, stopping)
        stack.callback(house.close)
        house.open()
        if not quiet:
            console.print(house.describe(), highlight=False, soft_wrap=True)
        house.status.show = lambda level, text, seat: display.say(house.sentence(text, seat), STYLES[level])
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
            if stopping.asked():
                raise Interrupted("Stopped; everything up to the last finished round is on disk.", "start the same command again to go on.")
        house.status.begin_phase("finished")
        try:
            insist(run.engine, run.finish)
        except AdapterError:  # what did not pass its check is not shared, and nobody need wait for it
            conductor.finish(config.rounds, True, "the joined adapter did not pass the check at the end of the run")
            raise
        house.offer(run.folder / "adapter")
        conductor.finish(config.rounds, True, "")
        with suppress(Interrupted):  # nothing is left to interrupt
            conductor.linger(LINGER_S)
    except Interrupted as stop:
        with suppress(OSError):  # a note that a full disk may do without
            run.note_interruption()
        conductor.finish(config.rounds, False, "the server stops; it goes on when it is started again")
        log(LOGGER, "stopped", round=run.state.round)
        raise stopping.as_asked(stop) from stop


class House:
    """What a server opens to the outside: the listener, the enrolment port, the status page; and the conductor behind them."""

    def __init__(self, config: RunConfig, run: FederatedRun, identity: ServerIdentity | None, stopping: Stopping) -> None:
        self.config, self.run, self.identity = config, run, identity
        section, built = config.federation, run.assembly
        self.waits = Waits()
        self.seats: dict[int, Seat] = {}
        self.status = LoggedStatus(
            config.name, config.rounds, version=__version__, model=config.model.path, waits=self.waits, probe=self.probe
        )
        self.metrics = Metrics(self.status, __version__, f"{PROTOCOL_MAJOR}.{PROTOCOL_MINOR}")
        model = ModelParts.of(checkpoint_folder(config), built.base.anatomy, run.folder / "parts.json")
        self.parts, self.table = ServedParts(model), list(model.table())
        self.digest = model_digest(self.table)
        self.shared = [shared_config(config, built.base, seat) for seat in range(config.clients.count)]
        door: Doorkeeper = (
            ByName(run.folder / "names.txt", config.clients.count)
            if identity is None
            else ByCertificate(Roster.load(Path(section.identity)), config.clients.count)
        )
        self.host = Host(door, self.parts, self.greet, self.status, self.metrics, self.waits, config.name, seats=self.seats)
        self.host.each_second = self.renew
        self.conductor = Conductor(self.host, section, stopping.check, costs_for(config, built), config.engine.deterministic)
        self.conductor.plug_into(run.engine)
        run.engine.reached = failpoint()
        stopping.on_ask = self.drain
        self.renewed_s = monotonic_s()
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
            self.page = StatusPage(section.status_address, self.status, self.metrics, tls, self.may_look)
            self.page.start()
        host, _, port = section.address.rpartition(":")
        if self.identity is not None and section.enroll_address != "off":
            enroll = section.enroll_address or f"{host}:{int(port) + 1 if int(port) else 0}"
            where, number = split_address(enroll, "federation.enroll_address")
            self.enrolment = EnrolmentServer(Path(section.identity), where, number, self.port)
            self.enrolment.start()
        for event in load_events(self.run.folder / "journal.jsonl"):
            self.status.round_done(event)
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
            self.shared[seat],
            self.digest,
            self.table,
            list(OFFERED),
        )

    def sentence(self, text: str, seat: int | None) -> str:
        """An event of the status page as a line, with its client's name."""
        found = None if seat is None else self.seats.get(seat)
        return f"{found.name}: {text}" if found is not None else text

    def probe(self) -> dict[int, SeatChanges]:
        """What only the transport knows of each seat."""
        found: dict[int, SeatChanges] = {}
        for number, seat in list(self.seats.items()):
            if (session := seat.session) is not None:
                found[number] = {"silent_s": session.silent_s, "reconnects": session.counts.reconnects}
        return found

    def may_look(self, certificate: bytes) -> bool:
        """Whether the holder of a certificate may see the status page: whoever is on the roster."""
        return not self.host.doorkeeper.still(Peer("", certificate))

    def renew(self) -> None:
        """Show the server's new certificate when it was renewed; connections that stand are left alone."""
        if self.identity is None or monotonic_s() - self.renewed_s < RENEW_S:
            return
        self.renewed_s = monotonic_s()
        with suppress(SplitftError):
            latest = ServerIdentity.load(Path(self.config.federation.identity))
            if latest.fingerprint != self.identity.fingerprint:
                self.identity = latest
                self.listener.renew(latest.tls)
                if self.page is not None:
                    self.page.renew(latest.tls)
                log(LOGGER, "certificate renewed", expires=str(latest.expires))

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
            self.host.close(HANG_UP_S)
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


class LoggedStatus(ServerStatus):
    """What the status page shows as events is in the log as well, and before the operator's eyes."""

    show: Callable[[Level, str, int | None], None] = staticmethod(lambda level, text, seat: None)

    def event(self, level: Level, text: str, seat: int | None = None) -> None:
        super().event(level, text, seat)
        self.show(level, text, seat)
        log(LOGGER, text, {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}[level], seat=seat)


def load_events(journal: Path) -> Iterator[dict[str, Any]]:
    """The rounds and evaluations a run has had already, for the curves of a server that was restarted."""
    with journal.open(encoding="utf-8") as lines:
        for line in lines:
            if '"event":"round"' in line or '"event":"evaluation"' in line:
                yield json.loads(line)


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
