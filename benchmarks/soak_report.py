"""What an hour's soak gave: slopes of memory, descriptors and threads of every server process, loss over time; as JSON and as a plot."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import WIDTH_PX, stand_alone
from splitft.apps.plot_lines import draw_axes
from splitft.apps.plots import Drawing, linear_scale
from splitft.apps.report_files import write_atomically

SETTLED_S = 300.0  # a process is judged from here on: until then caches and pools fill
LEAST_SAMPLES = 12
Samples = list[dict[str, Any]]


def read_samples(folder: Path) -> tuple[Samples, Samples]:
    """Samples, and the deeds between them."""
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text("utf-8").splitlines()]
    return [one for one in lines if "server" in one and "resident_bytes" in one["server"]], [one for one in lines if "deed" in one]


def slope(at: Sequence[float], values: Sequence[float]) -> float:
    """Least squares, per unit of `at`."""
    return statistics.linear_regression(at, values).slope


def process_of(samples: Samples) -> dict[str, Any]:
    """One server process, once it has settled."""
    begun_s = samples[0]["elapsed_s"]
    settled = [one for one in samples if one["elapsed_s"] - begun_s >= SETTLED_S]
    found: dict[str, Any] = {"from_s": begun_s, "to_s": samples[-1]["elapsed_s"], "samples": len(samples), "judged": len(settled)}
    if len(settled) < LEAST_SAMPLES:
        return found
    hours = [one["elapsed_s"] / 3600 for one in settled]
    for name in ("resident_bytes", "descriptors", "threads"):
        values = [float(one["server"][name]) for one in settled]
        found[name] = {"first": values[0], "last": values[-1], "least": min(values), "most": max(values), "an_hour": slope(hours, values)}
    return found


def summary(folder: Path) -> dict[str, Any]:
    """The result of a soak as values."""
    samples, deeds = read_samples(folder)
    by_process: dict[int, Samples] = {}
    for one in samples:
        by_process.setdefault(int(one["server"]["pid"]), []).append(one)
    spent: dict[int, float] = {}
    for one in samples:
        for party in (one["server"], *one["clients"].values()):
            spent[int(party["pid"])] = max(spent.get(int(party["pid"]), 0.0), float(party.get("processor_s", 0.0)))
    losses = [(one["elapsed_s"], one["held_out_loss"]) for one in samples if one["held_out_loss"] is not None]
    last = samples[-1]
    return {
        "elapsed_s": last["elapsed_s"],
        "rounds": last["round"],
        "deeds": dict(Counter(str(one["deed"]) for one in deeds)),
        "servers": [process_of(own) for own in by_process.values()],
        "client_processes": len(spent) - len(by_process),
        "client_resident_bytes": max(float(party.get("resident_bytes", 0)) for one in samples for party in one["clients"].values()),
        "cores": sum(spent.values()) / last["elapsed_s"],
        "journal_bytes": last["journal_bytes"],
        "folder_bytes": last["folder_bytes"],
        "loss_first": losses[0][1],
        "loss_last": losses[-1][1],
        "loss_best": min(loss for _, loss in losses),
        "metrics_unanswered": sum(one["metrics"] != "200" for one in samples),
    }


def sentence(found: dict[str, Any]) -> str:
    """The result in words."""
    longest = max(found["servers"], key=lambda one: one["to_s"] - one["from_s"])
    parts = [f"{found['elapsed_s'] / 60:.0f} minutes, {found['rounds']} rounds, deeds: {found['deeds']}"]
    if "resident_bytes" in longest:
        memory, files, threads = longest["resident_bytes"], longest["descriptors"], longest["threads"]
        parts.append(
            f"longest server process {(longest['to_s'] - longest['from_s']) / 60:.0f} minutes: "
            f"{memory['first'] / 1e6:.1f} to {memory['last'] / 1e6:.1f} MB ({memory['an_hour'] / 1e6:+.2f} MB an hour), "
            f"{files['least']:.0f} to {files['most']:.0f} descriptors ({files['an_hour']:+.1f} an hour), "
            f"{threads['least']:.0f} to {threads['most']:.0f} threads"
        )
    parts.append(f"held-out loss {found['loss_first']:.3f} to {found['loss_last']:.3f}; {found['cores']:.2f} cores in all")
    return "; ".join(parts)


PANELS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "resident memory of the server, MB": lambda one: one["server"]["resident_bytes"] / 1e6,
    "open descriptors (solid) and threads (dashed)": lambda one: float(one["server"]["descriptors"]),
    "held-out loss of the joined model": lambda one: one["held_out_loss"],
    "journal, kB": lambda one: one["journal_bytes"] / 1e3,
}


def plot(folder: Path) -> str:
    """Four panels over the minutes; faint lines where the server was restarted."""
    samples, deeds = read_samples(folder)
    restarts = [one["elapsed_s"] / 60 for one in deeds if one["deed"] == "server: start"]
    drawing, half = Drawing(WIDTH_PX, 640), WIDTH_PX / 2
    for place, (title, value) in enumerate(PANELS.items()):
        left, top = 70 + half * (place % 2), 40 + 310 * (place // 2)
        points = [(one["elapsed_s"] / 60, value(one), one["server"]["pid"]) for one in samples if value(one) is not None]
        x = linear_scale([0.0, *(at for at, _, _ in points)], left, left + half - 100)
        y = linear_scale([one for _, one, _ in points], top + 220, top, zero=place != 2)
        draw_axes(drawing, x, y, "minutes", title)
        for at in restarts:
            drawing.line(x(at), top, x(at), top + 220, "rule")
        for pid in dict.fromkeys(own for _, _, own in points):
            drawing.path([(x(at), y(one)) for at, one, own in points if own == pid], "line bold c0")
            if place == 1:
                threads = [(x(one["elapsed_s"] / 60), y(one["server"]["threads"])) for one in samples if one["server"]["pid"] == pid]
                drawing.path(threads, "line c1 dash")
    return stand_alone(drawing, "soak", "An hour of a federation with churn", "Memory, descriptors, loss and journal over the minutes.")


def write_report(folder: Path, path: Path) -> None:
    """The result at `path`, JSON with the samples; its plot beside it as SVG."""
    samples, deeds = read_samples(folder)
    found = summary(folder)
    kept = [{name: one[name] for name in ("elapsed_s", "server", "journal_bytes", "round", "held_out_loss")} for one in samples]
    told = [{name: value for name, value in one.items() if name not in ("text", "pid")} for one in deeds]
    write_atomically(path, (json.dumps({"schema": 1, "summary": found, "samples": kept, "deeds": told}) + "\n").encode())
    write_atomically(path.with_suffix(".svg"), plot(folder).encode())
    print(sentence(found))
