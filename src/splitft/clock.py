"""Time: the only file that may read a clock, and the virtual clock, a discrete-event model of one synchronous round.

Every client has its own processor ("client") and its own link ("link"); the server has equal processors ("server"). Each resource
serves who comes first; at the server ties go to the smaller client number. Stages carry seconds, and the bytes of transfers:
`adapt/schedule.py` converts, so nothing here knows a device. The result depends on the schedules alone, never on the machine.

As a rule a client does one thing at a time, and the server's own link is wide enough. A `Network` may say otherwise:

* Shared links. All transfers of a direction share the server's capacity by max-min fairness (progressive filling: Bertsekas and
  Gallager, Data Networks, 1992, section 6.5.2): each goes at the rate of its client's link or, if that is less, at an equal share of
  what the slower ones leave. Or the downlink sends one at a time, first to the client with the most work left once it has it: the
  priority of CPSFL (Zhou et al. 2025, arXiv 2511.15404); that all its work of the round counts is our reconstruction. If all wait
  already and queue for nothing else, no order is better (Jackson 1955). It pays where the server's link is the bottleneck: alone on
  it, a transfer is still no faster than its client's link.
* Pipelining. The exchanges of one optimizer step overlap; the processor, both directions of the link and the server work side by
  side. All fronts are ready when the step begins, so they are computed first and feed the server early: a backward done just before
  a front could change places with it and delay nothing. One client alone is never slower than in sequence, as some stage
  of it is always under way. With several, as in every queue, somebody's head start can be another's delay.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from typing import Literal, NamedTuple, TypeAlias

from splitft.errors import ConfigError
from splitft.links import FairLink, SerialLink, Transfer

Resource = Literal["client", "link", "server"]
RESOURCES: tuple[Resource, ...] = ("client", "link", "server")

BLOCKS_DOWN = "blocks_down"
ADAPTERS_DOWN = "adapters_down"
ADAPTERS_UP = "adapters_up"
WHOLE_STEP = "whole_step"
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


def utc_time() -> datetime:
    """The present moment in UTC, for certificates and logs only: nothing waits by the wall clock, which may jump."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Stage:
    """One stretch of work on one resource. A transfer also takes `latency_s`, which delays its arrival.

    `seconds` of a transfer is its time when only the client's own link limits it. With `bytes` and `direction` it can share a link;
    transfers without a direction take turns on it.
    Raises ConfigError for a duration that is negative or not finite: a device profile with a rate of zero makes one.
    """

    kind: str
    resource: Resource
    seconds: float
    latency_s: float = 0.0
    bytes: float = 0.0
    direction: Literal["up", "down", ""] = ""

    def __post_init__(self) -> None:
        for value in (self.seconds, self.latency_s):
            if not (math.isfinite(value) and value >= 0.0):
                raise ConfigError(
                    f"stage {self.kind!r} would take {value} s; a duration is finite and not negative.",
                    "Check the rates and the latency of the device profiles.",
                )
        if not (math.isfinite(self.bytes) and self.bytes >= 0.0):
            raise ConfigError(f"stage {self.kind!r} would move {self.bytes} bytes; allowed is 0 or more.", "Check the predicted bytes.")

    @property
    def total_s(self) -> float:
        """Seconds from the start of the stage to its effect at the other end."""
        return self.seconds + self.latency_s


