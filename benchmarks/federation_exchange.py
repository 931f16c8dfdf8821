"""What the network adds to an exchange: the same engine and codec in one process, and as a client and a server over TLS on loopback."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import federation_parties as parties
from benchmarks.federation_scenes import Federated, Whole, require_same_work

ROUNDS = 1000
# Rows and tokens of a row of a step (256 channels in bfloat16, half a kilobyte a token), and by what a round has fewer of large ones.
SIZES = {"4 KiB": (1, 8, 1), "256 KiB": (4, 128, 1), "1.5 MiB": (24, 128, 4)}
CUT = 7


@dataclass(frozen=True)
class Load:
    """How much is measured: exchanges of a round, rounds of each side in turns."""

    exchanges: int = 25
    repeats: int = 8


def values(rows: int, tokens: int, exchanges: int) -> dict[str, Any]:
    """One client that holds all blocks but the last, so that the server's own work is short."""
    return {
        "name": "exchange",
        "seed": 3,
        "rounds": ROUNDS,
        "lora": {"rank": 4, "alpha": 8.0},
        "tokens": {"block_tokens": tokens, "common_held_out": 0.0},
        "clients": {"count": 1, "minimum": 1},
        "policy": {"name": "fixed", "cuts": [CUT]},
        "train": {"local_steps": exchanges, "batch_size": rows, "moments": "keep", "schedule": "constant"},
        "evaluate": {"max_rows": 1, "every_rounds": ROUNDS},
        "engine": {"device": "cpu"},
    }


def quantile(found: list[float], share: float) -> float:
    return sorted(found)[min(len(found) - 1, int(share * len(found)))]


def millis(found: list[float]) -> dict[str, float]:
    return {"median_ms": 1000 * statistics.median(found), "p95_ms": 1000 * quantile(found, 0.95)}


def measure_size(name: str, load: Load, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """One row: both sides took turns, a round each; the first round of each is not counted."""
    rows, tokens, fewer = SIZES[name]
    exchanges = max(2, load.exchanges // fewer)
    run = values(rows, tokens, exchanges)
    parties.write_texts(folder / "texts", 1, 60)
    federated = Federated(folder, run, 1, stamped=True)
    whole = Whole(folder, run, "workers", 1, threads=1, stamped=True)
    try:
        federated.serve("federation")
        federated.join([0])
        whole.start()
        inside: dict[str, list[float]] = {"exchange": [], "pass": [], "rest": []}
        outside: dict[str, list[float]] = {"exchange": [], "pass": [], "rest": [], "up": [], "queue": [], "down": []}
        for repeat in range(load.repeats + 1):
            one = whole.round()
            other, client = federated.round(), federated.clients[0].hear()
            if repeat:
                _add(inside, one["exchanges"], one["passes"], [])
                _add(outside, client["exchanges"], other["passes"], other["arrivals"])
        require_same_work(federated.run_folder, whole.run_folder, load.repeats + 1)
        packets = parties.events_of(federated.run_folder, "round")[-1]["clients"][0]["bytes"]
    finally:
        federated.close()
        whole.close()
    row = {
        "group": "exchange",
        "size": name,
        "exchanges": len(outside["exchange"]),
        "up_bytes": packets["up"]["activations"] // exchanges,
        "down_bytes": packets["down"]["gradients"] // exchanges,
        "one_process": {part: millis(found) for part, found in inside.items()},
        "network": {part: millis(found) for part, found in outside.items()},
        # The server's pass is the same work on both sides; what is left of an exchange is what the network changes.
        "added_median_ms": 1000 * (statistics.median(outside["rest"]) - statistics.median(inside["rest"])),
        "added_p95_ms": 1000 * (quantile(outside["rest"], 0.95) - quantile(inside["rest"], 0.95)),
    }
    wholes = [1000 * statistics.median(side["exchange"]) for side in (inside, outside)]
    say(f"{name}: {row['added_median_ms']:+.2f} ms median, {row['added_p95_ms']:+.2f} p95; whole {wholes[0]:.1f} and {wholes[1]:.1f} ms")
    return row


def _add(into: dict[str, list[float]], exchanges: list[list[float]], passes: list[list[float]], arrivals: list[float]) -> None:
    """The parts of every exchange; `rest` is all but the server's pass."""
    for place, ((sent, answered), (began, ended)) in enumerate(zip(exchanges, passes, strict=True)):
        into["exchange"].append(answered - sent)
        into["pass"].append(ended - began)
        into["rest"].append(answered - sent - (ended - began))
        if arrivals:
            into["up"].append(arrivals[place] - sent)
            into["queue"].append(began - arrivals[place])
            into["down"].append(answered - ended)


def measure(load: Load, folder: Path, say: Callable[[str], None], sizes: tuple[str, ...] = tuple(SIZES)) -> list[dict[str, Any]]:
    return [measure_size(name, load, folder / str(place), say) for place, name in enumerate(sizes)]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: times of an exchange, and where the network's part went."""
    lines = [
        "| packet, each way | exchange in one process, ms | over TLS, ms | but for the pass: in one process | over TLS | added | p95 |"
    ]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        inside, outside = row["one_process"], row["network"]
        cells = [f"{side['exchange']['median_ms']:.1f}" for side in (inside, outside)]
        cells += [f"{side['rest']['median_ms']:.2f}" for side in (inside, outside)]
        cells += [f"**{row['added_median_ms']:.2f}**", f"{row['added_p95_ms']:.1f}"]
        lines.append(f"| {row['size']} | {' | '.join(cells)} |")
    parts = [
        f"{row['size']}: up {row['network']['up']['median_ms']:.2f}, in the queue {row['network']['queue']['median_ms']:.2f}, "
        f"down {row['network']['down']['median_ms']:.2f}"
        for row in rows
    ]
    return [*lines, "", f"Medians of the way in ms: {'; '.join(parts)}. Decoding and checks of a message are in the queue's part."]
