"""All runs, some processes at a time; a finished one is not run again, a broken-off one goes on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.codecs.figures import COLUMNS, LINKS_FILE, points, rounds_done
from experiments.codecs.settings import LENGTHS, SETTINGS
from experiments.codecs.stacks import RECOMMENDED, UNCOMPRESSED, stacks

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"
COMMAND = "python -m experiments.codecs run --data TEXTS --models MODELS"
MEDIUM, LONG = 10, 50
TOGETHER = 4  # short runs of one process
# Which stacks run for how many epochs, most telling first: targets in every setting, then all stacks, then controllers with time to learn.
BOTH = (UNCOMPRESSED, RECOMMENDED)
COARSE = "recommended_coarse"
CONTROLLED = ("recommended_bang_bang", "recommended_open", "recommended_ddpg", "recommended_energy")
PARETO = ("shakespeare", "python_docs")


@dataclass(frozen=True)
class Places:
    """Where things are: folders of texts and models, and of run folders."""

    texts: Path
    models: Path
    work: Path


@dataclass(frozen=True)
class Job:
    """One run: how many epochs of which stack in which setting."""

    setting: str
    stack: str
    seed: int
    epochs: int

    @property
    def label(self) -> str:
        return f"{self.setting} {self.stack} seed {self.seed}, {self.epochs} epochs"

    @property
    def text(self) -> str:
        """As a command takes it."""
        return f"{self.setting}/{self.stack}/{self.seed}/{self.epochs}"

    @classmethod
    def read(cls, text: str) -> Job:
        """The inverse of `text`; ValueError for what it cannot be."""
        setting, stack, seed, epochs = text.split("/")
        return cls(setting, stack, int(seed), int(epochs))

    def codecs(self) -> dict[str, Any]:
        """The stack as it is configured now; a kept run with other codecs is not this one."""
        return stacks(self.epochs)[self.stack].values(SETTINGS[self.setting].exit)

    def folder(self, work: Path) -> Path:
        text = json.dumps([self.codecs(), SETTINGS[self.setting].values(self.seed, self.epochs)], sort_keys=True)
        return work / f"{self.setting}-{self.stack}-{self.epochs}-{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def jobs(
    seeds: Iterable[int], only: Iterable[str] = (), settings: Iterable[str] = (), lengths: Iterable[int] = (), quick: bool = False
) -> list[Job]:
    """What is to be run, most telling first, a stage after the other and within it seed by seed. `only`, `settings` and `lengths` (epochs)
    choose; empty ones choose all.

    The reference and the recommended stack for every length with the exit on the server; the longest in a U-shape; in two settings all
    stacks for ten epochs, on the small model the controllers for fifty; E2E last. `quick`: reference and recommended stack for one epoch.
    """
    names, chosen, epochs = set(only) or set(stacks()), list(settings) or list(SETTINGS), set(lengths) or set(LENGTHS)
    if unknown := (names - stacks().keys()) | (set(chosen) - SETTINGS.keys()) | {str(one) for one in epochs - LENGTHS.keys()}:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}; stacks are {', '.join(stacks())}; settings are {', '.join(SETTINGS)}")
    if quick:
        return [Job(setting, stack, seed, 1) for seed in seeds for setting in chosen for stack in BOTH if stack in names]
    main = [name for name in chosen if name != "e2e"]  # which is the least telling
    stages = [
        [(name, stack, length) for name in main if SETTINGS[name].exit == "server" for length in LENGTHS for stack in BOTH],
        [(name, stack, LONG) for name in main if SETTINGS[name].exit == "client" for stack in (*BOTH, COARSE)],
    ]
    for name in PARETO:
        stages.append([(name, stack, MEDIUM) for stack in stacks() if stack not in BOTH and name in main])
        stages.append([(name, stack, LONG) for stack in (COARSE, *CONTROLLED) if name == "shakespeare" and name in main])
    stages.append([("e2e", stack, length) for length in LENGTHS for stack in BOTH if "e2e" in chosen])
    wanted = [[one for one in stage if one[1] in names and one[2] in epochs] for stage in stages]
    return [Job(name, stack, seed, length) for stage in wanted for seed in seeds for name, stack, length in stage]


def configuration(job: Job, places: Places) -> dict[str, Any]:
    """The run's configuration with its paths."""
    setting, stack = SETTINGS[job.setting], stacks(job.epochs)[job.stack]
    values = {**setting.values(job.seed, job.epochs), **stack.values(setting.exit), "name": job.folder(places.work).name}
    values["data"] = setting.data(places.texts, places.work)
    values["run"] = {**values["run"], "folder": str(places.work)}
    values["clients"] = {**values["clients"], "profiles_file": str(LINKS_FILE)}
    if setting.model != "embedded":
        values["model"] = {**values["model"], "path": str(places.models / setting.model)}
    return values


