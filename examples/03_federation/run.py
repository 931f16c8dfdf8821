"""A federation on this machine: authority, server and three clients as processes of their own, over TLS; all ended at the end.

Usage: python examples/03_federation/run.py [FOLDER] [FIELD=VALUE]...

FOLDER (runs/federation) takes everything that is made: the authority, the identities, the run. FIELD=VALUE goes to the server.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).resolve().parent
SPLITFT = [sys.executable, "-m", "splitft"]
STATIONS = ("harbour", "lighthouse", "observatory")
LONGEST_S = 600.0


class Process:
    """A running command; its lines appear under its name, and it does not outlive the block it is used in."""

    def __init__(self, name: str, *words: object) -> None:
        self.name = name
        arguments = show(name, words)
        self.process = subprocess.Popen(
            [*SPLITFT, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"},
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            print(f"{self.name:>11} | {line.rstrip()}", flush=True)

    def wait(self, until_s: float) -> None:
        code = self.process.wait(max(1.0, until_s - time.monotonic()))
        self.reader.join(5.0)
        if code:
            raise SystemExit(f"{self.name} ended with exit code {code} (docs/errors.md).")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(15)


def show(name: str, words: Sequence[object]) -> list[str]:
    arguments = [str(word) for word in words]
    print(f"{name:>11} $ splitft {' '.join(arguments)}", flush=True)
    return arguments


def enroll(name: str, *words: object, stdin: str = "") -> str:
    """A short command, to its end; what it printed. The token goes in by standard input, where no list of processes shows it."""
    done = subprocess.run(
        [*SPLITFT, "enroll", *show(name, ["enroll", *words])[1:]], input=stdin, capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.strip()


def free_ports(count: int) -> list[int]:
    """Ports nobody listens at. Another program could take one before the server does; then it says so, and ends."""
    with ExitStack() as stack:
        places = [stack.enter_context(socket.socket()) for _ in range(count)]
        for place in places:
            place.bind(("127.0.0.1", 0))
        return [int(place.getsockname()[1]) for place in places]


def await_port(server: Process, port: int, until_s: float) -> None:
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            return
        except OSError:
            if server.process.poll() is not None or time.monotonic() > until_s:
                raise SystemExit("the server did not come up.") from None
            time.sleep(0.2)


def run(folder: Path, overrides: Sequence[str] = ()) -> Path:
    """The whole federation, once; returns the server's run folder."""
    if folder.exists():
        raise SystemExit(f"{folder} is there already; name another one: python examples/03_federation/run.py FOLDER")
    until_s = time.monotonic() + LONGEST_S
    port, enrolment, status = free_ports(3)
    authority = folder / "authority"
    enroll("operator", "init", authority, "--name", "stations")
    with ExitStack() as stack:
        server = stack.enter_context(
            Process(
                "server",
                "server",
                HERE / "federation.toml",
                f"federation.identity={authority.resolve()}",
                f"federation.address=127.0.0.1:{port}",
                f"federation.enroll_address=127.0.0.1:{enrolment}",
                f"federation.status_address=127.0.0.1:{status}",
                f"run.folder={(folder / 'runs').resolve()}",
                "engine.threads=1",
                *overrides,
            )
        )
        await_port(server, enrolment, until_s)
        clients = []
        for name in STATIONS:
            identity = folder / name
            token = enroll("operator", "invite", authority, name, "--address", f"127.0.0.1:{enrolment}", "--valid", "10m")
            enroll(name, "join", "-", "--identity", identity, stdin=f"{token}\n")
            data, policy = HERE / "texts" / f"{name}.jsonl", HERE / "policy.toml"
            words = ["client", "--data", data, "--identity", identity, "--policy", policy, "--cache", folder / "cache", "--threads", 1]
            clients.append(stack.enter_context(Process(name, *words)))
        for process in (*clients, server):
            process.wait(until_s)
    found = folder / "runs" / "stations"
    print(f"\nreport            {found / 'report.html'}\nadapter           {found / 'adapter'}")
    for name in STATIONS:
        print(f"{name + ' has it in':<24}{folder / name / 'adapter'}")
    return found


if __name__ == "__main__":
    given = sys.argv[1:]
    where = Path(given.pop(0)) if given and "=" not in given[0] else Path("runs/federation")
    run(where, given)
