"""A run's journal as a few numbers a round: bytes so far, loss, dial, errors, and virtual seconds on other links."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from splitft.adapt.profiles import load_profiles
from splitft.apps.report_codecs import codec_sums
from splitft.apps.report_record import load_record
from splitft.clock import ADAPTERS_DOWN, ADAPTERS_UP, BLOCKS_DOWN, ClientSchedule, Resource, Stage, Step, simulate_round
from splitft.types import Profile

LINKS_FILE = Path(__file__).resolve().parent / "links.toml"
LINKS = {"1 Mbit/s": "laptop-1", "10 Mbit/s": "laptop-10", "100 Mbit/s": "laptop-100"}
Event = Mapping[str, Any]
# One line a round. Bytes, both sums over clients, and virtual seconds are those since the run began; the rest is the round's own.
# `probe`: coded loss / clean loss - 1 of the controller's probe. Errors: root mean square over that of the values.
COLUMNS = (
    "round",
    "loss",
    "up_activations",
    "up_gradients",
    "up_labels",
    "up_adapters",
    "up_control",
    "down_activations",
    "down_gradients",
    "down_adapters",
    "down_control",
    "dial",
    "dial_gradients",
    "probe",
    "error_activations",
    "error_gradients",
    "residual",
    "skipped",
    *(f"virtual_s {link}" for link in LINKS),
)
SERVER_STAGES = {"back", "back_backward"}
TRANSFERS = {  # stage of a step -> direction and kind of what it carries
    "uplink": (("up", "activations"), ("up", "labels")),
    "downlink_u": (("down", "activations"),),
    "uplink_gradient": (("up", "gradients"),),
    "downlink_gradient": (("down", "gradients"),),
    "downlink": (("down", "gradients"),),
}
ORDER = {
    False: ("front_forward", "uplink", "back", "downlink", "front_backward"),
    True: (
        "front_forward",
        "uplink",
        "back",
        "downlink",
        "exit",
        "uplink_gradient",
        "back_backward",
        "downlink_gradient",
        "front_backward",
    ),
}


def events(folder: Path) -> list[dict[str, Any]]:
    """The journal of a run folder; empty where there is none."""
    path = folder / "journal.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def rounds_done(folder: Path) -> int:
    """How many rounds have been trained and evaluated."""
    return max((event["round"] for event in events(folder) if event["event"] == "evaluation"), default=-1)


def points(folder: Path) -> list[list[float | None]]:
    """The lines of COLUMNS from a run folder, round 0 (before training) first."""
    told = events(folder)
    losses = {event["round"]: event["global"]["loss"] for event in told if event["event"] == "evaluation"}
    trained = [event for event in told if event["event"] == "round"]
    profiles = load_profiles(LINKS_FILE)
    known = {item.round: item for item in load_record(folder / "journal.jsonl").rounds}
    sums = dict.fromkeys([name for name in COLUMNS if name.startswith(("up_", "down_"))], 0)
    ends_s = dict.fromkeys(LINKS, 0.0)
    found = [_line({"round": 0.0, "loss": losses[0], **sums, **{f"virtual_s {link}": 0.0 for link in LINKS}})]
    for event in trained:
        for client in event["clients"]:
            for direction, kinds in client["bytes"].items():
                for kind, count in kinds.items():
                    if count:
                        sums[f"{direction}_{kind}"] += count
        for link, name in LINKS.items():
            ends_s[link] += round_seconds(event["clients"], profiles[name])
        probe, dial, own = event.get("probe") or {}, event.get("dial") or {}, [known[event["round"]]]
        activations, gradients = codec_sums(own, "up activations"), codec_sums(own, "down gradients")
        found.append(
            _line(
                {
                    "round": event["round"],
                    "loss": losses[event["round"]],
                    **sums,
                    "dial": dial.get("activations"),
                    "dial_gradients": dial.get("gradients"),
                    "probe": probe["coded_loss"] / probe["clean_loss"] - 1 if probe else None,
                    "error_activations": activations.error,
                    "error_gradients": gradients.error,
                    "residual": activations.residual_share,
                    "skipped": activations.skip_rate,
                    **{f"virtual_s {link}": seconds for link, seconds in ends_s.items()},
                }
            )
        )
    return found


def _line(values: Mapping[str, float | None]) -> list[float | None]:
    """Whole bytes; other numbers with seven figures."""
    found: list[float | None] = []
    for name in COLUMNS:
        value = values.get(name)
        exact = value is None or name == "round" or name.startswith(("up_", "down_"))
        found.append(value if exact or value is None else float(f"{value:.7g}"))
    return found


def round_seconds(clients: Iterable[Event], link: Profile) -> float:
    """Seconds of a recorded round had every client had this link: its computing takes what it took, its bytes go at the link's rates.

    The journal's own arithmetic (adapt.schedule, engine.attendance.retimed): equal exchanges, each with the mean bytes of the round's, and
    the virtual clock for the queue at the server. Other bytes (control) are not timed.
    """
    return simulate_round([_schedule(client, link) for client in clients], timeline_steps=0).duration_s


def _schedule(client: Event, link: Profile) -> ClientSchedule:
    busy, steps, counted = client["busy_s"], client["steps"], client["bytes"]
    unknown = busy.keys() - {*ORDER[True], ADAPTERS_DOWN, ADAPTERS_UP}
    if BLOCKS_DOWN in unknown or unknown:
        raise ValueError(f"a round with {', '.join(sorted(unknown))} cannot be replayed")

    def moved(kind: str, count: float, direction: str) -> Stage:
        rate = link.uplink_bytes_per_s if direction == "up" else link.downlink_bytes_per_s
        return Stage(kind, "link", count / rate, link.latency_s)

    def stage(kind: str, u_shaped: bool) -> Stage:
        key = "downlink_u" if kind == "downlink" and u_shaped else kind
        if key in TRANSFERS:
            carried = TRANSFERS[key]
            return moved(kind, sum(counted[direction][what] for direction, what in carried) / steps, carried[0][0])
        where: Resource = "server" if kind in SERVER_STAGES else "client"
        return Stage(kind, where, busy[kind] / steps)

    u_shaped = "exit" in busy
    step: Step = tuple(stage(kind, u_shaped) for kind in ORDER[u_shaped])
    down, up = counted["down"]["adapters"], counted["up"]["adapters"]
    before = (moved(ADAPTERS_DOWN, down, "down"),) if down else ()
    after = (moved(ADAPTERS_UP, up, "up"),) if up else ()
    return ClientSchedule(client["client"], (step,) * steps, before, after)
