"""Measure and write the results down.

python -m benchmarks                       everything, into benchmarks/results/ and docs/benchmarks.md; about 30 minutes on two cores
python -m benchmarks throughput growth     some of it
python -m benchmarks flower --flower-python PATH      beside Flower, which needs a Python of its own
python -m benchmarks --quick               a look that they work: small, printed only
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import paper_page, record
from splitft.apps.console import prepare_process
from splitft.clock import utc_now

TIMED = ("startup", "throughput", "growth", "memory", "codecs", "floors", "federation", "flower")
# Bytes by shape: nothing in it depends on the machine, so it is measured when asked for.
NAMES = (*TIMED, "paper_tables")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure splitft against what else there is, and its floor.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to measure: {', '.join(NAMES)}; all but the last if none is named")
    parser.add_argument("--quick", action="store_true", help="small settings; results are printed, not recorded")
    parser.add_argument("--threads", type=int, default=2, help="threads of every process (default 2)")
    parser.add_argument("--repeats", type=int, help="timings of each contestant (default 5)")
    parser.add_argument("--steps", type=int, help="optimizer steps of a timing")
    parser.add_argument(
        "--models", nargs="+", choices=("embedded", "gpt2-small", "tiny"), help="models of throughput, memory, codecs, floors"
    )
    parser.add_argument("--clients", nargs="+", type=int, help="numbers of clients of throughput and memory")
    parser.add_argument("--tokens", nargs="+", type=int, help="tokens per client of throughput")
    parser.add_argument("--bf16", action="store_true", help="measure memory with bfloat16 weights as well")
    parser.add_argument(
        "--flower-python", default="", metavar="PATH", help="a Python that has flwr[simulation], torch, transformers and peft"
    )
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the JSON files")
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.names if name not in NAMES]:
        parser.error(f"there is no benchmark {unknown[0]!r}; choose from {', '.join(NAMES)}")
    return chosen


def scope(name: str, chosen: argparse.Namespace) -> Any:
    """The benchmark's settings: its own, or its quick ones, changed by the options that it knows."""
    module = benchmark(name)
    base = module.QUICK if chosen.quick else module.Scope()
    options = {name: getattr(chosen, name) for name in ("repeats", "steps")}
    options |= {name: tuple(value) for name in ("models", "clients", "tokens") if (value := getattr(chosen, name))}
    options["dtypes"] = ("float32", "bfloat16") if chosen.bf16 else None
    options["flower_python"] = chosen.flower_python or None
    known = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    changes = {name: value for name, value in options.items() if value is not None and type(known.get(name)) is type(value)}
    return dataclasses.replace(base, **changes)


def benchmark(name: str) -> Any:
    """The module; imported late, for torch reads the thread count when it is imported."""
    return import_module(f"benchmarks.{name}")


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(arguments)
    prepare_process(chosen.threads)
    facts = {"machine": record.machine(), "versions": record.versions(), "threads": chosen.threads, "command": record.command_line()}
    date = utc_now()[:10]
    for name in chosen.names or TIMED:
        print(f"== {name}", flush=True)
        begin = time.perf_counter()
        rows = benchmark(name).measure(scope(name, chosen), lambda line: print(line, flush=True))
        if not rows:  # it has said why
            continue
        print(f"\n{benchmark(name).table(rows)}\n\n{name} took {time.perf_counter() - begin:.0f} s", flush=True)
        if not chosen.quick:  # after each, so that a measurement that is stopped keeps what it has
            print(f"written: {record.write_result(chosen.results, date, name, rows, facts)}", flush=True)
    if not chosen.quick and chosen.results == record.RESULTS:
        write_pages(record.newest_sections())


def write_pages(sections: dict[str, Any]) -> None:
    """The page with its plots, and the page of the paper's tables."""
    from benchmarks import plots

    record.write_page(record.render(sections))
    for path in [record.PAGE, *plots.write_plots(sections)]:
        print(f"written: {path}")
    if "paper_tables" in sections:
        print(f"written: {paper_page.write_page(sections['paper_tables'])}")


if __name__ == "__main__":
    main()