def train(job: Job, places: Places) -> None:
    """Run it in this process to its last round."""
    import splitft
    from splitft.config import parse_config

    folder = job.folder(places.work)
    begun = (folder / "config.toml").is_file()
    if rounds_done(folder) >= LENGTHS[job.epochs].rounds:
        return
    opened = splitft.open_run(parse_config(configuration(job, places)), resume=folder if begun else False)
    with contextlib.closing(opened):
        for _ in opened.rounds():
            pass


def results_path(setting: str, results: Path = RESULTS) -> Path:
    return results / f"codecs-{setting}.json"


def kept(setting: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    """The runs of a setting that are kept."""
    path = results_path(setting, results)
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    return found


def is_kept(job: Job, results: Path = RESULTS) -> bool:
    """Whether its figures are there, of the same codecs."""
    stack, side = stacks(job.epochs)[job.stack], SETTINGS[job.setting].exit
    return any(_is(run, job) and stack.is_kept_as(run["codecs"], side) for run in kept(job.setting, results))


def _is(run: Mapping[str, Any], job: Job) -> bool:
    return bool((run["stack"], run["seed"], run["epochs"]) == (job.stack, job.seed, job.epochs))


def keep(job: Job, found: list[list[float | None]], results: Path = RESULTS) -> Path:
    """Put the figures of a run into its setting's file, in place of an older one of the same stack, length and seed."""
    others = [run for run in kept(job.setting, results) if not _is(run, job)]
    order = {name: place for place, name in enumerate(stacks())}
    runs = [*others, {"stack": job.stack, "epochs": job.epochs, "seed": job.seed, "codecs": job.codecs(), "points": found}]
    runs.sort(key=lambda run: (order.get(run["stack"], len(order)), run["epochs"], run["seed"]))
    head = {"command": COMMAND, "setting": SETTINGS[job.setting].values(0, LONG), "columns": COLUMNS}
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in runs)
    text = json.dumps(head, separators=(",", ":"))[:-1] + ',"runs":[\n' + lines + "\n]}\n"
    path = results_path(job.setting, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return path


def run_all(todo: list[Job], places: Places, processes: int, results: Path = RESULTS, say: Callable[[str], None] = print) -> list[Job]:
    """Train what is missing, so many processes at a time, and keep the figures of a process's runs when it ends; the jobs that failed."""
    waiting = _together([job for job in todo if not is_kept(job, results)])
    left = sum(len(group) for group in waiting)
    say(f"{len(todo) - left} of {len(todo)} runs are kept already")
    running: list[tuple[list[Job], subprocess.Popen[bytes]]] = []
    failed: list[Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                group = waiting.pop(0)
                running.append((group, _start(group, places)))
            _wait_for_one(running)
            for group, child in [pair for pair in running if pair[1].poll() is not None]:
                running.remove((group, child))
                left -= len(group)
                for job in group:
                    if not _take(job, places, results):
                        failed.append(job)
                        say(f"FAILED {job.label}: see {_log(group, places)}")
                    else:
                        say(f"done {job.label}, {left} left")
    finally:
        for _, child in running:
            child.terminate()
    return failed


def _together(listed: list[Job]) -> list[list[Job]]:
    """What one process trains: a long run alone, some neighbouring short ones, since a process needs seconds to begin."""
    groups: list[list[Job]] = []
    for job in listed:
        fits = groups and job.epochs < LONG and groups[-1][0].epochs < LONG and len(groups[-1]) < TOGETHER
        if fits:
            groups[-1].append(job)
        else:
            groups.append([job])
    return groups


def _take(job: Job, places: Places, results: Path) -> bool:
    """Keep the figures of a run that has come to its end; whether it has."""
    folder = job.folder(places.work)
    if rounds_done(folder) < LENGTHS[job.epochs].rounds:
        return False
    keep(job, points(folder), results)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return True


def _log(group: list[Job], places: Places) -> Path:
    return Path(f"{group[0].folder(places.work)}.log")


def _start(group: list[Job], places: Places) -> subprocess.Popen[bytes]:
    places.work.mkdir(parents=True, exist_ok=True)
    for job in group:
        SETTINGS[job.setting].data(places.texts, places.work)  # here, so that no two processes write it
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "experiments.codecs", "train", *(job.text for job in group)]
    command += ["--data", str(places.texts), "--models", str(places.models), "--work", str(places.work)]
    with _log(group, places).open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _wait_for_one(running: list[tuple[list[Job], subprocess.Popen[bytes]]]) -> None:
    while all(child.poll() is None for _, child in running):
        with contextlib.suppress(subprocess.TimeoutExpired):
            running[0][1].wait(timeout=0.5)
