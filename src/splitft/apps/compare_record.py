"""Figures of a comparison, from the runs' journals: what a run reached and what it had cost by then, mean and spread over seeds.

Nothing is interpolated: a target counts as reached at the first evaluation that shows it, and never beyond the end of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from splitft.apps.compare_plan import PlannedRun, Variant
from splitft.apps.plot_stages import group_of
from splitft.apps.report_record import RunRecord, load_record
from splitft.apps.report_text import number_text
from splitft.errors import CheckpointError

Status = Literal["finished", "failed", "unfinished", "not run"]
SEEDS_FOR_A_CLAIM = 3
# A mean of equal numbers may differ from them in the last place.
SAME = 1e-9


class Point(NamedTuple):
    """One evaluation of the global model, and what the run had cost by the end of that round (sums over rounds and clients)."""

    round: int
    perplexity: float | None
    accuracy: float | None = None
    loss: float | None = None
    virtual_s: float = 0.0
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    client_compute_s: float = 0.0
    tokens: int = 0

    @property
    def bytes_both(self) -> float:
        return self.bytes_up + self.bytes_down


_NOTHING = Point(0, None)


@dataclass(frozen=True)
class RunFigures:
    """One run. `error` is the first line of what went wrong; `total` is what all its rounds cost, whether evaluated or not."""

    name: str
    seed: int
    status: Status
    error: str = ""
    points: tuple[Point, ...] = ()
    total: Point = _NOTHING
    wall_s: float = 0.0
    held_out_tokens: int = 0
    references: tuple[str, ...] = ()

    @property
    def start(self) -> float | None:
        """Perplexity before training."""
        return next((point.perplexity for point in self.points if point.round == 0), None)

    @property
    def last(self) -> Point | None:
        return next((point for point in reversed(self.points) if point.round > 0), None)

    @property
    def best(self) -> float | None:
        """The lowest perplexity after training began."""
        return min((point.perplexity for point in self.points if point.round > 0 and point.perplexity is not None), default=None)

    def reached(self, target: float) -> Point | None:
        """The first evaluation at or below the target; None where there is none."""
        return next((point for point in self.points if point.perplexity is not None and point.perplexity <= target * (1 + SAME)), None)


class Spread(NamedTuple):
    """Mean over runs; `deviation` is the sample standard deviation (n - 1), None for a single run, which has no spread to tell."""

    mean: float
    deviation: float | None
    low: float
    high: float
    runs: int


def spread_of(values: Sequence[float | None]) -> Spread | None:
    """The spread of the values that are there; None when there are none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    return Spread(fmean(known), stdev(known) if len(known) > 1 else None, min(known), max(known), len(known))


@dataclass(frozen=True)
class VariantFigures:
    """A variant and its runs; only finished runs count in means."""

    name: str
    label: str
    settings: tuple[str, ...]
    runs: tuple[RunFigures, ...]

    @property
    def finished(self) -> tuple[RunFigures, ...]:
        return tuple(run for run in self.runs if run.status == "finished")

    def over(self, value: Callable[[RunFigures], float | None]) -> Spread | None:
        """Spread of a figure of the finished runs."""
        return spread_of([value(run) for run in self.finished])

    @property
    def final(self) -> Spread | None:
        return self.over(lambda run: run.last.perplexity if run.last else None)

    @property
    def best(self) -> Spread | None:
        return self.over(lambda run: run.best)

    @property
    def accuracy(self) -> Spread | None:
        return self.over(lambda run: run.last.accuracy if run.last else None)

    def hits(self, target: float) -> tuple[Point, ...]:
        """Where the finished runs that reached the target reached it."""
        return tuple(point for run in self.finished if (point := run.reached(target)) is not None)

    def to_target(self, target: float | None, value: Callable[[Point], float]) -> Spread | None:
        """Spread over the runs that reached the target; `always_reached` says whether those are all."""
        return None if target is None else spread_of([value(point) for point in self.hits(target)])

    def always_reached(self, target: float | None) -> bool:
        """Whether every finished run reached the target: only then is the mean comparable with that of another variant."""
        return target is not None and bool(self.finished) and len(self.hits(target)) == len(self.finished)

    def curve(self) -> tuple[tuple[Point, ...], ...]:
        """Per round that all finished runs evaluated: one point of each run, in the order of seeds."""
        tables = [{point.round: point for point in run.points if point.perplexity is not None} for run in self.finished]
        rounds = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
        return tuple(tuple(table[number] for table in tables) for number in rounds)


