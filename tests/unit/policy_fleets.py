"""Fleets, observations and rounds for the tests of the cut policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from unit.cost_shapes import DEVICE, cost_model

from splitft.adapt.base import Policy
from splitft.adapt.cost import CostModel
from splitft.clock import Network
from splitft.types import Observation, Profile

PHONE = replace(DEVICE, name="phone", flops_per_s=2.5e7, uplink_bytes_per_s=1e5, downlink_bytes_per_s=3e5, latency_s=0.002)
LAPTOP = DEVICE
DESKTOP = replace(DEVICE, name="desktop", flops_per_s=8e8, uplink_bytes_per_s=4e6, downlink_bytes_per_s=4e6, latency_s=0.001)
KINDS = (PHONE, LAPTOP, DESKTOP)


def holding(cut: int, profile: Profile = DEVICE) -> Profile:
    """The device with just enough memory for this cut by the rule that half of it may be used."""
    return replace(
        profile, name=f"{profile.name}-{cut}", memory_bytes=2 * cost_model().cost(cost_model().plan(cut)).client_memory.total_bytes
    )


def seen(client: int, round_index: int = 1, gain: float | None = None, slow: float | None = None) -> Observation:
    """One observation: improvement over the base model in nats a token, and observed over predicted seconds."""
    held_out = None if gain is None else 5.0 - gain
    busy_s, predicted_s = (0.0, 0.0) if slow is None else (2.0 * slow, 2.0)
    return Observation(client, round_index, 100, 4.0, 3.0, 1.0, 10, 10, held_out, None if gain is None else 5.0, busy_s, predicted_s)


def run(policy: Policy, state: Any, rounds: Sequence[tuple[Sequence[int], Sequence[Observation]]], first: int = 1) -> list[tuple[Any, Any]]:
    """(cuts, state) after every round; a round is its participants and the observations of the round before."""
    answers = []
    for index, (participants, observations) in enumerate(rounds, first):
        cuts, state = policy.plan(index, participants, observations, state)
        answers.append((cuts, state))
    return answers


PROFILES = st.builds(
    lambda flops, link, latency: replace(
        DEVICE, name="drawn", flops_per_s=flops, uplink_bytes_per_s=link, downlink_bytes_per_s=2 * link, latency_s=latency
    ),
    st.sampled_from([1e7, 3e7, 1e8, 1e9]),
    st.sampled_from([3e4, 3e5, 3e6]),
    st.sampled_from([0.0, 0.01]),
)


@st.composite
def fleets(draw: st.DrawFn, most: int = 4) -> tuple[list[CostModel], list[Profile]]:
    """Cost models and devices of 1 to `most` clients: rows of several lengths, a server of one or two processors, tight memory, bounds."""
    clients = draw(st.integers(1, most))
    network = Network(server_slots=draw(st.integers(1, 2)))
    bounds = draw(st.sampled_from([{}, {"minimum_cut": 2}, {"maximum_cut": 3}, {"minimum_cut": 2, "maximum_cut": 4}]))
    shared: dict[str, Any] = {"network": network, "exit_on_client": draw(st.booleans()), **bounds}
    costs = [cost_model(sequence_tokens=draw(st.sampled_from([8, 16])), **shared) for _ in range(clients)]
    profiles = draw(st.lists(PROFILES, min_size=clients, max_size=clients))
    tight = draw(st.integers(2, 8))
    if tight <= costs[0].deepest_cut:
        need_bytes = max(cost.cost(cost.plan(tight)).client_memory.total_bytes for cost in costs)
        profiles[0] = replace(profiles[0], memory_bytes=2 * need_bytes)
    return costs, profiles
