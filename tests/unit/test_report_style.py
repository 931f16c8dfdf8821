"""The palettes: told apart with every common colour vision, seen on their background, every class defined."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
from report_journals import Journal

from splitft.apps.report_page import render_page
from splitft.apps.report_record import load_record
from splitft.apps.report_style import CLIENT_HUES, DARK, LIGHT, STAGE_HUES, style_sheet
from splitft.types import KINDS

# Severity 1.0 matrices of Machado, Oliveira and Fernandes 2009, on linear RGB.
VISIONS = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def _linear(colour: str) -> list[float]:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]


def _oklab(rgb: list[float]) -> tuple[float, float, float]:
    red, green, blue = (min(1.0, max(0.0, value)) for value in rgb)
    long = (0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue) ** (1 / 3)
    medium = (0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue) ** (1 / 3)
    short = (0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue) ** (1 / 3)
    return (
        0.2104542553 * long + 0.793617785 * medium - 0.0040720468 * short,
        1.9779984951 * long - 2.428592205 * medium + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * medium - 0.808675766 * short,
    )


def _distance(one: str, other: str, vision: str) -> float:
    seen = [
        [sum(weight * value for weight, value in zip(row, _linear(colour), strict=True)) for row in VISIONS[vision]]
        for colour in (one, other)
    ]
    return 100 * math.dist(_oklab(seen[0]), _oklab(seen[1]))


def _contrast(one: str, other: str) -> float:
    low, high = sorted(
        sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), _linear(c), strict=True)) for c in (one, other)
    )
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(("hues", "least"), [(CLIENT_HUES, 9.5), (STAGE_HUES, 8.0)], ids=["clients", "stages"])
def test_hues_stay_apart(colours: dict[str, str], vision: str, hues: tuple[str, ...], least: float) -> None:
    for one, other in itertools.combinations(hues, 2):
        assert _distance(colours[one], colours[other], vision) >= least, (one, other)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_marks_and_text_stand_out(colours: dict[str, str]) -> None:
    for hue in CLIENT_HUES:
        assert _contrast(colours[hue], colours["card"]) >= 3.0, hue
    for name, back in (
        ("ink", "card"),
        ("muted", "card"),
        ("muted", "page"),
        ("ink", "warn-back"),
        ("accent", "card"),
        ("good", "page"),
        ("warn", "page"),
        ("bad", "card"),
    ):
        assert _contrast(colours[name], colours[back]) >= 4.5, (name, back)
    for hue in STAGE_HUES:
        assert _contrast(colours[f"on-{hue[2:]}"], colours[hue]) >= 4.2, hue
    for step in range(7):
        assert _contrast(colours["on-low" if step < 4 else "on-high"], colours[f"q{step}"]) >= 4.5, step


def test_every_kind_of_bytes_has_its_own_colour() -> None:
    colours = dict(re.findall(r"\.k-([a-z]+)\{--c:var\(--([a-z0-9]+)\)\}", style_sheet()))
    assert set(KINDS) <= colours.keys()
    assert len(set(colours.values())) == len(colours)


def test_a_cross_is_seen_on_its_cell() -> None:
    for colours in (LIGHT, DARK):
        assert _contrast(colours["bad"], colours["gap"]) >= 3.0


def test_both_modes_define_the_same_names_and_every_name_used_is_defined() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert set(re.findall(r"var\(--([\w-]+)", style_sheet())) <= LIGHT.keys() | {"c"}


def test_the_ramp_gets_darker_on_paper_and_lighter_on_a_dark_screen() -> None:
    light = [_oklab(_linear(LIGHT[f"q{step}"]))[0] for step in range(7)]
    dark = [_oklab(_linear(DARK[f"q{step}"]))[0] for step in range(7)]
    assert light == sorted(light, reverse=True)
    assert dark == sorted(dark)


def test_every_class_a_plot_uses_has_a_rule(tmp_path: Path) -> None:
    defined = set(re.findall(r"\.([a-z][\w-]*)", style_sheet()))
    journals = (
        Journal(),
        Journal(clients=40, rounds=3),
        Journal(clients=50, rounds=2),
        Journal(rounds=11, adaptive=True),
        Journal(clients=70, rounds=80, adaptive=True, drawn_steps=0),
    )
    for number, journal in enumerate(journals):
        page = render_page(load_record(journal.write(tmp_path / str(number))))
        for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
            used = {name for classes in re.findall(r'class="([^"]*)"', svg) for name in classes.split()}
            assert used <= defined | {"t"}, used - defined
