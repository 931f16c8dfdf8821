"""What client-level differential privacy costs: held-out loss against epsilon, for rule `private`, in runs of a hundred clients.

    python -m experiments.utility                          the embedded model, about ten minutes on two cores
    python -m experiments.utility --seeds 1 2 3

Every point is a whole run (`splitft run`); points that are there already are kept. Results go to experiments/results/utility-NAME.json and,
as a table, to standard output. The noise is drawn from the seed, so that the table can be made again: nobody may do so in earnest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

RESULTS = Path(__file__).parent / "results"
CLIENTS, ROUNDS, DELTA = 100, 10, 1e-5
EPSILONS = (64.0, 32.0, 16.0, 8.0, 4.0, 2.0)
NO_CLIP, CLIP_ONLY = "no clip", "clip only"
BASE = [
    f"rounds={ROUNDS}",
    f"clients.count={CLIENTS}",
    "tokens.block_tokens=32",
    "tokens.held_out=0",
    "train.batch_size=4",
    "train.local_steps=2",
    "train.learning_rate=1e-2",
    "lora.rank=2",
    "policy.name=fixed",
    "evaluate.max_rows=128",
    f"evaluate.every_rounds={ROUNDS}",
    "engine.threads=1",
]


def points() -> dict[str, str]:
    """Name -> the aggregator. What would drown in noise is run all the same here, to show that it does."""
    # The seed of the noise is the run's; `most_noise` lets pass what a user would be refused.
    private = '{name="private",rule="freeze_a",clip=4.0,delta=%g,most_noise=1e6,secret_seed=SEED,%s}'
    return {
        NO_CLIP: '{name="freeze_a"}',
        CLIP_ONLY: private % (DELTA, "noise_multiplier=0.0"),
        **{f"{epsilon:g}": private % (DELTA, f"epsilon={epsilon:g}") for epsilon in EPSILONS},
    }


def measured(aggregator: str, seed: int, folder: Path, model: str) -> dict[str, Any]:
    """One point: train, read what the journal says."""
    run = folder / "point"
    shutil.rmtree(run, ignore_errors=True)
    given = [f"model.path={model}", f"run.folder={folder}", f"seed={seed}", f"aggregator={aggregator.replace('SEED', str(seed))}"]
    command = [sys.executable, "-m", "splitft", "run", "--quiet", "--name", run.name, *BASE, *given]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    events = [json.loads(line) for line in (run / "journal.jsonl").read_text("utf-8").splitlines()]
    losses = [event["global"]["loss"] for event in events if event["event"] == "evaluation"]
    facts = next((event["facts"] for event in reversed(events) if event["event"] == "round" and "facts" in event), {})
    return {"before": losses[0], "loss": losses[-1], "facts": {key: value for key, value in facts.items() if "private" in key}}


def series(results: dict[str, Any]) -> dict[str, list[float]]:
    """Name -> held-out losses after training, one a seed."""
    found: dict[str, list[float]] = {}
    for row in results["rows"]:
        found.setdefault(row["name"], []).append(row["loss"])
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown: mean and range over the seeds."""
    found, before = series(results), fmean(row["before"] for row in results["rows"])
    names = [name for name in points() if name in found]
    heads = [name if name in (NO_CLIP, CLIP_ONLY) else f"ε {name}" for name in names]
    means = [f"{fmean(found[name]):.3f}" for name in names]
    ranges = [f"{min(found[name]):.3f} to {max(found[name]):.3f}" for name in names]
    lines = [f"| untrained {before:.3f} | {' | '.join(heads)} |", f"|---|{'---:|' * len(names)}"]
    return "\n".join([*lines, f"| held-out loss | {' | '.join(means)} |", f"| seeds | {' | '.join(ranges)} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/utility"))
    chosen = parser.parse_args()
    name = Path(chosen.model).name
    path = RESULTS / f"utility-{name}.json"
    results: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {"model": name, "base": BASE, "rows": []}
    known = {(row["name"], row["seed"]) for row in results["rows"]}
    for seed in chosen.seeds:
        for point, aggregator in points().items():
            if (point, seed) in known:
                continue
            row = {"name": point, "seed": seed, **measured(aggregator, seed, chosen.folder, chosen.model)}
            results["rows"].append(row)
            path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
            print(point, seed, row["loss"], file=sys.stderr)
    print(table(results))


if __name__ == "__main__":
    main()
