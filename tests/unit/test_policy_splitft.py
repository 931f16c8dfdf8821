"""The quality rule: its signal, its direction, its bounds, and what it does not react to."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.cost_shapes import DEVICE, SHAPE, cost_model
from unit.policy_fleets import DESKTOP, LAPTOP, PHONE, holding, run, seen

from splitft.adapt.choose import choose_cuts
from splitft.adapt.quality import improvements, standings
from splitft.adapt.splitft import SplitFT
from splitft.errors import ConfigError, ResourceError

QUICK: dict[str, Any] = {"averaging": 1.0, "cool_down": 0, "dead_band": 0.0}


def started(policy: SplitFT, clients: int = 3, **fields: object) -> Any:
    return policy.init(SHAPE, [DEVICE] * clients, [cost_model(**fields)] * clients)


def gains(*values: float | None) -> list[Any]:
    return [seen(client, gain=value) for client, value in enumerate(values)]


def tracks(policy: SplitFT, state: Any, observations: list[Any], rounds: int = 30) -> list[list[int]]:
    """Each client's cuts, round by round, when every round gives the same observations."""
    clients = range(len(state["cuts"]))
    answers = run(policy, state, [(clients, observations)] * rounds)
    return [[state["cuts"][client], *(cuts[client] for cuts, _ in answers)] for client in clients]


def test_improvement_is_over_the_base_model_and_unknown_without_it() -> None:
    found = improvements([seen(2, gain=0.5), seen(0, gain=-1.0), seen(1), seen(3, gain=float("nan")), seen(4, gain=float("inf"))])
    assert found == {0: -1.0, 2: 0.5}
    assert list(found) == [0, 2]


def test_standings_by_hand() -> None:
    """Median 1, deviations 1, 0, 0, 1, 9: median deviation 1, spread 1.4826."""
    found = standings({0: 0.0, 1: 1.0, 2: 1.0, 3: 2.0, 4: 10.0}, 0.01)
    assert found == pytest.approx({0: -1 / 1.4826, 1: 0.0, 2: 0.0, 3: 1 / 1.4826, 4: 3.0})


def test_differences_within_the_noise_are_small_and_one_client_is_no_cohort() -> None:
    assert standings({0: 1.000, 1: 1.001, 2: 1.002}, 0.1) == pytest.approx({0: -0.01, 1: 0.0, 2: 0.01})
    assert standings({4: 1.0}, 0.01) == {}


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9), st.floats(-3, 3), st.randoms(use_true_random=False))
def test_standings_know_neither_offset_nor_names(values: list[float], offset: float, random: Any) -> None:
    plain = standings(dict(enumerate(values)), 0.01)
    shifted = standings({client: value + offset for client, value in enumerate(values)}, 0.01)
    assert all(abs(plain[client] - shifted[client]) < 1e-6 for client in plain)
    order = list(range(len(values)))
    random.shuffle(order)
    renamed = standings({client: values[old] for client, old in enumerate(order)}, 0.01)
    assert {order[client]: value for client, value in renamed.items()} == plain
    assert all(-3 <= value <= 3 for value in plain.values())


def test_better_goes_deeper_worse_shallower_and_the_middle_stays() -> None:
    worse, middle, better = tracks(SplitFT(start=3), started(SplitFT(start=3)), gains(0.1, 0.5, 0.9))
    assert (worse[-1], set(middle), better[-1]) == (1, {3}, 6)
    assert all(after <= before for before, after in pairwise(worse))
    assert all(after >= before for before, after in pairwise(better))


def test_who_sits_a_round_out_keeps_its_cut_although_it_was_judged() -> None:
    """The figures of the round before move only those who take part in this one."""
    policy = SplitFT(start=3, gamma=1.0, **QUICK)
    state = started(policy)
    cuts, after = policy.plan(2, [0, 1], gains(0.1, 0.5, 0.9), state)
    assert list(cuts) == [0, 1]
    assert after["cuts"] == [2, 3, 3]
    everyone, _ = policy.plan(2, [0, 1, 2], gains(0.1, 0.5, 0.9), state)
    assert everyone == {0: 2, 1: 3, 2: 4}


def test_the_weight_follows_the_written_rule() -> None:
    """Standings of three evenly spaced clients are -+1/1.4826; start 3, gamma 0.2: 0.1349 a round to the weight."""
    policy = SplitFT(start=3, gamma=0.2, **QUICK)
    answers = run(policy, started(policy), [(range(3), gains(0.1, 0.5, 0.9))] * 3)
    step = 0.2 / 1.4826
    for index, (_, state) in enumerate(answers, 1):
        assert state["quality"]["weights"] == pytest.approx([1 - index * step, 1.0, 1 + index * step])
    # A whole block of 3 needs a weight of 4/3: the third decision.
    assert [cuts for cuts, _ in answers] == [{0: 3, 1: 3, 2: 3}, {0: 3, 1: 3, 2: 3}, {0: 2, 1: 3, 2: 4}]


