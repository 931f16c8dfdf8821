"""Device profiles: presets, files, assignment to clients."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import pytest

from splitft.adapt import profiles
from splitft.adapt.profiles import PRESETS, assign_profiles, load_profiles, preset
from splitft.errors import ConfigError

WHOLE = """
[ward]
flops_per_s = 1e12
memory_bytes = 8_000_000_000
uplink_bytes_per_s = 1e6
downlink_bytes_per_s = 2e6
latency_s = 0
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "profiles.toml"


def test_presets_are_plausible_and_documented() -> None:
    for name, profile in PRESETS.items():
        assert profile.name == name
        assert f"\n    {name} " in (profiles.__doc__ or "")
        assert all(math.isfinite(value) and value > 0 for key, value in asdict(profile).items() if key != "name")
        assert 1e9 < profile.flops_per_s < 1e15
        assert 1e9 < profile.memory_bytes < 1e12
        assert profile.latency_s < 1
    assert PRESETS["phone"].flops_per_s < PRESETS["laptop"].flops_per_s < PRESETS["workstation-gpu"].flops_per_s
    assert PRESETS["phone"].uplink_bytes_per_s < PRESETS["phone"].downlink_bytes_per_s


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'labtop'; known: desktop, .*did you mean 'laptop'\?"):
        preset("labtop")


def test_a_file_adds_profiles_and_may_build_on_a_preset(file: Path) -> None:
    file.write_text(WHOLE + '\n[ward-tablet]\nlike = "tablet"\nuplink_bytes_per_s = 5e5\n')
    known = load_profiles(file)
    assert set(known) == {*PRESETS, "ward", "ward-tablet"}
    assert known["ward"] == profiles.Profile("ward", 1e12, 8e9, 1e6, 2e6, 0.0)
    tablet = known["ward-tablet"]
    assert (tablet.name, tablet.uplink_bytes_per_s, tablet.flops_per_s) == ("ward-tablet", 5e5, PRESETS["tablet"].flops_per_s)
    assert "ward" not in PRESETS


def test_every_problem_of_a_file_is_reported(file: Path) -> None:
    file.write_text('speed = 3\n[a]\nlike = "phon"\n[b]\nflops_per_s = 0\n[c]\nlike = "phone"\nflop_per_s = 1\nlatency_s = true\n')
    with pytest.raises(ConfigError, match=r"profiles\.toml: speed = 3") as caught:
        load_profiles(file)
    problems = "\n".join(caught.value.problems)
    for part in (
        "speed = 3 stands outside a table",
        "a.like is 'phon'",
        "did you mean 'phone'?",
        "b.flops_per_s is 0; allowed is a finite number, more than 0",
        "b lacks memory_bytes, uplink_bytes_per_s",
        "c has no field 'flop_per_s'",
        "did you mean 'flops_per_s'?",
        "c.latency_s is True; allowed is a finite number, 0 or more",
    ):
        assert part in problems


@pytest.mark.parametrize("value", ["-1", "nan", "inf", '"fast"', "[1]"])
def test_numbers_must_be_finite_and_positive(file: Path, value: str) -> None:
    file.write_text(WHOLE.replace("1e12", value))
    with pytest.raises(ConfigError, match=r"ward\.flops_per_s is"):
        load_profiles(file)


def test_broken_and_missing_files_are_named(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the profiles file '.*profiles.toml'"):
        load_profiles(file)
    file.write_text("[a\n")
    with pytest.raises(ConfigError, match=r"profiles.toml: not a TOML file.*line 1"):
        load_profiles(file)
    file.write_bytes(b"# \xff\n")
    with pytest.raises(ConfigError, match="not a TOML file in UTF-8"):
        load_profiles(file)


def test_one_name_serves_all_or_one_name_each() -> None:
    assert [profile.name for profile in assign_profiles(["phone"], 3)] == ["phone"] * 3
    assert [profile.name for profile in assign_profiles(["phone", "laptop"], 2)] == ["phone", "laptop"]
    for names in ([], ["phone", "laptop"]):
        with pytest.raises(ConfigError, match=rf"{len(names)} entries for 3 clients"):
            assign_profiles(names, 3)
    with pytest.raises(ConfigError, match="unknown device profile 'phoen'"):
        assign_profiles(["phoen"], 3)
