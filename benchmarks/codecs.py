"""What a codec costs at the cut: its share of a training step in the engine, and megabytes per second of each by itself.

The share is recorded where it arises: around every crossing of a cut (`Wire.carry`), forward and backward, in the real engine. That counts
gathering the rows of the clients with that cut, encoding to bytes, counting them, decoding and putting the rows back. Operations on a
CPU are over when their call returns, so the clock around a crossing misses nothing.

Axes: n clients, t tokens, d width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import setups
from benchmarks.setups import Case
from benchmarks.throughput import cohort_way
from benchmarks.timing import seconds, take_turns
from splitft.compress.base import Codec
from splitft.wire import Wire

WORDS = {"identity": "`identity`", "cast": "`cast` bfloat16", "int8": "`quantize` 8 bits a token"}


@dataclass(frozen=True)
class Scope:
    models: tuple[str, ...] = ("embedded", "gpt2-small")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    clients: int = 8
    tokens: int = 128
    codecs: tuple[str, ...] = ("identity", "cast", "int8")
    steps: int = 1
    repeats: int = 5


QUICK = Scope(models=("embedded",), dtypes=("float32",), repeats=1)


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


def shares(case: Case, scope: Scope) -> list[dict[str, Any]]:
    """One row per codec: seconds of a step and of its crossings."""
    split = setups.cohort_model(setups.build_model(case.model, case.dtype))
    base = setups.federation(case, split, setups.CODECS["identity"])
    with crossings_timed() as crossings:

        def sampled(name: str) -> Callable[[], tuple[float, float]]:
            train = cohort_way(setups.with_codec(base, setups.CODECS[name]), case)
            return lambda: (crossings.taken(), train().step_s, crossings.taken() / case.steps)[1:]

        ways = {name: sampled(name) for name in scope.codecs}
        for way in ways.values():
            way()
        samples = take_turns(ways, scope.repeats)
    found = []
    for name, pairs in samples.items():
        speeds = megabytes_per_s(setups.CODECS[name], case, split.hidden_size, scope.repeats)
        found.append(
            {name: value for name, value in case.facts().items() if name != "steps"}
            | {
                "codec": name,
                "step_s": statistics.median(step for step, _ in pairs),
                "crossing_s": statistics.median(crossing for _, crossing in pairs),
                "share": statistics.median(crossing / step for step, crossing in pairs),
                "encode_mb_s": speeds[0],
                "decode_mb_s": speeds[1],
                "shares": [crossing / step for step, crossing in pairs],
            }
        )
    return found


def megabytes_per_s(codec: Codec, case: Case, width: int, repeats: int) -> tuple[float, float]:
    """Megabytes of float32 per second, encoding and decoding the rows [n t, d] of a whole cohort at once."""
    rows = torch.randn(case.clients * case.tokens, width, generator=torch.Generator().manual_seed(0))
    counts, states = [case.tokens] * case.clients, [codec.init()] * case.clients
    generators: list[torch.Generator | None] = [None] * case.clients
    packets, _ = codec.encode_batch(rows, counts, states, generators)
    codec.decode_batch(packets, states)
    encode_s = [seconds(lambda: codec.encode_batch(rows, counts, states, generators)) for _ in range(10 * repeats)]
    decode_s = [seconds(lambda: codec.decode_batch(packets, states)) for _ in range(10 * repeats)]
    return rows.nbytes / 1e6 / statistics.median(encode_s), rows.nbytes / 1e6 / statistics.median(decode_s)


def measure(scope: Scope, say: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = []
    for model in scope.models:
        for dtype in scope.dtypes:
            found = shares(Case(model, dtype, scope.clients, scope.tokens, scope.steps), scope)
            rows += found
            say(f"{model} {dtype}: " + ", ".join(f"{row['codec']} {row['share']:.1%} of {row['step_s'] * 1000:.0f} ms" for row in found))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line per model, precision and codec."""
    lines = ["| model | weights | clients × tokens | codec | ms of a step | ms at the cuts | share | encode, MB/s | decode, MB/s |"]
    lines += ["|---|---|---|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        cells = [row["model"], row["dtype"], f"{row['clients']} × {row['tokens']}", WORDS[row["codec"]]]
        cells += [f"{row['step_s'] * 1000:.0f}", f"{row['crossing_s'] * 1000:.2f}", f"**{row['share']:.1%}**"]
        cells += [f"{row['encode_mb_s']:,.0f}", f"{row['decode_mb_s']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
