"""Federations of real processes with mutual TLS: commands that are killed, stopped, restarted, and what they leave behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import splitft
from splitft.engine import checkpoint, tensor_file

from . import identities
from .federation_scenes import events_of, federation_values, wait_for

GENTLE = {
    "PYTHONPATH": str(Path(splitft.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
    "NO_COLOR": "1",
    "COLUMNS": "200",
    "PYTHONUNBUFFERED": "1",
    "GRPC_VERBOSITY": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


class Nursery:
    """The process that others are forked from (see nursery.py)."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        script = Path(__file__).with_name("nursery.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **GENTLE}
        )
        assert self._answer() == {"threads": 1}, "a process with threads must not be forked"

    def ask(self, order: dict[str, Any]) -> Any:
        with self.lock:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the nursery has ended"
        return json.loads(line)

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self.process.wait(20)


class Forked:
    """A command of splitft in a process of its own; ended by its own id."""

    def __init__(
        self,
        nursery: Nursery,
        arguments: list[str],
        log: Path,
        environment: dict[str, str] | None = None,
        limits: dict[str, int] | None = None,
    ) -> None:
        self.nursery, self.log, self.code = nursery, log, None
        order = {"arguments": arguments, "log": str(log), "environment": environment or {}, "limits": limits or {}}
        self.number: int = nursery.ask(order)
        self.began_s = time.monotonic()

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self.nursery.ask({"wait": self.number})
        return self.code

    @property
    def running(self) -> bool:
        return self.poll() is None

    def send(self, number: int) -> None:
        if self.running:
            os.kill(self.number, number)

    def kill(self) -> None:
        """As a power cut: no handler runs. Returns when it is dead."""
        self.send(signal.SIGKILL)
        self.wait(10)

    def wait(self, timeout_s: float = 60.0) -> int:
        end_s = time.monotonic() + timeout_s
        while self.poll() is None:
            if time.monotonic() > end_s:
                self.send(signal.SIGUSR1)
                time.sleep(0.5)
                self.end()
                raise AssertionError(f"still running after {timeout_s} s:\n{self.text()[-6000:]}")
            time.sleep(0.01)
        assert self.code is not None
        return self.code

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def end(self) -> None:
        self.send(signal.SIGCONT)
        self.kill()


@dataclass(frozen=True)
class Ground:
    """What all federations of a test session share: the tiny model, three texts, an authority and three identities."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, seats: int = 3) -> Ground:
        federation_values(folder, seats)
        identities.federation(folder / "federation", "hospitals")
        for seat in range(seats):
            identities.member(folder / "federation", f"client-{seat}", folder / "clients" / f"client-{seat}")
        return cls(folder)

    def copy_to(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("model", "texts"):
            if not (folder / name).exists():
                (folder / name).symlink_to(self.folder / name)
        for name in ("federation", "clients"):
            shutil.copytree(self.folder / name, folder / name, symlinks=True)


def free_port() -> int:
    """A port of loopback that nobody has: a server that is restarted must be found where it was."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def toml_of(values: dict[str, Any]) -> str:
    """A configuration as TOML; JSON writes strings, numbers and lists alike."""

    def flat(table: dict[str, Any]) -> str:
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in table.items() if not isinstance(value, dict))

    def tables(table: dict[str, Any], above: str) -> str:
        found = ""
        for name, value in table.items():
            if isinstance(value, dict):
                found += f"\n[{above}{name}]\n{flat(value)}{tables(value, f'{above}{name}.')}"
        return found

    return flat(values) + tables(values, "")


