"""catalog.py: components are built by name; everything wrong with a name or its fields is said at once, with the nearest right one."""

from __future__ import annotations

import pytest

from splitft.catalog import CATALOG, build, problems
from splitft.compress.cast import Cast
from splitft.errors import ConfigError


def test_a_component_is_built_with_its_fields() -> None:
    assert build("uplink", "cast", {"dtype": "float16"}) == Cast("float16")
    assert build("uplink", "cast", {}) == Cast()


def test_a_component_without_problems_has_none() -> None:
    assert problems("uplink", "cast", {"dtype": "float16"}) == []
    assert problems("transport", "inproc", {}) == []


@pytest.mark.parametrize("seam", CATALOG)
def test_an_unknown_name_lists_the_known_ones(seam: str) -> None:
    (line,) = problems(seam, "zzz", {})
    assert line.startswith(f"{seam}.name is 'zzz'; known are ")
    assert all(name in line for name in CATALOG[seam])
    assert "Did you mean" not in line


def test_a_slip_of_the_pen_is_put_right() -> None:
    assert problems("uplink", "identiy", {})[0].endswith("Did you mean 'identity'?")
    (line,) = problems("uplink", "cast", {"dtpye": "float16"})
    assert line == "uplink.dtpye is not a field of cast; its fields: dtype. Did you mean 'dtype'?"


def test_a_component_without_fields_says_so() -> None:
    assert problems("aggregator", "average", {"momentum": 0.9}) == ["aggregator.momentum is not a field of average; its fields: none."]


def test_everything_wrong_is_said_at_once() -> None:
    found = problems("data", "jsonl", {"one": 1, "two": 2})
    assert found[0].startswith("data.one is not a field of jsonl")
    assert found[1].startswith("data.two is not a field of jsonl")
    assert found[2] == "data.path is missing; jsonl needs it"
    with pytest.raises(ConfigError, match=r"\[data\] has 3 problems") as caught:
        build("data", "jsonl", {"one": 1, "two": 2})
    assert caught.value.problems == tuple(found)


def test_one_problem_is_one() -> None:
    with pytest.raises(ConfigError, match=r"\[uplink\] has 1 problem\."):
        build("uplink", "nothing", {})


def test_a_value_the_component_refuses_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="float8"):
        build("uplink", "cast", {"dtype": "float8"})


def test_a_value_of_the_wrong_type_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="policy"):
        build("policy", "fixed", {"cuts": 3})