def test_larger_gamma_moves_sooner_and_none_never() -> None:
    first_moves = []
    for gamma in (0.05, 0.1, 0.4):
        policy = SplitFT(start=3, gamma=gamma)
        _, _, better = tracks(policy, started(policy), gains(0.1, 0.5, 0.9))
        first_moves.append(next(index for index, cut in enumerate(better) if cut != 3))
    assert first_moves == sorted(set(first_moves), reverse=True)
    still = SplitFT(start=3, gamma=0.0, **QUICK)
    assert all(set(track) == {3} for track in tracks(still, started(still), gains(-5.0, 0.0, 5.0)))


@pytest.mark.parametrize(
    "observations",
    [
        [],
        gains(None, None, None),
        gains(0.7, 0.7, 0.7),
        gains(None, 0.9, None),
        gains(0.500, 0.501, 0.502),  # within the noise
    ],
)
def test_nothing_to_tell_clients_apart_moves_nobody(observations: list[Any]) -> None:
    policy = SplitFT(start=3, gamma=1.0)
    assert all(set(track) == {3} for track in tracks(policy, started(policy), observations))


def test_raw_perplexity_plays_no_part() -> None:
    """The hard text that training helped most goes deeper, although its loss is the highest."""
    policy = SplitFT(start=3)
    base = {0: 9.0, 1: 5.0, 2: 2.0}
    helped = {0: 2.0, 1: 1.0, 2: 0.1}
    observed = [
        type(one)(**{**vars(one), "base_loss": base[one.client], "held_out_loss": base[one.client] - helped[one.client]})
        for one in gains(0, 0, 0)
    ]
    hard, _, easy = tracks(policy, started(policy), observed)
    assert (hard[-1], easy[-1]) == (6, 1)


def test_a_client_that_is_missing_keeps_its_cut_and_comes_back_to_its_own() -> None:
    policy = SplitFT(start=3, gamma=1.0, **QUICK)
    rounds = [([0, 1, 2], gains(0.1, 0.5, 0.9))] + [([0, 1], gains(0.1, 0.5))] * 6
    *_, (_, state) = run(policy, started(policy), rounds)
    assert state["cuts"][2] == 4
    back, _ = policy.plan(8, [2], [], state)
    assert back == {2: 4}


def test_cool_down_and_cadence() -> None:
    for fields, gap in (({"cool_down": 4}, 5), ({"decide_every": 3}, 3), ({}, 1)):
        policy = SplitFT(start=3, gamma=5.0, **{**QUICK, **fields})
        _, _, better = tracks(policy, started(policy), gains(0.1, 0.5, 0.9))
        moves = [index for index, (before, after) in enumerate(pairwise(better), 1) if before != after]
        assert len(moves) == 3
        assert all(after - before == gap for before, after in pairwise(moves))


def test_a_weight_does_not_run_up_at_a_bound() -> None:
    """After fifty rounds at the top the first worse rounds count at once."""
    policy = SplitFT(start=3, gamma=0.5, **QUICK)
    answers = run(policy, started(policy), [(range(3), gains(0.1, 0.5, 0.9))] * 50)
    _, state = answers[-1]
    assert state["quality"]["weights"] == pytest.approx([1 / 3, 1.0, 2.0])
    turned = run(policy, state, [(range(3), gains(0.9, 0.5, 0.1))] * 2, first=51)
    assert turned[-1][0][2] < 6
    assert turned[-1][0][0] > 1


def test_memory_and_configured_bounds_hold_for_ever() -> None:
    policy = SplitFT(start=3, gamma=5.0, **QUICK)
    profiles = [LAPTOP, LAPTOP, holding(4)]
    state = policy.init(SHAPE, profiles, [cost_model(minimum_cut=2, maximum_cut=5)] * 3)
    worse, _, better = tracks(policy, state, gains(0.1, 0.5, 0.9))
    assert (min(worse), max(better)) == (2, 4)
    *_, roomy = tracks(policy, policy.init(SHAPE, [LAPTOP] * 3, [cost_model(minimum_cut=2, maximum_cut=5)] * 3), gains(0.1, 0.5, 0.9))
    assert max(roomy) == 5


def test_start_is_given_or_derived_and_fits() -> None:
    profiles = [PHONE, LAPTOP, DESKTOP]
    costs = [cost_model()] * 3
    assert SplitFT().init(SHAPE, profiles, costs)["cuts"] == [choice.cut for choice in choose_cuts(costs, profiles)]
    assert SplitFT(start=5).init(SHAPE, [DEVICE, holding(3)], costs[:2])["cuts"] == [5, 3]
    with pytest.raises(ConfigError, match=r"policy\.start is 5; small allows 1\.\.4 here"):
        SplitFT(start=5).init(SHAPE, [DEVICE], [cost_model(maximum_cut=4)])
    with pytest.raises(ResourceError, match="'device-1'"):
        SplitFT(start=2).init(SHAPE, [holding(1)], [cost_model(minimum_cut=2)])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gamma", -1),
        ("averaging", 2),
        ("dead_band", float("nan")),
        ("noise_nats", 0),
        ("cool_down", 1.5),
        ("decide_every", 0),
        ("start", -1),
    ],
)
def test_bad_fields_are_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"policy\.{field} is {value!r}"):
        SplitFT(**{field: value})  # type: ignore[arg-type]
