"""What codecs, controllers and hostile lengths are refused for, before anything is trained or decoded."""

from __future__ import annotations

from typing import Any

import pytest

from splitft.apps.assemble import build_components
from splitft.compress.feedback import Feedback
from splitft.config import parse_config
from splitft.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"controller": "bang_bang"}, "none of the codecs has"),
        ({"uplink": {"name": "quantize", "bits": 4}, "controller": "energy"}, "none of the codecs has"),
        ({"uplink": "error_bounded", "controller": "energy", "clients": {"buffer": 2}}, "clients.buffer does not have"),
        ({"exit_uplink": "error_bounded", "controller": "energy"}, "none of the codecs has"),
    ],
    ids=str,
)
def test_a_controller_needs_something_to_turn(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build_components(parse_config(changes))
    assert any(words in line for line in refused.value.problems)


def test_it_has_something_in_one_codec_of_several() -> None:
    build_components(parse_config({"downlink": {"name": "entropy", "inner": "error_bounded"}, "controller": "bang_bang"}))
    build_components(parse_config({"exit_uplink": "error_bounded", "controller": "energy", "split": {"labels": "client"}}))


def test_adapters_down_need_no_feedback() -> None:
    """What is lost down is part of the next change anyway; owed a second time it would be paid twice."""
    feedback = {"name": "feedback", "inner": {"name": "topk", "share": 0.2}}
    built = build_components(parse_config({"adapter_uplink": feedback}))
    assert isinstance(built.adapter_uplink, Feedback)
    assert built.adapter_downlink == built.adapter_uplink.inner


def test_the_name_of_an_inner_codec_can_be_followed_by_its_fields() -> None:
    config = parse_config({}, ["uplink=entropy", "uplink.inner=quantize", "uplink.inner.bits=4"])
    assert config.uplink.fields == {"inner": {"name": "quantize", "bits": 4}}
