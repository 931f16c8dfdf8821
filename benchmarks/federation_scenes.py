"""Federations and runs in one process whose rounds are let go one at a time, so that what is compared is measured in turns."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import federation_parties as parties
from benchmarks.federation_parties import ROOT

PATIENCE_S = 240.0


class Child:
    """A federation_child process: lines of JSON out of it, words into it."""

    def __init__(self, given: Mapping[str, Any], log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "benchmarks.federation_child", json.dumps(given)]
        environment = {**parties.surroundings(), "OMP_NUM_THREADS": str(given.get("threads", 1))}
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True
            )
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.lines.put(json.loads(line))
        self.lines.put(None)

    @property
    def pid(self) -> int:
        return self.process.pid

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def hear(self, patience_s: float = PATIENCE_S) -> dict[str, Any]:
        """Its next line. Raises RuntimeError with what it wrote where it has ended or is silent."""
        try:
            found = self.lines.get(timeout=patience_s)
        except queue.Empty:
            found = None
        if found is None:
            raise RuntimeError(f"the process has ended or is silent:\n{self.log.read_text(errors='replace')[-3000:]}")
        return found

    def round(self) -> dict[str, Any]:
        """Let one round go and hear of it."""
        self.go()
        return self.hear()

    def end(self, patience_s: float = 20.0) -> None:
        """Close its input, after which it ends by itself; then make sure."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)


@dataclass
class Federated:
    """A server and clients over mutual TLS in `folder`. `values`: the run; a client's number is its seat."""

    folder: Path
    values: dict[str, Any]
    identities: int
    documents: int = 40
    stamped: bool = False
    server_threads: int = 1
    clients: dict[int, Child] = field(default_factory=dict)
    server: Child | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        parties.make_identities(self.folder, self.identities)
        self.texts = sorted((self.folder / "texts").glob("*.jsonl"))
        self.port = parties.free_port()

    def serve(self, name: str, **changes: Any) -> dict[str, Any]:
        """Start the server of a run in runs-NAME; clients of an earlier one come over by themselves."""
        values = merged(self.values, changes)
        section = {"address": f"127.0.0.1:{self.port}", "identity": str(self.folder / "federation"), "enroll_address": "off"}
        values["federation"] = {"status_address": "off", "join_s": 0.0, **values.get("federation", {}), **section}
        values["run"] = {"folder": str(self.folder / f"runs-{name}")}
        values["engine"] = {**values.get("engine", {}), "threads": self.server_threads}
        config = parties.write_config(self.folder / f"{name}.toml", values)
        given = {"kind": "server", "config": str(config), "threads": self.server_threads, "stamped": self.stamped}
        self.server = Child(given, self.folder / "server.out")
        self.run_folder = self.folder / f"runs-{name}" / values["name"]
        return self.server.hear()

    def join(self, clients: Iterable[int], ports: Mapping[int, int] | None = None, own_cache: bool = False) -> None:
        """Start clients that are not there yet; through other ports than the server's, where they are given. One cache for all, unless
        each is to fetch its own part of the model."""
        for client in clients:
            if client not in self.clients:
                port = (ports or {}).get(client, self.port)
                arguments = parties.client_arguments(self.folder, client, self.texts[client], port)
                if own_cache:
                    arguments[arguments.index("--cache") + 1] += f"-{client}"
                given = {"kind": "client", "arguments": arguments, "stamped": self.stamped}
                self.clients[client] = Child(given, self.folder / f"{parties.client_name(client)}.out")

    def processor_s(self) -> float:
        """Seconds of processor time of all parties so far."""
        everyone = [*self.clients.values(), *([self.server] if self.server else [])]
        return sum(parties.status_of(one.pid).get("processor_s", 0.0) for one in everyone)

    def round(self) -> dict[str, Any]:
        """One round: what the server says of it, and the processor time of all parties meanwhile."""
        assert self.server is not None
        before_s = self.processor_s()
        found = self.server.round()
        return {**found, "processor_s": self.processor_s() - before_s}

    def close_server(self) -> None:
        """End the server as if it was killed; its clients wait for the next."""
        if self.server is not None:
            self.server.end()
            self.server = None

    def close(self) -> None:
        for child in self.clients.values():
            child.process.terminate()
        self.close_server()
        for child in self.clients.values():
            child.end()


@dataclass
class Whole:
    """The same run in one process, by one of the engines."""

    folder: Path
    values: dict[str, Any]
    engine: str
    clients: int
    threads: int = 2
    stamped: bool = False
    changes: dict[str, Any] = field(default_factory=dict)

    def start(self) -> Whole:
        name = f"{self.engine}-{self.clients}-{self.threads}{'-batched' if self.changes else ''}"
        own = self.folder / f"texts-{self.clients}"
        if not own.exists():
            own.mkdir()
            for path in sorted((self.folder / "texts").glob("*.jsonl"))[: self.clients]:
                (own / path.name).symlink_to(path.resolve())
        values = merged(self.values, self.changes)
        values["engine"] = {**values.get("engine", {}), "name": self.engine, "threads": self.threads}
        values["data"], values["partition"] = {"name": "jsonl", "path": str(own)}, {"name": "files"}
        values["clients"] = {**values.get("clients", {}), "count": 0, "minimum": 1}
        values["run"] = {"folder": str(self.folder / f"runs-{name}")}
        config = parties.write_config(self.folder / f"{name}.toml", values)
        given = {"kind": "engine", "config": str(config), "threads": self.threads, "stamped": self.stamped}
        self.child = Child(given, self.folder / f"{name}.out")
        self.run_folder = self.folder / f"runs-{name}" / values["name"]
        self.child.hear()
        return self

    def round(self) -> dict[str, Any]:
        before_s = parties.status_of(self.child.pid).get("processor_s", 0.0)
        found = self.child.round()
        return {**found, "processor_s": parties.status_of(self.child.pid).get("processor_s", 0.0) - before_s}

    def close(self) -> None:
        self.child.end()


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Tables of a run with single fields changed."""
    both = {**values}
    for name, change in changes.items():
        both[name] = {**both.get(name, {}), **change} if isinstance(change, Mapping) and "name" not in change else change
    return both


def require_same_work(one: Path, other: Path, rounds: int) -> None:
    """The losses of every client in the rounds that both have done must be the same numbers."""
    first, second = parties.events_of(one, "round")[:rounds], parties.events_of(other, "round")[:rounds]
    for left, right in zip(first, second, strict=True):
        pairs = zip(left["clients"], right["clients"], strict=True)
        if any(abs(a["loss_mean"] - b["loss_mean"]) > 1e-3 * abs(b["loss_mean"]) or a["tokens"] != b["tokens"] for a, b in pairs):
            raise RuntimeError(f"round {left['round']}: the contestants do not train the same thing ({one}, {other}).")
