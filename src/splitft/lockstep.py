"""The virtual clock where clients share one set of server adapters: together step by step, or one client after the other.

With one set per client the server serves whoever arrives (clock.py). With one set for all it cannot: stepped with all batches together
("shared") it must wait for everybody's tensors before every pass, and client after client ("sequential") nobody begins before the one
in front has finished. The stages are those of clock.py; the server's own link is taken to be wide enough here.
"""

from __future__ import annotations

from collections.abc import Sequence

from splitft.clock import BARRIER_WAIT, SERVER_WAIT, ClientSchedule, ClientTiming, RoundTiming, Step, TimelineEntry, simulate_round


class _Member:
    """A client on its way through its schedule, in seconds since the start of the round."""

    def __init__(self, schedule: ClientSchedule, timeline_steps: int) -> None:
        self.schedule = schedule
        self.timeline_steps = timeline_steps
        self.now_s = 0.0
        self.wait_s = 0.0
        self.busy_s: dict[str, float] = {}
        self.step_ends_s: list[float] = []
        self.drawn: list[tuple[str, float, float]] = []

    def spend(self, kind: str, seconds: float, draw: bool) -> None:
        begin_s, self.now_s = self.now_s, self.now_s + seconds
        self.busy_s[kind] = self.busy_s.get(kind, 0.0) + seconds
        if draw:
            self.drawn.append((kind, begin_s, self.now_s))

    def wait_until(self, moment_s: float, draw: bool) -> None:
        if moment_s > self.now_s:
            self.wait_s += moment_s - self.now_s
            if draw:
                self.drawn.append((SERVER_WAIT, self.now_s, moment_s))
            self.now_s = moment_s

    def shows(self, exchange: int) -> bool:
        return self.timeline_steps > 0 and (exchange < self.timeline_steps or exchange == len(self.schedule.steps) - 1)


def simulate_together(
    clients: Sequence[ClientSchedule], start_s: float = 0.0, server_slots: int = 1, timeline_steps: int = 1
) -> RoundTiming:
    """Play a round in which every server pass is one batch of all clients that still have steps.

    A pass begins when the last of them has arrived and takes the sum of their server seconds, divided by `server_slots`; then all are
    answered. A client with fewer steps leaves the company early. Time is O(stages).
    """
    members = [_Member(schedule, timeline_steps) for schedule in sorted(clients, key=lambda one: one.client)]
    server_busy_s = 0.0
    for member in members:
        _own(member, member.schedule.before, True)
    for exchange in range(max((len(member.schedule.steps) for member in members), default=0)):
        company = [member for member in members if len(member.schedule.steps) > exchange]
        server_busy_s += _exchange(company, exchange, server_slots)
        for member in company:
            if (exchange + 1) % member.schedule.micro == 0:
                member.step_ends_s.append(member.now_s)
    for member in members:
        _own(member, member.schedule.after, True)
    return _timing(members, start_s, server_busy_s)


def _own(member: _Member, stages: Step, draw: bool) -> None:
    for stage in stages:
        member.spend(stage.kind, stage.total_s, draw)


def _exchange(company: Sequence[_Member], exchange: int, server_slots: int) -> float:
    """One exchange of the whole company: everyone's own stages up to the next pass, the pass, and on. Seconds the server computed."""
    places = [0] * len(company)
    total_s = 0.0
    while True:
        arrived: list[int] = []
        for index, member in enumerate(company):
            stages = member.schedule.steps[exchange]
            while places[index] < len(stages) and stages[places[index]].resource != "server":
                stage = stages[places[index]]
                member.spend(stage.kind, stage.total_s, member.shows(exchange))
                places[index] += 1
            if places[index] < len(stages):
                arrived.append(index)
        if not arrived:
            return total_s
        work = {index: company[index].schedule.steps[exchange][places[index]] for index in arrived}
        begin_s = max(company[index].now_s for index in arrived)
        pass_s = sum(stage.seconds for stage in work.values()) / server_slots
        total_s += sum(stage.seconds for stage in work.values())
        for index, stage in work.items():
            member = company[index]
            # Its own rows are part of one batch: it waits for the others', before and in the pass.
            member.wait_until(begin_s + pass_s - min(stage.seconds, pass_s), member.shows(exchange))
            member.spend(stage.kind, min(stage.seconds, pass_s) + stage.latency_s, member.shows(exchange))
            places[index] += 1


def simulate_in_turn(clients: Sequence[ClientSchedule], order: Sequence[int], start_s: float = 0.0, timeline_steps: int = 1) -> RoundTiming:
    """Play a round in which each client begins when the one before it in `order` (client numbers) has finished."""
    by_client = {schedule.client: schedule for schedule in clients}
    members, elapsed_s, server_busy_s = [], 0.0, 0.0
    for client in order:
        alone = simulate_round([by_client[client]], timeline_steps=timeline_steps)
        (timed,) = alone.clients
        member = _Member(by_client[client], timeline_steps)
        member.wait_until(elapsed_s, True)
        member.busy_s = dict(timed.busy_s)
        member.drawn += [(entry.kind, elapsed_s + entry.start_s, elapsed_s + entry.end_s) for entry in alone.timeline]
        member.step_ends_s = [elapsed_s + end_s for end_s in timed.step_ends_s]
        elapsed_s += alone.duration_s
        member.now_s = elapsed_s
        members.append(member)
        server_busy_s += alone.server_busy_s
    return _timing(sorted(members, key=lambda one: one.schedule.client), start_s, server_busy_s)


def _timing(members: Sequence[_Member], start_s: float, server_busy_s: float) -> RoundTiming:
    duration_s = max((member.now_s for member in members), default=0.0)
    timings, timeline = [], []
    for member in members:
        barrier_s, client = duration_s - member.now_s, member.schedule.client
        ends_s = tuple(start_s + end_s for end_s in member.step_ends_s)
        timings.append(ClientTiming(client, start_s + member.now_s, dict(member.busy_s), member.wait_s, barrier_s, ends_s))
        drawn = [*member.drawn, (BARRIER_WAIT, member.now_s, duration_s)] if barrier_s > 0 else member.drawn
        timeline += [TimelineEntry(client, kind, start_s + begin_s, start_s + end_s) for kind, begin_s, end_s in drawn]
    return RoundTiming(start_s, duration_s, tuple(timings), tuple(timeline), server_busy_s)
