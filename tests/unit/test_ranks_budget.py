"""Rank policy `budget`: the largest rank that fits, found again here by counting."""

from __future__ import annotations

from dataclasses import replace

import pytest

from splitft.catalog import build
from splitft.errors import CheckpointError, ConfigError, ResourceError
from splitft.lora import Layout
from splitft.ranks.budget import BudgetRanks, needed_parameters
from splitft.types import Key, Profile

from .cost_shapes import DEVICE, cost_model

LAYOUT = Layout.of({Key(block, "attn.c_attn"): (32, 96) for block in range(6)}, 8, 1.0)
VALUES = 128  # parameters a block needs per rank
COST = cost_model(rank=8)


def rank_at(policy: BudgetRanks, cut: int, profile: Profile = DEVICE, **fields: object) -> int:
    state = policy.init(LAYOUT, [profile], [replace(COST, **fields)])  # type: ignore[arg-type]
    ranks = policy.plan(1, {0: cut}, [], LAYOUT, state)[0][0]
    own, servers = set(ranks[:cut]), set(ranks[cut:])
    assert len(own) == 1
    assert servers <= {8}
    return own.pop()


@pytest.mark.parametrize("cut", range(1, 7))
@pytest.mark.parametrize("rank", range(1, 8))
def test_an_upload_budget_is_used_to_the_last_byte(cut: int, rank: int) -> None:
    exact = 4 * VALUES * cut * rank
    if rank > 1 or cut > 1:
        smallest = 4 * VALUES  # rank 1 at cut 1 must fit, or nothing does
        if exact - 1 >= smallest * cut:
            assert rank_at(BudgetRanks(exact - 1, 0), cut) == rank - 1
    assert rank_at(BudgetRanks(exact, 0), cut) == rank
    assert rank_at(BudgetRanks(exact + 1, 0), cut) == rank


def test_without_limits_everybody_has_the_layouts_rank() -> None:
    assert [rank_at(BudgetRanks(0, 0), cut) for cut in range(1, 7)] == [8] * 6
    assert [rank_at(BudgetRanks(10**9, 1.0), cut) for cut in range(1, 7)] == [8] * 6


def test_narrower_values_on_the_wire_leave_room_for_more() -> None:
    assert rank_at(BudgetRanks(4 * VALUES * 2, 0), 1) == 2
    assert rank_at(BudgetRanks(4 * VALUES * 2, 0), 1, adapter_bytes=2.0) == 4


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_memory_budget_is_what_weights_and_activations_leave(cut: int, share: float) -> None:
    memory = COST.cost(COST.plan(cut)).client_memory
    for rank in (1, 3, 7):
        need = 16 * VALUES * cut * rank / share
        profile = replace(DEVICE, memory_bytes=memory.weights_bytes + memory.activations_bytes + need + 1)
        assert rank_at(BudgetRanks(0, share), cut, profile) == rank
        if rank > 1:
            assert rank_at(BudgetRanks(0, share), cut, replace(profile, memory_bytes=profile.memory_bytes - 2)) == rank - 1


def test_the_tighter_of_two_budgets_holds() -> None:
    memory = COST.cost(COST.plan(1)).client_memory
    profile = replace(DEVICE, memory_bytes=memory.weights_bytes + memory.activations_bytes + 16 * VALUES * 3 + 1)
    assert rank_at(BudgetRanks(4 * VALUES * 5, 1.0), 1, profile) == 3
    assert rank_at(BudgetRanks(4 * VALUES * 2, 1.0), 1, profile) == 2


def test_every_client_has_its_own_rank_and_deeper_cuts_lower_it() -> None:
    policy = BudgetRanks(0, 1.0)
    memory = COST.cost(COST.plan(2)).client_memory
    tight = replace(DEVICE, memory_bytes=memory.weights_bytes + memory.activations_bytes + 16 * VALUES * 2 * 3 + 1)
    state = policy.init(LAYOUT, [DEVICE, tight], [COST] * 2)
    ranks, after = policy.plan(1, {1: 2, 0: 2}, [], LAYOUT, state)
    assert after == state
    assert ranks == {0: (8,) * 6, 1: (3, 3, 8, 8, 8, 8)}
    table = state["ranks"]
    assert isinstance(table, list)
    assert table[1] == sorted(table[1], reverse=True)


