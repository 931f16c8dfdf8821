"""What policies carry in their state: the fleet comes back as it was, and a foreign state is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from unit.cost_shapes import BLOCK, DEVICE, SHAPE, cost_model
from unit.policy_fleets import DESKTOP, PHONE

from splitft.adapt.oscillation import oscillates
from splitft.adapt.state import Fleet, cuts_of, list_of, recall, remember
from splitft.clock import Network
from splitft.errors import CheckpointError

OTHER = replace(BLOCK, parameters=99, projections=BLOCK.projections[:2])


def there_and_back(profiles: list, costs: list) -> Fleet:  # type: ignore[type-arg]
    return recall({"fleet": json.loads(json.dumps(remember(profiles, costs), allow_nan=False))})


@pytest.mark.parametrize(
    "network",
    [Network(), Network(3, True, 1e6, 2e6, "longest_first", True), Network(uplink_bytes_per_s=math.inf, downlink_bytes_per_s=5.0)],
)
def test_the_fleet_comes_back_through_json(network: Network) -> None:
    shape = replace(SHAPE, blocks=(BLOCK, OTHER, BLOCK, OTHER, BLOCK, BLOCK))
    fields: dict[str, object] = {"network": network, "minimum_cut": 2, "exit_on_client": True, "tail_blocks": 1, "adapter_bytes": 1.5}
    costs = [cost_model(shape, sequence_tokens=8 + client % 3, **fields) for client in range(5)]
    profiles = [DEVICE, PHONE, DEVICE, DESKTOP, PHONE]
    assert there_and_back(profiles, costs) == Fleet(tuple(costs), tuple(profiles))


def test_fields_without_a_default_case_come_back_too() -> None:
    costs = [cost_model(modules=("attn.c_attn", "mlp.c_fc")), cost_model(modules=("mlp.c_proj",), batch_size=7)]
    assert there_and_back([DEVICE] * 2, costs).costs == tuple(costs)
    assert there_and_back([], []) == Fleet((), ())


def test_a_thousand_clients_take_little_room() -> None:
    costs = [cost_model(sequence_tokens=1 + client) for client in range(1000)]
    assert len(json.dumps(remember([DEVICE] * 1000, costs))) < 50_000


def test_part_of_a_fleet_and_slower_devices() -> None:
    fleet = Fleet(tuple(cost_model(sequence_tokens=8 + client) for client in range(3)), (DEVICE, PHONE, DESKTOP))
    part = fleet.company([2, 0]).slower([2.0, 1.0])
    assert [cost.sequence_tokens for cost in part.costs] == [10, 8]
    assert part.profiles[1] == DEVICE
    assert part.profiles[0].flops_per_s == DESKTOP.flops_per_s / 2
    assert part.profiles[0].latency_s == DESKTOP.latency_s * 2


@pytest.mark.parametrize("fleet", [None, {}, {"clients": [[0, {}]]}, {"clients": [[5, {}]], "devices": []}, 7])
def test_a_state_without_a_fleet_is_refused(fleet: object) -> None:
    with pytest.raises(CheckpointError, match="no fleet that can be read"):
        recall({"fleet": fleet})


def test_lists_of_a_state_are_copies_and_must_be_there() -> None:
    state = {"cuts": [1, 2], "weights": [0.5]}
    cuts_of(state, [0, 1]).append(3)
    list_of(state, "weights").append(1.0)
    assert state == {"cuts": [1, 2], "weights": [0.5]}
    with pytest.raises(CheckpointError, match="no cut for every participant"):
        cuts_of(state, [2])
    with pytest.raises(CheckpointError, match="no list 'standings'"):
        list_of(state, "standings")


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], False),
        ([3], False),
        ([1, 2, 3, 4, 5, 6, 7, 8], False),  # a long way
        ([4, 4, 4, 4, 4, 4], False),
        ([2, 3, 2, 3], False),  # two turns
        ([2, 3, 2, 3, 2], True),
        ([2, 3, 3, 2, 2, 3, 3, 2], True),  # rests do not hide it
        ([2, 3, 2, 3, 2, 2, 2, 2, 2, 2, 2, 2], False),  # it has settled
    ],
)
def test_oscillation_is_turning_to_and_fro(history: list[int], expected: bool) -> None:
    assert oscillates(history) is expected


def test_window_and_turns_of_oscillation() -> None:
    assert oscillates([1, 2, 1], turns=1)
    assert not oscillates([1, 2, 1, 2, 1, 2], window=2, turns=1)
    assert not oscillates([1, 2, 1], window=0, turns=1)
