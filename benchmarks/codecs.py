"""What a codec costs at the cut: its share of a training step in the engine, its speed by itself, its bytes, and a round on slow links.

The share is recorded where it arises: around every crossing of a cut (`Wire.carry`), forward and backward, in the real engine. That counts
gathering the rows of the clients with that cut, encoding to bytes, counting them, decoding and putting the rows back. Operations on a
CPU are over when their call returns, so the clock around a crossing misses nothing. Every step trains on the same sequences: in the first
one samples are new to codecs that remember, in the others they are not.

Axes: n clients, t tokens, d width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor

from benchmarks import codec_links, codec_stacks, setups
from benchmarks.codec_links import Links
from benchmarks.codec_rows import Sizes
from benchmarks.codec_stacks import STACKS
from benchmarks.setups import Case
from benchmarks.timing import take_turns
from splitft.engine.cohort import CohortExecutor
from splitft.engine.settings import Federation
from splitft.wire import Wire

# Of a model that takes seconds a step, those that matter most.
FEW = ("identity", "cast", "int8", "bounded", "residual", "axes residual")


@dataclass(frozen=True)
class Scope:
    models: tuple[str, ...] = ("embedded", "gpt2-small")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    clients: int = 8
    tokens: int = 128
    codecs: tuple[str, ...] = tuple(STACKS)
    steps: int = 2
    repeats: int = 5
    widths: tuple[int, ...] = (256, 768)
    sizes: Sizes = field(default_factory=lambda: Sizes(batches=2))
    links: Links = field(default_factory=Links)


QUICK = Scope(models=("embedded",), dtypes=("float32",), repeats=1, widths=(256,), sizes=Sizes(clients=2, sequences=2, batches=1, epochs=2))


@dataclass
class Crossings:
    """Seconds spent in crossings since it was emptied."""

    total_s: float = 0.0

    def taken(self) -> float:
        found, self.total_s = self.total_s, 0.0
        return found


@contextmanager
def crossings_timed() -> Iterator[Crossings]:
    """The engine's own crossing with a clock around it."""
    found, carry = Crossings(), Wire.carry

    def timed(wire: Wire, tensor: Tensor, is_forward: bool) -> Tensor:
        begin = time.perf_counter()
        result = carry(wire, tensor, is_forward)
        found.total_s += time.perf_counter() - begin
        return result

    setattr(Wire, "carry", timed)  # noqa: B010 - another method for a while
    try:
        yield found
    finally:
        setattr(Wire, "carry", carry)  # noqa: B010


@dataclass(frozen=True)
class Steps:
    """Seconds of each step of a round, and of its crossings."""

    step_s: tuple[float, ...]
    crossing_s: tuple[float, ...]

    def share(self, step: int) -> float:
        return self.crossing_s[step] / self.step_s[step]


def steps_way(base: Federation, case: Case, crossings: Crossings) -> Callable[[], Steps]:
    """A round of the engine from the same start each time, with codecs that remember nothing yet."""
    executor, start = CohortExecutor(base), base.layout.initial_row(0)
    plan = setups.round_plan(case, base.split.blocks)

    def run() -> Steps:
        marks: list[float] = []
        taken: list[float] = []

        def mark(*told: object) -> None:
            marks.append(time.perf_counter())
            taken.append(crossings.taken())

        def opened(one: Any) -> Tensor:
            marks[:], taken[:] = [time.perf_counter()], []
            crossings.taken()
            return start

        executor.train(plan, 0, opened, {}, mark)
        return Steps(tuple(end - begin for begin, end in pairwise(marks)), tuple(taken))

    return run


def shares(case: Case, scope: Scope) -> list[dict[str, Any]]:
    """One row per codec: seconds of a step and of its crossings, when samples are new (the first step) and when they are not."""
    split = setups.cohort_model(setups.build_model(case.model, case.dtype))
    base = setups.federation(setups.with_steps(case, 1), split, setups.CODECS["identity"])  # one sequence a client
    names = [name for name in scope.codecs if case.model != "gpt2-small" or name in FEW]
    with crossings_timed() as crossings:
        ways = {name: steps_way(setups.with_codec(base, STACKS[name][1]), case, crossings) for name in names}
        for way in ways.values():
            way()
        samples = take_turns(ways, scope.repeats)
    return [
        {name: value for name, value in case.facts().items() if name != "steps"}
        | {
            "kind": "share",
            "codec": name,
            "step_s": statistics.median(one.step_s[-1] for one in found),
            "crossing_s": statistics.median(one.crossing_s[-1] for one in found),
            "share": statistics.median(one.share(-1) for one in found),
            "first_share": statistics.median(one.share(0) for one in found),
            "shares": [one.share(-1) for one in found],
        }
        for name, found in samples.items()
    ]


def measure(scope: Scope, say: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = []
    for model in scope.models:
        for dtype in scope.dtypes:
            found = shares(Case(model, dtype, scope.clients, scope.tokens, scope.steps), scope)
            rows += found
            say(f"{model} {dtype}: " + ", ".join(f"{row['codec']} {row['share']:.1%} of {row['step_s'] * 1000:.0f} ms" for row in found))
    if not scope.widths:
        return rows
    speeds = codec_stacks.measure(scope.sizes, scope.widths, scope.codecs, scope.repeats, say)
    narrow = [row for row in speeds if row["width"] == min(scope.widths)]
    return [*rows, *speeds, *codec_links.measure(narrow, scope.links)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: shares of a step, one line per model, precision and codec; speeds by themselves; slow links."""
    kinds = {kind: [row for row in rows if row.get("kind", "share") == kind] for kind in ("share", "speed", "link")}
    parts = [_share_table(kinds["share"])]
    parts += [codec_stacks.table(kinds["speed"])] if kinds["speed"] else []
    parts += [codec_links.table(kinds["link"])] if kinds["link"] else []
    return "\n\n".join(parts)


def _share_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| model | weights | clients × tokens | codec | ms of a step | ms at the cuts | share | share, new samples |"]
    lines += ["|---|---|---|---|---:|---:|---:|---:|"]
    for row in rows:
        cells = [row["model"], row["dtype"], f"{row['clients']} × {row['tokens']}", STACKS[row["codec"]][0]]
        cells += [f"{row['step_s'] * 1000:.0f}", f"{row['crossing_s'] * 1000:.2f}", f"**{row['share']:.1%}**"]
        cells.append(f"{row['first_share']:.1%}" if "first_share" in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