Step: TypeAlias = tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class Network:
    """What clients share. `server_slots` equal processors serve one queue. With `shared` all transfers also share the server's own link
    of these rates; over it the downlink sends "together" or one at a time, "longest_first". `pipeline` lets micro-batches overlap.

    An infinite rate shares nothing. Raises ConfigError for fields out of range.
    """

    server_slots: int = 1
    shared: bool = False
    uplink_bytes_per_s: float = math.inf
    downlink_bytes_per_s: float = math.inf
    downlink_order: Literal["together", "longest_first"] = "together"
    pipeline: bool = False

    def __post_init__(self) -> None:
        if self.server_slots < 1:
            raise ConfigError(f"server_slots is {self.server_slots}; allowed is 1 or more.", "Give the server at least one slot.")
        for name in ("uplink_bytes_per_s", "downlink_bytes_per_s"):
            if not getattr(self, name) > 0.0:
                raise ConfigError(f"the server's {name} is {getattr(self, name)}; allowed is more than 0.", "Correct the server's profile.")
        if self.downlink_order not in ("together", "longest_first"):
            raise ConfigError(f"downlink_order is {self.downlink_order!r}.", 'Choose "together" or "longest_first".')


@dataclass(frozen=True, slots=True)
class ClientSchedule:
    """What one client does in one round: `before` (the global adapters arrive), every exchange in turn, `after` (its update leaves).

    Exchanges may differ from each other (ragged batches, codecs of variable rate); equal ones share one tuple. `micro` of them form
    one optimizer step (gradient accumulation), the last of which may have fewer. Raises ConfigError for `micro` below 1.
    """

    client: int
    steps: tuple[Step, ...]
    before: Step = ()
    after: Step = ()
    micro: int = 1

    def __post_init__(self) -> None:
        if self.micro < 1:
            raise ConfigError(f"{self.micro} exchanges would form a step; allowed is 1 or more.", "Correct the gradient accumulation.")

    def alone_s(self) -> float:
        """The closed form for a client with a server of its own and nothing overlapping: the sum of all stages."""
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

    `busy_s` sums the seconds of every stage kind, latency and the slowness of a shared link included. `server_wait_s` is when nothing
    of this client went on before it finished, so busy plus `server_wait_s` plus `barrier_wait_s` is the round; where exchanges overlap
    it is more. `step_ends_s`: absolute virtual time at which each optimizer step was complete.
    """

    client: int
    finish_s: float
    busy_s: Mapping[str, float]
    server_wait_s: float
    barrier_wait_s: float
    step_ends_s: tuple[float, ...] = ()


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


class _Exchange:
    """One pass through the stages of a step, or of the round's beginning or end; it waits for or holds one resource at a time."""

    __slots__ = ("client", "now_s", "number", "position", "stages")

    def __init__(self, client: _Client, number: int, stages: Step) -> None:
        self.client, self.number, self.stages, self.position, self.now_s = client, number, stages, 0, client.now_s

    @property
    def stage(self) -> Stage:
        return self.stages[self.position]

    def work(self, start_s: float, end_s: float, seconds: float) -> None:
        """The present stage occupied its resource from `start_s` to `end_s`."""
        client, stage = self.client, self.stage
        self.now_s = end_s + stage.latency_s
        self.position += 1
        client.busy_s[stage.kind] = client.busy_s.get(stage.kind, 0.0) + seconds + stage.latency_s
        client.spans.append((start_s, self.now_s, stage.kind))


