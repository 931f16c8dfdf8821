"""Time: the only file that may read a clock, and the virtual clock, a discrete-event model of one synchronous round.

The virtual clock knows three kinds of resource. Every client has its own processor ("client") and its own link ("link");
the server has `server_slots` equal processors ("server") that serve one first-come first-served queue, ties broken by client
number. A client does one thing at a time, in the order of its schedule, so its link is never contended by itself; the server's
own link is taken to be wide enough. Stages carry seconds, not flops or bytes: `adapt/cost.py` converts, so nothing here knows
a device. The result depends on the schedules alone, never on the machine it is computed on.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NamedTuple, TypeAlias

from splitft.errors import ConfigError

Resource = Literal["client", "link", "server"]
RESOURCES: tuple[Resource, ...] = ("client", "link", "server")

ADAPTERS_DOWN = "adapters_down"
ADAPTERS_UP = "adapters_up"
SERVER_WAIT = "server_wait"
BARRIER_WAIT = "barrier_wait"
STEP_KINDS = ("front_forward", "uplink", "back", "downlink", "front_backward")
U_SHAPED_STEP_KINDS = (
    "front_forward",
    "uplink",
    "back",
    "downlink",
    "exit",
    "uplink_gradient",
    "back_backward",
    "downlink_gradient",
    "front_backward",
)


def monotonic_s() -> float:
    """Seconds of a clock that never goes back; only differences mean anything."""
    return time.perf_counter()


def utc_now() -> str:
    """The present moment in UTC as ISO 8601 with whole seconds, such as `2026-04-01T09:30:00+00:00`."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stretch of work on one resource. A transfer also takes `latency_s`, which delays its arrival.

    Raises ConfigError for a duration that is negative or not finite: a device profile with a rate of zero makes one.
    """

    kind: str
    resource: Resource
    seconds: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        for value in (self.seconds, self.latency_s):
            if not (math.isfinite(value) and value >= 0.0):
                raise ConfigError(
                    f"stage {self.kind!r} would take {value} s; a duration is finite and not negative.",
                    "Check the rates and the latency of the device profiles.",
                )

    @property
    def total_s(self) -> float:
        """Seconds from the start of the stage to its effect at the other end."""
        return self.seconds + self.latency_s


Step: TypeAlias = tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class ClientSchedule:
    """What one client does in one round: `before` (the global adapters arrive), every step in turn, `after` (its update leaves).

    Steps may differ from each other (ragged batches, codecs of variable rate); equal steps share one tuple.
    """

    client: int
    steps: tuple[Step, ...]
    before: Step = ()
    after: Step = ()

    def alone_s(self) -> float:
        """The closed form for a client with a server of its own: the sum of all stages."""
        stages = (stage for part in (self.before, *self.steps, self.after) for stage in part)
        return math.fsum(stage.total_s for stage in stages)


class TimelineEntry(NamedTuple):
    """One drawn interval, in absolute virtual seconds; `kind` is a stage kind, `server_wait` or `barrier_wait`."""

    client: int
    kind: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class ClientTiming:
    """How one client spent the round. `finish_s` is the absolute virtual time at which its update had arrived.

    `busy_s` sums the seconds of every stage kind, latency included; busy plus `server_wait_s` plus `barrier_wait_s` is the round.
    """

    client: int
    finish_s: float
    busy_s: Mapping[str, float]
    server_wait_s: float
    barrier_wait_s: float


@dataclass(frozen=True, slots=True)
class RoundTiming:
    """The outcome of `simulate_round`; clients in client order. `server_busy_s` sums over all slots."""

    start_s: float
    duration_s: float
    clients: tuple[ClientTiming, ...]
    timeline: tuple[TimelineEntry, ...]
    server_busy_s: float

    @property
    def end_s(self) -> float:
        """Absolute virtual time at which the slowest update had arrived: where the next round starts."""
        return self.start_s + self.duration_s


class _Runner:
    """One client on its way through its schedule, in seconds since the start of the round."""

    __slots__ = ("busy_s", "client", "drawn", "now_s", "remaining", "wait_s")

    def __init__(self, schedule: ClientSchedule, timeline_steps: int) -> None:
        self.client = schedule.client
        self.now_s = 0.0
        self.wait_s = 0.0
        self.busy_s: dict[str, float] = {}
        self.drawn: list[tuple[str, float, float]] = []
        self.remaining = _flow(schedule, timeline_steps)

    def work(self, stage: Stage, draw: bool) -> None:
        start_s = self.now_s
        self.now_s = start_s + stage.seconds + stage.latency_s
        self.busy_s[stage.kind] = self.busy_s.get(stage.kind, 0.0) + stage.seconds + stage.latency_s
        if draw:
            self.drawn.append((stage.kind, start_s, self.now_s))

    def wait_until(self, start_s: float, draw: bool) -> None:
        if start_s > self.now_s:
            self.wait_s += start_s - self.now_s
            if draw:
                self.drawn.append((SERVER_WAIT, self.now_s, start_s))
            self.now_s = start_s

    def to_server(self) -> tuple[Stage, bool] | None:
        """Do all work up to the next server stage and return that stage, or None at the end of the schedule."""
        for stage, draw in self.remaining:
            if stage.resource == "server":
                return stage, draw
            self.work(stage, draw)
        return None


def _flow(schedule: ClientSchedule, timeline_steps: int) -> Iterator[tuple[Stage, bool]]:
    """All stages in order, each with whether the timeline shows it: the first `timeline_steps` steps, the last, and both ends."""
    for stage in schedule.before:
        yield stage, True
    last = len(schedule.steps) - 1
    for index, step in enumerate(schedule.steps):
        draw = timeline_steps > 0 and (index < timeline_steps or index == last)
        for stage in step:
            yield stage, draw
    for stage in schedule.after:
        yield stage, True


def simulate_round(clients: Sequence[ClientSchedule], start_s: float = 0.0, server_slots: int = 1, timeline_steps: int = 1) -> RoundTiming:
    """Play one synchronous round: all start at `start_s`, and it ends when the slowest client's update has arrived.

    Requests reach the server in order of arrival because a client's next request is never earlier than the end of its last
    one; so one heap of pending requests is enough, and a round costs O(stages + requests log clients). The order of `clients`
    does not matter. Aggregation and evaluation take no virtual time. A client number may appear once.
    """
    if server_slots < 1:
        raise ConfigError(f"server_slots is {server_slots}; allowed is 1 or more.", "Give the server at least one slot.")
    runners = [_Runner(schedule, timeline_steps) for schedule in sorted(clients, key=lambda schedule: schedule.client)]
    assert len({runner.client for runner in runners}) == len(runners), "a client number appears twice in one round"
    # (arrival, client number, index, stage, draw): the unique client number decides ties, stages are never compared.
    queue: list[tuple[float, int, int, Stage, bool]] = []

    def proceed(index: int) -> None:
        runner = runners[index]
        if (request := runner.to_server()) is not None:
            heapq.heappush(queue, (runner.now_s, runner.client, index, *request))

    for index in range(len(runners)):
        proceed(index)
    free_at_s = [0.0] * server_slots
    server_busy_s = 0.0
    while queue:
        _, _, index, stage, draw = heapq.heappop(queue)
        runners[index].wait_until(free_at_s[0], draw)
        # The slot is free again after the work; latency on a server stage would only delay the client.
        heapq.heapreplace(free_at_s, runners[index].now_s + stage.seconds)
        runners[index].work(stage, draw)
        server_busy_s += stage.seconds
        proceed(index)
    return _timing(runners, start_s, server_busy_s)


def _timing(runners: Sequence[_Runner], start_s: float, server_busy_s: float) -> RoundTiming:
    """Shift to absolute time last: the durations of a round do not depend on when it starts, not even in rounding."""
    duration_s = max((runner.now_s for runner in runners), default=0.0)
    timings: list[ClientTiming] = []
    timeline: list[TimelineEntry] = []
    for runner in runners:
        barrier_s = duration_s - runner.now_s
        timings.append(ClientTiming(runner.client, start_s + runner.now_s, dict(runner.busy_s), runner.wait_s, barrier_s))
        drawn = [*runner.drawn, (BARRIER_WAIT, runner.now_s, duration_s)] if barrier_s > 0 else runner.drawn
        timeline.extend(TimelineEntry(runner.client, kind, start_s + begin, start_s + end) for kind, begin, end in drawn)
    return RoundTiming(start_s, duration_s, tuple(timings), tuple(timeline), server_busy_s)