def test_tail_blocks_are_the_clients_own() -> None:
    cost = replace(COST, exit_on_client=True, tail_blocks=2)
    policy = BudgetRanks(4 * VALUES * 3 * 2, 0)  # rank 2 in three blocks
    state = policy.init(LAYOUT, [DEVICE], [cost])
    assert policy.plan(1, {0: 1}, [], LAYOUT, state)[0] == {0: (2, 8, 8, 8, 2, 2)}


def test_keys_of_lower_rank_are_counted_as_they_are() -> None:
    layout = Layout.of({Key(0, "a"): (2, 3), Key(0, "b"): (4, 6)}, {Key(0, "a"): 1, Key(0, "b"): 3}, 1.0)
    assert needed_parameters(layout, 1, 1) == [5 + 10, 5 + 20, 5 + 30]


def test_a_budget_for_nothing_is_refused_before_the_run_and_says_what_would_do() -> None:
    with pytest.raises(ResourceError, match=r"client 1 \(device\).*512 bytes a round, ranks\.upload_bytes allows 511") as caught:
        BudgetRanks(511, 0).init(LAYOUT, [DEVICE] * 2, [replace(COST, adapter_bytes=1.0), COST])
    assert "Set ranks.upload_bytes to 512" in caught.value.remedy
    assert rank_at(BudgetRanks(512, 0), 1) == 1


def test_too_little_memory_is_refused_and_the_remedy_works() -> None:
    memory = COST.cost(COST.plan(1)).client_memory
    used = memory.weights_bytes + memory.activations_bytes
    profile = replace(DEVICE, memory_bytes=used + 16 * VALUES * 2)
    with pytest.raises(ResourceError, match=r"memory_share 0\.25 of the 4096 bytes left is too little") as caught:
        BudgetRanks(0, 0.25).init(LAYOUT, [profile], [COST])
    assert "Set ranks.memory_share to 0.5 or more" in caught.value.remedy
    assert rank_at(BudgetRanks(0, 0.5), 1, profile) == 1
    with pytest.raises(ResourceError) as caught:
        BudgetRanks(0, 1.0).init(LAYOUT, [replace(profile, memory_bytes=used / 2)], [COST])
    assert f"Give it {16 * VALUES} bytes more" in caught.value.remedy


def test_a_cut_that_became_too_deep_is_refused_and_the_deepest_that_fits_is_named() -> None:
    policy = BudgetRanks(4 * VALUES * 3, 0)
    state = policy.init(LAYOUT, [DEVICE], [COST])
    assert policy.plan(1, {0: 3}, [], LAYOUT, state)[0][0] == (1, 1, 1, 8, 8, 8)
    with pytest.raises(ResourceError, match=r"client 0 .* cut 4 .* deepest cut that holds rank 1 is 3") as caught:
        policy.plan(2, {0: 4}, [], LAYOUT, state)
    assert "split.maximum_cut to 3" in caught.value.remedy


def test_a_minimum_cut_that_does_not_fit_is_refused_at_once() -> None:
    policy = BudgetRanks(4 * VALUES, 0)
    policy.init(LAYOUT, [DEVICE], [COST])
    with pytest.raises(ResourceError, match="at cut 2"):
        policy.init(LAYOUT, [DEVICE], [replace(COST, minimum_cut=2)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"upload_bytes": -1}, r"upload_bytes is -1; allowed are whole numbers from 0"),
        ({"upload_bytes": 1.5}, r"upload_bytes is 1\.5"),
        ({"upload_bytes": True}, r"upload_bytes is True"),
        ({"memory_share": 1.1}, r"memory_share is 1\.1; allowed are numbers from 0"),
        ({"memory_share": float("nan")}, r"memory_share is nan"),
        ({"memory_share": "half"}, r"memory_share is 'half'"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("ranks", "budget", fields)


def test_a_state_for_other_clients_is_refused() -> None:
    state = BudgetRanks().init(LAYOUT, [DEVICE], [COST])
    with pytest.raises(CheckpointError, match=r"no ranks for every participant of \[1\]"):
        BudgetRanks().plan(1, {1: 1}, [], LAYOUT, state)
