"""Hand-made figures and journals for the tests of `splitft compare`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from splitft.apps.compare_record import Point, RunFigures, Status, VariantFigures


def figures(
    perplexities: Mapping[int, float | None], seed: int = 0, name: str = "v", status: Status = "finished", seconds: float = 10.0
) -> RunFigures:
    """A run whose round takes `seconds` virtual seconds, 300 bytes up, 100 down and 3 seconds of client compute."""
    points = tuple(
        Point(at, value, 0.25, None, at * seconds, at * 300.0, at * 100.0, at * 3.0, at * 64) for at, value in sorted(perplexities.items())
    )
    total = points[-1]._replace(perplexity=None) if points else Point(0, None)
    return RunFigures(f"{name}-s{seed}", seed, status, "", points, total, 1.5, 1000, ("2106.09685",))


def variant(name: str, *runs: RunFigures) -> VariantFigures:
    return VariantFigures(name, name, (f'policy="{name}"',), runs)


def ended(name: str, finals: Sequence[float], start: float = 100.0, seconds: float = 10.0) -> VariantFigures:
    """A variant with one run per final perplexity, reached in the second of two rounds."""
    runs = [figures({0: start, 1: (start + one) / 2, 2: one}, seed, name, seconds=seconds) for seed, one in enumerate(finals)]
    return variant(name, *runs)


def write_journal(folder: Path, rounds: int = 2, evaluated: Sequence[int] = (0, 1, 2), finished: bool = True) -> Path:
    """A journal with two clients; in round r client c sends 10 r (c + 1) bytes up, 5 down and computes 0.5 and 1.5 seconds."""
    events: list[dict[str, Any]] = [
        {"event": "run_started", "version": "1", "name": "x", "config": {"rounds": rounds}, "references": ["2106.09685"]}
    ]
    for number in range(rounds + 1):
        if number:
            clients = [
                {
                    "client": client,
                    "cut": 1,
                    "tokens": 32,
                    "bytes": {"up": {"activations": 10.0 * number * (client + 1)}, "down": {"gradients": 5.0}},
                    "busy_s": {"front_forward": 0.5, "front_backward": 1.5, "uplink": 7.0, "back": 9.0},
                }
                for client in range(2)
            ]
            span = {"virtual_start_s": 4.0 * (number - 1), "virtual_end_s": 4.0 * number, "wall_s": 0.25}
            events.append({"event": "round", "round": number, "clients": clients, "step_losses": [], **span})
        if number in evaluated:
            events.append({"event": "evaluation", "round": number, "global": {"perplexity": 50.0 - number, "accuracy": 0.1, "tokens": 77}})
    if finished:
        events.append({"event": "run_finished", "rounds": rounds, "wall_s": 0.5, "virtual_s": 4.0 * rounds})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "journal.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path
