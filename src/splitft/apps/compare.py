"""`splitft compare`: many runs of one plan, side by side where it pays, and one page that compares them.

Everything lies in one folder: `runs/` with an ordinary run folder each, `failures/` with what went wrong, `compare.html`,
`compare.json`, `table.md`. The same command again does what is missing; a run that failed is tried again only when asked to.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from splitft import __version__
from splitft.apps.compare_page import render_markdown, render_page, terminal_table
from splitft.apps.compare_plan import PlannedRun, Request, Variant, expand
from splitft.apps.compare_pool import Outcome, Pool, lock
from splitft.apps.compare_record import Comparison, build_comparison, figures_of, to_json
from splitft.apps.console import usable_cores
from splitft.apps.report_files import write_atomically
from splitft.apps.report_record import load_record
from splitft.apps.report_text import number_text, plural
from splitft.apps.signals import asked_to_stop
from splitft.clock import utc_now
from splitft.config import RunConfig, load_config
from splitft.errors import CheckpointError, ConfigError, Interrupted
from splitft.toml import format_value, nearest

if TYPE_CHECKING:
    from typing import IO

GRAPHICS_DEVICE = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class Options:
    """How to run and show it, beside what is compared. `jobs` 0: as many as pay."""

    target: float | None = None
    baseline: str = ""
    jobs: int = 0
    retry: bool = False
    quiet: bool = False
    dry_run: bool = False


def compare(request: Request, options: Options) -> int:
    """Plan, run what is missing, write the page; the exit code: 0, or 1 when a run has failed.

    Raises ConfigError for a plan that makes no sense or does not fit the folder, Interrupted when stopped (page written all the same).
    """
    variants = expand(request)
    _check_options(options, variants)
    console = Console(stderr=True, quiet=options.quiet, highlight=False)
    runs = in_order(variants)
    _say(console, f"{plural(len(runs), 'run')}: {plural(len(variants), 'variant')}, {_seeds(variants)}")
    if options.dry_run:
        for run in runs:
            print(run.name)
        return 0
    with _claimed(request.place):
        missing, kept = missing_runs(runs, request.place, options.retry)
        done = len(runs) - len(missing) - len(kept)
        left = f", {len(kept)} failed before (--retry tries again)" if kept else ""
        _say(console, f"{done} finished already{left}, {len(missing)} to run")
        stopped = _run_missing(missing, request.place, options, console) if missing else False
        comparison = write_results(request, variants, options)
    if not options.quiet:
        out = Console()
        out.print(terminal_table(comparison))
        for note in comparison.notes:
            out.print(note, highlight=False, markup=False)
        out.print(f"page     {request.place / 'compare.html'}", highlight=False, soft_wrap=True, markup=False)
    if stopped:
        raise Interrupted("Stopped; every finished round is on disk.", "The same command again goes on with what is missing.")
    return 1 if comparison.failed else 0


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _seeds(variants: Sequence[Variant]) -> str:
    counts = {len(variant.runs) for variant in variants}
    return f"{plural(max(counts), 'seed')} each"


def _check_options(options: Options, variants: Sequence[Variant]) -> None:
    known = [name for variant in variants for name in (variant.name, variant.label)]
    if options.baseline and options.baseline not in known:
        close = nearest(options.baseline, known)
        hint = f"Did you mean {close}?" if close else "Name one of them."
        labels = ", ".join(variant.label for variant in variants)
        raise ConfigError(f"--baseline {options.baseline!r} is none of the variants: {labels}.", hint)
    if options.target is not None and not 1.0 <= options.target < float("inf"):
        raise ConfigError(f"--target-perplexity is {options.target}; a perplexity is at least 1.", "Give a number such as 40.")
    if options.jobs < 0:
        raise ConfigError(f"--jobs is {options.jobs}; allowed is 0 (as many as pay) or more.", "Leave it out, or give a small number.")


def in_order(variants: Sequence[Variant]) -> list[PlannedRun]:
    """The first seed of every variant, then the second: stopped early, all variants can still be compared."""
    longest = max(len(variant.runs) for variant in variants)
    return [variant.runs[at] for at in range(longest) for variant in variants if at < len(variant.runs)]


class _claimed:  # noqa: N801 - reads as a word after `with`
    """The comparison's folder for this process. Raises CheckpointError when it is in use or cannot be written to."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.stream: IO[str] | None = None

    def __enter__(self) -> None:
        try:
            (self.place / "runs").mkdir(parents=True, exist_ok=True)
            self.stream = lock(self.place)
        except OSError as problem:
            raise CheckpointError(f"cannot write to {self.place}: {problem.strerror}.", "Choose another --folder.") from problem
        if self.stream is None:
            raise CheckpointError(f"{self.place} is in use by another comparison.", "Wait for it or stop it, or choose another --name.")

    def __exit__(self, *error: object) -> None:
        if self.stream is not None:
            self.stream.close()


