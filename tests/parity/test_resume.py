"""Oracle 6: killed at any point and resumed = uninterrupted, bit for bit. Oracle 12: same seed, same run; another seed, another."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from splitft.apps.session import FederatedRun
from splitft.config import RunConfig
from splitft.engine import checkpoint
from splitft.errors import CheckpointError, ConfigError, Interrupted

from ..tiny_run import text_file, tiny_config

WALL = ("wall_s", "utc")


def train(config: RunConfig, resume: Path | None = None) -> Path:
    """Run (or resume) to the end in this process."""
    run = FederatedRun(config, resume)
    try:
        for _ in run.rounds():
            pass
        return run.finish()
    finally:
        run.close()


def outcome(folder: Path) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Final adapters, and every event with the wall clock left out."""
    events = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in event.items() if k not in WALL} for event in events if event["event"] in ("round", "evaluation")]
    return checkpoint.load(checkpoint.newest(folder)).adapters, kept


def same(folder: Path, reference: Path) -> None:
    adapters, events = outcome(folder)
    expected, expected_events = outcome(reference)
    assert torch.equal(adapters, expected)
    assert events == expected_events
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (reference / name).read_bytes()


@pytest.fixture(scope="module", params=["cohort", "workers"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    folder = tmp_path_factory.mktemp("reference")
    config = tiny_config(folder, engine={"name": request.param}, clients={"participation": 0.7})
    return config, train(config)


def elsewhere(config: RunConfig, folder: Path, **changes: Any) -> RunConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"folder": str(folder)}), **changes})


def in_child(work: Any) -> Any:
    """Start `work` in a forked process that can be killed."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


def attempt(config: RunConfig, folder: Path) -> None:
    """What a user does: start, or resume if there is something to resume."""
    try:
        train(config)
    except ConfigError as problem:
        assert "--resume" in str(problem)  # noqa: PT017 - the remedy is what the user follows
        train(config, folder)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_killed_at_ten_random_moments_and_resumed_equals_uninterrupted(reference: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, expected = reference
    own = elsewhere(config, tmp_path)
    folder, draw, kills = tmp_path / config.name, np.random.default_rng(7), 0
    started = time.monotonic()
    train(elsewhere(config, tmp_path / "timing"))
    whole_s = time.monotonic() - started
    for _ in range(60):
        if kills == 10:
            break
        child = in_child(lambda: attempt(own, folder))
        child.join(float(draw.uniform(0.05, 1.0)) * whole_s)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
        if (folder / "report.html").exists():  # it finished: begin again, so that all ten kills hit a run in progress
            same(folder, expected)
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            folder.rmdir()
    assert kills == 10
    attempt(own, folder)
    same(folder, expected)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("reference", ["cohort"], indirect=True)  # both engines write by the same code; above both are killed
@pytest.mark.parametrize("call", ["fsync", "rename", "rmtree"])
def test_killed_before_every_kth_write_to_disk(reference: tuple[RunConfig, Path], tmp_path: Path, call: str) -> None:
    """Every point at which a file or folder becomes permanent, one after the other: the process dies right before it."""
    config, expected = reference
    for kth in range(1, 99):
        folder = tmp_path / f"{call}-{kth}" / config.name
        own = elsewhere(config, folder.parent)

        def die_at(own: RunConfig = own, folder: Path = folder, kth: int = kth) -> None:
            owner: Any = {"fsync": os, "rename": Path, "rmtree": shutil}[call]
            real, count = getattr(owner, call), 0

            def counted(*arguments: Any, **named: Any) -> Any:
                nonlocal count
                count += 1
                if count == kth:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **named)

            setattr(owner, call, counted)
            attempt(own, folder)

        child = in_child(die_at)
        child.join()
        if child.exitcode == 0:
            assert kth > 2, "the run writes at fewer points than it should"
            break
        assert child.exitcode == -signal.SIGKILL
        attempt(own, folder)
        same(folder, expected)
    else:
        pytest.fail("the run never came to its end")


def test_stopped_after_a_step_loses_nothing(reference: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """What Ctrl-C does: Interrupted out of a step in the middle of a round; resume repeats that round with the same numbers."""
    config, expected = reference
    steps = 0

    def listen(event: str, facts: dict[str, Any]) -> None:
        nonlocal steps
        steps += facts.get("count", 0) if event == "step" else 0
        if event == "step" and steps > 5:
            raise Interrupted("stopped")

    run = FederatedRun(elsewhere(config, tmp_path), None, listen)
    with pytest.raises(Interrupted):
        list(run.rounds())
    assert run.state.round >= 1
    run.close()
    train(elsewhere(config, tmp_path), run.folder)
    same(run.folder, expected)


def test_same_seed_same_run_and_another_seed_another(reference: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, expected = reference
    same(train(elsewhere(config, tmp_path / "again")), expected)
    other, _ = outcome(train(elsewhere(config, tmp_path / "other", seed=2)))
    assert not torch.equal(other, outcome(expected)[0])


def test_resuming_a_finished_run_changes_nothing(reference: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, expected = reference
    own = elsewhere(config, tmp_path)
    folder = train(own)
    train(own, folder)
    same(folder, expected)


def test_more_rounds_can_be_asked_for_later(tmp_path: Path) -> None:
    """With a constant rate the schedule does not depend on the number of rounds, so two and one rounds equal three."""
    config = tiny_config(tmp_path, train={"schedule": "constant"})
    whole = train(elsewhere(config, tmp_path / "whole"))
    short = elsewhere(config, tmp_path / "short", rounds=2)
    folder = train(short)
    train(short.model_copy(update={"rounds": 3}), folder)
    assert torch.equal(outcome(folder)[0], outcome(whole)[0])


def test_another_thread_count_or_other_data_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    folder = train(config)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(CheckpointError, match="threads"):
            FederatedRun(config.model_copy(update={"engine": config.engine.model_copy(update={"threads": threads + 1})}), folder)
    finally:
        torch.set_num_threads(threads)
    text_file(tmp_path / "text.txt", seed=5)
    with pytest.raises(CheckpointError, match="data ="):
        FederatedRun(config, folder)


def test_a_folder_is_not_overwritten_and_has_one_writer(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, rounds=1)
    run = FederatedRun(config)
    with pytest.raises(ConfigError, match="exists already"):
        FederatedRun(config)
    with pytest.raises(CheckpointError, match="in use"):
        FederatedRun(config, run.folder)
    run.close()


@pytest.mark.parametrize("engine", ["cohort", "workers"])
def test_a_bottleneck_is_resumed_bit_for_bit(tmp_path: Path, engine: str) -> None:
    """Its pairs, their moments and its noise: two cuts fixed, kept moments, stopped after the first round."""
    changes: dict[str, Any] = {
        "engine": {"name": engine},
        "bottleneck": {"channels": 6, "noise": 0.5, "clip": 4.0},
        "clients": {"participation": 0.7},
    }
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    config = tiny_config(tmp_path, **changes)
    reference = train(elsewhere(config, tmp_path / "whole"))
    stopped = elsewhere(config, tmp_path / "stopped")
    run = FederatedRun(stopped)
    next(iter(run.rounds()))
    next(iter(run.rounds()))
    run.close()
    folder = train(stopped, tmp_path / "stopped" / "tiny")
    same(folder, reference)
    assert (folder / "bottleneck.safetensors").read_bytes() == (reference / "bottleneck.safetensors").read_bytes()
    with pytest.raises(CheckpointError):  # another one is another run
        FederatedRun(stopped.model_copy(update={"bottleneck": config.bottleneck.model_copy(update={"channels": 5})}), folder)
