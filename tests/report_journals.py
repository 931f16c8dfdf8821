"""Journals of runs that never were, for the tests of the report: any number of clients and rounds, gaps and damage by request."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitft.rng import numpy_stream

STAGES = ("front_forward", "uplink", "back", "downlink", "front_backward")
PROFILES = ("phone", "laptop", "tablet", "desktop", "edge-gpu")


@dataclass(frozen=True)
class Journal:
    """Knobs of a made-up run. `participation`: share of clients in a round; `busy`: write `busy_s`; `drawn_steps` of the time line.

    `adaptive`: cuts that move, are refused and oscillate, ranks that differ, clients cut short and lost, rounds not aggregated.
    Without it a journal is as the first version wrote it. `asynchronous_events` makes a run whose updates are merged as they arrive.
    """

    clients: int = 5
    rounds: int = 5
    steps: int = 10
    participation: float = 1.0
    finished: bool = True
    busy: bool = False
    drawn_steps: int = 2
    names: tuple[str, ...] = ()
    seed: int = 0
    adaptive: bool = False

    def name(self, client: int) -> str:
        return self.names[client] if client < len(self.names) else f"client-{client}"

    def start_event(self) -> dict[str, Any]:
        stream = numpy_stream(self.seed, "journal", 0)
        clients = []
        for client in range(self.clients):
            centre = 6 * (client + 0.5) / self.clients
            histogram = [int(40 * math.exp(-((bucket - centre) ** 2) / 2.5) + stream.integers(0, 5)) for bucket in range(6)]
            documents = sum(histogram)
            clients.append(
                {
                    "client": client, "name": self.name(client), "documents": documents, "train_rows": documents * 3,
                    "train_tokens": documents * 380, "held_out_tokens": documents * 40,
                    "profile": PROFILES[client % len(PROFILES)], "length_histogram": histogram,
                }
            )  # fmt: skip
        model = {
            "name": "embedded", "architecture": "LlamaForCausalLM", "parameters": 3_412_480, "blocks": 6,
            "hidden_size": 192, "vocabulary": 4096,
        }  # fmt: skip
        return {
            "event": "run_started", "version": "0.1.0", "utc": "2026-04-01T09:30:00+00:00", "name": "demo",
            "config": self.config(), "model": model, "clients": clients, "length_edges": [0, 64, 128, 256, 512, 1024, 4096],
            "skew_index": 0.31, "partition": "length_dirichlet",
            "references": ["SplitFT, arXiv:2604.26388", "LoRA, Hu et al. 2021, arXiv 2106.09685", "FedAvg, arXiv:1602.05629"],
        }  # fmt: skip

    def config(self) -> dict[str, Any]:
        return {
            "name": "demo", "seed": self.seed, "rounds": self.rounds,
            "model": {"path": "embedded", "dtype": "auto", "attention": "sdpa"},
            "lora": {"rank": 8, "alpha": 16.0, "targets": ["q_proj", "v_proj"]},
            "data": {"name": "python_docs"}, "partition": {"name": "length_dirichlet", "alpha": 0.5},
            "clients": {"count": self.clients, "profiles": list(PROFILES), "participation": self.participation},
            "policy": {"name": "fixed", "cuts": [1, 2, 3]}, "train": {"local_steps": self.steps, "batch_size": 4, "learning_rate": 2e-3},
            "uplink": {"name": "cast", "dtype": "bfloat16"}, "downlink": {"name": "cast", "dtype": "bfloat16"},
            "aggregator": {"name": "average"}, "note": None,
        }  # fmt: skip

    def participants(self, number: int) -> list[int]:
        count = max(1, round(self.clients * self.participation))
        order = numpy_stream(self.seed, "participants", number).permutation(self.clients)
        return sorted(int(client) for client in order[:count])

    def evaluation_event(self, number: int) -> dict[str, Any]:
        scores = []
        present = range(self.clients) if number == 0 or self.participation == 1 else self.participants(number)
        for client in present:
            loss = 2.45 + 0.25 * math.sin(client * 2.1) + (1.1 + 0.2 * math.cos(client)) * math.exp(-0.45 * number)
            scores.append(
                {"client": client, "loss": loss, "perplexity": math.exp(loss), "accuracy": 0.62 - loss / 10, "tokens": 900 + client}
            )
        mean = sum(score["loss"] for score in scores) / len(scores)
        overall = {
            "loss": mean,
            "perplexity": math.exp(mean),
            "accuracy": 0.62 - mean / 10,
            "tokens": sum(score["tokens"] for score in scores),
        }
        return {"event": "evaluation", "round": number, "global": overall, "clients": scores}

    def adapted_event(self, number: int, start_s: float) -> dict[str, Any]:
        """The round with all that adaptation may add to it."""
        event = self.round_event(number, start_s)
        event |= {"aggregated": number % 4 != 2, "metrics": {"discarded_energy": 0.02 / number, "clip_limit": 1.5, "never": 0.0}}
        for part in event["clients"]:
            client = part["client"]
            part |= {"cut": 1 + (client + number // 2) % 5, "status": self.state(client, number), "truncated": 0.001 * (client % 3)}
            part["predicted_s"] = sum(part["busy_s"].values()) / (1.0 + 0.1 * (client % 4))
            part["ranks"] = [4 if block == part["cut"] - 1 else 8 for block in range(6) for _ in range(2)]
            if part["cut"] == 4:
                part["refused_cut"] = 5
                part["bytes"]["down"]["weights"] = 400_000
            if part["status"] != "done":
                part["steps"] = max(1, self.steps // 2)
            if part["status"] == "lost":
                part["finish_s"] = start_s + 0.4 * (part["finish_s"] - start_s)
                part["server_wait_s"] *= 0.4
                part["busy_s"] = {kind: 0.4 * seconds for kind, seconds in part["busy_s"].items()}
                part["barrier_wait_s"] = event["virtual_end_s"] - part["finish_s"]
                event["timeline"] = [
                    [who, kind, max(begin, part["finish_s"]) if kind == "barrier_wait" else begin, end]
                    for who, kind, begin, end in event["timeline"]
                    if who != client or end <= part["finish_s"]
                ] + [[client, "barrier_wait", part["finish_s"], event["virtual_end_s"]]]
        return event

    def state(self, client: int, number: int) -> str:
        """What becomes of a client's part in an adaptive run."""
        return {0: "lost", 1: "partial"}.get((client * 3 + number * 5) % 11, "done")

    def warning_event(self, number: int, client: int) -> dict[str, Any]:
        text = f"the cut of client {client} goes back and forth: [1, 2, 1, 2]; give the policy a wider dead band or a longer cool-down."
        return {"event": "warning", "round": number, "client": client, "text": text}

    def round_event(self, number: int, start_s: float) -> dict[str, Any]:
        present = self.participants(number)
        tracks = {client: self._track(client, number, start_s, place, len(present)) for place, client in enumerate(present)}
        end_s = max(track[-1][3] for track in tracks.values())
        timeline: list[list[Any]] = []
        clients = []
        for client, track in tracks.items():
            finish = track[-1][3]
            wait = sum(stage[3] - stage[2] for stage in track if stage[1] == "server_wait")
            busy: dict[str, float] = {}
            for _, kind, begin, end in track:
                if kind != "server_wait":
                    busy[kind] = busy.get(kind, 0.0) + end - begin
            timeline += self._drawn(track)
            if finish < end_s:
                timeline.append([client, "barrier_wait", finish, end_s])
            clients.append(
                self._client(client, number, finish, wait, end_s - finish) | ({"busy_s": busy} if self.busy or self.adaptive else {})
            )
        stream = numpy_stream(self.seed, "steps", number)
        losses = [
            2.5 + 1.3 * math.exp(-0.05 * ((number - 1) * self.steps + step)) + 0.06 * stream.standard_normal() for step in range(self.steps)
        ]
        return {
            "event": "round", "round": number, "clients": clients, "step_losses": losses, "virtual_start_s": start_s,
            "virtual_end_s": end_s, "wall_s": 3.4, "learning_rate": 2e-3 * (1 - (number - 1) / self.rounds), "timeline": timeline,
        }  # fmt: skip

    def _track(self, client: int, number: int, start_s: float, place: int, count: int) -> list[tuple[int, str, float, float]]:
        stream = numpy_stream(self.seed, "track", client, number)
        speed = 1.0 + 1.6 * (client % 5) / 4
        link = 0.15 + 0.5 * ((client * 3) % 5) / 4
        lengths = {"front_forward": 0.35 * speed, "uplink": link, "back": 0.18, "downlink": link / 2, "front_backward": 0.55 * speed}
        now = start_s + link / 3
        track = [(client, "adapters_down", start_s, now)]
        for _ in range(self.steps):
            for kind in STAGES:
                if kind == "back" and count > 1:
                    wait = 0.05 * place + 0.1 * float(stream.random())
                    track.append((client, "server_wait", now, now + wait))
                    now += wait
                length = lengths[kind] * (0.95 + 0.1 * float(stream.random()))
                track.append((client, kind, now, now + length))
                now += length
        track.append((client, "adapters_up", now, now + link))
        return track

    def _drawn(self, track: Sequence[tuple[int, str, float, float]]) -> list[list[Any]]:
        """The first steps, the last one, and both ends, as the engine writes them."""
        step, kept = 0, []
        for stage in track:
            step += stage[1] == "front_forward"
            if step <= self.drawn_steps or step == self.steps or stage[1].startswith("adapters"):
                kept.append(list(stage))
        return kept

    def _client(self, client: int, number: int, finish_s: float, server_wait_s: float, barrier_wait_s: float) -> dict[str, Any]:
        tokens = self.steps * 4 * 128
        cut = 1 + (client + (number > 2 and client % 3 == 1)) % 4
        down = {"activations": 0, "gradients": tokens * 384, "labels": 0, "adapters": cut * 52_000, "control": 900}
        up = {"activations": tokens * 384, "gradients": 0, "labels": tokens * 4, "adapters": cut * 52_000, "control": 1400}
        loss = 2.5 + 0.2 * math.sin(client) + math.exp(-0.5 * number)
        return {
            "client": client, "cut": cut, "rank": 8, "steps": self.steps, "tokens": tokens, "targets": tokens,
            "loss_first": loss + 0.1, "loss_mean": loss,
            "loss_last": loss - 0.1, "finish_s": finish_s, "server_wait_s": server_wait_s, "barrier_wait_s": barrier_wait_s,
            "bytes": {"up": up, "down": down},
        }  # fmt: skip

    def events(self) -> list[dict[str, Any]]:
        events = [self.start_event(), self.evaluation_event(0)]
        now = 0.0
        for number in range(1, self.rounds + 1):
            if not self.finished and number == self.rounds:
                break
            if self.adaptive and number % 3 == 2:
                events.append(self.warning_event(number, number % self.clients))
            events.append(self.adapted_event(number, now) if self.adaptive else self.round_event(number, now))
            now = events[-1]["virtual_end_s"]
            events.append(self.evaluation_event(number))
        if self.finished:
            events.append({"event": "run_finished", "rounds": self.rounds, "wall_s": 4.0 * self.rounds, "virtual_s": now})
        return events

    def write(self, folder: Path) -> Path:
        """The journal in `folder`, which is returned."""
        return write_events(folder, self.events())


