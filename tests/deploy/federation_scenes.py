"""Federations for tests: a real server and real clients over gRPC, in threads of one process or as processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from splitft.apps.client_command import ClientOptions, Lines
from splitft.apps.client_setup import ClientWorkshop
from splitft.apps.server_command import House
from splitft.apps.server_setup import assemble_server, source_of
from splitft.apps.session import FederatedRun
from splitft.apps.stopping import Stopping
from splitft.config import RunConfig, parse_config
from splitft.deploy.cache import ModelCache
from splitft.deploy.host import OFFERED
from splitft.deploy.identity import ServerIdentity
from splitft.deploy.letters import PROTOCOL_MAJOR, PROTOCOL_MINOR, Finished, Hello, pack
from splitft.deploy.member import Member
from splitft.deploy.policy import ClientPolicy
from splitft.engine import checkpoint
from splitft.transport.link import Link
from splitft.transport.tls import ClientTls
from splitft.transport.values import Limits, Timing
from splitft.waits import Waits

from ..tiny_run import model_folder, text_file

QUICK = Timing(heartbeat_s=0.2, liveness_s=2.0, connect_s=5.0, backoff_s=(0.02, 0.3))


def federation_values(folder: Path, seats: int = 3, **changes: Any) -> dict[str, Any]:
    """A federation of `seats` clients with the cuts 1, 2, 3 and so on, as the table of its configuration; texts are in c0.txt, c1.txt..."""
    model = folder / "model"
    if not model.is_dir():
        model_folder(model)
    for client in range(seats):
        if not (folder / "texts" / f"c{client}.txt").is_file():
            (folder / "texts").mkdir(exist_ok=True)
            text_file(folder / "texts" / f"c{client}.txt", documents=14, seed=client)
    values: dict[str, Any] = {
        "name": "fed",
        "seed": 1,
        "rounds": 3,
        "model": {"path": str(model), "dtype": "float32", "self_check": False},  # it has tests of its own
        "lora": {"rank": 2, "alpha": 4.0},
        "data": {"name": "text", "path": str(folder / "texts")},
        "partition": {"name": "files"},
        "tokens": {"block_tokens": 16, "common_held_out": 0.0},
        "clients": {"count": seats, "minimum": seats},
        "policy": {"name": "fixed", "cuts": [1 + client % 3 for client in range(seats)]},
        "train": {"local_steps": 3, "batch_size": 2, "moments": "keep", "learning_rate": 5e-3},
        "evaluate": {"max_rows": 2},
        "engine": {"name": "workers", "threads": 1},
        "run": {"folder": str(folder / "runs")},
        "federation": {
            "address": "127.0.0.1:0",
            "status_address": "off",
            "heartbeat_s": 0.2,
            "liveness_s": 2.0,
            "join_s": 0.1,
            "grace_s": 3.0,
        },
    }
    for name, change in changes.items():
        values[name] = {**values.get(name, {}), **change} if isinstance(change, dict) and "name" not in change else change
    return values


def federation_config(folder: Path, seats: int = 3, **changes: Any) -> RunConfig:
    return parse_config(federation_values(folder, seats, **changes))


def adapters_of(run_folder: Path) -> torch.Tensor:
    """The joined adapters of the newest checkpoint."""
    return checkpoint.load(checkpoint.newest(run_folder)).adapters


def events_of(run_folder: Path, kind: str = "round") -> list[dict[str, Any]]:
    lines = (run_folder / "journal.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def simulated(folder: Path, seats: int = 3, **changes: Any) -> Path:
    """The same run in one process: the reference of bit-for-bit tests."""
    own = {**changes.get("clients", {}), "count": 0}  # a client for each file, in their order
    config = federation_config(folder, seats, **{**changes, "name": "reference", "clients": own})
    run = FederatedRun(config)
    try:
        for _ in run.rounds():
            pass
        return run.finish()
    finally:
        run.close()


class Faulty(threading.Thread):
    """A thread whose error is seen by whoever joins it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work, self.error, self.found = work, None, None

    def run(self) -> None:
        try:
            self.found = self.work()
        except BaseException as problem:
            self.error = problem

    def end(self, timeout_s: float = 60.0) -> Any:
        self.join(timeout_s)
        assert not self.is_alive(), "still running"
        if self.error is not None:
            raise self.error
        return self.found


