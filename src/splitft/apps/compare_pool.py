"""Worker processes of `splitft compare`: jobs handed out, reports gathered, everything ended when the command ends.

Workers are sessions of their own, so Ctrl-C reaches this process alone, which then asks them to stop after their current step.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from splitft.apps.compare_plan import PlannedRun

if TYPE_CHECKING:
    pass

POLL_S = 0.2
PATIENCE_S = 10.0
LOG_TAIL_BYTES = 4000
Listener = Callable[[PlannedRun, dict[str, Any]], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended; `kind`, `message` and `remedy` are those of the error of a failed one."""

    status: Literal["done", "failed", "stopped"]
    kind: str = ""
    message: str = ""
    remedy: str = ""


@dataclass
class Worker:
    """A process and the run it is at."""

    process: subprocess.Popen[bytes]
    log: Path
    run: PlannedRun | None = None
    pending: bytes = b""

    def give(self, run: PlannedRun, folder: Path) -> None:
        """Hand over a run. A process that died meanwhile is noticed when its output ends."""
        job = {"run": run.name, "config": run.config.model_dump(mode="json"), "folder": str(folder)}
        self.run = run
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()

    def receive(self) -> Iterator[dict[str, Any]]:
        """The messages that have arrived; the last one is `{"event": "ended"}` when there will be no more."""
        assert self.process.stdout is not None
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        *lines, self.pending = (self.pending + data).split(b"\n")
        for line in lines:
            yield json.loads(line)
        if not data:
            yield {"event": "ended"}

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()

    def last_words(self) -> str:
        """The last line of its log, which often says why it died."""
        try:
            lines = self.log.read_bytes()[-LOG_TAIL_BYTES:].decode("utf-8", "replace").split("\n")
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def environment(threads: int) -> dict[str, str]:
    """What a worker is started with: its threads, and waiting threads that sleep (more processes than one share the cores)."""
    counts = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    waiting = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
    return {**os.environ, **counts, **waiting, "TOKENIZERS_PARALLELISM": "false"}


def start_worker(number: int, logs: Path, threads: int) -> Worker:
    log = logs / f"worker-{number}.log"
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "splitft.apps.compare_work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            env=environment(threads),
            start_new_session=True,
        )
    return Worker(process, log)


class Pool:
    """Runs jobs on up to `size` workers. `listen` hears every message of a run, and its end as `{"event": "outcome"}`."""

    def __init__(self, size: int, threads: int, folder: Path, logs: Path, listen: Listener) -> None:
        self.size, self.threads, self.folder, self.logs, self.listen = size, threads, folder, logs, listen
        self.workers: list[Worker] = []
        self.started = 0
        self.outcomes: dict[str, Outcome] = {}
        self.selector = selectors.DefaultSelector()

    def run(self, runs: Sequence[PlannedRun], stop: Callable[[], bool] = lambda: False) -> dict[str, Outcome]:
        """Run all, in this order as workers become free; outcomes by name of run. After `stop()` nothing new begins."""
        waiting = deque(runs)
        told = False
        try:
            while waiting or any(worker.run for worker in self.workers):
                if stop() and not told:
                    told = True
                    waiting.clear()
                    for worker in self.workers:
                        worker.process.terminate()
                self._hand_out(waiting)
                for key, _ in self.selector.select(POLL_S):
                    self._hear(key.data, told)
        finally:
            self._end(told)
        return self.outcomes

    def _hand_out(self, waiting: deque[PlannedRun]) -> None:
        for worker in self.workers:
            if worker.run is None and waiting:
                self._give(worker, waiting.popleft())
        while waiting and len(self.workers) < self.size:
            worker = start_worker(self.started, self.logs, self.threads)
            self.started += 1
            self.workers.append(worker)
            assert worker.process.stdout is not None
            self.selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            self._give(worker, waiting.popleft())

    def _give(self, worker: Worker, run: PlannedRun) -> None:
        worker.give(run, self.folder / run.name)
        self.listen(run, {"event": "given"})

    def _hear(self, worker: Worker, stopping: bool) -> None:
        for message in worker.receive():
            event = message["event"]
            if event == "done":
                self._settle(worker, Outcome("done"))
            elif event == "stopped":
                self._settle(worker, Outcome("stopped"))
            elif event == "failed":
                self._settle(worker, Outcome("failed", message["kind"], message["message"], message["remedy"]))
            elif event == "ended":
                self._bury(worker, stopping)
            elif worker.run is not None:
                self.listen(worker.run, message)

    def _settle(self, worker: Worker, outcome: Outcome) -> None:
        run, worker.run = worker.run, None
        if run is not None:
            self.outcomes[run.name] = outcome
            self.listen(run, {"event": "outcome", "outcome": outcome})
        if outcome.status != "done":  # it ends by itself; nothing more may be given to it
            self.workers.remove(worker)

    def _bury(self, worker: Worker, stopping: bool) -> None:
        """Its output ended: with a run in hand it died, or was stopped before the run began."""
        assert worker.process.stdout is not None
        self.selector.unregister(worker.process.stdout)
        code = worker.process.wait()
        if worker.run is not None:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            if stopping:
                outcome = Outcome("stopped")
            else:
                words = worker.last_words() if code > 0 else ""
                message = f"The worker process {how}" + (f": {words}" if words else ".")
                killed = "Often this is a lack of memory: try --jobs 1. " if code == -signal.SIGKILL else ""
                outcome = Outcome("failed", "WorkerDied", message, f"{killed}Its log is {worker.log}.")
            self._settle(worker, outcome)
        elif worker in self.workers:
            self.workers.remove(worker)
        worker.close()

    def _end(self, stopping: bool) -> None:
        """No worker outlives the command: idle ones end when their input does, others are terminated, then killed."""
        left = {key.data.process.pid: key.data for key in self.selector.get_map().values()}.values()
        for worker in left:
            if worker.run is not None or stopping:
                worker.process.kill() if worker.run is not None else worker.process.terminate()
            worker.close()
        for worker in left:
            try:
                worker.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self.selector.close()


def lock(folder: Path) -> IO[str] | None:
    """The folder for this process alone; None when another one has it. Closing the file lets go."""
    import fcntl

    stream = (folder / ".lock").open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        return None
    return stream
