"""Measure and write the results down.

python -m benchmarks                       everything, into benchmarks/results/ and docs/benchmarks.md
python -m benchmarks throughput --bf16     one benchmark, with more of it
python -m benchmarks --quick               a look that they work: small, printed only
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import paper_page, record
from splitft.apps.console import prepare_process
from splitft.clock import utc_now

NAMES = ("startup", "memory", "throughput", "paper_tables")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure splitft against plain transformers + PEFT.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to measure: {', '.join(NAMES)}; all if none is named")
    parser.add_argument("--quick", action="store_true", help="small settings; results are printed, not recorded")
    parser.add_argument("--threads", type=int, default=2, help="threads of every process (default 2)")
    parser.add_argument("--repeats", type=int, help="timings of each contestant (default 5)")
    parser.add_argument("--steps", type=int, help="optimizer steps of a timing (default 4, 2 for gpt2-small)")
    parser.add_argument("--models", nargs="+", choices=("embedded", "gpt2-small", "tiny"), help="models of throughput and memory")
    parser.add_argument("--clients", nargs="+", type=int, help="numbers of clients (default 1 4 16; 1 4 for gpt2-small's speed)")
    parser.add_argument("--tokens", nargs="+", type=int, help="tokens per client of throughput (default 64 128 256)")
    parser.add_argument("--bf16", action="store_true", help="measure bfloat16 weights as well")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the JSON files")
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.names if name not in NAMES]:
        parser.error(f"there is no benchmark {unknown[0]!r}; choose from {', '.join(NAMES)}")
    return chosen


def scope(name: str, chosen: argparse.Namespace) -> Any:
    """The benchmark's settings: its own, or its quick ones, changed by the options that it knows."""
    module = benchmark(name)
    base = module.QUICK if chosen.quick else module.Scope()
    known = {field.name for field in dataclasses.fields(base)}
    options = {name: getattr(chosen, name) for name in ("repeats", "steps", "models", "clients", "tokens")}
    options["dtypes"] = ("float32", "bfloat16") if chosen.bf16 else None
    changes = {name: value for name, value in options.items() if value is not None and name in known}
    return dataclasses.replace(base, **{name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()})


def benchmark(name: str) -> Any:
    """The module; imported late, for torch reads the thread count when it is imported."""
    if name == "throughput":
        from benchmarks import throughput

        return throughput
    if name == "paper_tables":
        from benchmarks import paper_tables

        return paper_tables
    from benchmarks import memory, startup

    return {"memory": memory, "startup": startup}[name]


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(arguments)
    prepare_process(chosen.threads)
    facts = {"machine": record.machine(), "versions": record.versions(), "threads": chosen.threads, "command": record.command_line()}
    date = utc_now()[:10]
    for name in chosen.names or NAMES:
        print(f"== {name}", flush=True)
        rows = benchmark(name).measure(scope(name, chosen), lambda line: print(line, flush=True))
        print(f"\n{benchmark(name).table(rows)}\n", flush=True)
        if not chosen.quick:  # after each, so that a measurement that is stopped keeps what it has
            print(f"written: {record.write_result(chosen.results, date, name, rows, facts)}", flush=True)
    if not chosen.quick and chosen.results == record.RESULTS:
        sections = record.newest_sections()
        record.write_page(record.render(sections))
        print(f"written: {record.PAGE}")
        if "paper_tables" in sections:
            print(f"written: {paper_page.write_page(sections['paper_tables'])}")


if __name__ == "__main__":
    main()
