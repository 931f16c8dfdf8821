"""A run as a conductor would tell it, for the tests of the status page: three organisations and one that is late, seven rounds done."""

from __future__ import annotations

import math
from typing import Any

from splitft.deploy.metrics import Metrics
from splitft.deploy.status import ServerStatus
from splitft.waits import Waits

NAMES = ("charite-berlin", "st-thomas", "ucsf-medical", "karolinska-institutet")
SPEED = (1.0, 0.72, 1.31, 0.38)
STEPS = 12


def spread(index: int, round_number: int) -> float:
    """A small deviation that looks like noise and is the same every time."""
    return math.sin(12.9898 * index + 78.233 * round_number) * 0.5


def loss_of(index: int, at: float) -> float:
    return 2.1 + 1.7 * math.exp(-at / 4.0) + 0.05 * index + 0.08 * spread(index, int(10 * at))


def bars(clients: int, seconds: float) -> list[list[Any]]:
    """The time line of a round: three steps each, then waiting for the slowest."""
    found: list[list[Any]] = []
    for client in range(clients):
        now, pace = 0.0, seconds / 23.0 / SPEED[client % 4] * SPEED[3] * 2.2
        found.append([client, "adapters_down", now, now := now + 0.3 * pace])
        for _ in range(3):
            for kind, share in (("front_forward", 0.5), ("uplink", 0.7), ("server_wait", 0.15), ("back", 0.4), ("downlink", 0.6)):
                found.append([client, kind, now, now := now + share * pace])
            found.append([client, "front_backward", now, now := now + 0.8 * pace])
        found.append([client, "adapters_up", now, now := now + 0.3 * pace])
        if now < seconds:
            found.append([client, "barrier_wait", now, seconds])
    return found


def round_record(number: int, clients: int = 4) -> dict[str, Any]:
    """A round as the journal holds it."""
    return {
        "event": "round",
        "round": number,
        "wall_s": 48.0 + 9.0 * spread(1, number),
        "timeline": bars(clients, 50.0),
        "clients": [
            {
                "client": client,
                "cut": 2 + client % 3,
                "rank": 8,
                "steps": STEPS,
                "status": "done",
                "tokens": 24_576,
                "targets": 23_000,
                "loss_mean": loss_of(client, number),
                "loss_last": loss_of(client, number + 0.5),
                "bytes": {
                    "up": {"activations": 6_100_000 + 190_000 * (number % 3), "adapters": 412_000},
                    "down": {"gradients": 5_900_000, "adapters": 412_000, "control": 900},
                },
            }
            for client in range(clients)
        ],
    }


def evaluation_record(number: int, clients: int = 4) -> dict[str, Any]:
    """An evaluation as the journal holds it."""
    loss = loss_of(0, number) + 0.12
    return {
        "event": "evaluation",
        "round": number,
        "global": {"loss": loss, "perplexity": math.exp(loss), "accuracy": 0.4, "tokens": 10_000},
        "clients": [{"client": one, "loss": loss + 0.03 * one, "perplexity": math.exp(loss), "tokens": 900} for one in range(clients)],
    }


def running(names: tuple[str, ...] = NAMES, rounds_done: int = 7, waits: Waits | None = None) -> tuple[ServerStatus, Metrics]:
    """A run in the middle of a round: the first three train, the fourth was lost; all told through the methods the server uses."""
    status = ServerStatus("discharge-letters", 20, version="0.9.0", model="SmolLM2-360M", waits=waits)
    metrics = Metrics(status, version="0.9.0", protocol="1.0")
    status.begin_phase("running")
    status.event("info", "the server is listening")
    status.round_done(evaluation_record(0, len(names)))
    for seat, name in enumerate(names):
        status.seat(seat, name=name, state="ready", memory_bytes=(3 + seat) * 1_100_000_000, silent_s=1.0)
        status.event("info", "joined", seat)
    for number in range(1, rounds_done + 1):
        status.round_begins(number)
        for step in range(1, STEPS + 1):
            for seat in range(len(names)):
                advance(status, metrics, seat, number, step)
        status.round_done(round_record(number, len(names)))
        status.round_done(evaluation_record(number, len(names)))
        metrics.round_took(38.0)
        metrics.checkpoint_took(0.4)
        status.event("info", f"round {number} committed, {len(names)} updates")
    return status, metrics


def midway(status: ServerStatus, metrics: Metrics, number: int = 8) -> None:
    """Into the next round: the first three at different steps, the fourth gone."""
    status.round_begins(number)
    for seat, steps in ((0, 7), (1, 5), (2, 9)):
        for step in range(1, steps + 1):
            advance(status, metrics, seat, number, step)
    status.seat(1, state="waiting", reconnects=2)
    status.seat(3, state="lost", silent_s=74.0)
    status.event("warning", "connection broken: no sign of life for 20 s", 3)
    status.event("warning", "its update of round 8 is not waited for any longer", 3)
    status.event("error", "message refused: values that are not finite (1 of 3 strikes)", 1)
    status.stage("training, 3 of 4 clients")


def advance(status: ServerStatus, metrics: Metrics, seat: int, number: int, step: int) -> None:
    seconds = 2048 / (900.0 * SPEED[seat % 4] * (1 + 0.2 * spread(seat, step)))
    status.traffic(seat, up_bytes=511_000, down_bytes=498_000)
    status.step_done(seat, step, STEPS, 2048, seconds, loss=loss_of(seat, number + step / STEPS), wait_s=0.04 + 0.02 * seat)
    metrics.traffic("up", "activations", 511_000)
    metrics.traffic("down", "gradients", 498_000)
    metrics.tokens(2048)
    metrics.step(seconds)
    metrics.server_pass(1 + seat)
