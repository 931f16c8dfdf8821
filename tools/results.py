"""Keep what `splitft compare` measured: figures of its runs in experiments/results/, and docs/results.md written from them.

python tools/results.py take DIR NAME     take DIR/compare.json as experiments/results/NAME.json
python tools/results.py                   write docs/results.md
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
PAGE = ROOT / "docs" / "results.md"
PROSE = ROOT / "experiments" / "results" / "reading.md"
HEAD = "<!-- Written by tools/results.py from experiments/results; change the figures or reading.md there. -->\n"
Run = Mapping[str, Any]


def take(source: Path, name: str) -> Path:
    """A comparison's figures, small enough to keep: of every finished run the evaluated rounds and what they had cost."""
    found = json.loads((source / "compare.json").read_text(encoding="utf-8"))
    variants = []
    for variant in found["variants"]:
        runs = [_small(run) for run in variant["runs"] if run["status"] == "finished"]
        missing = [f"{run['name']}: {run['status']} {run['error']}".strip() for run in variant["runs"] if run["status"] != "finished"]
        variants.append({"name": variant["name"], "settings": variant["settings"], "runs": runs, "missing": missing})
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"name": found["name"], "variants": variants}, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
    return path


def _small(run: Run) -> dict[str, Any]:
    def line(point: Run) -> list[float]:
        moved = point["bytes_up"] + point["bytes_down"]
        return [
            point["round"],
            *(float(f"{value:.6g}") for value in (point["perplexity"], point["virtual_s"], moved, point["client_compute_s"])),
        ]

    return {"seed": run["seed"], "points": [line(point) for point in run["points"]]}


def load(name: str) -> dict[str, list[Run]]:
    """Runs of every variant of a kept comparison, by its name."""
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return {variant["name"]: variant["runs"] for variant in found["variants"]}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation; one value alone has no spread."""
    if not values:
        return "—"
    mean = statistics.fmean(values)
    return f"{mean:.{digits}f}" if len(values) == 1 else f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def final(run: Run) -> float:
    """Perplexity after the last round."""
    return float(run["points"][-1][1])


def best(run: Run) -> float:
    """Lowest perplexity after training began."""
    return float(min(point[1] for point in run["points"] if point[0] > 0))


def reached(run: Run, target: float, column: int) -> float | None:
    """What a run had spent (column of its points) when it first stood at or below the target; None if it never did."""
    return next((float(point[column]) for point in run["points"] if point[0] > 0 and point[1] <= target), None)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    marks = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, marks, *rows)) + "\n"


def time_table(name: str, baseline: str) -> str:
    """Time to the target of one fleet: per seed the target is the worst final perplexity of any variant on that seed."""
    variants = load(name)
    seeds = sorted({run["seed"] for runs in variants.values() for run in runs})
    targets = {seed: max(final(run) for runs in variants.values() for run in runs if run["seed"] == seed) for seed in seeds}

    def spent(runs: Sequence[Run], column: int) -> list[float]:
        return [value for run in runs if (value := reached(run, targets[run["seed"]], column)) is not None]

    own = {label: spent(runs, 2) for label, runs in variants.items()}
    base = statistics.fmean(own[baseline])
    rows = []
    for label, runs in variants.items():
        times, hits = own[label], f"{len(own[label])}/{len(runs)}"
        faster = f"{base / statistics.fmean(times):.2f}" if times else "—"
        moved = [value / 1e6 for value in spent(runs, 3)]
        rows.append(
            (f"`{label}`", hits, spread(times), faster, spread(spent(runs, 0), 1), spread(moved, 1), spread([final(run) for run in runs]))
        )
    rows.sort(key=lambda row: float(row[2].split(" ")[0]) if row[2] != "—" else 1e9)
    given = ", ".join(f"{targets[seed]:.2f}" for seed in seeds)
    head = ("variant", "reached", "virtual s to target", f"times as fast as `{baseline}`", "rounds", "MB moved", "final perplexity")
    return f"Targets by seed: {given}.\n\n" + table(head, rows)


def quality_table(name: str) -> str:
    """Final and best perplexity of every method at every alpha of a kept comparison."""
    variants = load(name)
    methods = list(dict.fromkeys(label.rsplit("-alpha_", 1)[0] for label in variants))
    alphas = sorted({label.rsplit("-alpha_", 1)[1] for label in variants if "-alpha_" in label}, key=float)
    rows = []
    for method in methods:
        cells = [f"`{method}`"]
        for alpha in alphas:
            runs = variants.get(f"{method}-alpha_{alpha}", [])
            cells += [spread([final(run) for run in runs]), spread([best(run) for run in runs])]
        rows.append(cells)
    rows.sort(key=lambda cells: float(cells[1].split(" ")[0]) if cells[1] != "—" else 1e9)
    head = ["method", *(text for alpha in alphas for text in (f"alpha {alpha}, final", f"alpha {alpha}, best"))]
    return table(head, rows)


def fleets_table() -> str:
    """Seconds of a first round by fleet and server."""
    found = json.loads((RESULTS / "fleets.json").read_text(encoding="utf-8"))
    columns = (
        "best uniform cut",
        "combined",
        "combined, work balanced",
        "adaptive",
        "cut 3, shared server set",
        "whole model on every client",
    )
    rows = []
    for row in found:
        cells = [f"{row['fleet']}, {row['server']}", f"{row[columns[0]]:.2f} (cut {row['best cut']:.0f})"]
        rows.append([*cells, *(f"{row[name]:.2f}" for name in columns[1:])])
    return table(("fleet, server", *columns), rows)


def page() -> str:
    """docs/results.md: the reading, with each `{{table ...}}` line replaced by its table."""
    makers: dict[str, Callable[..., str]] = {"time": time_table, "quality": quality_table, "fleets": fleets_table}
    lines = []
    for line in PROSE.read_text(encoding="utf-8").splitlines():
        if line.startswith("{{") and line.endswith("}}"):
            kind, *arguments = line[2:-2].split()
            lines.append(makers[kind](*arguments).rstrip("\n"))
        else:
            lines.append(line)
    return HEAD + "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    if arguments and arguments[0] == "take":
        print(take(Path(arguments[1]), arguments[2]).relative_to(ROOT))
        return
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])
