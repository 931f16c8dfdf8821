"""`splitft plan` for a fleet: one row per client, and what the round takes beside every uniform cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from splitft.adapt.cost import CostModel
from splitft.adapt.schedule import schedule, step_seconds
from splitft.apps.report_text import bytes_text, number_text, seconds_text
from splitft.engine.attendance import timed
from splitft.types import Profile

if TYPE_CHECKING:
    from rich.console import Console

# More device profiles than this are shown in one table, a row per client, in place of a table each.
TABLES_SHOWN = 4
CLIENTS_SHOWN = 40


@dataclass(frozen=True)
class FleetRow:
    """One client: its device, its first cut, its local steps, and what a step and a whole round alone cost it."""

    client: int
    profile: Profile
    cut: int
    steps: int
    memory_bytes: float
    step_s: float
    finish_s: float


@dataclass(frozen=True)
class FleetPlan:
    """The first round of a fleet by the virtual clock. `uniform_s`: seconds of the round with everyone at cut `shallowest`, and so on,
    taking equal steps."""

    rows: tuple[FleetRow, ...]
    round_s: float
    shallowest: int
    uniform_s: tuple[float, ...]


@dataclass(frozen=True)
class Manner:
    """What the clock must know besides: whose adapters the server has, batches behind an optimizer step, the seed of turns."""

    server: str = "per_client"
    micro: int = 1
    seed: int = 0


def fleet_plan(
    costs: CostModel, profiles: Sequence[Profile], cuts: Sequence[int], steps: Sequence[int], manner: Manner | None = None
) -> FleetPlan:
    """Play the first round, adapters included, with these cuts and local steps [clients], and with every uniform cut."""
    manner = manner or Manner()
    seconds, finishes = _played(costs, profiles, cuts, steps, manner)
    rows = []
    for client, (profile, cut, count) in enumerate(zip(profiles, cuts, steps, strict=True)):
        cost = costs.cost(costs.plan(cut))
        alone_s = step_seconds(cost, profile, costs.server).total_s * manner.micro
        rows.append(FleetRow(client, profile, cut, count, cost.client_memory.total_bytes, alone_s, finishes[client]))
    equal = [costs.local_steps] * len(profiles)
    uniform = range(costs.shallowest_cut, costs.deepest_cut + 1)
    return FleetPlan(
        tuple(rows),
        seconds,
        costs.shallowest_cut,
        tuple(_played(costs, profiles, [cut] * len(profiles), equal, manner)[0] for cut in uniform),
    )


def _played(
    costs: CostModel, profiles: Sequence[Profile], cuts: Sequence[int], steps: Sequence[int], manner: Manner
) -> tuple[float, list[float]]:
    """Seconds of the round, and of each client's part of it."""
    made = []
    for client, (profile, cut, count) in enumerate(zip(profiles, cuts, steps, strict=True)):
        plan = replace(costs.plan(cut, client), local_steps=count * manner.micro)
        made.append(schedule(plan, costs.cost(plan), profile, costs.server, micro=manner.micro))
    timing = timed(made, 1, manner.seed, manner.server, costs.network, 0.0)
    return timing.duration_s, [one.finish_s for one in timing.clients]


def render_fleet(plan: FleetPlan, console: Console, title: str) -> None:
    """Print the clients, slowest first where not all can be shown, and how long the round takes beside uniform cuts."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    rows = sorted(plan.rows, key=lambda row: -row.finish_s)[:CLIENTS_SHOWN]
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("client", no_wrap=True)
    for head in ("Gflop/s", "up\nMbit/s", "cut", "steps", "memory", "step\nalone", "done\nafter"):
        table.add_column(head, justify="right", no_wrap=True)
    slowest_s = max(row.finish_s for row in plan.rows)
    for row in sorted(rows, key=lambda row: row.client):
        cells = (
            number_text(row.profile.flops_per_s / 1e9),
            number_text(row.profile.uplink_bytes_per_s * 8 / 1e6),
            str(row.cut),
            str(row.steps),
            bytes_text(row.memory_bytes),
            seconds_text(row.step_s),
            seconds_text(row.finish_s),
        )
        table.add_row(f"{row.client} {row.profile.name}", *cells, style="bold" if row.finish_s == slowest_s else "")
    console.print(table)
    if len(rows) < len(plan.rows):
        console.print(Text(f"The {len(rows)} slowest of {len(plan.rows)} clients are shown.", style="dim"))
    console.print(_comparison(plan))


def _comparison(plan: FleetPlan) -> str:
    """One sentence: this plan's round beside the best and the worst uniform cut."""
    ranked = sorted(range(len(plan.uniform_s)), key=lambda index: plan.uniform_s[index])
    best, worst = ranked[0], ranked[-1]
    uniform = (
        f"everyone at cut {plan.shallowest + best}: {seconds_text(plan.uniform_s[best])}, "
        f"at cut {plan.shallowest + worst}: {seconds_text(plan.uniform_s[worst])}"
    )
    return f"The first round takes {seconds_text(plan.round_s)} by the virtual clock; with equal steps and {uniform}."
