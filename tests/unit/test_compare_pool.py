"""Workers: every run ends in an outcome, whatever becomes of the process that has it in hand."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from splitft.apps import compare_pool, compare_work
from splitft.apps.compare_plan import PlannedRun
from splitft.apps.compare_pool import Outcome, Pool, Worker, environment, lock
from splitft.apps.signals import asked_to_stop
from splitft.config import RunConfig
from splitft.errors import ConfigError, Interrupted

# Speaks the protocol as the real worker does; the seed says what becomes of a run.
STUB = """
import json, os, signal, sys, time
stopped = False
def stop(number, frame):
    global stopped
    stopped = True
signal.signal(signal.SIGTERM, stop)
def say(**message):
    print(json.dumps(message), flush=True)
for line in sys.stdin:
    seed = json.loads(line)["config"]["seed"]
    say(event="round", round=0)
    if seed == 1:
        say(event="failed", kind="ConfigError", message="it is wrong", remedy="make it right"); sys.exit(1)
    if seed == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == 3:
        print("last words", file=sys.stderr, flush=True); sys.exit(5)
    if seed == 4:
        while not stopped:
            time.sleep(0.01)
        say(event="stopped"); sys.exit(130)
    say(event="round", round=1)
    say(event="done")
"""


@pytest.fixture
def pids(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stub workers in place of real ones; their process numbers."""
    started: list[int] = []

    def start(number: int, logs: Path, threads: int) -> Worker:
        log = logs / f"worker-{number}.log"
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, "-c", STUB],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=environment(threads),
                start_new_session=True,
            )
        started.append(process.pid)
        return Worker(process, log)

    monkeypatch.setattr(compare_pool, "start_worker", start)
    return started


def run(seed: int, number: int = 0) -> PlannedRun:
    return PlannedRun(f"r{number}-s{seed}", "v", seed, RunConfig(seed=seed))


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_worker_does_many_runs_and_failures_stop_nothing(pids: list[int], tmp_path: Path) -> None:
    heard: list[tuple[str, str]] = []
    runs = [run(0, 1), run(1, 2), run(2, 3), run(0, 4), run(3, 5), run(0, 6), run(0, 7)]
    outcomes = Pool(2, 1, tmp_path, tmp_path, lambda one, message: heard.append((one.name, message["event"]))).run(runs)
    assert {name: outcome.status for name, outcome in outcomes.items()} == {one.name: "done" if one.seed == 0 else "failed" for one in runs}
    assert outcomes["r2-s1"] == Outcome("failed", "ConfigError", "it is wrong", "make it right")
    assert "signal 9" in outcomes["r3-s2"].message
    assert "memory" in outcomes["r3-s2"].remedy
    assert outcomes["r5-s3"].message.endswith("exit code 5: last words")
    assert [event for name, event in heard if name == "r7-s0"] == ["given", "round", "round", "outcome"]
    assert len(pids) <= 5  # one more for each that was lost
    assert all(gone(pid) for pid in pids)


def test_one_worker_takes_all_runs_in_order(pids: list[int], tmp_path: Path) -> None:
    order: list[str] = []
    runs = [run(0, number) for number in range(5)]
    Pool(1, 1, tmp_path, tmp_path, lambda one, message: order.append(one.name) if message["event"] == "given" else None).run(runs)
    assert order == [one.name for one in runs]
    assert len(pids) == 1


def test_stop_ends_runs_and_begins_no_more(pids: list[int], tmp_path: Path) -> None:
    asked = False

    def listen(one: PlannedRun, message: dict[str, Any]) -> None:
        nonlocal asked
        asked = asked or (one.seed == 4 and message["event"] == "round")

    outcomes = Pool(1, 1, tmp_path, tmp_path, listen).run([run(0, 1), run(4, 2), run(0, 3)], lambda: asked)
    assert {name: outcome.status for name, outcome in outcomes.items()} == {"r1-s0": "done", "r2-s4": "stopped"}
    assert all(gone(pid) for pid in pids)


def test_no_worker_outlives_an_error_of_the_command(pids: list[int], tmp_path: Path) -> None:
    def listen(one: PlannedRun, message: dict[str, Any]) -> None:
        if message["event"] == "round":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pool(2, 1, tmp_path, tmp_path, listen).run([run(4, 1), run(4, 2)])
    assert all(gone(pid) for pid in pids)


def test_the_first_signal_asks_and_the_second_interrupts() -> None:
    said: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    with asked_to_stop(lambda: said.append("asked")) as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert len(said) == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_workers_compute_with_the_threads_they_are_given() -> None:
    found = environment(3)
    assert (found["OMP_NUM_THREADS"], found["OMP_WAIT_POLICY"], found["KMP_BLOCKTIME"]) == ("3", "PASSIVE", "0")
    assert found["PATH"] == os.environ["PATH"]


def test_one_comparison_has_the_folder(tmp_path: Path) -> None:
    first = lock(tmp_path)
    assert first is not None
    assert lock(tmp_path) is None
    first.close()
    again = lock(tmp_path)
    assert again is not None
    again.close()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, 0, {"event": "done"}),
        (Interrupted("Stopped."), 130, {"event": "stopped"}),
        (ConfigError("Two faults.\nmore", "mend it", ("a is 1", "b is 2")), 1, {"kind": "ConfigError", "message": "Two faults."}),
        (ConfigError("a is 1", "", ("a is 1",)), 1, {"message": "a is 1"}),
        (MemoryError(), 1, {"kind": "ResourceError"}),
        (ZeroDivisionError("by zero\nand more"), 1, {"kind": "ZeroDivisionError", "message": "by zero"}),
    ],
)
def test_how_a_run_ended_is_told(
    error: Exception | None, code: int, message: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(values: dict[str, Any], folder: Path, send: compare_work.Send) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(compare_work, "work", work)
    channel = io.StringIO()
    job = json.dumps({"run": "a", "config": {}, "folder": "x"}) + "\n"
    assert compare_work.serve(io.StringIO(job), compare_work.sender(channel)) == code
    (told,) = [json.loads(line) for line in channel.getvalue().splitlines()]
    assert message.items() <= told.items()
    assert ("Traceback" in capsys.readouterr().err) == (code == 1)  # the log has what the page leaves out
