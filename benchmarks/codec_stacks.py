"""Codecs by themselves on recorded rows: megabytes per second of encoding and decoding, bits per value, and the error that buys.

A stack is played as a stream: every exchange of the recording in turn, both ends following it, so what is measured of a later visit is what
a later visit is. Speeds are of one thread over all clients' packets together; the first exchange, with which a basis is worked out and
travels, is told apart.

Axes: n clients, q rows (tokens), d channels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.codec_rows import Sizes, Visit, recorded
from benchmarks.timing import take_turns
from splitft.compress.base import Codec
from splitft.compress.cast import Cast
from splitft.compress.entropy import Entropy
from splitft.compress.error_bounded import ErrorBounded
from splitft.compress.feedback import Feedback
from splitft.compress.identity import Identity
from splitft.compress.lowrank import LowRank
from splitft.compress.noise import Noise
from splitft.compress.projection import Projection
from splitft.compress.quantize import Quantize
from splitft.compress.randk import RandK
from splitft.compress.residual import Residual
from splitft.compress.temporal import Temporal
from splitft.compress.topk import TopK
from splitft.rng import torch_stream

STACKS: dict[str, tuple[str, Codec]] = {
    "identity": ("`identity`", Identity()),
    "cast": ("`cast` bfloat16", Cast()),
    "int8": ("`quantize` 8 bits a token", Quantize(bits=8)),
    "int4": ("`quantize` 4 bits a token", Quantize(bits=4)),
    "int2": ("`quantize` 2 bits a token", Quantize(bits=2)),
    "bounded": ("`error_bounded`", ErrorBounded()),
    "axes": ("`projection` over `error_bounded`", Projection(ErrorBounded())),
    "residual": ("`residual` over `error_bounded`", Residual()),
    "axes residual": ("`projection` over `residual` over `error_bounded`", Projection(Residual())),
    "temporal": ("`temporal` over `cast`", Temporal()),
    "lowrank": ("`lowrank` over `cast`", LowRank()),
    "topk": ("`topk` 10 % over `cast`", TopK()),
    "feedback": ("`feedback` over `topk` 10 %", Feedback(TopK())),
    "randk": ("`randk` 10 %", RandK()),
    "noise cast": ("`noise` (0.5 of a row's rms) over `cast`", Noise(Cast(), clip=0.0, multiple=0.5)),
    "entropy cast": ("`entropy` over `cast`", Entropy(Cast())),
    "entropy int4": ("`entropy` over `quantize` 4 bits", Entropy(Quantize(bits=4))),
}


@dataclass
class Played:
    """A stream that has been played: seconds of every exchange's encoding and decoding, its bits a value and relative error, and the bytes
    of bases (which its bits leave out)."""

    encode_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    basis_bytes: float = 0.0


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch with a single thread for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def play(codec: Codec, visits: Sequence[Visit]) -> Played:
    """Send every exchange from one end to the other, as a simulation does: one state where both ends keep the same."""
    clients, found = len(visits[0].counts), Played()
    senders = [codec.init() for _ in range(clients)]
    receivers = senders if codec.mirrored else [codec.init() for _ in range(clients)]
    for index, visit in enumerate(visits):
        drawn = [torch_stream(clients * index + k, "codec stacks") if codec.draws else None for k in range(clients)]
        told = visit.samples if codec.hears_samples else None
        begin = time.perf_counter()
        packets, after = codec.encode_batch(visit.rows, visit.counts, senders, drawn, told, commit=not codec.mirrored)
        encoded = time.perf_counter()
        rows, receivers = codec.decode_batch(packets, receivers, samples=told)
        decoded = time.perf_counter()
        senders = receivers if codec.mirrored else after
        basis_bytes = sum(one.facts.get("stage_basis_bytes", 0.0) for one in packets)
        found.encode_s.append(encoded - begin)
        found.decode_s.append(decoded - encoded)
        found.bits.append(8 * (sum(one.size_bytes for one in packets) - basis_bytes) / visit.rows.numel())
        found.errors.append(float((visit.rows - rows).double().norm() / visit.rows.double().norm()))
        found.basis_bytes += basis_bytes / clients
    return found


def measure(sizes: Sizes, widths: Sequence[int], stacks: Sequence[str], repeats: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row for each width and stack; hidden states are timed `repeats` times, of gradients only bytes and errors are taken, once."""
    rows = []
    for width, (up, down) in recorded(sizes, widths).items():
        with one_thread():

            def timed(name: str, visits: Sequence[Visit] = up) -> Callable[[], Played]:
                return lambda: play(STACKS[name][1], visits)

            ways = {name: timed(name) for name in stacks}
            found = take_turns(ways, repeats)
            own = [_row(name, found[name], play(STACKS[name][1], down), sizes, up[0].rows.nbytes / 1e6) for name in stacks]
        rows += [{"kind": "speed", "width": width, **row} for row in own]
        say(
            f"width {width}: "
            + ", ".join(f"{row['codec']} {row['later']['encode_mb_s']:,.0f}/{row['later']['decode_mb_s']:,.0f}" for row in own)
        )
    return rows


