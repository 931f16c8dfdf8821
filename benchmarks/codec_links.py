"""What a codec's bytes come to on slow links: seconds of a round by the virtual clock, from bits a value that were measured.

The cost model, the schedule and the clock are those of `splitft plan` and of every run. Time to encode and decode is not in it: a device's
own speed at that was not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from benchmarks import setups
from benchmarks.codec_rows import CUT
from benchmarks.codec_stacks import STACKS
from splitft.adapt.cost import CostModel
from splitft.adapt.profiles import MBIT_BYTES_PER_S, preset
from splitft.adapt.schedule import schedule
from splitft.clock import simulate_round
from splitft.models.anatomy import describe
from splitft.types import ModelShape

# Largest relative error, of hidden states and of gradients, at which a codec is a candidate for the best.
MOST_ERROR = 0.1


@dataclass(frozen=True)
class Links:
    """The federation: phones behind links of so many Mbit/s both ways, and a round's local steps."""

    mbit_per_s: tuple[float, ...] = (1.0, 10.0, 100.0)
    device: str = "phone"
    server: str = "server-a100"
    clients: int = 8
    sequences: int = 4
    tokens: int = 128
    local_steps: int = 8


@cache
def embedded_shape() -> ModelShape:
    return describe(setups.build_model("embedded", "float32"), "embedded")


def round_of(links: Links, mbit_per_s: float, up_bits: float, down_bits: float) -> tuple[float, float]:
    """Virtual seconds of a round of all clients, cut after CUT blocks, and the bytes of a client's step both ways."""
    rate = mbit_per_s * MBIT_BYTES_PER_S
    profile = replace(preset(links.device), uplink_bytes_per_s=rate, downlink_bytes_per_s=rate)
    server = preset(links.server)
    costs = CostModel(
        shape=embedded_shape(),
        server=server,
        batch_size=links.sequences,
        sequence_tokens=links.tokens,
        rank=setups.RANK,
        local_steps=links.local_steps,
        modules=setups.TARGETS,
        uplink_bytes_per_value=up_bits / 8,
        downlink_bytes_per_value=down_bits / 8,
        label_bytes=2.0,
    )
    played = []
    for client in range(links.clients):
        plan = costs.plan(CUT, client)
        played.append(schedule(plan, costs.cost(plan), profile, server))
    cost = costs.cost(costs.plan(CUT))
    return simulate_round(played, timeline_steps=0).duration_s, cost.uplink_bytes + cost.downlink_bytes


def measure(speeds: Sequence[dict[str, Any]], links: Links) -> list[dict[str, Any]]:
    """One row a stack, from its measured bits: rounds of first and of later visits at each rate."""
    rows = []
    for row in speeds:
        found = {}
        for visit in ("first", "later"):
            bits = row[visit]["up_bits"], row[visit]["down_bits"]
            rounds = [round_of(links, rate, *bits) for rate in links.mbit_per_s]
            found[visit] = {"round_s": [seconds for seconds, _ in rounds], "step_bytes": rounds[0][1]}
        rows.append(
            {
                "kind": "link",
                "codec": row["codec"],
                "mbit_per_s": list(links.mbit_per_s),
                "error": max(row["later"]["up_error"], row["later"]["down_error"]),
                **found,
            }
        )
    return rows


def best(rows: Sequence[dict[str, Any]], place: int, most_error: float = MOST_ERROR) -> str:
    """The stack of the shortest later round at the rate of that place, of those that are precise enough; empty if none is."""
    fit = [row for row in rows if row["error"] <= most_error]
    return str(min(fit, key=lambda row: float(row["later"]["round_s"][place]))["codec"]) if fit else ""


def table(rows: Sequence[dict[str, Any]], links: Links | None = None) -> str:
    """Markdown: the stacks, the best of each rate in bold, and that one named."""
    links, rates = links or Links(), rows[0]["mbit_per_s"]
    chosen = [best(rows, place) for place in range(len(rates))]
    setting = (
        f"{links.local_steps} local steps of {links.sequences} × {links.tokens} tokens, embedded model cut after block {CUT}, "
        f"{links.clients} devices of class `{links.device}`"
    )
    lines = [
        f"**On slow links**: virtual seconds of a round of {setting}, links of so many Mbit/s both ways; first epoch → later ones. "
        f"Bold: the shortest later round of all with relative errors of {MOST_ERROR:.0%} at most, of hidden states and of gradients.",
        "",
        f"| codec | KB of a step | {' | '.join(f'{rate:g} Mbit/s' for rate in rates)} |",
        f"|---|---:|{'---:|' * len(rates)}",
    ]
    for row in rows:
        cells = [STACKS[row["codec"]][0], f"{row['first']['step_bytes'] / 1e3:,.0f} → {row['later']['step_bytes'] / 1e3:,.0f}"]
        for place, (first, later) in enumerate(zip(row["first"]["round_s"], row["later"]["round_s"], strict=True)):
            cells.append(f"{first:,.1f} → {f'**{later:,.1f}**' if row['codec'] == chosen[place] else f'{later:,.1f}'}")
        lines.append(f"| {' | '.join(cells)} |")
    named = ", ".join(f"at {rate:g} Mbit/s {STACKS[name][0]}" for rate, name in zip(rates, chosen, strict=True) if name)
    return "\n".join(lines) + (f"\n\nBest: {named}." if named else "")