class _Client:
    """One client on its way through its schedule, in seconds since the start of the round."""

    def __init__(self, schedule: ClientSchedule, network: Network, timeline_steps: int) -> None:
        self.number = schedule.client
        self.now_s = self.wait_s = 0.0
        self.busy_s: dict[str, float] = {}
        self.drawn: list[tuple[str, float, float]] = []
        self.step_ends_s: list[float] = []
        self.units = list(_units(schedule, network.pipeline, timeline_steps))
        self.next_unit = 0
        self.draw = self.ends_step = self.overlaps = False
        self.running: list[_Exchange] = []
        self.unfinished = 1
        self.spans: list[tuple[float, float, str]] = []
        self.free_s: dict[str, float] = {}  # its own resources; kept only where exchanges overlap
        self.later_s: list[float] = []

    def next_exchanges(self) -> Sequence[_Exchange]:
        """An exchange has ended: those that begin with it, none while others of its unit are under way or at the end of the schedule."""
        self.unfinished -= 1
        if self.unfinished:
            return ()
        self._close_unit()
        if self.next_unit == len(self.units):
            return ()
        steps, self.draw, self.ends_step = self.units[self.next_unit]
        self.next_unit += 1
        self.running = [_Exchange(self, number, stages) for number, stages in enumerate(steps)]
        self.unfinished, self.overlaps = len(steps), len(steps) > 1
        return self.running

    def _close_unit(self) -> None:
        for start_s, end_s, kind in sorted(self.spans, key=itemgetter(0)) if self.overlaps else self.spans:
            if start_s > self.now_s:
                self.wait_s += start_s - self.now_s
                if self.draw:
                    self.drawn.append((SERVER_WAIT, self.now_s, start_s))
            if self.draw:
                self.drawn.append((kind, start_s, end_s))
            self.now_s = max(self.now_s, end_s)
        self.spans.clear()
        if self.ends_step:
            self.step_ends_s.append(self.now_s)

    def left_s(self, exchange: _Exchange) -> float:
        """Seconds of work this client has left once the transfer that `exchange` waits for has been sent."""
        if not self.later_s:
            units = [math.fsum(stage.total_s for step in steps for stage in step) for steps, _, _ in reversed(self.units)]
            self.later_s = [0.0, *itertools.accumulate(units)]
        here = (stage.total_s for other in self.running for stage in other.stages[other.position :])
        return self.later_s[len(self.units) - self.next_unit] + math.fsum(here) - exchange.stage.seconds


def _units(schedule: ClientSchedule, pipeline: bool, timeline_steps: int) -> Iterator[tuple[Sequence[Step], bool, bool]]:
    """What a client does one after the other: the exchanges that overlap, whether the timeline shows them (the first `timeline_steps`
    units, the last, and both ends), and whether an optimizer step ends with them."""
    yield (schedule.before,), True, False
    size, count = schedule.micro if pipeline else 1, len(schedule.steps)
    for first in range(0, count, size):
        steps = schedule.steps[first : first + size]
        done = first + len(steps)
        draw = timeline_steps > 0 and (first < timeline_steps * size or done == count)
        yield (tuple(filter(None, steps)) or ((),)) if size > 1 else steps, draw, done % schedule.micro == 0 or done == count
    yield (schedule.after,), True, False


