"""`splitft compare` as people use it: run, run again, stopped, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from splitft.apps import compare as module
from splitft.apps.cli import main
from splitft.apps.compare import differences, in_order, missing_runs, note_failure, read_failure, worker_count
from splitft.apps.compare_plan import Request, expand
from splitft.apps.compare_pool import Outcome
from splitft.config import override
from splitft.errors import ConfigError

from ..tiny_run import tiny_config
from .compare_journals import write_journal

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def splitft(*arguments: str) -> int:
    """The command in this process; its exit code."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0)


def plan(tmp_path: Path, *overrides: str, seeds: str = "2") -> Request:
    return Request(sweeps=("lora.rank=2,4",), overrides=overrides, seeds=seeds, folder=tmp_path, name="c")


def begun(request: Request, name: str, finished: bool) -> None:
    """A run folder as if it had been run."""
    run = next(run for variant in expand(request) for run in variant.runs if run.name == name)
    write_journal(request.place / "runs" / name, finished=finished)
    (request.place / "runs" / name / "config.toml").write_text(run.config.to_toml())


def names(found: list[module.PlannedRun]) -> list[str]:
    return [run.name for run in found]


def test_finished_runs_are_not_run_again_and_half_finished_ones_are(tmp_path: Path) -> None:
    request = plan(tmp_path)
    begun(request, "rank_2-s0", finished=True)
    begun(request, "rank_4-s0", finished=False)
    runs = in_order(expand(request))
    assert names(runs) == ["rank_2-s0", "rank_4-s0", "rank_2-s1", "rank_4-s1"]  # the first seed of all, then the second
    missing, kept = missing_runs(runs, request.place, retry=False)
    assert (names(missing), kept) == (["rank_4-s0", "rank_2-s1", "rank_4-s1"], [])
    more = in_order(expand(plan(tmp_path, seeds="3")))
    assert len(missing_runs(more, request.place, retry=False)[0]) == 5  # a superset of the plan adds runs


def test_failed_runs_are_left_alone_until_asked_for(tmp_path: Path) -> None:
    request = plan(tmp_path)
    runs = in_order(expand(request))
    request.place.mkdir()
    note_failure(request.place, runs[0], Outcome("failed", "ConfigError", "it is wrong", "mend it"))
    assert read_failure(request.place, runs[0]) == "ConfigError: it is wrong"
    missing, kept = missing_runs(runs, request.place, retry=False)
    assert (names(kept), len(missing)) == (["rank_2-s0"], 3)
    assert len(missing_runs(runs, request.place, retry=True)[0]) == 4
    other = in_order(expand(plan(tmp_path, "rounds=9")))
    assert read_failure(request.place, other[0]) is None  # it was another run that failed
    assert len(missing_runs(other, request.place, retry=False)[0]) == 4


def test_another_plan_under_the_same_name_is_refused(tmp_path: Path) -> None:
    begun(plan(tmp_path), "rank_2-s0", finished=True)
    with pytest.raises(ConfigError) as caught:
        missing_runs(in_order(expand(plan(tmp_path, "rounds=9"))), tmp_path / "c", retry=False)
    assert caught.value.problems == ("rank_2-s0: rounds was 5, is 9",)
    assert "--name" in caught.value.remedy


def test_where_a_run_is_kept_is_no_difference() -> None:
    (variant,) = expand(Request())
    config = variant.runs[0].config
    assert differences(config, override(config, ["run.folder=elsewhere", "run.keep_checkpoints=5"])) == []
    assert differences(config, override(config, ["seed=3"])) == ["seed was 0, is 3"]


