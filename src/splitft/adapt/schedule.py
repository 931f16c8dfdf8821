"""From a plan's cost to time: flops and bytes on a device become stages of the virtual clock.

seconds = flops / flops_per_s on the side that computes, and bytes / bytes_per_s plus the client's latency on its link. What several
clients share (the server's processors, its own link) is the clock's business: `clock.simulate_round`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitft.adapt.cost import CostModel, PlanCost
from splitft.clock import ADAPTERS_DOWN, ADAPTERS_UP, BLOCKS_DOWN, WHOLE_STEP, ClientSchedule, Resource, Stage, Step, simulate_round
from splitft.errors import ConfigError
from splitft.types import Plan, Profile


@dataclass(frozen=True)
class StepSeconds:
    """One step of one client that has the server to itself, divided by where the time goes."""

    client_s: float
    link_s: float
    server_s: float

    @property
    def total_s(self) -> float:
        """The whole step."""
        return self.client_s + self.link_s + self.server_s


def step_stages(cost: PlanCost, profile: Profile, server: Profile) -> Step:
    """One exchange as the stages of the virtual clock.

    With the exit on the server the labels travel with the activations and the server does forward, exit and backward in one stage.
    A client that holds the whole model computes its step in one stage, without link and server.
    """

    def compute(kind: str, resource: Resource, flops: float) -> Stage:
        return Stage(kind, resource, flops / (server if resource == "server" else profile).flops_per_s)

    if cost.whole:
        return (compute(WHOLE_STEP, "client", cost.client_flops),)
    first = (
        compute("front_forward", "client", cost.front_forward_flops),
        _up("uplink", cost.activations_up_bytes + cost.labels_up_bytes, profile),
    )
    last = compute("front_backward", "client", cost.front_backward_flops)
    if not cost.plan.exit_on_client:
        return (*first, compute("back", "server", cost.server_flops), _down("downlink", cost.gradients_down_bytes, profile), last)
    return (
        *first,
        compute("back", "server", cost.back_forward_flops),
        _down("downlink", cost.activations_down_bytes, profile),
        compute("exit", "client", cost.exit_flops),
        _up("uplink_gradient", cost.gradients_up_bytes, profile),
        compute("back_backward", "server", cost.back_backward_flops),
        _down("downlink_gradient", cost.gradients_down_bytes, profile),
        last,
    )


def step_seconds(cost: PlanCost, profile: Profile, server: Profile) -> StepSeconds:
    """The step of a client that finds the server free: the stages of `step_stages` added up by resource."""
    seconds: dict[Resource, float] = {"client": 0.0, "link": 0.0, "server": 0.0}
    for stage in step_stages(cost, profile, server):
        seconds[stage.resource] += stage.total_s
    return StepSeconds(seconds["client"], seconds["link"], seconds["server"])


def schedule(
    plan: Plan,
    cost: PlanCost,
    profile: Profile,
    server: Profile,
    *,
    fetch_bytes: float = 0.0,
    upload_bytes: float | None = None,
    download_bytes: float | None = None,
    extra_up_bytes: float = 0.0,
    micro: int = 1,
    steps: int | None = None,
    lost: bool = False,
) -> ClientSchedule:
    """A client's round for the virtual clock: blocks it lacks and adapters down, `plan.local_steps` equal exchanges, adapters up.

    `fetch_bytes`: weights of blocks the client has not had yet. `download_bytes` and `upload_bytes` replace the predicted bytes of
    adapters; `extra_up_bytes` (reports) travel with the upload. Transfers of nothing are left out. `micro` exchanges form one optimizer
    step (gradient accumulation); `steps`, counted in optimizer steps, cuts the round short. A `lost` client never uploads.
    Raises ConfigError for `micro` below 1 or negative `steps`.
    """
    if steps is not None and steps < 0:
        raise ConfigError(f"a round of {steps} steps; allowed is 0 or more.", "Leave steps out for the whole round.")
    exchanges = plan.local_steps if steps is None else min(plan.local_steps, steps * micro)
    down_bytes = cost.adapters_down_bytes if download_bytes is None else download_bytes
    up_bytes = (cost.adapters_up_bytes if upload_bytes is None else upload_bytes) + extra_up_bytes
    before = (_down(BLOCKS_DOWN, fetch_bytes, profile), _down(ADAPTERS_DOWN, down_bytes, profile))
    after = () if lost else (_up(ADAPTERS_UP, up_bytes, profile),)
    return ClientSchedule(
        plan.client,
        (step_stages(cost, profile, server),) * exchanges,
        tuple(stage for stage in before if stage.bytes > 0),
        tuple(stage for stage in after if stage.bytes > 0),
        micro,
    )


def round_seconds(costs: Sequence[CostModel], profiles: Sequence[Profile], cuts: Sequence[int], steps: int = 3, micro: int = 1) -> float:
    """Seconds of one optimizer step, by the virtual clock, of a round where these clients run at these cuts; 0 for no clients.

    One entry per client. It plays `steps` optimizer steps of `micro` exchanges each over the network of the first cost model and
    divides, so queueing for the server, shared links and pipelining are in it, and of the transfers of adapters the share that these
    steps are of a round's. More steps give the queue time to settle. Raises ConfigError for a cut out of range or `steps` below 1.
    """
    if steps < 1:
        raise ConfigError(f"steps is {steps}; allowed is 1 or more.", "Play at least one step.")
    clients = list(zip(costs, profiles, cuts, strict=True))
    if not clients:
        return 0.0
    known = {}
    for cost, profile, cut in set(clients):
        own = cost.cost(cost.plan(cut))
        known[cost, profile, cut] = step_stages(own, profile, cost.server), adapter_share(own, profile, cost.local_steps, steps)
    played = [
        ClientSchedule(number, (known[client][0],) * (steps * micro), after=known[client][1], micro=micro)
        for number, client in enumerate(clients)
    ]
    return simulate_round(played, timeline_steps=0, network=costs[0].network).duration_s / steps


def adapter_share(cost: PlanCost, profile: Profile, local_steps: int, steps: int = 1) -> Step:
    """The part of a round's transfers of adapters, both ways, that `steps` of its `local_steps` have to bear."""
    down, up = _down(ADAPTERS_DOWN, cost.adapters_down_bytes, profile), _up(ADAPTERS_UP, cost.adapters_up_bytes, profile)
    return (Stage(ADAPTERS_UP, "link", (down.total_s + up.total_s) * steps / local_steps),)


def _up(kind: str, byte_count: float, profile: Profile) -> Stage:
    return Stage(kind, "link", byte_count / profile.uplink_bytes_per_s, profile.latency_s, byte_count, "up")


def _down(kind: str, byte_count: float, profile: Profile) -> Stage:
    return Stage(kind, "link", byte_count / profile.downlink_bytes_per_s, profile.latency_s, byte_count, "down")
