"""`splitft run`: a run with a live display, stopped cleanly by Ctrl-C, ending in a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from splitft.apps.report import summary_table
from splitft.apps.report_record import load_record
from splitft.apps.session import FederatedRun, stoppable
from splitft.config import RunConfig
from splitft.engine.rounds import RoundRecord
from splitft.errors import Interrupted

STAGES = {"train": "training", "aggregate": "averaging adapters", "evaluate": "evaluating"}


class Display:
    """A line per finished round above a progress bar of client-steps. Quiet: nothing."""

    def __init__(self, console: Console, rounds: int, quiet: bool) -> None:
        self.console, self.rounds, self.quiet = console, rounds, quiet
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("client-steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self.task = self.progress.add_task("starting", total=None)
        self.round = 0
        self.first: float | None = None

    def expect(self, total: int, done: int) -> None:
        self.progress.update(self.task, total=total, completed=done)

    def listen(self, event: str, facts: dict[str, Any]) -> None:
        if event == "stage":
            name = STAGES.get(facts["name"], facts["name"])
            self.progress.update(
                self.task, description=f"round {self.round + 1}/{self.rounds}: {name}" if facts["name"] in STAGES else name
            )
        elif event == "step":
            self.progress.advance(self.task, facts["count"])
        elif event == "round":
            self.show(facts["record"])

    def show(self, record: RoundRecord) -> None:
        self.round = record.round
        if self.quiet:
            return
        parts = [f"round {record.round:>3}"]
        if record.training is not None:
            clients = record.training["clients"]
            loss = sum(one["loss_mean"] * one["targets"] for one in clients) / sum(one["targets"] for one in clients)
            sent = sum(sum(kinds.values()) for one in clients for kinds in one["bytes"].values())
            cuts = ",".join(str(one["cut"]) for one in clients) if len(clients) <= 12 else f"{len(clients)} clients"
            parts += [f"cuts {cuts}", f"train loss {loss:.3f}", f"{sent / 1e6:.1f} MB"]
        if record.evaluation is not None:
            parts.append(f"held-out perplexity {record.evaluation['global']['perplexity']:.2f}")
        if record.training is not None:
            parts.append(f"{record.training['virtual_end_s']:.1f} virtual s, {record.training['wall_s']:.1f} s")
        else:
            parts.append("(before training)")
        self.progress.console.print("  ".join(parts), highlight=False, soft_wrap=True)


def execute(config: RunConfig, *, resume: Path | None = None, quiet: bool = False) -> Path:
    """Run to the end and return the run folder. Raises Interrupted when stopped, and whatever error the run meets."""
    console = Console(stderr=True)
    display = Display(console, config.rounds, quiet)
    folder = resume or Path(config.run.folder) / config.name
    with stoppable(folder, lambda text: display.progress.console.print(text, style="yellow")) as check, display.progress:

        def listen(event: str, facts: dict[str, Any]) -> None:
            display.listen(event, facts)
            if event in ("step", "stage"):
                check()

        run = FederatedRun(config, resume, listen)
        try:
            display.round = run.state.round
            rules = run.assembly.rules
            every, drawn = len(run.assembly.data.clients), rules.attendance
            taking_part = rules.buffer or min(every, max(drawn.minimum, round(drawn.participation * every)))
            per_round = taking_part * rules.local_steps
            display.expect(rules.rounds * per_round, run.state.round * per_round)
            if run.state.round >= rules.rounds and not quiet:
                more = f"splitft run --resume {folder} rounds={2 * rules.rounds}"
                console.print(f"all {rules.rounds} rounds are done already; for more: {more}", highlight=False, soft_wrap=True)
            for _ in run.rounds():
                check()
            run.finish()
        except Interrupted:
            run.note_interruption()
            raise
        finally:
            run.close()
    if not quiet:
        show_end(folder)
    return folder


def show_end(folder: Path) -> None:
    """The tables at the end of a run, and where to look."""
    out = Console()
    for table in summary_table(load_record(folder / "journal.jsonl")):
        out.print(table)
    out.print(f"report   {folder / 'report.html'}", highlight=False, soft_wrap=True)
    out.print(f"adapter  {folder / 'adapter'}", highlight=False, soft_wrap=True)
