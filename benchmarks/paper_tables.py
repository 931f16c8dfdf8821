"""The SplitFT paper's two tables by shape runs: our counted bytes beside the published megabytes, every difference explained.

SplitFT: arXiv 2604.26388. Bytes depend on shapes and not on values, so GPT-2 small's shapes with random weights and a step or two of each
configuration are enough: the ledger of the cohort executor is compared byte for byte with a closed form, then multiplied to the paper's
schedule. How the published figures come about (the schedule, the two constants, a "MB" of 2^20 bytes) is our reconstruction from the
figures themselves. Nothing here reads a clock; the seconds are the cost model's.

Axes: b sequences, t tokens, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks import setups
from benchmarks.paper_bytes import PACKET_HEADER_BYTES, PUBLISHED_CUTS, Setting, Turn, turn_counts
from splitft.adapt.cost import CostModel
from splitft.adapt.schedule import schedule
from splitft.clock import simulate_round
from splitft.compress.identity import Identity
from splitft.data.order import BatchOrder
from splitft.engine.cohort import CohortExecutor
from splitft.engine.ledger import Counts
from splitft.engine.settings import Federation
from splitft.lora import Layout
from splitft.models.anatomy import describe
from splitft.ranks.splitft import CutRank
from splitft.selfcheck import inspect_family
from splitft.split import SplitModel
from splitft.types import Plan, Profile, RoundPlan

TARGETS = ["attn.c_attn", "attn.c_proj", "mlp.c_proj"]
VALUE_BYTES = {"identity": 4.0, "cast": 2.0}
# The data sheet says 35.6e12 float32; a third of the peak is what adapt/profiles.py takes large accelerators to achieve. 1 Gbit/s, 1 ms.
DEVICE = Profile("rtx-3090-like", 1.2e13, 24e9, 1.25e8, 1.25e8, 0.001)
SLOWDOWNS = (1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Scope:
    """The runs. `turn_steps` is the length of the one turn that is run whole, as the paper's schedule has it."""

    shape: str = "gpt2-small"
    batch_size: int = 4
    sequence_tokens: int = 128
    rank: int = 16
    cuts: tuple[int, ...] = (2, 4, 6, 8, 10)
    cut_ranks: tuple[int, ...] = (1, 2, 4, 8, 16)
    cut: int = 2
    cut_rank: int = 8
    turn_steps: int = 20


QUICK = Scope("tiny", 2, 8, 4, cuts=(1, 2), cut_ranks=(1, 2, 4), cut=2, cut_rank=2, turn_steps=3)


def require_equal(row: Mapping[str, Any]) -> None:
    """RuntimeError when the ledger and the closed form of a run disagree in any kind of bytes."""
    for direction, kinds in row["closed_form"].items():
        for kind, expected in kinds.items():
            if row["counted"][direction][kind] != expected:
                counted = row["counted"][direction][kind]
                raise RuntimeError(
                    f"{row['run']}, cut {row['cut']}, r_cut {row['cut_rank']}: {counted} bytes of {kind} {direction} were counted, "
                    f"the closed form has {expected}."
                )


class Bench:
    """A federation in the paper's shapes; `run` trains one round of it and returns what crossed, client by client."""

    def __init__(self, scope: Scope) -> None:
        model = setups.build_model(scope.shape, "float32")
        shape = describe(model, scope.shape)
        split = SplitModel(model, inspect_family(model.config, model.config.model_type), TARGETS)
        layout = Layout.of(split.keys, scope.rank, 2.0)
        clients = max(len(scope.cuts), len(scope.cut_ranks))
        case = setups.Case(scope.shape, "float32", clients, scope.sequence_tokens, scope.batch_size)
        base = setups.federation(case, split, Identity(), layout)
        orders = tuple(BatchOrder(len(one.train), scope.batch_size, 0, one.client) for one in base.clients)
        self.federation: Federation = replace(base, orders=orders, settings=replace(base.settings, batch_size=scope.batch_size))
        self.costs = CostModel(
            shape,
            DEVICE,
            scope.batch_size,
            scope.sequence_tokens,
            scope.rank,
            scope.turn_steps,
            modules=tuple(TARGETS),
            uplink_bytes_per_value=4.0,
            downlink_bytes_per_value=4.0,
            label_bytes=2.0,
            packet_header_bytes=PACKET_HEADER_BYTES,
        )
        first = [entry for entry in layout.entries if entry.key.block == 0]
        per_rank = sum(entry.inputs + entry.outputs for entry in first)
        self.setting = Setting(
            scope.batch_size, scope.sequence_tokens, shape.hidden_size, shape.vocabulary, split.blocks, len(first), per_rank, scope.rank
        )

    def plan(self, turn: Turn) -> Plan:
        """The plan that rank policy `splitft` gives."""
        layout, policy = self.federation.layout, CutRank(turn.cut_rank)
        ranks, _ = policy.plan(turn.round, {turn.client: turn.cut}, (), layout, policy.init(layout, (), (self.costs,)))
        return Plan(turn.client, turn.cut, turn.steps, self.setting.rank, ranks=ranks[turn.client])

    def run(self, name: str, turns: Iterable[Turn], codec: str = "identity") -> list[dict[str, Any]]:
        """Train a round of these turns and compare each client's bytes with the closed form."""
        chosen, layout, start = list(turns), self.federation.layout, self.federation.start
        settings = replace(self.federation.settings, uplink=setups.CODECS[codec], downlink=setups.CODECS[codec])
        executor = CohortExecutor(replace(self.federation, settings=settings))
        plans = RoundPlan(chosen[0].round, tuple(self.plan(turn) for turn in chosen))
        result = executor.train(plans, chosen[0].first_step, lambda plan: start * layout.active(plan.ranks), {}, lambda count: None)
        rows = []
        for turn in chosen:
            expected = turn_counts(self.setting, turn, VALUE_BYTES[codec])
            rows.append({"run": name, "codec": codec, **asdict(turn), "counted": result.ledger.of(turn.client), "closed_form": expected})
            require_equal(rows[-1])
        return rows

    def turn_s(self, cut: int, cut_rank: int, slowdown: float, counted: Counts, front_twice: bool = False) -> float:
        """Virtual seconds of a turn on a client `slowdown` times slower than the server, with the adapter bytes that were counted.

        `front_twice` computes the client's forward a second time before its backward.
        """
        plan = replace(self.plan(Turn(cut, cut_rank, self.costs.local_steps)), client=0)
        cost = self.costs.cost(plan)
        if front_twice:
            cost = replace(cost, front_backward_flops=cost.front_backward_flops + cost.front_forward_flops)
        profile = replace(DEVICE, flops_per_s=DEVICE.flops_per_s / slowdown)
        up_bytes, down_bytes = float(counted["up"]["adapters"]), float(counted["down"]["adapters"])
        turn = schedule(plan, cost, profile, DEVICE, upload_bytes=up_bytes, download_bytes=down_bytes)
        return simulate_round([turn], timeline_steps=0).duration_s