def missing_runs(runs: Sequence[PlannedRun], place: Path, retry: bool) -> tuple[list[PlannedRun], list[PlannedRun]]:
    """What is still to run, and what failed before and is left alone. Raises ConfigError when a run folder holds another configuration."""
    missing: list[PlannedRun] = []
    kept: list[PlannedRun] = []
    problems: list[str] = []
    for run in runs:
        folder = place / "runs" / run.name
        if (folder / "config.toml").is_file():
            changed = differences(load_config(folder / "config.toml"), run.config)
            if changed:
                problems.append(f"{run.name}: " + ", ".join(changed[:4]) + (", ..." if len(changed) > 4 else ""))
                continue
        if _finished(folder):
            continue
        failed = read_failure(place, run) is not None and not retry
        (kept if failed else missing).append(run)
    if problems:
        raise ConfigError(
            f"{place} holds runs of another plan under the same names.",
            "Choose another --name, or remove these run folders. New variants, values and seeds may be added to a comparison.",
            tuple(problems),
        )
    return missing, kept


def differences(before: RunConfig, now: RunConfig) -> list[str]:
    """Fields in which two configurations differ, with both values; where a run is kept does not count."""
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name) and not name.startswith("run."))
    return [f"{name} was {_shown(old.get(name))}, is {_shown(new.get(name))}" for name in names]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return found


def _shown(value: Any) -> str:
    return "absent" if value is None else format_value(value)


def _finished(folder: Path) -> bool:
    if not (folder / "journal.jsonl").is_file():
        return False
    try:
        return load_record(folder).status == "finished"
    except CheckpointError:
        return False


def read_failure(place: Path, run: PlannedRun) -> str | None:
    """The first line of the error of a run that failed with this very configuration; None if it did not."""
    path = place / "failures" / f"{run.name}.json"
    try:
        failure = json.loads(path.read_text("utf-8"))
        return str(failure["message"]) if failure["config"] == run.config.model_dump(mode="json") else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note_failure(place: Path, run: PlannedRun, outcome: Outcome) -> None:
    """Keep what went wrong beside the runs: a run that fails at its start leaves no folder."""
    (place / "failures").mkdir(exist_ok=True)
    facts = {"kind": outcome.kind, "message": f"{outcome.kind}: {outcome.message}", "remedy": outcome.remedy, "utc": utc_now()}
    content = json.dumps({**facts, "config": run.config.model_dump(mode="json")}, indent=1) + "\n"
    write_atomically(place / "failures" / f"{run.name}.json", content.encode())