def asynchronous_events() -> list[dict[str, Any]]:
    """Three clients, two updates merged at a time. Client 2 is slow: it begins in round 1 and is merged in round 2, one version late;
    client 0 is lost in round 2."""
    base = Journal(clients=3, rounds=2, adaptive=True)
    events = [base.start_event(), base.evaluation_event(0)]

    def record(client: int, finish_s: float, busy_s: float, **more: Any) -> dict[str, Any]:
        made = base._client(client, 1, finish_s, 0.0, 99.0)
        return made | {"status": "done", "busy_s": {"front_forward": busy_s}, "predicted_s": busy_s / 2} | more

    def bars(client: int, start_s: float, end_s: float, until_s: float) -> list[list[Any]]:
        return [[client, "front_forward", start_s, end_s], [client, "barrier_wait", end_s, until_s]]

    common = {"event": "round", "step_losses": [2.5, 2.4], "wall_s": 1.0, "learning_rate": 1e-3, "aggregated": True, "metrics": {}}
    first = [record(0, 4.0, 4.0, staleness=0), record(1, 6.0, 6.0, staleness=0)]
    second = [record(0, 7.0, 1.0, status="lost"), record(1, 12.0, 6.0, staleness=0), record(2, 9.0, 9.0, staleness=1)]
    started = [*bars(0, 0.0, 4.0, 9.0), *bars(1, 0.0, 6.0, 9.0), *bars(2, 0.0, 9.0, 9.0)]
    again = [*bars(0, 6.0, 7.0, 12.0), *bars(1, 6.0, 12.0, 12.0)]
    times = ({"virtual_start_s": 0.0, "virtual_end_s": 6.0}, {"virtual_start_s": 6.0, "virtual_end_s": 12.0})
    events.append(common | times[0] | {"round": 1, "clients": first, "timeline": started})
    events.append(common | times[1] | {"round": 2, "clients": second, "timeline": again})
    return [*events, base.evaluation_event(2)]


def write_events(folder: Path, events: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder
