"""What noise a run will have is printed before it starts: by the plan, by a run and by a federation's server."""

from __future__ import annotations

import io
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from splitft.apps.execute import Display
from splitft.apps.plan_command import show_plan
from splitft.apps.server_setup import assemble_server
from splitft.apps.session import FederatedRun
from splitft.errors import ConfigError

from ..deploy.federation_scenes import federation_config
from ..tiny_run import text_file, tiny_config

PRIVATE: dict[str, Any] = {"name": "private", "noise_multiplier": 4.0, "most_noise": 1e6, "rule": "average"}
NOISY: dict[str, Any] = {"name": "entropy", "inner": {"name": "noise", "multiple": 0.5}}
LINES = (
    "noise on uplink: 0.5 times the root mean square of a row on every channel: obfuscation, no epsilon",
    "aggregator private: 3 merges of 3 participants, noise multiplier 4 (clips on the sum)",
    "noise on both factors is amplified in their product",
)


def printed(console_of: Any) -> str:
    return " ".join(console_of.split())


def test_the_plan_tells_the_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(tiny_config(tmp_path, aggregator=PRIVATE, uplink=NOISY))
    said = printed(capsys.readouterr().out)
    for line in LINES:
        assert line in said
    show_plan(tiny_config(tmp_path))
    assert "epsilon" not in capsys.readouterr().out


def test_the_plan_refuses_a_budget_that_the_run_would_refuse(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the privacy budget cannot be met"):
        show_plan(tiny_config(tmp_path, aggregator={"name": "private", "epsilon": 0.5}))


def test_noise_where_it_hides_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a U-shape "same" carries the uplink's noise to what the server sends, and not to the gradients that tell the labels."""
    labels, hides_nothing = "labels can be read from the gradients", "exit_downlink puts noise on what the server sends"
    for changes, said_labels, said_nothing in (
        ({}, True, True),
        ({"exit_downlink": "cast"}, True, False),
        ({"exit_downlink": "cast", "exit_uplink": {"name": "noise"}}, False, False),
    ):
        show_plan(tiny_config(tmp_path, uplink={"name": "noise"}, split={"labels": "client"}, **changes))
        said = printed(capsys.readouterr().out)
        assert (labels in said, hides_nothing in said) == (said_labels, said_nothing)


def test_sealed_sums_are_told_with_what_they_do_not_hide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(tiny_config(tmp_path, secure_aggregation={"enabled": True}, policy={"name": "fixed", "cuts": [2]}))
    assert "summed among 3 clients or more; what activations, labels and gradients tell" in printed(capsys.readouterr().out)


def test_a_bottleneck_s_noise_is_told_in_its_own_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(tiny_config(tmp_path, bottleneck={"channels": 9, "noise": 0.7, "clip": 2.0}, policy={"name": "fixed", "cuts": [2]}))
    said = printed(capsys.readouterr().out)
    assert "noise on uplink: 0.7 times the root mean square of a row at the clip, on every channel; epsilon" in said


@pytest.mark.parametrize("federation", [False, True], ids=["run", "server"])
def test_a_run_and_a_server_tell_it_before_the_first_round(tmp_path: Path, federation: bool) -> None:
    stream = io.StringIO()
    display = Display(Console(file=stream, width=400), 3, quiet=False, measured=federation)
    if federation:
        public = str(text_file(tmp_path / "public.txt", documents=12, seed=9))
        section = {"update_norm_factor": 0, "held_out": public}
        config = federation_config(
            tmp_path, aggregator=PRIVATE, uplink=NOISY, tokens={"held_out": 0.0, "common_held_out": 0.1}, federation=section
        )
        made = FederatedRun(config, listen=display.listen, build=assemble_server)
    else:
        made = FederatedRun(tiny_config(tmp_path, aggregator=PRIVATE, uplink=NOISY), listen=display.listen)
    with closing(made):
        said = printed(stream.getvalue())
    for line in LINES:
        assert line in said