@dataclass
class Scene:
    """A server in a thread of this process; clients are added in threads."""

    config: RunConfig
    folder: Path
    identity: ServerIdentity | None = None
    members: dict[int, tuple[Faulty, Member, threading.Event]] = field(default_factory=dict)

    def start(self) -> Scene:
        ready = threading.Event()
        self.stopping = Stopping(self.config.federation.grace_s, lambda text: None)
        self.failed: BaseException | None = None

        def serve() -> Path:
            where = Path(self.config.run.folder) / self.config.name
            run = FederatedRun(self.config, where if checkpoint.exists(where) else None, build=assemble_server)
            try:
                self.run = run
                self.house = House(self.config, run, self.identity, self.stopping)
                self.house.open()
                self.port = self.house.port
                ready.set()
                for record in run.rounds():
                    self.house.conductor.committed(record)
                run.finish()
                self.house.offer(run.folder / "adapter")
                self.house.conductor.finish(self.config.rounds, True, "")
                self.house.conductor.linger(5.0)
                return run.folder
            finally:
                ready.set()
                if hasattr(self, "house"):
                    self.house.close()
                run.close()

        self.thread = Faulty(serve)
        self.thread.start()
        assert ready.wait(60)
        if self.thread.error is not None:
            raise self.thread.error
        return self

    def client(
        self,
        number: int,
        port: int | None = None,
        tls: ClientTls | None = None,
        policy: ClientPolicy | None = None,
        window: int = 1,
        name: str = "",
        takeover: bool = False,
        text: Path | None = None,
        timing: Timing = QUICK,
        link_of: Callable[..., Link] = Link,
    ) -> Faulty:
        """Add a client, of the text c<number>.txt."""
        home = self.folder / f"home-{number}"
        stop = threading.Event()
        data = text or self.folder / "texts" / f"c{number}.txt"
        name = name or f"client-{number}"
        workshop = ClientWorkshop(
            lambda: source_of(data, {}), policy or ClientPolicy(), ModelCache(home / "cache"), "cpu", None, 1000, name, home / "adapter"
        )
        workshop.tls = tls
        hello = pack(Hello(PROTOCOL_MAJOR, PROTOCOL_MINOR, "test", name, takeover, list(OFFERED)))
        waits = Waits()
        link = link_of(f"127.0.0.1:{port or self.port}", tls, lambda: hello, Limits(), timing, waits=waits)
        self.heard: list[tuple[str, dict[str, Any]]] = []
        member = Member(link, workshop, home / "state", lambda event, facts: self.heard.append((event, facts)), stop.is_set, waits, window)

        def work() -> Finished:
            try:
                return member.run()
            finally:
                link.close()

        thread = Faulty(work)
        self.members[number] = (thread, member, stop)
        thread.start()
        return thread

    def all_clients(self, **options: Any) -> Scene:
        """Clients in the order of their seats: without certificates a seat goes to who comes first."""
        for number in range(self.config.clients.count):
            self.client(number, **options)
            if self.identity is None:
                wait_for(lambda number=number: number in self.house.host.seats)  # type: ignore[misc]
        return self

    def end(self, timeout_s: float = 90.0) -> Path:
        folder: Path = self.thread.end(timeout_s)
        for thread, _, _ in self.members.values():
            thread.end(20)
        return folder

    def stop_all(self) -> None:
        for _, _, stop in self.members.values():
            stop.set()
        self.stopping.grace_s, self.stopping.asked_s = 0.0, time.perf_counter() - 1
        for thread, _, _ in self.members.values():
            thread.join(20)
        self.thread.join(20)


@contextmanager
def scene(folder: Path, seats: int = 3, identity: ServerIdentity | None = None, **changes: Any) -> Iterator[Scene]:
    """A server that is running; what is left of it ends with the block."""
    made = Scene(federation_config(folder, seats, **changes), folder, identity)
    try:
        yield made.start()
    finally:
        made.stop_all()


def wait_for(condition: Callable[[], Any], timeout_s: float = 30.0) -> None:
    """Until it holds; fails after a while."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "did not come about in time"
        time.sleep(0.01)


class Process:
    """A command of splitft as a process of its own, with one thread; ended by its own id."""

    def __init__(self, arguments: list[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        self.stream = log.open("ab")
        env = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200", "PYTHONUNBUFFERED": "1", **(environment or {})}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "splitft", *arguments], stdout=self.stream, stderr=self.stream, stdin=subprocess.DEVNULL, env=env
        )

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def wait(self, timeout_s: float = 120.0) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired as problem:
            self.end()
            raise AssertionError(f"still running:\n{self.text()}") from problem

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        if self.running:
            self.process.kill()
            self.process.wait(20)
        self.stream.close()


__all__ = ["ClientOptions", "Lines"]
