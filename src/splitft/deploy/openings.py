"""How often a server has had each round opened by a client, and each batch of its data sent: every time shows it more of the text, and with
noise one sample more to average."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from splitft.compress.noise import noise_in
from splitft.deploy.disk import private_folder, read_private, write_private
from splitft.deploy.letters import Welcome
from splitft.engine.settings import TrainSettings
from splitft.errors import IdentityError, PolicyError, ResourceError, SplitftError

FILE, RUN_FILE = "openings.json", "run.json"
# A server may open a round again after a fault, and not without end.
MOST_OPENINGS = 100
# Where what leaves has noise, a round that is not the same to the last bit gets fresh noise, and so many samples average it out.
MOST_NOISY = 3
LIMIT_BYTES = 16 << 20
# Beside the counts of rounds, in the file: how often each batch may have been sent.
BATCHES = "batches"
# From each batch on, up to the next one named: how often. The last entry is 0 times; nothing where no batch has been counted.
Times = list[tuple[int, int]]

Purpose = Literal["train", "evaluate"]


class OneRun:
    """The run that a client is in. Counts and pledges are kept by run, seat and model, which the server names: each new one needs a person,
    who starts the client again. Under noise and secure aggregation it is on the disk in `folder` until the run is over, since it may be a
    supervisor that starts a client which the server has brought to its end."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / RUN_FILE
        self.named: tuple[str, int, str] | None = None
        self.kept = False

    def hold(self, welcome: Welcome) -> None:
        """Raise PolicyError for another run, seat or model than that of the first welcome, or of a kept one that is not over."""
        now = (welcome.run, welcome.seat, welcome.model)
        if self.named is None and self.path.exists() and _named_in(self.path) != now:
            raise PolicyError(
                f"the server names run {welcome.run[:80]!r}, seat {welcome.seat}; this client was in another, with noise or sealed sums, "
                "that has not ended: what it counts and confirms would begin anew.",
                f"if you agree to that, remove {self.path}.",
            )
        self.named = self.named or now
        if now != self.named:
            raise PolicyError(
                f"the server now names run {welcome.run[:80]!r}, seat {welcome.seat} and model {welcome.model[:16]!r}, and one of them was "
                "another when this client came in: what it counts would begin anew.",
                "start the client again if you agree to take part in that.",
            )

    def keep(self) -> None:
        """Put the run on the disk, if it is not there. Raises ResourceError."""
        if not self.kept and self.named is not None:
            private_folder(self.path.parent)
            write_private(self.path, json.dumps(self.named).encode())
            self.kept = True

    def over(self) -> None:
        """The run has ended, and with it this client: whoever starts it again wants another one."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def _named_in(path: Path) -> tuple[str, int, str]:
    """The run, seat and model in a file. Raises PolicyError for one that holds something else."""
    try:
        run, seat, model = json.loads(read_private(path, LIMIT_BYTES, "the run that a client is in"))
        return str(run), int(seat), str(model)
    except (IdentityError, ValueError, TypeError) as problem:
        raise PolicyError(
            "the file of this client does not say which run it is in.", f"{path}: {problem}; if nobody has changed it, remove it."
        ) from problem


def folder_of(folder: Path, welcome: Welcome, data: str) -> Path:
    """Where a client keeps what it remembers. A run's name may come back: what belongs together is the run, the seat, the model and the
    text, by its digest `data`."""
    named = f"{welcome.run}\0{welcome.seat}\0{welcome.model}\0{data}"
    return folder / hashlib.sha256(named.encode()).hexdigest()[:16]


class Openings:
    """The openings of a client's rounds in one run, by purpose, and of the batches of its data. With noise they are kept in `folder`: a
    client that is started again still knows them."""

    def __init__(self, folder: Path, run: OneRun | None = None) -> None:
        self.folder, self.run = folder, run or OneRun(folder)
        self.counted: Counter[str] = Counter()
        self.noisy = False

    def count(
        self,
        round_index: int,
        purpose: Purpose,
        settings: TrainSettings,
        refused: Callable[[SplitftError], None],
        batches: range = range(0),
    ) -> None:
        """One opening more, before anything of the round leaves; `batches` are those of the client's data that it trains on. `refused` is
        called as long as the disk does not take the count.

        Raises PolicyError for one too many, and under noise for batches that are not the next or sent before: a server that chose them
        freely could have the same rows in every round.
        """
        noisy = self.noisy = any(noise_in(codec) is not None for codec in (*settings.codecs, settings.adapter_uplink))
        name, path, most = f"{round_index} {purpose}", self.folder / FILE, MOST_NOISY if noisy else MOST_OPENINGS
        counted, times = _read(path) if noisy else (self.counted, Times())
        counted = counted + Counter({name: 1})
        if counted[name] > most:
            raise PolicyError(
                f"the server has opened round {round_index} more than {most} times"
                + (", and noise on what leaves averages out." if noisy else "."),
                "talk to its operator" + (f"; after a fault that you know of, remove {path}." if noisy else "."),
            )
        if noisy and len(batches):
            times = _with(times, batches, path)
        while noisy:
            try:
                private_folder(self.folder)
                self.run.keep()
                _write(path, counted, times)
                break
            except ResourceError as problem:
                refused(problem)
        self.counted = counted

    def unsent(self, batches: range) -> None:
        """Take back what was counted of batches that did not leave, as the round ended before them. A disk that refuses leaves them in."""
        if self.noisy and len(batches):
            with suppress(ResourceError, PolicyError):
                counted, times = _read(self.folder / FILE)
                _write(self.folder / FILE, counted, _changed(times, batches, -1))


def _with(times: Times, batches: range, path: Path) -> Times:
    """Raises PolicyError for batches that nobody honest asks for: not the next, or too often."""
    if times and not times[0][0] <= batches.start <= times[-1][0]:
        raise PolicyError(
            f"the server goes on at batch {batches.start} of this client's data; it has been sent {times[0][0]} to {times[-1][0] - 1}, and "
            "none is left out.",
            f"talk to its operator; after a fault that you know of, remove {path}.",
        )
    after = _changed(times, batches, 1)
    if often := [first for first, count in after if count > MOST_NOISY]:
        raise PolicyError(
            f"the server asks for batch {often[0]} of this client's data more than {MOST_NOISY} times, and noise on what leaves averages "
            "out.",
            f"talk to its operator; after a fault that you know of, remove {path}.",
        )
    return after


def _changed(times: Times, batches: range, by: int) -> Times:
    """The counts with those of `batches` changed."""
    known = dict(times)
    edges = sorted({*known, batches.start, batches.stop})
    count, found = 0, Times()
    for edge in edges:
        count = known.get(edge, count)
        now = max(0, count + by) if batches.start <= edge < batches.stop else count
        if now != (found[-1][1] if found else 0):
            found.append((edge, now))
    return found


def _write(path: Path, counted: Counter[str], times: Times) -> None:
    write_private(path, json.dumps({**counted, BATCHES: times}).encode())


def _read(path: Path) -> tuple[Counter[str], Times]:
    """The counts of openings and batches in a file; none when it is not there. Raises PolicyError for one that holds something else."""
    if not path.exists():
        return Counter(), Times()
    try:
        found: dict[str, Any] = json.loads(read_private(path, LIMIT_BYTES, "the count of opened rounds"))
        times = [(int(first), int(count)) for first, count in found.pop(BATCHES, [])]
        return Counter({str(name): int(count) for name, count in found.items()}), times
    except (IdentityError, ValueError, TypeError, AttributeError) as problem:
        # The message goes to the server; what is this client's own is in the remedy, which does not.
        raise PolicyError(
            "the file of this client does not say how often rounds were opened.", f"{path}: {problem}; if nobody has changed it, remove it."
        ) from problem