class _Round:
    """The resources all clients share and who wants them next, in the order of time."""

    def __init__(self, network: Network) -> None:
        # (arrival, client number, exchange number, exchange): the numbers decide ties, exchanges are never compared.
        self.queue: list[tuple[float, int, int, _Exchange]] = []
        self.free_at_s = [0.0] * network.server_slots
        self.server_busy_s = 0.0
        self.links: dict[str, FairLink[_Exchange] | SerialLink[_Exchange]] = {}
        if network.shared and network.uplink_bytes_per_s < math.inf:
            self.links["up"] = FairLink(network.uplink_bytes_per_s)
        if network.shared and network.downlink_bytes_per_s < math.inf:
            kind = SerialLink if network.downlink_order == "longest_first" else FairLink
            self.links["down"] = kind(network.downlink_bytes_per_s)

    def play(self, clients: Sequence[_Client]) -> None:
        for client in clients:
            self._follow(client.next_exchanges())
        while True:
            due_s, link = math.inf, None
            for one in self.links.values():
                if (one_s := one.due_s()) < due_s:
                    due_s, link = one_s, one
            if self.queue and self.queue[0][0] <= due_s:
                self._grant(heapq.heappop(self.queue)[-1])
            elif link is None:
                return
            elif (sent := link.proceed()) is not None:
                sent.owner.work(sent.start_s, sent.end_s, sent.end_s - sent.start_s)
                self._follow((sent.owner,))

    def _link(self, stage: Stage) -> FairLink[_Exchange] | SerialLink[_Exchange] | None:
        return self.links.get(stage.direction) if stage.bytes > 0.0 else None

    def _follow(self, exchanges: Sequence[_Exchange]) -> None:
        """Do all work of a client that nobody can hinder, up to the next stages that need a resource others may hold."""
        while exchanges:
            client = exchanges[0].client
            for exchange in exchanges:
                waits = self._walk(exchange)
            exchanges = () if waits else client.next_exchanges()

    def _walk(self, exchange: _Exchange) -> bool:
        """Whether the exchange now waits; else it has ended. Of several exchanges all wait: they overlap, and none is without stages."""
        client = exchange.client
        for stage in exchange.stages[exchange.position :]:
            if client.overlaps or stage.resource == "server" or self._link(stage) is not None:
                heapq.heappush(self.queue, (exchange.now_s, client.number, exchange.number, exchange))
                return True
            exchange.work(exchange.now_s, exchange.now_s + stage.seconds, stage.seconds)
        return False

    def _grant(self, exchange: _Exchange) -> None:
        stage, client = exchange.stage, exchange.client
        if (link := self._link(stage)) is not None:
            left_s = client.left_s(exchange) if isinstance(link, SerialLink) else 0.0
            link.add(Transfer(exchange, client.number, stage.bytes, stage.seconds, left_s), exchange.now_s)
            return
        if stage.resource == "server":
            start_s = max(exchange.now_s, self.free_at_s[0])
            # The slot is free again after the work; latency on a server stage would only delay the client.
            heapq.heapreplace(self.free_at_s, start_s + stage.seconds)
            self.server_busy_s += stage.seconds
        else:
            own = stage.direction or stage.resource
            start_s = max(exchange.now_s, client.free_s.get(own, 0.0))
            client.free_s[own] = start_s + stage.seconds
        exchange.work(start_s, start_s + stage.seconds, stage.seconds)
        self._follow((exchange,))


def simulate_round(
    clients: Sequence[ClientSchedule],
    start_s: float = 0.0,
    server_slots: int = 1,
    timeline_steps: int = 1,
    network: Network | None = None,
) -> RoundTiming:
    """Play one synchronous round: all start at `start_s`, and it ends when the slowest client's update has arrived.

    `network`, if given, says what is shared (its `server_slots` then count). Requests reach a resource in order of time because a
    client's next request is never earlier than the end of its last; so one heap of requests is enough, and a round costs
    O(stages + requests log clients). The order of `clients` does not matter. Aggregation and evaluation take no virtual time.
    A client number may appear once. Raises ConfigError for a server without slots.
    """
    network = Network(server_slots) if network is None else network
    made = [_Client(schedule, network, timeline_steps) for schedule in sorted(clients, key=lambda schedule: schedule.client)]
    assert len({client.number for client in made}) == len(made), "a client number appears twice in one round"
    played = _Round(network)
    played.play(made)
    return _timing(made, start_s, played.server_busy_s)


def _timing(clients: Sequence[_Client], start_s: float, server_busy_s: float) -> RoundTiming:
    """Shift to absolute time last: the durations of a round do not depend on when it starts, not even in rounding."""
    duration_s = max((client.now_s for client in clients), default=0.0)
    timings: list[ClientTiming] = []
    timeline: list[TimelineEntry] = []
    for client in clients:
        barrier_s, ends_s = duration_s - client.now_s, tuple(start_s + end_s for end_s in client.step_ends_s)
        timings.append(ClientTiming(client.number, start_s + client.now_s, dict(client.busy_s), client.wait_s, barrier_s, ends_s))
        drawn = [*client.drawn, (BARRIER_WAIT, client.now_s, duration_s)] if barrier_s > 0 else client.drawn
        timeline.extend(TimelineEntry(client.number, kind, start_s + begin, start_s + end) for kind, begin, end in drawn)
    return RoundTiming(start_s, duration_s, tuple(timings), tuple(timeline), server_busy_s)