@dataclass
class Federation:
    """One federation below `folder`: its server and clients by seat, with names client-0 and so on."""

    nursery: Nursery
    folder: Path
    seats: int = 3
    changes: dict[str, Any] = field(default_factory=dict)
    servers: list[Forked] = field(default_factory=list)
    clients: dict[int, Forked] = field(default_factory=dict)
    all: list[Forked] = field(default_factory=list)

    def __post_init__(self) -> None:
        values = federation_values(self.folder, self.seats, **self.changes)
        self.port = free_port()
        section = {"address": f"127.0.0.1:{self.port}", "identity": str(self.folder / "federation"), "enroll_address": "off"}
        values["federation"] = {**values["federation"], **section}
        self.client_port = self.port
        self.config = self.folder / "federation.toml"
        self.config.write_text(toml_of(values))
        self.run = self.folder / "runs" / "fed"

    @property
    def server(self) -> Forked:
        return self.servers[-1]

    def serve(self, failpoint: str = "", limits: dict[str, int] | None = None) -> Forked:
        environment = {"SPLITFT_FAILPOINT": failpoint}
        made = Forked(self.nursery, ["server", str(self.config)], self.folder / "server.log", environment, limits)
        self.servers.append(made)
        self.all.append(made)
        return made

    def join(self, seat: int, *more: str, port: int = 0, limits: dict[str, int] | None = None, text: Path | None = None) -> Forked:
        name, home = f"client-{seat}", self.folder / "clients" / f"client-{seat}"
        data = str(text or self.folder / "texts" / f"c{seat}.txt")
        arguments = ["client", "--data", data, "--identity", str(home), "--server", f"127.0.0.1:{port or self.client_port}"]
        arguments += ["--cache", str(self.folder / "cache" / name), "--threads", "1", "--device", "cpu", *more]
        made = self.clients[seat] = Forked(self.nursery, arguments, self.folder / f"{name}.log", {}, limits)
        self.all.append(made)
        return made

    def join_all(self) -> Federation:
        for seat in range(self.seats):
            self.join(seat)
        return self

    def finish(self, timeout_s: float = 60.0) -> None:
        """Until server and clients have ended by themselves, all in order."""
        assert self.server.wait(timeout_s) == 0, self.server.text()[-4000:]
        for seat, client in self.clients.items():
            assert client.wait(30) == 0, (seat, client.text()[-4000:])

    def lines(self) -> int:
        """How many lines the journal has."""
        path = self.run / "journal.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def committed(self) -> int:
        """The newest whole checkpoint's round; -1: none."""
        parent = self.run / checkpoint.FOLDER
        found = [int(path.name.split("-")[1]) for path in parent.glob("round-*")] if parent.is_dir() else []
        return max(found, default=-1)

    def until_round(self, number: int, timeout_s: float = 40.0) -> None:
        wait_for(lambda: self.committed() >= number or not self.server.running, timeout_s)

    def end(self) -> None:
        for one in self.all:
            one.end()


def fingerprint(federation: Federation) -> dict[str, Any]:
    """What must be the same after any disturbance: every tensor of the server's last checkpoint (adapters, moments, streams), every
    client's last snapshot, and what the journal says of each round, without the times."""
    newest = checkpoint.newest(federation.run)
    found: dict[str, Any] = {"server": tensor_file.digest_of(newest / "tensors.safetensors")}
    for seat in range(federation.seats):
        states = sorted((federation.folder / "clients" / f"client-{seat}" / "state").glob("*/round-*"))
        found[f"client {seat}"] = (states[-1].name, tensor_file.digest_of(states[-1] / "state.safetensors"))
    for event in events_of(federation.run):
        rows = [
            tuple(one[name] for name in ("client", "cut", "steps", "status", "tokens", "loss_first", "loss_last"))
            for one in event["clients"]
        ]
        assert event["round"] not in found, "a round is in the journal twice"
        found[event["round"]] = rows
    return found


def adapter_bytes(federation: Federation) -> str:
    """The digest of the joined adapter as it is handed out."""
    return hashlib.sha256((federation.run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@contextmanager
def federation(nursery: Nursery, ground: Ground, folder: Path, seats: int = 3, **changes: Any) -> Iterator[Federation]:
    """A federation on that ground; what is left of it ends with the block."""
    ground.copy_to(folder)
    made = Federation(nursery, folder, seats, changes)
    try:
        yield made
    finally:
        made.end()


__all__ = ["Federation", "Forked", "Ground", "Nursery", "adapter_bytes", "federation", "fingerprint", "free_port"]