def times(bench: Bench, rows: list[dict[str, Any]], front_twice: bool) -> list[dict[str, Any]]:
    """The cost model's seconds of a turn at each row's cut: clients as fast as the server, slower ones, and at the slowdown that makes
    the last cut take as much longer than the first as the paper says (left out where none up to 64 does)."""

    def seconds(row: dict[str, Any], slowdown: float) -> float:
        return bench.turn_s(row["cut"], row["cut_rank"], slowdown, row["counted"], front_twice)

    def ratio(slowdown: float) -> float:
        return seconds(rows[-1], slowdown) / seconds(rows[0], slowdown)

    target = PUBLISHED_CUTS[10][0] / PUBLISHED_CUTS[2][0]
    fitted = [_crossing(ratio, target)] if ratio(1.0) < target < ratio(64.0) else []
    found: list[dict[str, Any]] = []
    for slowdown in sorted([*SLOWDOWNS, *fitted]):
        facts = {"run": "time", "slowdown": slowdown, "fitted": slowdown in fitted, "front_twice": front_twice}
        found += [facts | {"cut": row["cut"], "turn_s": seconds(row, slowdown)} for row in rows]
    return found


def _crossing(rising: Callable[[float], float], target: float, low: float = 1.0, high: float = 64.0) -> float:
    """Where a rising function reaches the target, by bisection."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return high


def measure(scope: Scope, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every configuration of both tables, then: all clients alike and two steps, a narrower cut, one whole turn.

    Raises RuntimeError when a count is not the closed form's, byte for byte.
    """
    bench = Bench(scope)
    clients = len(bench.federation.clients)
    cuts = bench.run("cuts", [Turn(cut, scope.cut_rank, 1, k) for k, cut in enumerate(scope.cuts)])
    say(f"cuts {scope.cuts}: as the closed form says")
    rows = cuts + bench.run("ranks", [Turn(scope.cut, rank, 1, k) for k, rank in enumerate(scope.cut_ranks)])
    say(f"r_cut {scope.cut_ranks}: as the closed form says")
    rows += bench.run("alike", [Turn(scope.cut, scope.cut_rank, 2, k) for k in range(clients)])
    say(f"{clients} clients alike, two steps: as the closed form says")
    rows += bench.run("cast", [Turn(scope.cut, scope.cut_rank, 1)], "cast")
    rows += bench.run("turn", [Turn(scope.cut, scope.cut_rank, scope.turn_steps)])
    say(f"bfloat16 at the cut; a turn of {scope.turn_steps} steps: as the closed form says")
    rows += times(bench, cuts, front_twice=False) + times(bench, cuts, front_twice=True)
    return [{"run": "setting", **asdict(bench.setting)}, {"run": "device", **asdict(DEVICE)}, *rows]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: bytes of each configuration, which are those of the closed form."""
    lines = ["| run | cut | r_cut | codec | steps | bytes up | bytes down |", "|---|---:|---:|---|---:|---:|---:|"]
    for row in rows:
        if "counted" in row:
            up, down = (f"{sum(row['counted'][direction].values()):,}" for direction in ("up", "down"))
            lines.append(f"| {row['run']} | {row['cut']} | {row['cut_rank']} | {row['codec']} | {row['steps']} | {up} | {down} |")
    return "\n".join(lines)
