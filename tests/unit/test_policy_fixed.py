"""The `fixed` policy: its fields, its refusals, its state."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from unit.cost_shapes import DEVICE, SHAPE, cost_model

from splitft.adapt.choose import choose_cuts
from splitft.adapt.fixed import Fixed
from splitft.errors import CheckpointError, ConfigError, ResourceError
from splitft.types import Observation

FAST = replace(DEVICE, name="fast", flops_per_s=1e11)


def test_one_cut_serves_every_client_and_only_participants_are_planned() -> None:
    policy = Fixed((2,))
    state = policy.init(SHAPE, [DEVICE] * 4, [cost_model()] * 4)
    cuts, after = policy.plan(1, [0, 3], [], state)
    assert cuts == {0: 2, 3: 2}
    assert after == state


def test_one_cut_per_client_in_client_order() -> None:
    policy = Fixed((1, 6, 3))
    state = policy.init(SHAPE, [DEVICE] * 3, [cost_model()] * 3)
    assert policy.plan(1, [2, 0, 1], [], state)[0] == {0: 1, 1: 6, 2: 3}


def test_observations_and_rounds_change_nothing() -> None:
    policy = Fixed((2,))
    state = policy.init(SHAPE, [DEVICE], [cost_model()])
    seen = Observation(client=0, round=1, tokens=9, loss=1.0, virtual_s=1.0, wait_s=0.0, uplink_bytes=1, downlink_bytes=1)
    assert policy.plan(7, [0], [seen], state) == policy.plan(1, [0], [], state)


def test_empty_cuts_are_derived_from_the_cost_model() -> None:
    profiles = [DEVICE, FAST, DEVICE]
    policy = Fixed()
    cuts, _ = policy.plan(1, range(3), [], policy.init(SHAPE, profiles, [cost_model()] * 3))
    assert list(cuts.values()) == [choice.cut for choice in choose_cuts([cost_model()] * 3, profiles)]
    assert cuts[1] > cuts[0]


def test_each_client_s_cut_is_derived_from_its_own_row_length() -> None:
    short, long = cost_model(sequence_tokens=8), cost_model(sequence_tokens=256)
    for costs in ([short, short, long], [long, short, short]):
        cuts = Fixed().init(SHAPE, [DEVICE] * 3, costs)["cuts"]
        assert cuts == [choice.cut for choice in choose_cuts(costs, [DEVICE] * 3)]
        assert cuts[costs.index(long)] < cuts[costs.index(short)]


def test_derived_cuts_stay_before_the_tail() -> None:
    model = cost_model(exit_on_client=True, tail_blocks=4)
    cuts, _ = Fixed().plan(1, [0, 1], [], Fixed().init(SHAPE, [FAST, FAST], [model] * 2))
    assert max(cuts.values()) <= 2


def test_state_survives_json() -> None:
    policy = Fixed((1, 2))
    state = policy.init(SHAPE, [DEVICE] * 2, [cost_model()] * 2)
    restored = json.loads(json.dumps(state))
    assert policy.plan(1, [1], [], restored) == policy.plan(1, [1], [], state)


def test_a_list_from_a_configuration_file_is_accepted() -> None:
    assert Fixed([2, 3]) == Fixed((2, 3))  # type: ignore[arg-type]


def test_wrong_number_of_cuts_names_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"2 entries for 5 clients.*Give 1 or 5"):
        Fixed((1, 2)).init(SHAPE, [DEVICE] * 5, [cost_model()] * 5)


def test_cuts_out_of_range_are_all_named() -> None:
    with pytest.raises(ConfigError, match=r"small, which has 6 blocks: policy.cuts\[0\] is 0; allowed is 1\.\.6") as caught:
        Fixed((0, 3, 7)).init(SHAPE, [DEVICE] * 3, [cost_model()] * 3)
    assert caught.value.problems == ("policy.cuts[0] is 0; allowed is 1..6", "policy.cuts[2] is 7; allowed is 1..6")


def test_tail_blocks_shorten_the_range() -> None:
    model = cost_model(exit_on_client=True, tail_blocks=2)
    with pytest.raises(ConfigError, match=r"2 stay behind the server on the client.*5; allowed is 1\.\.4"):
        Fixed((5,)).init(SHAPE, [DEVICE], [model])
    assert Fixed((4,)).init(SHAPE, [DEVICE], [model]) == {"cuts": [4]}


@pytest.mark.parametrize("cut", [True, 1.5, "2"])
def test_a_cut_is_a_whole_number(cut: object) -> None:
    with pytest.raises(ConfigError, match=r"policy\.cuts\[0\]"):
        Fixed((cut,))  # type: ignore[arg-type]


def test_a_device_no_cut_fits_is_refused_when_cuts_are_derived() -> None:
    badge = replace(DEVICE, name="badge", memory_bytes=1000.0)
    with pytest.raises(ResourceError, match="'badge'"):
        Fixed().init(SHAPE, [DEVICE, badge], [cost_model()] * 2)
    assert Fixed((1,)).init(SHAPE, [DEVICE, badge], [cost_model()] * 2) == {"cuts": [1, 1]}


@pytest.mark.parametrize("state", [{}, {"cuts": "none"}, {"cuts": [1]}])
def test_a_state_of_another_run_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="no cut for every participant"):
        Fixed((1,)).plan(1, [0, 1], [], state)
