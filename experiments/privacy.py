"""What cut, codec, noise, bottleneck and tail buy and cost: one table of leak, perplexity and bytes for a model.

    python -m experiments.privacy                          the embedded model, about ten minutes on two cores
    python -m experiments.privacy --model FOLDER           another one
    python -m experiments.privacy --again noise trained    the rows with one of these words in their name once more (no words: all)
    python -m experiments.privacy --again noise --audit    the same, of the runs that are there: only their audits are made anew

Every row is a whole run (`splitft run`) and an audit of its end (`splitft audit`); rows that are there already are kept. Results go to
experiments/results/privacy-NAME.json and, as a table, to standard output.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BASE = [
    "rounds=3",
    "clients.count=4",
    "tokens.block_tokens=64",
    "train.local_steps=20",
    "train.learning_rate=2e-3",
    "lora.targets=all",
    "policy.name=fixed",
    "engine.threads=1",
]
BOTTLENECK = 'uplink={name="projection",dimensions=%d,inner={name="cast"}}'


def rows(blocks: int, width: int) -> dict[str, list[str]]:
    """Name -> overrides. The middle cut unless the row is about cuts."""
    middle, quarter = blocks // 2, width // 4
    cut = f"policy.cuts=[{middle}]"
    noisy = 'uplink={name="noise",clip=0,multiple=%g,inner={name="cast"}}'
    both = 'uplink={name="noise",clip=0,multiple=%g,inner={name="projection",dimensions=%d,inner={name="cast"}}}'
    client = ["split.labels=client"]
    return {
        "cut 1": ["policy.cuts=[1]"],
        f"cut {middle}": [cut],
        f"cut {blocks - 1}": [f"policy.cuts=[{blocks - 1}]"],
        "int8": [cut, 'uplink={name="quantize",bits=8}'],
        "int4": [cut, 'uplink={name="quantize",bits=4}'],
        "noise 0.5 rms": [cut, noisy % 0.5],
        "noise 1 rms": [cut, noisy % 1.0],
        "noise 2 rms": [cut, noisy % 2.0],
        f"bottleneck {quarter} of {width}": [cut, BOTTLENECK % quarter],
        f"bottleneck {quarter // 2} of {width}": [cut, BOTTLENECK % (quarter // 2)],
        f"bottleneck {quarter}, noise 1 rms": [cut, both % (1.0, quarter)],
        f"bottleneck {quarter // 2}, noise 1 rms": [cut, both % (1.0, quarter // 2)],
        "U-shape, head": [cut, *client],
        "U-shape, one block": [cut, *client, "split.tail_blocks=1"],
        f"axes kept, {quarter} of {width}": [cut, *trained(quarter, learning_rate=0.0)],
        f"axes kept, {quarter // 2}, noise 1 rms": [cut, *trained(quarter // 2, learning_rate=0.0, noise=1.0)],
        f"trained, {quarter} of {width}": [cut, *trained(quarter)],
        f"trained, {quarter // 2} of {width}": [cut, *trained(quarter // 2)],
        f"trained, {quarter}, noise 1 rms": [cut, *trained(quarter, noise=1.0)],
        f"trained, {quarter // 2}, noise 1 rms": [cut, *trained(quarter // 2, noise=1.0)],
        f"U-shape, head, trained, {quarter}, noise 1 rms": [cut, *client, *trained(quarter, noise=1.0)],
        f"U-shape, head, axes kept, {quarter // 2}, noise 1 rms both ways": [
            cut,
            *client,
            *trained(quarter // 2, learning_rate=0.0, noise=1.0),
            'exit_uplink={name="noise",clip=0,multiple=1.0,inner={name="cast"}}',
        ],
    }


def trained(channels: int, **fields: float) -> list[str]:
    """A bottleneck that is trained with the adapters."""
    return [f"bottleneck.channels={channels}", *(f"bottleneck.{name}={value}" for name, value in fields.items())]


def is_wanted_again(row: str, words: list[str] | None) -> bool:
    """Whether `--again` names a row; None: it was not given."""
    return words is not None and (not words or any(word in row for word in words))


def command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "splitft", *arguments], check=True, stdout=subprocess.DEVNULL)


def measured(name: str, overrides: list[str], folder: Path, model: str, audit_only: bool) -> dict[str, Any]:
    """One row: train, audit, read what both left."""
    run = folder / name.replace(" ", "-").replace(",", "").replace(".", "_")
    if not audit_only or not (run / "adapter").is_dir():
        shutil.rmtree(run, ignore_errors=True)
        command("run", "--quiet", "--name", run.name, *BASE, f"model.path={model}", f"run.folder={folder}", *overrides)
    command("audit", str(run), "--quiet", "--sequences", "4", "--tokens", "48", "--seconds", "400")
    events = [json.loads(line) for line in (run / "journal.jsonl").read_text("utf-8").splitlines()]
    scored = [event["global"] for event in events if event["event"] == "evaluation"]
    through = [one["perplexity"] for event in events if event["event"] == "bottleneck" for one in event["through"]]
    trained = [event for event in events if event["event"] == "round"]
    sent = sum(sum(sum(kinds.values()) for kinds in one["bytes"].values()) for event in trained for one in event["clients"])
    audit = json.loads((run / "audit.json").read_text("utf-8"))
    found: dict[str, float] = {}
    for one in audit["cuts"][0]["findings"]:  # the best of first and later visits
        found[one["attacker"]] = max(found.get(one["attacker"], 0.0), one["figures"]["accuracy"])
    return {
        "before": scored[0]["perplexity"],
        "perplexity": scored[-1]["perplexity"],
        "through": next(iter(through), None),
        "bytes": sent,
        "leaks": found,
        "labels_sent": audit["labels_sent"],
        "verdict": audit["verdict"],
        "floors": audit["floors"],
        "visits": audit["visits"],
        "times_sent": audit["times_sent"],
        "notes": audit["notes"],
    }


def table(results: dict[str, Any], order: list[str]) -> str:
    """The rows as Markdown."""
    head = "| uplink, cut, tail | perplexity | through | MB | visits | K, adapter known | B, base only | L, labels | K+L |"
    lines = [head, "|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for name, one in ((name, results["rows"][name]) for name in order):
        leaks = one["leaks"]
        labels = "sent" if one["labels_sent"] else " / ".join(f"{leaks[key]:.3f}" for key in ("L", "L base") if key in leaks)
        ways = [f"{leaks[key]:.3f}" if key in leaks else "" for key in ("K", "B", "K+L")]
        through = "" if one.get("through") is None else f"{one['through']:.1f}"
        first = f"| {name} | {one['perplexity']:.1f} | {through} | {one['bytes'] / 1e6:.1f} | {one.get('visits', 1)}"
        lines.append(f"{first} | {ways[0]} | {ways[1]} | {labels} | {ways[2]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--folder", type=Path, default=Path("runs/privacy"))
    parser.add_argument("--again", nargs="*", metavar="WORD", help="measure rows again whose name has one of these words; no words: all")
    parser.add_argument("--audit", action="store_true", help="train nothing that is there: make the audits anew")
    chosen = parser.parse_args()
    from splitft.models.load import load_model_config

    text = load_model_config(chosen.model).get_text_config()
    name = Path(chosen.model).name
    path = RESULTS / f"privacy-{name}.json"
    results: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {"model": name, "base": BASE, "rows": {}}
    wanted = rows(int(text.num_hidden_layers), int(text.hidden_size))
    for row, overrides in wanted.items():
        if row in results["rows"] and not is_wanted_again(row, chosen.again):
            continue
        results["rows"][row] = measured(row, overrides, chosen.folder / name, chosen.model, chosen.audit)
        path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        print(row, results["rows"][row]["perplexity"], results["rows"][row]["leaks"], file=sys.stderr)
    print(table(results, list(wanted)))


if __name__ == "__main__":
    main()
