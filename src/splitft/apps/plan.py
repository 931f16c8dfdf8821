"""`splitft plan`: what every cut of a model would cost on a device, which one the cost model chooses, and why."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from splitft.adapt.choose import MEMORY_SHARE, SLACK, CutChoice, choose_cut, memory_budget_bytes
from splitft.adapt.cost import CostModel, PlanCost
from splitft.adapt.schedule import StepSeconds, step_seconds
from splitft.apps.report_text import BYTE_UNITS, TIME_UNITS, bytes_text, number_text, pick_unit, seconds_text
from splitft.errors import ResourceError
from splitft.types import Profile

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FLOP_UNITS: tuple[tuple[float, str], ...] = (
    (1e15, "Pflop"),
    (1e12, "Tflop"),
    (1e9, "Gflop"),
    (1e6, "Mflop"),
    (1e3, "kflop"),
    (1.0, "flop"),
)
ROWS_SHOWN = 16


@dataclass(frozen=True)
class PlanRow:
    """One cut on one device. Flops, bytes and seconds are of one step, adapter bytes of one round (each way they are the same).

    `fits`: needs no more memory than a derived cut may take. `reason` says why this cut is the one chosen, or why it is not.
    """

    cut: int
    client_flops: float
    server_flops: float
    uplink_bytes: float
    downlink_bytes: float
    adapter_up_bytes: float
    adapter_down_bytes: float
    client_memory_bytes: float
    client_s: float
    link_s: float
    server_s: float
    step_s: float
    fits: bool
    chosen: bool
    reason: str


def plan_table(costs: CostModel, profile: Profile, reference_s: float | None = None) -> list[PlanRow]:
    """One row per cut of `costs.shape` on `profile`, at most one of them chosen (none when no cut fits the device's memory).

    `reference_s` is the step time of the run's median client (`adapt.choose.reference_step_s`); without it the device is compared
    with itself.
    """
    choice: CutChoice | None = None
    with suppress(ResourceError):  # then no row fits, and each row's reason says so with its own figures
        choice = choose_cut(costs, profile, reference_s)
    options = costs.every_cut()
    seconds = [step_seconds(option, profile, costs.server) for option in options]
    reaches_all = costs.deepest_cut == len(costs.shape.blocks) - costs.tail_blocks
    whose = "this device's" if reference_s is None else "the median client's"
    explain = _Explainer(profile, choice, options, seconds, whose, reaches_all)
    return [_row(*pair, explain) for pair in zip(options, seconds, strict=True)]


def mark_configured(rows: Sequence[PlanRow], cuts: Collection[int], reason: str = "set by policy.cuts") -> list[PlanRow]:
    """The rows with these cuts as the chosen ones, for this reason: what the configuration says beats what would be derived."""
    derived = next((row.cut for row in rows if row.chosen), None)
    if set(cuts) == {derived}:
        return list(rows)
    would = f"; derived, it would be {derived}" if derived is not None else ""
    return [replace(row, chosen=row.cut in cuts, reason=f"{reason}{would}." if row.cut in cuts else row.reason) for row in rows]


def render_plan(rows: Sequence[PlanRow], console: Console, title: str = "") -> None:
    """Print the table and, below it, the chosen cut with its reason. Of many cuts a selection is shown, the chosen one always."""
    from rich.text import Text

    shown = select_rows(rows)
    console.print(_table(shown, title))
    if len(shown) < len(rows):
        console.print(Text(f"{len(shown)} of {len(rows)} cuts are shown.", style="dim"))
    chosen = [row for row in rows if row.chosen]
    for row in chosen:
        console.print(Text.assemble((f"Cut {row.cut}", "bold green"), f": {row.reason}"))
    if rows and not chosen:
        console.print(Text.assemble(("No cut fits", "bold red"), f". Cut {rows[0].cut}: {rows[0].reason}"))
        console.print(Text("Use a smaller batch, shorter sequences, bfloat16 weights or gradient checkpointing."))


def select_rows(rows: Sequence[PlanRow], limit: int = ROWS_SHOWN) -> list[PlanRow]:
    """At most about `limit` rows, evenly spread, with the first, the last, and the chosen one and its neighbours among them."""
    if len(rows) <= limit:
        return list(rows)
    spread = limit - 3
    keep = {round(step * (len(rows) - 1) / (spread - 1)) for step in range(spread)}
    for index, row in enumerate(rows):
        if row.chosen:
            keep |= {max(0, index - 1), index, min(len(rows) - 1, index + 1)}
    return [rows[index] for index in sorted(keep)]


@dataclass(frozen=True)
class _Explainer:
    """Puts the rule of `adapt/choose.py` into words for one device."""

    profile: Profile
    choice: CutChoice | None
    options: Sequence[PlanCost]
    seconds: Sequence[StepSeconds]
    whose: str
    reaches_all: bool

    def memory_bytes(self, cut: int) -> float:
        return self.options[self._place(cut)].client_memory.total_bytes

    def step_s(self, cut: int) -> float:
        return self.seconds[self._place(cut)].total_s

    def fits(self, cut: int) -> bool:
        return self.memory_bytes(cut) <= memory_budget_bytes(self.profile)

    def reason(self, cut: int) -> str:
        budget = bytes_text(memory_budget_bytes(self.profile))
        budget += f" ({MEMORY_SHARE:.0%} of {self.profile.name}'s {bytes_text(self.profile.memory_bytes)})"
        memory, step = bytes_text(self.memory_bytes(cut)), seconds_text(self.step_s(cut))
        if not self.fits(cut):
            return f"it needs {memory} of memory; allowed are {budget}."
        assert self.choice is not None, "a cut that fits exists, so one was chosen"
        limit = f"{seconds_text(self.choice.limit_s)} ({SLACK:g} times {self.whose} fastest step)"
        in_time = self.step_s(cut) <= self.choice.limit_s
        if cut == self.choice.cut and in_time:
            return f"the deepest within {budget} and {limit}. It needs {memory} and {step} a step; {self._deeper(cut)}."
        if cut == self.choice.cut:
            return f"no cut within {budget} keeps a step within {limit}; this one is the fastest, with {memory} and {step}."
        return f"cut {self.choice.cut} is deeper and within the limits too." if in_time else f"a step takes {step}; the limit is {limit}."

    def _deeper(self, cut: int) -> str:
        if cut == self.options[-1].plan.cut:
            return "there is no deeper one" if self.reaches_all else "split.maximum_cut allows no deeper one"
        if not self.fits(cut + 1):
            return f"cut {cut + 1} would need {bytes_text(self.memory_bytes(cut + 1))}"
        return f"cut {cut + 1} would take {seconds_text(self.step_s(cut + 1))}"

    def _place(self, cut: int) -> int:
        """Where this cut stands among the options, which begin with the shallowest cut allowed."""
        return cut - self.options[0].plan.cut


def _row(cost: PlanCost, seconds: StepSeconds, explain: _Explainer) -> PlanRow:
    cut = cost.plan.cut
    return PlanRow(
        cut=cut,
        client_flops=cost.client_flops,
        server_flops=cost.server_flops,
        uplink_bytes=cost.uplink_bytes,
        downlink_bytes=cost.downlink_bytes,
        adapter_up_bytes=cost.adapters_up_bytes,
        adapter_down_bytes=cost.adapters_down_bytes,
        client_memory_bytes=cost.client_memory.total_bytes,
        client_s=seconds.client_s,
        link_s=seconds.link_s,
        server_s=seconds.server_s,
        step_s=seconds.total_s,
        fits=explain.fits(cut),
        chosen=explain.choice is not None and explain.choice.cut == cut,
        reason=explain.reason(cut),
    )


def _table(rows: Sequence[PlanRow], title: str) -> Table:
    """The rows with one unit a column, so that figures compare at a glance. Marks as well as colours say chosen and too large."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title) if title else None, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False
    )
    table.add_column("cut", justify="right", no_wrap=True)
    columns = (
        _column("client", FLOP_UNITS, [row.client_flops for row in rows]),
        _column("up", BYTE_UNITS, [row.uplink_bytes for row in rows]),
        _column("down", BYTE_UNITS, [row.downlink_bytes for row in rows]),
        _column("adapters", BYTE_UNITS, [row.adapter_up_bytes for row in rows]),
        _column("memory", BYTE_UNITS, [row.client_memory_bytes for row in rows]),
        *_time_columns(rows),
    )
    for head, _ in columns:
        table.add_column(Text(head), justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        mark, style = (">", "bold green") if row.chosen else (" ", "") if row.fits else ("x", "red")
        table.add_row(f"{mark}{row.cut:>3}", *(cells[index] for _, cells in columns), style=style)
    table.caption = Text("> chosen, x too large for the device. Adapters are per round and direction, all else per step.", style="dim")
    table.caption_justify = "left"
    return table


def _column(head: str, units: tuple[tuple[float, str], ...], values: Sequence[float]) -> tuple[str, list[str]]:
    """Heading with the unit that suits the smallest value, and the cells in that unit."""
    size, unit = pick_unit(min(values, default=0.0), units)
    return f"{head}\n{unit}", [_cell(value / size) for value in values]


def _time_columns(rows: Sequence[PlanRow]) -> list[tuple[str, list[str]]]:
    """Client, link, server and their sum, in one unit so that they visibly add up."""
    size, unit = pick_unit(min((row.step_s for row in rows), default=0.0), TIME_UNITS)
    parts = {
        "client": [row.client_s for row in rows],
        "link": [row.link_s for row in rows],
        "server": [row.server_s for row in rows],
        "step": [row.step_s for row in rows],
    }
    return [(f"{head}\n{unit}", [_cell(value / size) for value in values]) for head, values in parts.items()]


def _cell(value: float) -> str:
    """Three figures, but no more than two decimals: the table must fit a terminal of 80 columns."""
    if 0 < value < 0.01:
        return "<0.01"
    return number_text(value) if value >= 1 else f"{value:.2f}"