def _row(name: str, ups: Sequence[Played], down: Played, sizes: Sizes, megabytes: float) -> dict[str, Any]:
    """The figures of a stack: of the first epoch without its first exchange (where there are others), and of the last epoch."""
    exchanges = len(down.bits)
    first = range(min(1, sizes.batches - 1), sizes.batches)
    later = range(exchanges - sizes.batches, exchanges)

    def of(epoch: range) -> dict[str, float]:
        def mean(values: Sequence[float]) -> float:
            return statistics.fmean(values[index] for index in epoch)

        return {
            "encode_mb_s": megabytes / statistics.median(one.encode_s[index] for one in ups for index in epoch),
            "decode_mb_s": megabytes / statistics.median(one.decode_s[index] for one in ups for index in epoch),
            "up_bits": mean(ups[0].bits),
            "down_bits": mean(down.bits),
            "up_error": mean(ups[0].errors),
            "down_error": mean(down.errors),
        }

    return {
        "codec": name,
        "clients": sizes.clients,
        "rows": sizes.sequences * sizes.tokens,
        "first": of(first),
        "later": of(later),
        "basis_bytes": ups[0].basis_bytes,
        "opening_s": statistics.median(one.encode_s[0] + one.decode_s[0] for one in ups) / sizes.clients,
        "encode_s": [one.encode_s for one in ups],
        "decode_s": [one.decode_s for one in ups],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a table for each width."""
    parts = []
    for width in dict.fromkeys(row["width"] for row in rows):
        own = [row for row in rows if row["width"] == width]
        lines = [
            f"**By themselves, {width} channels**: {own[0]['clients']} clients' packets of {own[0]['rows']} tokens at once, one thread. "
            "Speeds of hidden states in MB of float32 a second, first epoch → last; bits a value and relative errors of hidden states and "
            "of gradients. Of bases, which travel once, their own column tells.",
            "",
            "| codec | encode, MB/s | decode, MB/s | bits, first | bits, later | error, later | basis, KB | first packet, ms |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [f"| {' | '.join(_cells(row))} |" for row in own]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cells(row: dict[str, Any]) -> list[str]:
    first, later = row["first"], row["later"]
    cells = [STACKS[row["codec"]][0]]
    cells += [f"{first[key]:,.0f} → {later[key]:,.0f}" for key in ("encode_mb_s", "decode_mb_s")]
    cells += [f"{one['up_bits']:.2f} \\| {one['down_bits']:.2f}" for one in (first, later)]
    cells.append(f"{later['up_error']:.1%} \\| {later['down_error']:.1%}")
    cells.append(f"{row['basis_bytes'] / 1e3:,.0f}" if row["basis_bytes"] > 100 else "")
    return [*cells, f"{row['opening_s'] * 1000:.1f}"]