def worker_count(jobs: int, runs: Sequence[PlannedRun]) -> int:
    """As many as asked for; else one per core, but one where a graphics device does the work, and never more than there are runs."""
    devices = {run.config.engine.device for run in runs}
    graphics = devices & {"cuda", "mps"} or ("auto" in devices and GRAPHICS_DEVICE.exists())
    threads = max(run.config.engine.threads for run in runs)
    return max(1, min(jobs or (1 if graphics else usable_cores() // threads), len(runs)))


def _run_missing(missing: Sequence[PlannedRun], place: Path, options: Options, console: Console) -> bool:
    """Run them; True if the user stopped it."""
    size = worker_count(options.jobs, missing)
    for run in missing:
        (place / "failures" / f"{run.name}.json").unlink(missing_ok=True)
    logs = place / "logs"
    logs.mkdir(exist_ok=True)
    display = Display(console, missing, place)
    say = display.progress.console.print
    _say(console, f"{plural(size, 'worker')} side by side; logs in {logs}" if size > 1 else f"1 worker; its log is in {logs}")
    threads = max(run.config.engine.threads for run in missing)
    with (
        asked_to_stop(lambda: say("stopping after the current steps; once more to stop at once", style="yellow")) as stop,
        display.progress,
    ):
        try:
            outcomes = Pool(size, threads, place / "runs", logs, display.listen).run(missing, stop)
        except KeyboardInterrupt:
            return True
    return stop() or any(outcome.status == "stopped" for outcome in outcomes.values())


class Display:
    """A bar over all rounds of all runs with the time left, what each worker is at, and a line per run that ended."""

    def __init__(self, console: Console, runs: Sequence[PlannedRun], place: Path) -> None:
        self.place, self.total, self.ended = place, len(runs), 0
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rounds"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            transient=True,
            disable=console.quiet or not console.is_terminal,
        )
        self.all = self.progress.add_task(f"0 of {self.total} runs", total=sum(run.config.rounds for run in runs))
        self.tasks: dict[str, TaskID] = {}
        self.rounds: dict[str, int] = {}

    def listen(self, run: PlannedRun, message: dict[str, Any]) -> None:
        """Messages of the pool about a run."""
        event = message["event"]
        if event == "given":
            self.tasks[run.name] = self.progress.add_task(run.name, total=run.config.rounds)
        elif event == "stage":
            self.progress.update(self.tasks[run.name], description=f"{run.name}: {message['name']}")
        elif event == "round":
            self._advance(run, message["round"])
        elif event == "outcome":
            self._end(run, message["outcome"])

    def _advance(self, run: PlannedRun, number: int) -> None:
        self.progress.advance(self.all, number - self.rounds.get(run.name, 0))
        self.rounds[run.name] = number
        self.progress.update(self.tasks[run.name], completed=number)

    def _end(self, run: PlannedRun, outcome: Outcome) -> None:
        self.progress.remove_task(self.tasks.pop(run.name))
        if outcome.status == "stopped":
            return
        self._advance_rest(run)
        self.ended += 1
        self.progress.update(self.all, description=f"{self.ended} of {self.total} runs")
        head = f"[{self.ended}/{self.total}] {run.name}"
        if outcome.status == "failed":
            note_failure(self.place, run, outcome)
            self.progress.console.print(f"{head}  failed: {outcome.kind}: {outcome.message}", style="red", markup=False, soft_wrap=True)
            return
        _, after = load_record(self.place / "runs" / run.name).before_after()
        self.progress.console.print(f"{head}  perplexity {number_text(after, 4)}", markup=False, soft_wrap=True)

    def _advance_rest(self, run: PlannedRun) -> None:
        """Rounds a failed run will not do count as dealt with."""
        self.progress.advance(self.all, run.config.rounds - self.rounds.get(run.name, 0))


def write_results(request: Request, variants: Sequence[Variant], options: Options) -> Comparison:
    """`compare.html`, `compare.json` and `table.md` from what lies in the folder."""
    place = request.place
    runs = [run for variant in variants for run in variant.runs]
    failures = {run.name: text for run in runs if (text := read_failure(place, run)) is not None}
    figures = figures_of(variants, place / "runs", failures)
    comparison = build_comparison(request.name, figures, options.target, options.baseline)
    facts = {"version": __version__, "command": command_of(request, options), **to_json(comparison)}
    page = render_page(comparison, __version__, facts["command"])
    write_atomically(place / "compare.json", (json.dumps(facts, indent=1, allow_nan=False) + "\n").encode())
    write_atomically(place / "table.md", render_markdown(comparison).encode())
    write_atomically(place / "compare.html", page.encode())
    return comparison


def command_of(request: Request, options: Options) -> str:
    """The command line that makes this comparison again."""
    parts = ["splitft", "compare", *(str(path) for path in request.configs)]
    parts += [part for name in request.methods for part in ("--method", name)]
    parts += [part for sweep in request.sweeps for part in ("--sweep", sweep)]
    named = {
        "--seeds": request.seeds,
        "--target-perplexity": "" if options.target is None else f"{options.target:g}",
        "--baseline": options.baseline,
        "--folder": str(request.folder),
        "--name": request.name,
    }
    parts += [part for option, value in named.items() if value for part in (option, value)]
    return shlex.join([*parts, *request.overrides])