def test_as_many_workers_as_pay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "usable_cores", lambda: 8)
    monkeypatch.setattr(module, "GRAPHICS_DEVICE", tmp_path / "absent")
    two, many = in_order(expand(Request(seeds="2"))), in_order(expand(Request(seeds="20")))
    assert [worker_count(0, two), worker_count(0, many), worker_count(3, many), worker_count(30, many)] == [2, 8, 3, 20]
    assert worker_count(0, in_order(expand(Request(seeds="20", overrides=("engine.threads=4",))))) == 2
    assert worker_count(0, in_order(expand(Request(seeds="20", overrides=("engine.device=cuda",))))) == 1
    monkeypatch.setattr(module, "GRAPHICS_DEVICE", tmp_path)
    assert [worker_count(0, many), worker_count(4, many)] == [1, 4]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("-m", "splitlra"), "Did you mean splitlora?"),
        (("--baseline", "x"), "--baseline"),
        (("--target-perplexity", "0.5"), "at least 1"),
        (("--jobs", "-1"), "--jobs"),
        (("absent.toml",), "absent.toml"),
        (("--seeds", "x"), "--seeds"),
        (("uplink=casst",), "casst"),
    ],
)
def test_faults_are_told_before_anything_is_run(
    arguments: tuple[str, ...], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert splitft("compare", "--folder", str(tmp_path / "out"), *arguments) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert word in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_dry_run_lists_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert splitft("compare", "--folder", str(tmp_path / "out"), "--sweep", "lora.rank=2,4", "--seeds", "2", "--dry-run") == 0
    found = capsys.readouterr()
    assert found.out.split() == ["rank_2-s0", "rank_4-s0", "rank_2-s1", "rank_4-s1"]
    assert "4 runs: 2 variants" in found.err
    assert not (tmp_path / "out").exists()


def tiny(tmp_path: Path, rounds: int = 2) -> str:
    values = tiny_config(tmp_path, rounds=rounds)
    (tmp_path / "tiny.toml").write_text(values.to_toml())
    return str(tmp_path / "tiny.toml")


def test_real_runs_end_to_end_with_a_failure_and_more_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", tiny(tmp_path), "--sweep", "policy.cuts=[1],[2],[9]", "--folder", str(tmp_path / "out"), "--name", "cuts"]
    assert splitft(*command) == 1
    found = capsys.readouterr()
    place = tmp_path / "out" / "cuts"
    assert "3 runs: 3 variants" in found.err
    assert "cuts_9-s1  failed: ConfigError" in found.err
    assert str(place / "compare.html") in found.out
    facts = json.loads((place / "compare.json").read_text())
    assert [item["runs"][0]["status"] for item in facts["variants"]] == ["finished", "finished", "failed"]
    one, two, _ = facts["variants"]
    # Where a block runs is no part of what is learned; it is of what is sent.
    assert one["perplexity_final"]["mean"] == pytest.approx(two["perplexity_final"]["mean"], rel=1e-2)
    assert one["in_all"]["bytes_up"]["mean"] != two["in_all"]["client_compute_s"]["mean"]
    assert one["runs"][0]["points"][0]["round"] == 0
    assert "policy.cuts[0] is 9" in (place / "compare.html").read_text()
    journal = (place / "runs" / "cuts_1-s1" / "journal.jsonl").read_bytes()
    assert (place / "runs" / "cuts_1-s1" / "report.html").is_file()

    assert splitft("compare", str(tmp_path / "tiny.toml"), "--sweep", "policy.cuts=[1],[2],[3]", *command[4:]) == 0
    found = capsys.readouterr()
    assert "2 finished already, 1 to run" in found.err
    assert (place / "runs" / "cuts_1-s1" / "journal.jsonl").read_bytes() == journal
    assert "cuts_9" not in (place / "compare.html").read_text()


@pytest.mark.slow
def test_stopped_by_a_signal_and_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["compare", tiny(tmp_path, 24), "--seeds", "3", "--jobs", "1", "--folder", str(out), "--name", "c"]
    command = [sys.executable, "-m", "splitft", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not list(out.glob("c/runs/tiny-s1/checkpoints/round-00002")):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()  # noqa: PT018
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "same command again" in error
    statuses = [run["status"] for run in json.loads((out / "c" / "compare.json").read_text())["variants"][0]["runs"]]
    assert statuses == ["finished", "unfinished", "not run"]
    first = (out / "c" / "runs" / "tiny-s0" / "journal.jsonl").read_bytes()
    assert splitft(*arguments) == 0
    assert (out / "c" / "runs" / "tiny-s0" / "journal.jsonl").read_bytes() == first
    assert '"event":"resumed"' in (out / "c" / "runs" / "tiny-s1" / "journal.jsonl").read_text()
    statuses = [run["status"] for run in json.loads((out / "c" / "compare.json").read_text())["variants"][0]["runs"]]
    assert statuses == ["finished"] * 3
