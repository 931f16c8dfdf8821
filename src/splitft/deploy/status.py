"""What a server is doing, for whoever looks: the conductor and the host tell it, the status page and the metrics read it.

Everything here is bounded: a seat keeps its last losses, the curves are thinned past a few thousand rounds, old events are dropped. Every
method may be called from any thread, and those that are called in every step cost microseconds.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, Unpack

from splitft.clock import monotonic_s, utc_now
from splitft.deploy.curves import Curves, finite
from splitft.deploy.logs import one_line
from splitft.deploy.process import process_facts
from splitft.waits import Waits

Phase = Literal["starting", "running", "draining", "finished"]
SeatState = Literal["absent", "connecting", "ready", "training", "waiting", "done", "late", "lost", "excluded"]
Level = Literal["info", "warning", "error"]
STATES: tuple[SeatState, ...] = ("absent", "connecting", "ready", "training", "waiting", "done", "late", "lost", "excluded")
# Seats that are there: an open session and no reason to leave them out.
PRESENT: tuple[SeatState, ...] = ("ready", "training", "waiting", "done", "late")

MOST_EVENTS = 200
MOST_BARS = 800
SPARK_POINTS, FEW_SPARK_POINTS, MANY_SEATS = 40, 12, 64
LONGEST_NAME, LONGEST_TEXT = 80, 300
# Weight of the newest step in a seat's speed: about the last ten steps.
SPEED_WEIGHT = 0.2
# Rounds whose mean time predicts the rest.
LATEST_ROUNDS = 5


class SeatChanges(TypedDict, total=False):
    """What `seat` can be told. `silent_s`: seconds since the last sign of life; `wait_s`: what the client waited for the server in its
    last exchange; `up_bytes`, `down_bytes`: crossed so far in this round."""

    name: str
    state: SeatState
    step: int
    steps: int
    cut: int
    rank: int
    tokens_per_s: float
    up_bytes: int
    down_bytes: int
    silent_s: float
    wait_s: float
    memory_bytes: int
    loss: float
    held_out_loss: float
    reconnects: int


@dataclass
class _Seat:
    """One client as the server sees it."""

    name: str = ""
    state: SeatState = "absent"
    step: int = 0
    steps: int = 0
    cut: int | None = None
    rank: int | None = None
    steps_done: int = 0
    tokens: int = 0
    tokens_per_s: float | None = None
    up_bytes: int = 0
    down_bytes: int = 0
    up_before: int = 0
    down_before: int = 0
    seen_s: float | None = None
    wait_s: float | None = None
    memory_bytes: int | None = None
    loss: float | None = None
    held_out_loss: float | None = None
    reconnects: int = 0
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=SPARK_POINTS))

    def apply(self, changes: SeatChanges, now_s: float) -> None:
        for key, value in changes.items():
            if key == "silent_s":
                assert isinstance(value, int | float)
                self.seen_s = now_s - value
            elif key == "name":
                self.name = one_line(value, LONGEST_NAME)
            else:
                assert key in _PLAIN_FIELDS, key
                setattr(self, key, value)
        if (loss := changes.get("loss")) is not None and finite(loss) is not None:
            self.losses.append(loss)

    def shown(self, number: int, now_s: float, points: int) -> dict[str, Any]:
        return {
            "seat": number,
            "name": self.name or f"seat {number}",
            "state": self.state,
            "step": self.step,
            "steps": self.steps,
            "cut": self.cut,
            "rank": self.rank,
            "steps_done": self.steps_done,
            "tokens": self.tokens,
            "tokens_per_s": finite(self.tokens_per_s),
            "up_bytes": self.up_bytes,
            "down_bytes": self.down_bytes,
            "up_total_bytes": self.up_before + self.up_bytes,
            "down_total_bytes": self.down_before + self.down_bytes,
            "seen_s": None if self.seen_s is None else max(0.0, now_s - self.seen_s),
            "wait_s": finite(self.wait_s),
            "memory_bytes": self.memory_bytes,
            "loss": finite(self.loss),
            "held_out_loss": finite(self.held_out_loss),
            "reconnects": self.reconnects,
            "losses": [float(f"{loss:.4g}") for loss in list(self.losses)[-points:]],
        }


_PLAIN_FIELDS = frozenset(SeatChanges.__annotations__) - {"name", "silent_s"}


@dataclass
class _Event:
    utc: str
    level: Level
    text: str
    seat: int | None
    times: int = 1


class ServerStatus:
    """The state of one run on this server. `probe`, if given, is asked at every look for what only the host knows of each seat (silence,
    bytes on the wire), so that nobody needs to report it step by step."""

    def __init__(
        self,
        run: str,
        rounds: int,
        *,
        version: str = "",
        model: str = "",
        waits: Waits | None = None,
        probe: Callable[[], Mapping[int, SeatChanges]] | None = None,
    ) -> None:
        self._head = {"run": one_line(run, LONGEST_NAME), "version": one_line(version, 40), "model": one_line(model, LONGEST_NAME)}
        self._rounds, self._round = rounds, 0
        self._phase: Phase = "starting"
        self._stage: str = "starting"
        self._waits, self._probe = waits, probe
        self._started_utc, self._started_s, self._round_s = utc_now(), monotonic_s(), monotonic_s()
        self._round_done = True
        self._seats: dict[int, _Seat] = {}
        self._curves = Curves()
        self._timeline: dict[str, Any] | None = None
        self._events: deque[_Event] = deque(maxlen=MOST_EVENTS)
        self._recent_s: deque[float] = deque(maxlen=LATEST_ROUNDS)
        self._lock = threading.Lock()

    @property
    def phase(self) -> Phase:
        """Starting, running, draining (no new work) or finished."""
        return self._phase

    @property
    def ready(self) -> bool:
        """Whether a client that comes now would be served."""
        return self._phase == "running"

    def begin_phase(self, phase: Phase) -> None:
        """Say that the server has come up, is going down, or is done."""
        with self._lock:
            self._phase = self._stage = phase

    def stage(self, text: str) -> None:
        """Say in a few words what the run does now: "waiting for clients 2 of 3", "training", "paused: storage full"."""
        with self._lock:
            self._stage = one_line(text, LONGEST_TEXT)

    def round_begins(self, number: int) -> None:
        """Round `number` begins, perhaps once more: what seats count by round begins at zero."""
        with self._lock:
            self._round, self._round_s, self._round_done = number, monotonic_s(), False
            for seat in self._seats.values():
                seat.up_before, seat.down_before = seat.up_before + seat.up_bytes, seat.down_before + seat.down_bytes
                seat.up_bytes = seat.down_bytes = seat.step = 0

    def seat(self, number: int, **changes: Unpack[SeatChanges]) -> None:
        """Change what is known of a seat; what is not named stays. A seat exists from its first mention on."""
        with self._lock:
            self._seats.setdefault(number, _Seat()).apply(changes, monotonic_s())

    def step_done(
        self,
        number: int,
        step: int,
        steps: int,
        tokens: int,
        seconds: float,
        loss: float | None = None,
        wait_s: float | None = None,
    ) -> None:
        """A seat has done `step` of `steps`, `tokens` in `seconds`: it is training, and has given a sign of life. `loss` only where the
        server knows it, `wait_s` as in SeatChanges."""
        with self._lock:
            now_s = monotonic_s()
            seat = self._seats.setdefault(number, _Seat())
            seat.state, seat.step, seat.steps, seat.seen_s = "training", step, steps, now_s
            seat.steps_done += 1
            seat.tokens += tokens
            if seconds > 0.0:
                speed = tokens / seconds
                before = seat.tokens_per_s
                seat.tokens_per_s = speed if before is None else before + SPEED_WEIGHT * (speed - before)
            if wait_s is not None:
                seat.wait_s = wait_s
            if loss is not None:
                seat.apply({"loss": loss}, now_s)

    def traffic(self, number: int, up_bytes: int = 0, down_bytes: int = 0) -> None:
        """Bytes that crossed for a seat, in this round; bytes from the client are a sign of life."""
        with self._lock:
            seat = self._seats.setdefault(number, _Seat())
            seat.up_bytes += up_bytes
            seat.down_bytes += down_bytes
            if up_bytes:
                seat.seen_s = monotonic_s()

    def event(self, level: Level, text: str, seat: int | None = None) -> None:
        """Note something worth a line. The same thing again and again is one line with a count."""
        shown = one_line(text, LONGEST_TEXT)
        with self._lock:
            last = self._events[-1] if self._events else None
            if last is not None and (last.level, last.text, last.seat) == (level, shown, seat):
                last.times, last.utc = last.times + 1, utc_now()
            else:
                self._events.append(_Event(utc_now(), level, shown, seat))

    def round_done(self, record: Mapping[str, Any]) -> None:
        """Take an event of the journal, `round` or `evaluation` (docs/journal.md); others are ignored. After a restart, the events that
        are already in the journal bring the curves back."""
        with self._lock:
            if record.get("event") == "evaluation":
                self._curves.evaluated(record)
                for one in record.get("clients", ()):
                    self._seats.setdefault(int(one["client"]), _Seat()).held_out_loss = finite(one.get("loss"))
            elif record.get("event") == "round":
                self._curves.trained(record)
                self._take_round(record)

    def _take_round(self, record: Mapping[str, Any]) -> None:
        number = int(record["round"])
        if number == self._round:
            self._round_done = True
        elif number > self._round:
            self._round = number
        self._recent_s.append(finite(record.get("wall_s")) or 0.0)
        for one in record.get("clients", ()):
            seat = self._seats.setdefault(int(one["client"]), _Seat())
            seat.cut, seat.rank = one.get("cut", seat.cut), one.get("rank", seat.rank)
            seat.loss = finite(one.get("loss_last")) or seat.loss
        bars = [[int(seat), str(kind), float(begin), float(end)] for seat, kind, begin, end in record.get("timeline", ())[:MOST_BARS]]
        if bars:
            self._timeline = {"round": number, "bars": bars}

    def states(self) -> dict[SeatState, int]:
        """How many seats are in each state, those without any included."""
        with self._lock:
            counts = dict.fromkeys(STATES, 0)
            for seat in self._seats.values():
                counts[seat.state] += 1
        return counts

    def rounds(self) -> tuple[int, int]:
        """The round under way and how many there are to be."""
        with self._lock:
            return self._round, self._rounds

    def present(self) -> dict[int, bool]:
        """Seat -> whether its client is there."""
        with self._lock:
            return {number: seat.state in PRESENT for number, seat in sorted(self._seats.items())}

    def snapshot(self) -> dict[str, Any]:
        """Everything as plain values that JSON can hold."""
        probed = self._probe() if self._probe is not None else {}
        waits = self._waits.now()[:50] if self._waits is not None else []
        process = process_facts()
        with self._lock:
            now_s = monotonic_s()
            for number, changes in probed.items():
                self._seats.setdefault(number, _Seat()).apply(changes, now_s)
            points = SPARK_POINTS if len(self._seats) <= MANY_SEATS else FEW_SPARK_POINTS
            seats = [seat.shown(number, now_s, points) for number, seat in sorted(self._seats.items())]
            return {
                **self._head,
                "phase": self._phase,
                "stage": self._stage,
                "round": self._round,
                "rounds": self._rounds,
                "started_utc": self._started_utc,
                "utc": utc_now(),
                "elapsed_s": now_s - self._started_s,
                **self._progress(now_s),
                "seats": seats,
                "totals": self._totals(seats),
                "curves": self._curves.shown(),
                "timeline": self._timeline,
                "events": [
                    {"utc": one.utc, "level": one.level, "text": one.text, "seat": one.seat, "times": one.times} for one in self._events
                ],
                "waits": [{"what": one_line(wait.what), "peer": one_line(wait.peer), "seconds": wait.seconds} for wait in waits],
                "process": process,
            }

    def _totals(self, seats: list[dict[str, Any]]) -> dict[str, Any]:
        working = [seat["tokens_per_s"] or 0.0 for seat in seats if seat["state"] in ("training", "waiting")]
        return {
            "tokens": sum(seat["tokens"] for seat in seats),
            "tokens_per_s": sum(working),
            "up_bytes": sum(seat["up_total_bytes"] for seat in seats),
            "down_bytes": sum(seat["down_total_bytes"] for seat in seats),
            "present": sum(seat["state"] in PRESENT for seat in seats),
            "seats": len(seats),
        }

    def _progress(self, now_s: float) -> dict[str, float | None]:
        """How far the run is, and how long the rest takes if it goes on as in the latest rounds."""
        shares = [min(1.0, seat.step / seat.steps) for seat in self._seats.values() if seat.state in PRESENT and seat.steps]
        within = 1.0 if self._round_done else sum(shares) / len(shares) if shares else 0.0
        done = max(0.0, self._round - 1 + within) if self._round else 0.0
        share = 1.0 if self._phase == "finished" else min(1.0, done / self._rounds) if self._rounds else 0.0
        mean_s = sum(self._recent_s) / len(self._recent_s) if self._recent_s else None
        left_s = None if mean_s is None or self._phase != "running" else max(0.0, (self._rounds - done) * mean_s)
        return {"round_elapsed_s": None if self._round_done else now_s - self._round_s, "progress": share, "remaining_s": left_s}
