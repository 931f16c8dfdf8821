"""Run the comparison of codecs and write its page.

python -m experiments.codecs run --data TEXTS --models MODELS     train what is missing, keep its figures, write the page
python -m experiments.codecs page                                 write docs/codecs_results.md and its images from the kept figures
"""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from experiments.codecs.runs import Job, Places, jobs, run_all, train


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.codecs", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run, one = commands.add_parser("run", help="train what is missing, then write the page"), commands.add_parser("train")
    commands.add_parser("page", help="write the page from the kept figures")
    for command in (run, one):
        command.add_argument(
            "--data", type=Path, required=True, help="folder of texts: e2e/train.jsonl.gz, tinyshakespeare/speeches.jsonl.gz"
        )
        command.add_argument("--models", type=Path, required=True, help="folder of models: babyllama105")
        command.add_argument("--work", type=Path, default=Path("runs/codecs"), help="folder of run folders")
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--only", nargs="+", default=[], metavar="STACK", help="stacks to run; all if left out")
    run.add_argument("--settings", nargs="+", default=[], metavar="SETTING", help="settings to run; all if left out")
    run.add_argument("--epochs", type=int, nargs="+", default=[], help="lengths to run: 1, 3, 10, 50; all if left out")
    run.add_argument("--processes", type=int, default=2)
    run.add_argument("--quick", action="store_true", help="one epoch of two stacks, figures below --work; no page")
    one.add_argument("jobs", nargs="+", type=Job.read, metavar="SETTING/STACK/SEED/EPOCHS")
    return parser


def main(arguments: Sequence[str]) -> int:
    told = _parser().parse_args(arguments)
    if told.command == "page":
        return _write()
    places = Places(told.data.resolve(), told.models.resolve(), told.work.resolve())
    if told.command == "train":
        return _train(told.jobs, places)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that its children are ended too
    todo = jobs(told.seeds, told.only, told.settings, told.epochs, told.quick)
    if told.quick:
        return 1 if run_all(todo, places, told.processes, places.work / "results") else 0
    failed = run_all(todo, places, told.processes)
    _write()
    return 1 if failed else 0


def _train(listed: Sequence[Job], places: Places) -> int:
    """One run after the other; one that fails does not keep the others from theirs."""
    failed = 0
    for job in listed:
        try:
            train(job, places)
        except Exception:
            failed = 1
            traceback.print_exc()
    return failed


def _write() -> int:
    from experiments.codecs.page import write

    for path in write():
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
