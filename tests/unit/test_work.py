"""Work policies: as many steps in all, within bounds, and no division ends earlier."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitft.catalog import WORK_POLICIES
from splitft.errors import ConfigError
from splitft.work.balanced import Balanced
from splitft.work.equal import Equal

STEPS = st.dictionaries(st.integers(0, 30), st.floats(1e-3, 10.0), min_size=1, max_size=12)


@pytest.mark.parametrize("name", WORK_POLICIES)
@given(step_s=STEPS, local_steps=st.integers(1, 12))
@settings(max_examples=60)
def test_the_sum_is_kept_and_everyone_works(name: str, step_s: dict[int, float], local_steps: int) -> None:
    found = WORK_POLICIES[name]().steps(step_s, local_steps)
    assert set(found) == set(step_s)
    assert sum(found.values()) == local_steps * len(step_s)
    assert min(found.values()) >= 1
    assert found == WORK_POLICIES[name]().steps(dict(reversed(step_s.items())), local_steps)


@given(step_s=STEPS, local_steps=st.integers(1, 12), least=st.floats(0.0, 1.0), most=st.floats(1.0, 4.0))
@settings(max_examples=100)
def test_bounds_hold_and_nobody_slower_gets_more(step_s: dict[int, float], local_steps: int, least: float, most: float) -> None:
    found = Balanced(least, most).steps(step_s, local_steps)
    assert all(max(1, round(least * local_steps)) <= count <= -(-most * local_steps // 1) for count in found.values())
    for one, other in itertools.combinations(step_s, 2):
        if step_s[one] > step_s[other]:
            assert found[one] <= found[other]


@given(step_s=st.lists(st.floats(0.01, 5.0), min_size=1, max_size=4), local_steps=st.integers(1, 4))
@settings(max_examples=60)
def test_no_division_of_the_steps_is_done_earlier(step_s: list[float], local_steps: int) -> None:
    found = Balanced(0.5, 2.0).steps(dict(enumerate(step_s)), local_steps)
    slowest_s = max(found[k] * own_s for k, own_s in enumerate(step_s))
    counts = range(max(1, round(0.5 * local_steps)), 2 * local_steps + 1)
    for tried in itertools.product(counts, repeat=len(step_s)):
        if sum(tried) == local_steps * len(step_s):
            assert slowest_s <= max(count * own_s for count, own_s in zip(tried, step_s, strict=True)) * (1 + 1e-9)


def test_equal_devices_share_equally() -> None:
    assert Balanced().steps({3: 0.5, 4: 0.5, 9: 0.5}, 4) == Equal().steps({3: 0.5, 4: 0.5, 9: 0.5}, 4) == {3: 4, 4: 4, 9: 4}


def test_a_hand_worked_round() -> None:
    # 12 steps: the slow one takes its fewest, the fast one its most.
    assert Balanced(0.5, 1.5).steps({0: 0.1, 1: 1.0}, 6) == {0: 9, 1: 3}
    assert Balanced(1.0, 1.0).steps({0: 0.1, 1: 1.0}, 6) == {0: 6, 1: 6}
    assert Balanced().steps({}, 6) == {}


@pytest.mark.parametrize("fields", [{"least": -0.1}, {"least": 1.5}, {"most": 0.5}, {"most": float("nan")}, {"least": True}])
def test_bounds_out_of_range_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"work\.(least|most) is"):
        Balanced(**fields)
