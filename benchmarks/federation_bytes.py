"""What passes the sockets of a federation, counted by a proxy in front of every client, against what the run's ledger says."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.net.proxy import Proxy

from benchmarks import federation_parties as parties
from benchmarks.federation_scenes import Federated
from splitft.types import DIRECTIONS


@dataclass(frozen=True)
class Load:
    clients: int = 3
    rounds: int = 5
    rows: int = 4
    tokens: int = 128
    steps: int = 5


def values(load: Load) -> dict[str, Any]:
    """Cuts that move nothing but what a round moves; measured before the first round and after every one."""
    return {
        "name": "bytes",
        "seed": 9,
        "rounds": load.rounds,
        "lora": {"rank": 8, "alpha": 16.0},
        "tokens": {"block_tokens": load.tokens, "common_held_out": 0.0},
        "clients": {"count": load.clients, "minimum": load.clients},
        "policy": {"name": "fixed", "cuts": [2 + client % 3 for client in range(load.clients)]},
        "train": {"local_steps": load.steps, "batch_size": load.rows, "moments": "keep"},
        "evaluate": {"max_rows": 4, "every_rounds": load.rounds},
        "engine": {"device": "cpu"},
    }


def measure(load: Load, folder: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    parties.write_texts(folder / "texts", load.clients, 60)
    federated = Federated(folder, values(load), load.clients)
    with ExitStack() as stack:
        stack.callback(federated.close)
        federated.serve("bytes")
        proxies = [stack.enter_context(Proxy("127.0.0.1", federated.port)) for _ in range(load.clients)]
        # Caches of their own: every client fetches its part of the model.
        federated.join(range(load.clients), {client: proxy.port for client, proxy in enumerate(proxies)}, own_cache=True)
        assert federated.server is not None
        marks = []
        for _ in range(load.rounds):
            federated.round()
            time.sleep(0.5)  # acknowledgments that are under way
            marks.append({"up": sum(one.bytes_up for one in proxies), "down": sum(one.bytes_down for one in proxies)})
        events = parties.events_of(federated.run_folder, "round"), parties.events_of(federated.run_folder, "evaluation")
    row = _row(marks, *events, load)
    say(f"bytes at the sockets beyond the ledger: {100 * row['excess']:+.2f} %; of training {100 * row['middle_excess']:+.2f} %")
    return [row]


def _row(marks: list[dict[str, int]], rounds: list[dict[str, Any]], scores: list[dict[str, Any]], load: Load) -> dict[str, Any]:
    """All of it, and the rounds without measurements by themselves."""
    listed = [{way: _listed(one, way) for way in DIRECTIONS} for one in rounds]
    measured = {way: sum(one["bytes"][way] for one in scores) for way in DIRECTIONS}
    total = {way: sum(one[way] for one in listed) for way in DIRECTIONS}
    middle = {way: marks[-2][way] - marks[0][way] for way in DIRECTIONS}
    middle_listed = {way: sum(one[way] for one in listed[1:-1]) for way in DIRECTIONS}
    return {
        "group": "bytes",
        "clients": load.clients,
        "rounds": load.rounds,
        "socket": marks[-1],
        "ledger": total,
        "measuring": measured,
        "weights": sum(client["bytes"]["down"]["weights"] for one in rounds for client in one["clients"]),
        "excess": sum(marks[-1].values()) / (sum(total.values()) + sum(measured.values())) - 1.0,
        "middle_socket": middle,
        "middle_ledger": middle_listed,
        "middle_excess": sum(middle.values()) / sum(middle_listed.values()) - 1.0,
    }


def _listed(event: dict[str, Any], way: str) -> int:
    return sum(sum(client["bytes"][way].values()) for client in event["clients"])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: both sides of the account."""
    lines = ["| what | at the sockets, MB | in the journal, MB | more |", "|---|---:|---:|---:|"]
    for row in rows:
        whole = sum(row["ledger"].values()) + sum(row["measuring"].values())
        own = f"of it {row['weights'] / 1e6:.1f} the model's parts, {sum(row['measuring'].values()) / 1e6:.1f} held-out measurements"
        lines.append(
            f"| whole run of {row['clients']} clients, {own} | {sum(row['socket'].values()) / 1e6:.2f} | {whole / 1e6:.2f} "
            f"| **{100 * row['excess']:+.2f} %** |"
        )
        socket, listed = sum(row["middle_socket"].values()), sum(row["middle_ledger"].values())
        lines.append(f"| rounds that only train | {socket / 1e6:.2f} | {listed / 1e6:.2f} | {100 * row['middle_excess']:+.2f} % |")
    return lines