class Target(NamedTuple):
    """The perplexity to reach and where it comes from; None when there is nothing to go by."""

    perplexity: float | None
    rule: str


@dataclass(frozen=True)
class Comparison:
    """All figures. `baseline` is the variant that ratios refer to; `notes` say what a reader must know."""

    name: str
    variants: tuple[VariantFigures, ...]
    target: Target
    baseline: VariantFigures
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> int:
        return sum(run.status == "failed" for variant in self.variants for run in variant.runs)


def figures_of(variants: Sequence[Variant], folder: Path, failures: Mapping[str, str]) -> tuple[VariantFigures, ...]:
    """Read the journals below `folder`; `failures` maps names of runs to the first line of their error."""
    return tuple(
        VariantFigures(
            variant.name,
            variant.label,
            variant.settings,
            tuple(_read(run, folder / run.name, failures.get(run.name)) for run in variant.runs),
        )
        for variant in variants
    )


def _read(run: PlannedRun, folder: Path, error: str | None) -> RunFigures:
    missing: Status = "not run" if error is None else "failed"
    if not (folder / "journal.jsonl").is_file():
        return RunFigures(run.name, run.seed, missing, error or "")
    try:
        record = load_record(folder)
    except CheckpointError as problem:
        # Killed before the first event was whole: as good as not begun. Damage further on is told.
        empty = "run_started" in problem.message
        return RunFigures(run.name, run.seed, missing if empty else "failed", error or ("" if empty else problem.message))
    return run_figures(record, run.name, run.seed, error)


def run_figures(record: RunRecord, name: str, seed: int, error: str | None = None) -> RunFigures:
    """Figures of one record."""
    status: Status = "failed" if error is not None else "finished" if record.status == "finished" else "unfinished"
    totals = {0: _NOTHING}
    before = totals[0]
    for item in record.rounds:
        busy = sum(s for client in item.clients for kind, s in client.busy_s.items() if group_of(kind) == "client")
        up, down = before.bytes_up + item.traffic("up"), before.bytes_down + item.traffic("down")
        before = Point(
            item.round, None, None, None, item.virtual_end_s, up, down, before.client_compute_s + busy, before.tokens + item.tokens
        )
        totals[item.round] = before
    points = tuple(
        totals[item.round]._replace(perplexity=_finite(item.overall.perplexity), accuracy=item.overall.accuracy, loss=item.overall.loss)
        for item in record.evaluations
        if item.round in totals
    )
    held_out = record.evaluations[0].overall.tokens if record.evaluations else 0
    references = tuple(str(item) for item in record.started.references)
    return RunFigures(name, seed, status, error or "", points, before, record.wall_s, held_out, references)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def choose_target(variants: Sequence[VariantFigures], given: float | None) -> Target:
    """The target given, else the worst mean final perplexity among the variants that ended below where they started."""
    if given is not None:
        return Target(given, "as given")
    finals: list[tuple[float, str]] = []
    for variant in variants:
        start, final = variant.over(lambda run: run.start), variant.final
        if start is not None and final is not None and final.mean < start.mean:
            finals.append((final.mean, variant.label))
    if not finals:
        return Target(None, "no variant ended below the perplexity it started from, so there is no target")
    worst, label = max(finals)
    return Target(worst, f"the worst mean final perplexity among the variants that improved on the start, that of {label}")


def build_comparison(name: str, variants: Sequence[VariantFigures], target: float | None, baseline: str) -> Comparison:
    """Everything put together; `baseline` is a variant's name or label, empty for the first."""
    chosen = next((item for item in variants if baseline in (item.name, item.label)), variants[0])
    goal = choose_target(variants, target)
    return Comparison(name, tuple(variants), goal, chosen, tuple(_notes(variants, goal)))


def _notes(variants: Sequence[VariantFigures], target: Target) -> list[str]:
    notes = []
    if not_same := _not_comparable(variants):
        notes.append(not_same)
    starts = [run.start for variant in variants for run in variant.finished if run.start is not None]
    if target.perplexity is not None and starts and target.perplexity >= min(starts):
        notes.append(f"The target {number_text(target.perplexity, 4)} is met before training by some runs: times to it say little.")
    if len({len(variant.finished) for variant in variants}) > 1:
        notes.append("The variants do not all have the same number of finished runs: means rest on different seeds.")
    if variants and max(len(variant.finished) for variant in variants) < SEEDS_FOR_A_CLAIM:
        notes.append(f"Fewer than {SEEDS_FOR_A_CLAIM} finished runs of each variant: differences may be chance, none is claimed.")
    return notes


