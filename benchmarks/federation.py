"""The federation beside the engine in one process: time of an exchange, speed of many clients, memory of one more, idle clients, bytes.

Server and clients are the real ones, every one a process, over mutual TLS on loopback. Contestants take turns, a round each.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import federation_bytes, federation_exchange, federation_idle, federation_speed

Rows = list[dict[str, Any]]
PARTS: dict[str, tuple[Any, str]] = {
    "exchange": (
        federation_exchange,
        "**What the network adds to an exchange** (one client, one server, the engine's messages; in one process: `workers`)",
    ),
    "speed": (federation_speed, "**Many clients on one machine** (the embedded model, cuts 1 to 7, all processes share its cores)"),
    "idle": (federation_idle, "**Connected clients that do nothing**"),
    "bytes": (federation_bytes, "**Bytes at the sockets** (counted by a TCP proxy in front of every client, TLS and HTTP/2 included)"),
}


@dataclass(frozen=True)
class Scope:
    """`steps`: exchanges of a round; `repeats`: rounds of each contestant; `clients`: of the speed and memory points."""

    parts: tuple[str, ...] = tuple(PARTS)
    clients: tuple[int, ...] = (4, 8, 16)
    idle_clients: int = 200
    repeats: int = 8
    steps: int = 25
    watch_s: float = 40.0


QUICK = Scope(clients=(1, 2), idle_clients=5, repeats=1, steps=4, watch_s=4.0)


def measure(scope: Scope, say: Callable[[str], None]) -> Rows:
    rows: Rows = []
    loads: dict[str, Any] = {
        "exchange": federation_exchange.Load(scope.steps, scope.repeats),
        "speed": federation_speed.Load(clients=scope.clients, repeats=scope.repeats),
        "idle": federation_idle.Load(scope.idle_clients, scope.watch_s, min(3, scope.repeats), scope.steps),
        "bytes": federation_bytes.Load(),
    }
    for name in scope.parts:
        load = round(os.getloadavg()[0], 1)
        with tempfile.TemporaryDirectory() as folder:
            rows += [row | {"load_before": load} for row in PARTS[name][0].measure(loads[name], Path(folder), say)]
    return rows


def table(rows: Rows) -> str:
    """Markdown: a heading and a table for each part that was measured."""
    parts: list[str] = []
    for name, (module, title) in PARTS.items():
        if own := [row for row in rows if row["group"] == name]:
            parts += [f"{title}:", "", *module.table(own), ""]
            if "load_before" in own[0]:
                parts += [f"The machine's load before this part was {own[0]['load_before']:.1f}.", ""]
    return "\n".join(parts).rstrip()
