"""Who takes part in a round, on what terms, and who comes through it: availability, refusals, drop-outs, stragglers.

Everything here follows from the seed, the devices and the cost model, never from the machine that computes: the same run has the same
drop-outs and the same stragglers wherever it is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from splitft.adapt.cost import CostModel
from splitft.adapt.fleets import Device, available, lost_after, slowed
from splitft.adapt.schedule import schedule
from splitft.clock import ClientSchedule, Network, RoundTiming, simulate_round
from splitft.engine.ledger import Counts
from splitft.errors import ResourceError
from splitft.lockstep import simulate_in_turn, simulate_together
from splitft.rng import numpy_stream
from splitft.types import Plan, Profile

ATTEMPTS = 1000


@dataclass(frozen=True)
class Attendance:
    """How long a round waits: `deadline_s` 0 is for ever, `quorum` the share of updates a round needs before its deadline may end it,
    `partial` whether a straggler's finished steps count. `server` is the mode of its adapters: one set for all makes clients wait for
    each other."""

    seed: int
    participation: float
    minimum: int
    deadline_s: float
    quorum: float
    partial: bool
    server: str = "per_client"


@dataclass(frozen=True)
class Traffic:
    """Bytes a client's round moves beside its steps: weights it lacks and adapters down, adapters and reports up. `decided_later_bytes`:
    the upload if the round turns out to end with an aggregation."""

    fetch_bytes: float
    download_bytes: float
    upload_bytes: float
    report_bytes: float = 0.0
    decided_later_bytes: float = 0.0


@dataclass(frozen=True)
class Attended:
    """The round as it will go: plans with the steps each client gets done, who is lost with them, when everything happens.

    `predicted_s`: seconds of each client's round alone, had its device been as described and the round not been cut short. `turns`: the
    order in which clients' optimizer steps pass the server. `uploaded`: the timing with adapters sent at the end, where that is decided
    later.
    """

    plans: tuple[Plan, ...]
    lost: frozenset[int]
    timing: RoundTiming
    predicted_s: Mapping[int, float]
    turns: tuple[int, ...] = ()
    uploaded: RoundTiming | None = None

    def with_uploads(self) -> Attended:
        """The same round, once it is decided that adapters are sent."""
        return self if self.uploaded is None else replace(self, timing=self.uploaded)


def draw_participants(
    clients: int, rules: Attendance, index: int, devices: Sequence[Device] = (), here: Sequence[int] | None = None
) -> list[int]:
    """Who takes part in round `index`, ascending: a share of the clients drawn without replacement from those that can be reached
    (`here`, where that is known and not to be drawn).

    While fewer than the minimum can be reached the round waits and they are asked again. Raises ResourceError when that does not end.
    """
    reachable = list(range(clients) if here is None else here)
    if here is None and any(device.availability < 1.0 for device in devices):
        for attempt in range(ATTEMPTS):
            reachable = [client for client, here in enumerate(available(devices, rules.seed, index, attempt)) if here]
            if len(reachable) >= rules.minimum:
                break
        else:
            raise ResourceError(
                f"round {index} found fewer than {rules.minimum} clients reachable, {ATTEMPTS} times over.",
                "raise the fleet's availability or lower clients.minimum.",
            )
    count = min(len(reachable), max(rules.minimum, round(rules.participation * clients)))
    if count == len(reachable):
        return reachable
    drawn = numpy_stream(rules.seed, "participation", index).choice(len(reachable), count, replace=False)
    return sorted(reachable[int(position)] for position in drawn)


class UnfitError(ResourceError):
    """A client has not the memory for any cut that is allowed."""

    def __init__(self, client: int, message: str, remedy: str) -> None:
        super().__init__(message, remedy)
        self.client = client


def accept(plan: Plan, costs: CostModel, profile: Profile) -> Plan:
    """The plan as the client accepts it: one whose cut does not fit the device's memory is refused for the deepest that does.

    Only the client knows its memory, so this is its own decision. Raises UnfitError when not even the shallowest cut fits.
    """
    shallowest = plan.cut if plan.is_whole(len(costs.shape.blocks)) else min(plan.cut, costs.shallowest_cut)
    for cut in range(plan.cut, shallowest - 1, -1):
        tried = replace(plan, cut=cut)
        if costs.cost(tried).client_memory.total_bytes <= profile.memory_bytes:
            return tried
    need_bytes = costs.cost(replace(plan, cut=shallowest)).client_memory.total_bytes
    raise UnfitError(
        plan.client,
        f"client {plan.client} cannot hold any cut that is allowed: cut {shallowest} needs {need_bytes:.0f} bytes, {profile.name!r} has "
        f"{profile.memory_bytes:.0f}.",
        "use a smaller batch, shorter sequences, bfloat16 weights or gradient checkpointing, lower split.minimum_cut, or leave it out.",
    )


def attend(
    plans: Sequence[Plan],
    index: int,
    devices: Sequence[Device],
    costs: Sequence[CostModel],
    traffic: Mapping[int, Traffic],
    rules: Attendance,
    micro: int,
    start_s: float,
) -> Attended:
    """Play the round on the virtual clock before it is trained, and shorten the plans of those who do not get through it.

    `micro` is the number of batches behind an optimizer step. A client that is lost trains at least one step: its traffic is real.
    """
    profiles = {one.client: slowed(devices[one.client].profile, devices[one.client].jitter, one.client, rules.seed, index) for one in plans}
    vanished = {one.client: lost_after(devices[one.client], one.client, rules.seed, index, one.local_steps) for one in plans}
    steps = {one.client: one.local_steps for one in plans}
    steps.update({client: max(1, done) for client, done in vanished.items() if done is not None})
    lost = {client for client, done in vanished.items() if done is not None}

    known: dict[tuple[Plan, Profile, Traffic, int, bool], ClientSchedule] = {}

    def schedule_of(one: Plan, profile: Profile, moved: Mapping[int, Traffic], is_lost: bool) -> ClientSchedule:
        form = (one, profile, moved[one.client], steps[one.client], is_lost)
        if form not in known:  # a round that goes as planned asks for the same several times
            known[form] = _schedule(one, profile, costs, moved, micro, steps[one.client], is_lost)
        return known[form]

    def made(moved: Mapping[int, Traffic]) -> list[ClientSchedule]:
        return [schedule_of(one, profiles[one.client], moved, one.client in lost) for one in plans]

    def played(moved: Mapping[int, Traffic] = traffic) -> RoundTiming:
        return timed(made(moved), index, rules.seed, rules.server, costs[0].network, start_s)

    timing, limit_s = played(), 0.0
    if rules.deadline_s > 0 and (late := _late(timing, lost, rules, len(plans), start_s)):
        limit_s, stragglers = late
        for one in timing.clients:
            if one.client in stragglers:
                done = sum(end_s - start_s <= limit_s for end_s in one.step_ends_s)
                steps[one.client] = max(1, done)
                if done == 0 or not rules.partial:
                    lost.add(one.client)
        timing = played()
    timing = _without_the_lost(timing, lost, limit_s)
    uploaded = None
    if any(one.decided_later_bytes for one in traffic.values()):
        with_uploads = {client: replace(one, upload_bytes=one.decided_later_bytes) for client, one in traffic.items()}
        uploaded = _without_the_lost(played(with_uploads), lost, limit_s)
    predicted_s = {one.client: schedule_of(one, devices[one.client].profile, traffic, False).alone_s() for one in plans}
    # Who vanishes takes its adapters along: nothing of them is sent.
    shortened = tuple(replace(one, local_steps=steps[one.client], upload=one.upload and one.client not in lost) for one in plans)
    return Attended(shortened, frozenset(lost), timing, predicted_s, _turns(made(traffic), timing), uploaded)


def retimed(
    attended: Attended,
    counted: Mapping[int, Counts],
    index: int,
    devices: Sequence[Device],
    costs: Sequence[CostModel],
    traffic: Mapping[int, Traffic],
    rules: Attendance,
    micro: int,
    start_s: float,
) -> Attended:
    """The round on the virtual clock with the bytes that really crossed: codecs of variable rate are known only afterwards.

    Who takes part and for how many steps stays as it was predicted. With a deadline all of it does: it was kept by the prediction.
    """
    if rules.deadline_s > 0 or not attended.plans:
        return attended
    made, later = [], []
    for one in attended.plans:
        device, own = devices[one.client], costs[one.client]
        counts, exchanges = counted[one.client], one.local_steps * micro
        cost = replace(
            own.cost(one),
            activations_up_bytes=counts["up"]["activations"] / exchanges,
            gradients_up_bytes=counts["up"]["gradients"] / exchanges,
            labels_up_bytes=counts["up"]["labels"] / exchanges,
            activations_down_bytes=counts["down"]["activations"] / exchanges,
            gradients_down_bytes=counts["down"]["gradients"] / exchanges,
        )
        moved = traffic[one.client]
        planned = partial(
            schedule,
            replace(one, local_steps=exchanges),
            cost,
            slowed(device.profile, device.jitter, one.client, rules.seed, index),
            own.server,
            fetch_bytes=moved.fetch_bytes,
            download_bytes=counts["down"]["adapters"],
            extra_up_bytes=moved.report_bytes,
            micro=micro,
            lost=one.client in attended.lost,
        )
        made.append(planned(upload_bytes=counts["up"]["adapters"]))
        later.append(planned(upload_bytes=moved.decided_later_bytes))

    def played(schedules: Sequence[ClientSchedule]) -> RoundTiming:
        timing = timed(schedules, index, rules.seed, rules.server, costs[0].network, start_s)
        return _without_the_lost(timing, set(attended.lost), 0.0)

    return replace(attended, timing=played(made), uploaded=None if attended.uploaded is None else played(later))


def turn_order(seed: int, index: int, clients: Sequence[int]) -> list[int]:
    """In which order clients take turns in round `index`, where they train one after the other."""
    return [clients[position] for position in numpy_stream(seed, "sequence", index).permutation(len(clients)).tolist()]


def timed(made: Sequence[ClientSchedule], index: int, seed: int, server: str, network: Network, start_s: float) -> RoundTiming:
    """Play these schedules on the clock of the server mode."""
    if server == "shared":
        return simulate_together(made, start_s, network.server_slots, timeline_steps=2)
    if server == "sequential":
        return simulate_in_turn(made, turn_order(seed, index, [one.client for one in made]), start_s, timeline_steps=2)
    return simulate_round(made, start_s, timeline_steps=2, network=network)


def _turns(made: Sequence[ClientSchedule], timing: RoundTiming) -> tuple[int, ...]:
    """The clients in the order in which the server is done with their optimizer steps, a client once for each of its steps.

    What a client does after the server's last word (downlink, its own backward) depends on nobody else, so the moment the server was
    done is the end of the step less that.
    """
    by_client, moments = {one.client: one for one in timing.clients}, []
    for one in made:
        step = one.steps[0] if one.steps else ()
        last = max((position for position, stage in enumerate(step) if stage.resource == "server"), default=len(step) - 1)
        tail_s = math.fsum(stage.total_s for stage in step[last + 1 :])
        moments += [(end_s - tail_s, one.client) for end_s in by_client[one.client].step_ends_s]
    return tuple(client for _, client in sorted(moments))


def _without_the_lost(timing: RoundTiming, lost: set[int], limit_s: float) -> RoundTiming:
    """The round ends with the last update that counts, or with its deadline (seconds since its start; 0: none): nobody waits for who is
    lost. What those still did is cut off there."""
    if not lost:
        return timing
    arrivals = [one.finish_s - timing.start_s for one in timing.clients if one.client not in lost]
    duration_s = max([limit_s, *arrivals]) if arrivals or limit_s else timing.duration_s
    end_s = timing.start_s + duration_s
    clients = []
    for one in timing.clients:
        spent_s = math.fsum(one.busy_s.values()) + one.server_wait_s
        share = min(1.0, duration_s / spent_s) if one.client in lost and spent_s > 0 else 1.0
        busy_s = one.busy_s if share == 1.0 else {kind: seconds * share for kind, seconds in one.busy_s.items()}
        finish_s = min(one.finish_s, end_s)
        clients.append(
            replace(one, finish_s=finish_s, busy_s=busy_s, server_wait_s=one.server_wait_s * share, barrier_wait_s=end_s - finish_s)
        )
    line = tuple(entry._replace(end_s=min(entry.end_s, end_s)) for entry in timing.timeline if entry.start_s < end_s)
    return replace(timing, duration_s=duration_s, clients=tuple(clients), timeline=line)


def _schedule(
    plan: Plan, profile: Profile, costs: Sequence[CostModel], traffic: Mapping[int, Traffic], micro: int, steps: int, lost: bool
) -> ClientSchedule:
    own, moved = costs[plan.client], traffic[plan.client]
    return schedule(
        replace(plan, local_steps=steps * micro),
        own.cost(plan),
        profile,
        own.server,
        fetch_bytes=moved.fetch_bytes,
        download_bytes=moved.download_bytes,
        upload_bytes=moved.upload_bytes,
        extra_up_bytes=moved.report_bytes,
        micro=micro,
        lost=lost,
    )


def _late(timing: RoundTiming, lost: set[int], rules: Attendance, participants: int, start_s: float) -> tuple[float, set[int]] | None:
    """When the round stops waiting, in seconds since its start, and for whom; None when nobody is late or too few would be left.

    The round ends at its deadline or, later, when the quorum is reached.
    """
    finishes = sorted((one.finish_s - start_s, one.client) for one in timing.clients if one.client not in lost)
    needed = max(1, math.ceil(rules.quorum * participants))
    if len(finishes) < needed:
        return None
    limit_s = max(rules.deadline_s, finishes[needed - 1][0])
    stragglers = {client for finish_s, client in finishes if finish_s > limit_s}
    return (limit_s, stragglers) if stragglers else None
