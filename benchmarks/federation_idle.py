"""Two hundred connected clients that do nothing: what they cost the server, and whether a client that trains meanwhile notices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import federation_parties as parties
from benchmarks.federation_exchange import millis, values
from benchmarks.federation_scenes import Child, Federated, merged


@dataclass(frozen=True)
class Load:
    """Idle clients, seconds of watching the server, rounds and exchanges of the one that trains."""

    clients: int = 200
    watch_s: float = 40.0
    rounds: int = 3
    exchanges: int = 25


def watch(pid: int, seconds: float) -> dict[str, float]:
    """Share of a core that a process takes over some seconds, and what it holds at their end."""
    before, began_s = parties.status_of(pid), time.monotonic()
    time.sleep(seconds)
    after = parties.status_of(pid)
    return {**after, "core_share": (after["processor_s"] - before["processor_s"]) / (time.monotonic() - began_s)}


def measure(load: Load, folder: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The server waits for clients that can train: alone, with the idle ones connected; then one trains, with them and without."""
    run = merged(values(4, 128, load.exchanges), {"name": "idle", "clients": {"count": load.clients + 1, "minimum": 1}})
    parties.write_texts(folder / "texts", 1, 60)
    federated = Federated(folder, run, load.clients + 1, stamped=True)
    crowd: Child | None = None
    try:
        federated.serve("idle")
        assert federated.server is not None
        federated.server.go()  # it waits for clients now
        time.sleep(2.0)
        alone = watch(federated.server.pid, load.watch_s / 2)
        given = {"kind": "idle", "folder": str(folder), "port": federated.port, "first": 1, "count": load.clients}
        crowd = Child(given, folder / "idle.out")
        connected_s = crowd.hear()["seconds"]
        time.sleep(3.0)
        crowded = watch(federated.server.pid, load.watch_s)
        federated.join([0])
        federated.server.hear()
        federated.clients[0].hear()
        with_them = _exchanges(federated, load.rounds)
        crowd.end()
        crowd = None
        time.sleep(3.0)
        without = _exchanges(federated, load.rounds)
    finally:
        if crowd is not None:
            crowd.end()
        federated.close()
    row: dict[str, Any] = {
        "group": "idle",
        "clients": load.clients,
        "connected_s": connected_s,
        "alone": alone,
        "crowded": crowded,
        "step_with": millis(with_them),
        "step_without": millis(without),
    }
    steps = f"an exchange beside its pass {row['step_with']['median_ms']:.2f} ms with them, {row['step_without']['median_ms']:.2f} without"
    say(f"{load.clients} idle clients: {100 * crowded['core_share']:.2f} % of a core (none: {100 * alone['core_share']:.2f} %); {steps}")
    return [row]


def _exchanges(federated: Federated, rounds: int) -> list[float]:
    """Seconds of every exchange beside the server's pass."""
    found: list[float] = []
    for _ in range(rounds):
        other, client = federated.round(), federated.clients[0].hear()
        pairs = zip(client["exchanges"], other["passes"], strict=True)
        found += [answered - sent - (ended - began) for (sent, answered), (began, ended) in pairs]
    assert statistics.median(found) > 0
    return found


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: the server alone and with the idle clients."""
    lines = ["| idle clients | share of a core | resident, MB | threads | descriptors | an exchange of 256 KiB, on the way: median, p95 |"]
    lines += ["|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        for number, state, step in ((0, row["alone"], row["step_without"]), (row["clients"], row["crowded"], row["step_with"])):
            cells = [f"{100 * state['core_share']:.2f} %", f"{state['resident_bytes'] / 1e6:,.0f}", f"{state['threads']:.0f}"]
            cells += [f"{state['descriptors']:.0f}", f"{step['median_ms']:.2f} ms, {step['p95_ms']:.2f} ms"]
            lines.append(f"| {number} | {' | '.join(cells)} |")
    return lines
