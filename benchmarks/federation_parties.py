"""A federation on loopback for measurements: identities, texts, and server and clients as processes of their own over mutual TLS."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from splitft.data.python_docs import PythonDocs
from splitft.deploy import identity, roster
from splitft.deploy.authority import Authority
from splitft.deploy.certificates import read_request
from splitft.toml import write_toml

ROOT = Path(__file__).resolve().parents[1]
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def client_name(client: int) -> str:
    return f"client-{client:03d}"


def make_identities(folder: Path, clients: int) -> Path:
    """The federation's authority and server certificate in folder/federation, clients' identities in folder/client-K. Seats are their
    numbers."""
    home = folder / "federation"
    if home.exists():
        return home
    Authority.create(home, "loopback", ())
    roster.write_register(home, roster.Register(roster.SCHEMA, "loopback"))
    for client in range(clients):
        own = folder / client_name(client)
        _, key = read_request(identity.begin(own, client_name(client)))
        identity.finish(own, roster.sign(home, client_name(client), key), (home / "authority.pem").read_bytes())
    return home


def write_texts(folder: Path, clients: int, documents: int) -> list[Path]:
    """The documentation of the running Python, dealt in turn: a file of JSON lines for each client."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{client_name(client)}.jsonl" for client in range(clients)]
    texts = ["".join(part.text for part in one.segments) for one in PythonDocs(max_documents=documents * clients).documents()]
    for client, path in enumerate(paths):
        own = texts[client::clients]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in own), encoding="utf-8")
    return paths


def free_port() -> int:
    """A port that nobody has now; a server that is restarted needs the same one again."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def surroundings() -> dict[str, str]:
    """The environment of a party: the packages of this checkout, whichever is installed."""
    places = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    return {**os.environ, "PYTHONPATH": places, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "GRPC_VERBOSITY": "ERROR"}


class Party:
    """A command of splitft as a process of its own; ended by its own id."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, nice: int = 0) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        given = {**surroundings(), "COLUMNS": "200", "PYTHONUNBUFFERED": "1", **(environment or {})}
        command = [*(["nice", "-n", str(nice)] if nice else []), sys.executable, "-m", "splitft", *arguments]
        with log.open("ab") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=given, cwd=ROOT)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: int) -> None:
        if self.running:
            self.process.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        """Its exit code. Raises TimeoutExpired."""
        return self.process.wait(timeout_s)

    def end(self) -> None:
        """Make sure that it is gone."""
        if self.running:
            self.signal(signal.SIGKILL)
            self.process.wait(30)

    def text(self) -> str:
        return self.log.read_text("utf-8", errors="replace")


def server_arguments(config: Path, *overrides: str) -> list[str]:
    return ["server", str(config), "--quiet", *overrides]


def client_arguments(folder: Path, client: int, data: Path, port: int, threads: int = 1, window: int = 2) -> list[str]:
    own = folder / client_name(client)
    given = ["--data", str(data), "--identity", str(own), "--server", f"127.0.0.1:{port}", "--cache", str(folder / "cache")]
    return ["client", *given, "--device", "cpu", "--memory-mb", "1000", "--threads", str(threads), "--window", str(window)]


def write_config(path: Path, values: Mapping[str, Any]) -> Path:
    path.write_text(write_toml(values), encoding="utf-8")
    return path


def status_of(pid: int) -> dict[str, float]:
    """Resident bytes now and at their peak, threads, open descriptors, seconds of processor time of a process; empty when it has gone."""
    try:
        place = Path(f"/proc/{pid}")
        lines = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines() if ":" in line)
        fields = (place / "stat").read_text().rpartition(")")[2].split()
        return {
            "resident_bytes": int(lines["VmRSS"].split()[0]) * 1024,
            "peak_bytes": int(lines["VmHWM"].split()[0]) * 1024,
            "threads": int(lines["Threads"]),
            "descriptors": len(os.listdir(place / "fd")),
            "processor_s": (int(fields[11]) + int(fields[12])) / TICKS_PER_S,
        }
    except (OSError, KeyError, ValueError):
        return {}


def events_of(run_folder: Path, kind: str) -> list[dict[str, Any]]:
    """Events of a journal; its last line may be half written."""
    found = []
    for line in (run_folder / "journal.jsonl").read_text("utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("event") == kind:
            found.append(event)
    return found
