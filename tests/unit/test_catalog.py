"""catalog.py: components are built by name; everything wrong with a name or its fields is said at once, with the nearest right one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from splitft.catalog import CATALOG, CODECS, INNER, build, problems
from splitft.compress.cast import Cast
from splitft.compress.entropy import Entropy
from splitft.compress.error_bounded import ErrorBounded
from splitft.compress.projection import Projection
from splitft.compress.quantize import Quantize
from splitft.compress.residual import Residual
from splitft.errors import ConfigError

CODEC_SEAMS = [seam for seam, table in CATALOG.items() if table.items() >= CODECS.items()]


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


def test_a_codec_is_built_inside_another_to_any_depth() -> None:
    assert build("uplink", "entropy", {"inner": "quantize"}) == Entropy(Quantize())
    bounded = {"name": "error_bounded", "bound": 0.5, "of": "absolute"}
    built = build("downlink", "projection", {"inner": {"name": "residual", "cache_mb": 9, "inner": bounded}})
    assert built == Projection(Residual(ErrorBounded(0.5, "absolute"), cache_mb=9))


@pytest.mark.parametrize("seam", CODEC_SEAMS)
def test_every_codec_is_at_home_in_every_codec_section(seam: str) -> None:
    assert INNER[seam] == "inner"
    for name in CODECS:
        assert build(seam, name, {}) == CODECS[name]()
    for name in ("topk", "projection", "feedback"):
        assert build(seam, name, {"inner": "cast"}) == CODECS[name](inner=Cast())  # type: ignore[call-arg]


def test_sections_for_codecs_are_the_six_tensors() -> None:
    assert CODEC_SEAMS == ["uplink", "downlink", "exit_downlink", "exit_uplink", "adapter_uplink", "adapter_downlink"]
    assert [seam for seam in CODEC_SEAMS if "same" in CATALOG[seam]] == ["exit_downlink", "exit_uplink", "adapter_downlink"]


def test_faults_inside_a_component_are_found_before_it_is_built() -> None:
    assert problems("uplink", "entropy", {"inner": "quantise"})[0].endswith("Did you mean 'quantize'?")
    (line,) = problems("uplink", "entropy", {"inner": {"name": "topk", "shares": 0.1}})
    assert line.startswith("uplink.inner.shares is not a field of topk")
    assert line.endswith("Did you mean 'share'?")
    (line,) = problems("uplink", "entropy", {"inner": {"bits": 4}})
    assert line.startswith("uplink.inner.bits is not a field of cast"), "the codec that stands there by default"
    deep = problems("uplink", "projection", {"basis": 1, "inner": {"name": "residual", "inner": {"name": "cast", "bits": 4}}, "rank": 2})
    assert [text.split(" is ")[0] for text in deep] == ["uplink.inner.inner.bits", "uplink.rank"]


@pytest.mark.parametrize("inner", ["temporal", "feedback"])
def test_what_cannot_go_together_is_a_configuration_error(inner: str) -> None:
    for outer in ("residual", "lowrank", "feedback"):
        with pytest.raises(ConfigError, match="inner is"):
            build("uplink", outer, {"inner": inner})


def test_a_table_without_a_name_changes_what_stands_there_by_default() -> None:
    """On the command line `uplink=projection uplink.inner.inner.bound=0.2` is enough."""
    built = build("uplink", "projection", {"inner": {"ignore": 0.3, "inner": {"bound": 0.2}}})
    default = build("uplink", "projection", {})
    assert built == replace(default, inner=replace(default.inner, ignore=0.3, inner=replace(default.inner.inner, bound=0.2)))
    other = build("uplink", "residual", {"inner": {"name": "quantize", "bits": 4}})
    assert type(other.inner).__name__ == "Quantize", "a name begins anew"
    assert build("aggregator", "norm_clip", {"rule": {}}) == build("aggregator", "norm_clip", {})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"inner": "residul"}, "uplink.inner.name is 'residul'"),
        ({"inner": {"inner": {"bund": 1}}}, "uplink.inner.inner.bund is not a field of error_bounded"),
        ({"inner": {"name": "entropy", "inner": 3}}, "uplink.inner.inner is 3"),
        ({"inner": {"name": 3}}, "uplink.inner is"),
    ],
    ids=str,
)
def test_what_is_wrong_inside_is_named_with_its_path(fields: dict[str, Any], words: str) -> None:
    [found] = problems("uplink", "projection", fields)
    assert found.startswith(words)