def _not_comparable(variants: Sequence[VariantFigures]) -> str:
    """Perplexities may be compared only where the same model begins on the same held-out tokens."""
    by_seed: dict[int, list[RunFigures]] = {}
    for variant in variants:
        for run in variant.finished:
            by_seed.setdefault(run.seed, []).append(run)
    for runs in by_seed.values():
        starts = [run.start for run in runs if run.start is not None]
        if len({run.held_out_tokens for run in runs}) > 1 or (starts and max(starts) > min(starts) * 1.005):
            return (
                "Not all variants were measured from the same start on the same held-out tokens (another model, data, or "
                "tokens.common_held_out = 0): compare their perplexities with care."
            )
    return ""


def verdict(one: VariantFigures, baseline: VariantFigures) -> str:
    """How the final perplexity stands to the baseline's, claiming no more than the runs show."""
    if one is baseline:
        return "baseline"
    mine, other = one.final, baseline.final
    if mine is None or other is None:
        return "nothing to compare"
    if min(mine.runs, other.runs) < SEEDS_FOR_A_CLAIM:
        return f"fewer than {SEEDS_FOR_A_CLAIM} seeds, no claim"
    if mine.high < other.low:
        return "lower, ranges apart"
    if mine.low > other.high:
        return "higher, ranges apart"
    return f"ranges overlap{_paired(one, baseline)}"


def _paired(one: VariantFigures, baseline: VariantFigures) -> str:
    """Equal seeds mean equal data and equal starts, so runs can be compared pair by pair."""
    others = {run.seed: run.last.perplexity for run in baseline.finished if run.last}
    pairs = [(run.last.perplexity, others.get(run.seed)) for run in one.finished if run.last]
    known = [(mine, other) for mine, other in pairs if mine is not None and other is not None]
    lower = sum(mine < other * (1 - SAME) for mine, other in known)
    return f"; lower on {lower} of {len(known)} seeds" if known else ""


def ratio(mine: Spread | None, other: Spread | None) -> float | None:
    """Mean over mean; None where one is missing or the other is zero."""
    return None if mine is None or other is None or other.mean == 0 else mine.mean / other.mean


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Every figure, as `compare.json` has it; names end in their unit."""
    return {
        "name": comparison.name,
        "baseline": comparison.baseline.name,
        "target": comparison.target._asdict(),
        "notes": list(comparison.notes),
        "variants": [_variant_json(variant, comparison) for variant in comparison.variants],
    }


def _variant_json(variant: VariantFigures, comparison: Comparison) -> dict[str, Any]:
    goal = comparison.target.perplexity
    costs: dict[str, Callable[[Point], float]] = {
        "rounds": lambda point: float(point.round),
        "virtual_s": lambda point: point.virtual_s,
        "bytes": lambda point: point.bytes_both,
        "client_compute_s": lambda point: point.client_compute_s,
    }
    totals: dict[str, Callable[[RunFigures], float | None]] = {
        "virtual_s": lambda run: run.total.virtual_s,
        "bytes_up": lambda run: run.total.bytes_up,
        "bytes_down": lambda run: run.total.bytes_down,
        "client_compute_s": lambda run: run.total.client_compute_s,
        "wall_s": lambda run: run.wall_s,
    }
    figures = {"perplexity_final": variant.final, "perplexity_best": variant.best, "accuracy_final": variant.accuracy}
    return {
        "name": variant.name,
        "label": variant.label,
        "settings": list(variant.settings),
        "verdict": verdict(variant, comparison.baseline),
        **{name: _spread_json(value) for name, value in figures.items()},
        "target_reached_by": len(variant.hits(goal)) if goal is not None else None,
        "to_target": {name: _spread_json(variant.to_target(goal, value)) for name, value in costs.items()},
        "in_all": {name: _spread_json(variant.over(value)) for name, value in totals.items()},
        "runs": [_run_json(run) for run in variant.runs],
    }


def _spread_json(value: Spread | None) -> dict[str, Any] | None:
    return None if value is None else value._asdict()


def _run_json(run: RunFigures) -> dict[str, Any]:
    return {
        "name": run.name,
        "seed": run.seed,
        "status": run.status,
        "error": run.error,
        "wall_s": run.wall_s,
        "total": run.total._asdict(),
        "points": [point._asdict() for point in run.points],
    }
