"""An hour of a federation with churn: clients join late, leave, are killed and come back, networks are cut, the server is restarted twice.

python -m benchmarks.soak --folder DIR                  an hour; started again with the same folder it goes on where it stopped
python -m benchmarks.soak --folder DIR --minutes 3      a look that it works
python -m benchmarks.soak --folder DIR --report OUT     only write the result (JSON and a plot) of what was sampled so far

Server and clients are the real commands over mutual TLS, every client behind a TCP proxy whose latency slows the run down to a fraction
of one core. Every ten seconds the server's memory, descriptors, threads and the run's state go into DIR/samples.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.net.proxy import Proxy

from benchmarks import federation_parties as parties
from benchmarks.federation_parties import Party

CLIENTS = 5
LATE_CLIENT = 4  # its seat is taken after a while only
LATENCY_S = 0.3  # each way: this throttles the run, as a far-away network would
SAMPLE_S = 10.0
# In minutes: the server is stopped in order, then killed; both early, so that most of the hour is one process.
STOPPED_MIN, KILLED_MIN, LATE_MIN = 7.0, 14.0, 4.0
CHURN_S = (35.0, 70.0)
DEEDS = ("kill client", "stop client", "cut all", "cut one", "silence one", "kill client", "damage one")


def configuration(folder: Path, port: int, status_port: int) -> dict[str, Any]:
    """Four or five clients of the embedded model, small batches; rounds without end."""
    return {
        "name": "soak",
        "seed": 7,
        "rounds": 10_000,
        "lora": {"rank": 4, "alpha": 8.0},
        "tokens": {"block_tokens": 48, "common_held_out": 0.0, "held_out": 0.1},
        "clients": {"count": CLIENTS, "minimum": 2, "quorum": 0.4, "deadline_s": 60.0},
        "policy": {"name": "fixed", "cuts": [1, 2, 3, 1, 2]},
        "train": {"local_steps": 6, "batch_size": 1, "moments": "keep", "learning_rate": 3e-4, "schedule": "constant"},
        "evaluate": {"max_rows": 6, "every_rounds": 5},
        "engine": {"threads": 1, "device": "cpu"},
        "run": {"folder": str(folder / "runs")},
        "federation": {
            "address": f"127.0.0.1:{port}",
            "identity": str(folder / "federation"),
            "status_address": f"127.0.0.1:{status_port}",
            "enroll_address": "off",
            "join_s": 2.0,
            "absence_s": 20.0,
            "grace_s": 5.0,
        },
    }


@dataclass
class Soak:
    """The parties, and what is done to them. `elapsed_s` counts over restarts of this command."""

    folder: Path
    minutes: float
    nice: int
    server: Party | None = None
    clients: dict[int, Party] = field(default_factory=dict)
    proxies: dict[int, Proxy] = field(default_factory=dict)
    back_at: dict[int, float] = field(default_factory=dict)
    calm_at: dict[int, float] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    before_s: float = 0.0
    next_deed_s: float = 90.0
    server_at_s: float = 0.0

    def prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        parties.make_identities(self.folder, CLIENTS)
        self.texts = sorted((self.folder / "texts").glob("*.jsonl")) or parties.write_texts(self.folder / "texts", CLIENTS, 60)
        place = self.folder / "ports.json"
        if not place.exists():
            place.write_text(json.dumps([parties.free_port(), parties.free_port()]))
        self.port, self.status_port = json.loads(place.read_text())
        self.config = parties.write_config(self.folder / "federation.toml", configuration(self.folder, self.port, self.status_port))
        self.samples = self.folder / "samples.jsonl"
        if self.samples.exists():
            earlier = [json.loads(line) for line in self.samples.read_text().splitlines()]
            self.before_s = max((one["elapsed_s"] for one in earlier), default=0.0)
            self.done = set(next((one["done"] for one in reversed(earlier) if "done" in one), []))
            self.next_deed_s = self.before_s + 60.0
        self.random = random.Random(f"soak {self.before_s:.0f}")
        self.began_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return self.before_s + time.monotonic() - self.began_s

    # -- parties

    def start_server(self) -> None:
        self.server = Party(parties.server_arguments(self.config), self.folder / "server.out", nice=self.nice)

    def start_client(self, client: int) -> None:
        arguments = parties.client_arguments(self.folder, client, self.texts[client], self.proxies[client].port)
        self.clients[client] = Party(arguments, self.folder / f"{parties.client_name(client)}.out", nice=self.nice)

    def write(self, line: dict[str, Any]) -> None:
        with self.samples.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"elapsed_s": round(self.elapsed_s, 1), **line}) + "\n")

    def note(self, deed: str, **facts: Any) -> None:
        self.write({"deed": deed, **facts})

    # -- churn

    def disturb(self) -> None:
        """What is due: the server's restarts at their times, other deeds by chance."""
        minute = self.elapsed_s / 60
        if minute >= LATE_MIN and "late" not in self.done:
            self.done.add("late")
            self.start_client(LATE_CLIENT)
            self.note("late client joins", client=LATE_CLIENT)
        for name, at, number in (("stop", STOPPED_MIN, signal.SIGTERM), ("kill", KILLED_MIN, signal.SIGKILL)):
            if minute >= at and name not in self.done and self.server is not None:
                self.done.add(name)
                self.note(f"server: {name}", pid=self.server.pid)
                self.server.signal(number)
                code = self.server.wait(60)
                time.sleep(5.0)
                self.start_server()
                self.note("server: start", pid=self.server.pid, code=code)
                self.next_deed_s = self.elapsed_s + 60.0
        if self.elapsed_s >= self.next_deed_s:
            self.next_deed_s = self.elapsed_s + self.random.uniform(*CHURN_S)
            self._deed(self.random.choice(DEEDS))
        self._restore()

    def _deed(self, deed: str) -> None:
        here = [client for client, one in self.clients.items() if one.running and client not in self.calm_at]
        if len(here) < 3:
            return
        client = self.random.choice(here)
        proxy, party = self.proxies[client], self.clients[client]
        self.note(deed, client=client)
        if deed == "kill client":
            party.signal(signal.SIGKILL)
            self.back_at[client] = self.elapsed_s + self.random.uniform(2.0, 30.0)
        elif deed == "stop client":
            party.signal(signal.SIGTERM)
            self.back_at[client] = self.elapsed_s + self.random.uniform(15.0, 60.0)
        elif deed == "cut all":
            for one in self.proxies.values():
                one.reset()
        elif deed == "cut one":
            proxy.refuse = True
            proxy.reset()
            self.calm_at[client] = self.elapsed_s + self.random.uniform(2.0, 40.0)
        elif deed == "silence one":
            proxy.black_hole_up = proxy.black_hole_down = True
            self.calm_at[client] = self.elapsed_s + self.random.uniform(5.0, 45.0)
        elif deed == "damage one":
            proxy.flip_every_bytes = 200_000
            self.calm_at[client] = self.elapsed_s + 30.0

    def _restore(self) -> None:
        """Clients that were taken out come back, networks heal; whatever else has ended is noted and started again."""
        for client, at_s in list(self.calm_at.items()):
            if self.elapsed_s >= at_s:
                del self.calm_at[client]
                proxy = self.proxies[client]
                proxy.refuse = proxy.black_hole_up = proxy.black_hole_down = False
                proxy.flip_every_bytes = 0
                self.note("network is back", client=client)
        for client, party in list(self.clients.items()):
            if party.running:
                continue
            if client not in self.back_at:
                self.note("client ended unexpectedly", client=client, code=party.process.returncode, text=party.text()[-400:])
                self.back_at[client] = self.elapsed_s + 10.0
            elif self.elapsed_s >= self.back_at[client]:
                del self.back_at[client]
                self.start_client(client)
                self.note("client is back", client=client)
        if self.server is not None and not self.server.running:
            if self.elapsed_s < self.server_at_s:
                return
            self.note("server ended unexpectedly", code=self.server.process.returncode, text=self.server.text()[-400:])
            self.server_at_s = self.elapsed_s + 30.0
            self.start_server()

    # -- sampling

    def sample(self) -> None:
        run = self.folder / "runs" / "soak"
        journal = run / "journal.jsonl"
        rounds = parties.events_of(run, "round") if journal.exists() else []
        scores = parties.events_of(run, "evaluation") if journal.exists() else []
        assert self.server is not None
        self.write(
            {
                "server": {"pid": self.server.pid, **parties.status_of(self.server.pid)},
                "clients": {client: {"pid": one.pid, **parties.status_of(one.pid)} for client, one in self.clients.items() if one.running},
                "journal_bytes": journal.stat().st_size if journal.exists() else 0,
                "folder_bytes": folder_bytes(run),
                "round": rounds[-1]["round"] if rounds else 0,
                "held_out_loss": scores[-1]["global"]["loss"] if scores else None,
                "metrics": self._metrics(),
                "done": sorted(self.done),
            }
        )

    def _metrics(self) -> str:
        """Whether the server's /metrics answers, as an operator's Prometheus would ask."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.status_port}/metrics", timeout=2) as answer:
                return f"{answer.status}"
        except OSError as problem:
            return f"{type(problem).__name__}: {problem}"

    def run(self) -> None:
        """Until the time is over; every party ends with it."""
        self.prepare()
        with ExitStack() as stack:
            for client in range(CLIENTS):
                proxy = stack.enter_context(Proxy("127.0.0.1", self.port, seed=client))
                proxy.latency_s = LATENCY_S
                self.proxies[client] = proxy
            stack.callback(self.end)
            self.start_server()
            for client in range(CLIENTS):
                if client != LATE_CLIENT or "late" in self.done:
                    self.start_client(client)
            self.note("start", pid=self.server.pid if self.server else 0)
            sample_s = 0.0
            while self.elapsed_s < 60 * self.minutes:
                self.disturb()
                if time.monotonic() >= sample_s:
                    sample_s = time.monotonic() + SAMPLE_S
                    self.sample()
                time.sleep(0.5)
            self.note("end")

    def end(self) -> None:
        """Stop in order: the clients first, then the server, and what does not go is made to."""
        everyone = [*self.clients.values(), *([self.server] if self.server is not None else [])]
        for party in everyone:
            party.signal(signal.SIGTERM)
        for party in everyone:
            try:
                party.wait(30)
            except Exception as problem:  # whatever keeps it: it is ended, and the note says so
                self.note("had to be killed", pid=party.pid, why=type(problem).__name__)
                party.end()


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below; those that go meanwhile are left out."""
    total = 0
    for one in folder.rglob("*") if folder.exists() else ():
        with suppress(OSError):
            total += one.stat().st_size if one.is_file() else 0
    return total


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--nice", type=int, default=19)
    parser.add_argument("--report", type=Path, help="write the result here (JSON, and a plot beside it) and do nothing else")
    chosen = parser.parse_args(arguments)
    if chosen.report:
        from benchmarks.soak_report import write_report

        write_report(chosen.folder, chosen.report)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the parties end with it
    Soak(chosen.folder.resolve(), chosen.minutes, chosen.nice).run()


if __name__ == "__main__":
    main()
