"""How much fits: the memory this process may use, how many clients go through the model together, and where their rows lie meanwhile."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from splitft.adapt.cost import CostModel
from splitft.apps.console import usable_cores
from splitft.config import RunConfig
from splitft.engine.settings import Federation
from splitft.engine.shelf import KINDS, DiskShelf, MemoryShelf, Shelf
from splitft.errors import ResourceError

MEMORY_FACTS = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")
# Of the free memory, the share that training may plan with when nobody says otherwise: the rest is for evaluation, data and others.
SHARE = 0.5


def available_bytes() -> float:
    """Main memory that this process can still get: what the system calls available, less if its control group allows less."""
    found = []
    if MEMORY_FACTS.is_file():
        facts = dict(line.split(":", 1) for line in MEMORY_FACTS.read_text().splitlines() if ":" in line)
        if "MemAvailable" in facts:
            found.append(1024.0 * int(facts["MemAvailable"].split()[0]))
    limit, used = GROUP / "memory.max", GROUP / "memory.current"
    if limit.is_file() and used.is_file() and (allowed := limit.read_text().strip()).isdigit():
        found.append(float(int(allowed) - int(used.read_text()) + _cached_bytes()))
    if not found:  # systems without these files: half of what is built in
        found.append(0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0.0, min(found))


def _cached_bytes() -> int:
    """Of what the control group has in use, the files' pages that the system gives up first: a model just read is not memory that lacks."""
    facts = GROUP / "memory.stat"
    lines = facts.read_text().splitlines() if facts.is_file() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def kept_kinds(config: RunConfig, always_averaged: bool) -> tuple[str, ...]:
    """What clients keep from round to round: moments, and adapters of their own where these are not averaged after every round."""
    moments = config.train.moments == "keep"
    adapters = config.split.server == "unaveraged" or not always_averaged
    return tuple(kind for kind in KINDS if (adapters if kind == "adapter" else moments))


def open_shelf(config: RunConfig, clients: int, parameters: int, kinds: Sequence[str], folder: Path) -> Shelf:
    """Where the rows of `clients` clients, of so many adapter `parameters` each, lie: in memory, or below the run folder.

    Raises ResourceError where there is no room for them.
    """
    if config.engine.store == "disk":
        return DiskShelf(folder, clients, parameters, kinds)
    needed_bytes, free_bytes = 4.0 * parameters * clients * (1 + len(kinds)), available_bytes()
    if needed_bytes > free_bytes:
        raise ResourceError(
            f"the adapters and moments of {clients} clients take {needed_bytes / 1e6:.0f} MB of memory, {free_bytes / 1e6:.0f} are free.",
            'set engine.store = "disk", train.moments = "reset", a lower lora.rank, or fewer clients.',
        )
    return MemoryShelf(parameters)


def largest_pass(config: RunConfig, federation: Federation, costs: Sequence[CostModel], kinds: Sequence[str]) -> int:
    """How many clients may go through the model together so that training stays within engine.memory_mb; at least one.

    On the CPU that memory also holds the rows on the shelf, of these `kinds` and those of the round. Actors of a Ray on this machine
    share it. What is bounded by the memory that happens to be free is a power of two, so that equal runs seldom differ in it.
    """
    row_bytes, clients = 4.0 * federation.layout.parameters, len(federation.clients)
    longest = max(int(client.train.lengths.max()) for client in federation.clients)
    session_bytes = replace(costs[0], sequence_tokens=longest).session_bytes()
    limit_bytes = 1e6 * config.engine.memory_mb
    if federation.device.type == "cuda":
        free_bytes = limit_bytes or SHARE * torch.cuda.mem_get_info(federation.device)[0]
    else:
        free_bytes = limit_bytes or SHARE * available_bytes()
        if config.engine.store == "memory":
            free_bytes -= row_bytes * clients * (1 + len(kinds))
        if config.engine.name == "ray" and not limit_bytes:
            free_bytes /= config.engine.actors or usable_cores()
    fitting = max(1, int(free_bytes / session_bytes))
    return fitting if limit_bytes else 1 << (fitting.bit_length() - 1)
