"""`splitft run`: a run with a live display, stopped cleanly by Ctrl-C, ending in a table."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from splitft.apps.console import starting
from splitft.apps.report import summary_table
from splitft.apps.report_record import load_record
from splitft.apps.report_text import clean, plural
from splitft.apps.session import FederatedRun, stoppable
from splitft.config import RunConfig
from splitft.engine.rounds import RoundRecord
from splitft.errors import Interrupted

STAGES = {
    "train": "training",
    "evaluate the base": "evaluating the base model",
    "aggregate": "averaging adapters",
    "evaluate": "evaluating",
}
RECENT_ROUNDS = 8


class Display:
    """A line per finished round above a progress bar of client-steps. Quiet: nothing.

    How many steps a round has is known only after it: clients are lost or cut short, and asynchronous rounds begin as many as are idle.
    So the bar's total is an estimate, renewed after every round from the last few.
    """

    def __init__(self, console: Console, rounds: int, quiet: bool, measured: bool = False) -> None:
        self.console, self.rounds, self.quiet, self.measured = console, rounds, quiet, measured
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
        self.done = self.done_before = self.expected = 0
        self.per_round: deque[int] = deque(maxlen=RECENT_ROUNDS + 1)

    def expect(self, per_round: int, done_rounds: int) -> None:
        """Start the bar after `done_rounds`, with the steps a round is likely to have."""
        self.done = self.done_before = per_round * done_rounds
        self.round, self.expected = done_rounds, per_round
        self._estimate(per_round)

    def _estimate(self, per_round: float) -> None:
        left = max(0, self.rounds - self.round)
        self.progress.update(self.task, completed=self.done, total=max(self.done + round(left * per_round), 1))

    def _step(self, count: int) -> None:
        self.done += count
        total = self.progress.tasks[self.task].total
        self.progress.update(self.task, completed=self.done, total=None if total is None else max(total, self.done))

    def _learn(self) -> None:
        """The round's steps, and what they say of those to come. The oldest does not count: the first begins every client."""
        self.per_round.append(self.done - self.done_before)
        self.done_before = self.done
        recent = list(self.per_round)[1:] or [self.expected]
        self._estimate(sum(recent) / len(recent))

    def warn(self, text: str) -> None:
        """A warning of the run, in yellow, above the bar."""
        self.say(text, "yellow")

    def say(self, text: str, style: str = "") -> None:
        """A line above the bar."""
        if not self.quiet:
            self.progress.console.print(Text(clean(text), style=style), soft_wrap=True)

    def listen(self, event: str, facts: dict[str, Any]) -> None:
        if event == "stage":
            name = STAGES.get(facts["name"], facts["name"])
            self.progress.update(
                self.task, description=f"round {self.round + 1}/{self.rounds}: {name}" if facts["name"] in STAGES else name
            )
        elif event == "told":
            self.say(facts["text"])
        elif event == "step":
            self._step(facts["count"])
        elif event == "round":
            self.show(facts["record"])

    def show(self, record: RoundRecord) -> None:
        self.round = record.round
        if record.training is not None:
            self._learn()
        if self.quiet:
            return
        parts = [f"round {record.round:>3}"]
        if record.training is not None:
            parts += training_parts(record.training)
        if record.evaluation is not None:
            parts.append(f"held-out perplexity {record.evaluation['global']['perplexity']:.2f}")
        if record.training is not None:
            virtual = "" if self.measured else f"{record.training['virtual_end_s']:.1f} virtual s, "
            parts.append(f"{virtual}{record.training['wall_s']:.1f} s")
        else:
            parts.append("(before training)")
        self.progress.console.print("  ".join(parts), highlight=False, soft_wrap=True)


def training_parts(event: Mapping[str, Any]) -> list[str]:
    """What the line of a round says of its training: cuts, who fell out, loss, traffic."""
    clients = event["clients"]
    targets = sum(one["targets"] for one in clients)
    sent = sum(sum(kinds.values()) for one in clients for kinds in one["bytes"].values())
    parts = [f"cuts {','.join(str(one['cut']) for one in clients)}" if 0 < len(clients) <= 12 else plural(len(clients), "client")]
    for state, words in (("partial", "cut short"), ("lost", "lost")):
        if count := sum(one.get("status") == state for one in clients):
            parts.append(f"{count} {words}")
    if targets:
        parts.append(f"train loss {sum(one['loss_mean'] * one['targets'] for one in clients) / targets:.3f}")
    parts.append(f"{sent / 1e6:.1f} MB")
    return parts if event.get("aggregated", True) else [*parts, "not aggregated"]


class Warnings:
    """The warnings a run writes into its journal, each once, beginning behind what is there already."""

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.position = journal.stat().st_size

    def new(self) -> Iterator[str]:
        """Those since the last call."""
        with self.journal.open("rb") as stream:
            stream.seek(self.position)
            lines = stream.read().split(b"\n")
        self.position += sum(len(line) + 1 for line in lines[:-1])  # what has no end yet is read the next time
        for line in lines[:-1]:
            if b'"warning"' in line and (event := json.loads(line)).get("event") == "warning":
                yield f"round {event['round']:>3}  warning: {event['text']}"


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

        with starting(freeze=True):
            run = FederatedRun(config, resume, listen)
        try:
            warnings = Warnings(folder / "journal.jsonl")
            rules = run.assembly.rules
            every, drawn = len(run.assembly.data.clients), rules.attendance
            taking_part = rules.buffer or min(every, max(drawn.minimum, round(drawn.participation * every)))
            display.expect(taking_part * rules.local_steps, run.state.round)
            if run.state.round >= rules.rounds and not quiet:
                more = f"splitft run --resume {folder} rounds={2 * rules.rounds}"
                console.print(f"all {rules.rounds} rounds are done already; for more: {more}", highlight=False, soft_wrap=True)
            for _ in run.rounds():
                for text in warnings.new():
                    display.warn(text)
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
