"""`splitft plan` for a fleet: the rows are the clock's, and the comparison is with uniform cuts."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from splitft.adapt.profiles import preset
from splitft.adapt.schedule import schedule
from splitft.apps.plan_fleet import CLIENTS_SHOWN, fleet_plan, render_fleet
from splitft.types import Profile

from .cost_shapes import cost_model

COSTS = cost_model(local_steps=4)
FLEET = [preset("phone"), preset("laptop"), preset("desktop")]


def text_of(profiles: list[Profile], cuts: list[int], steps: list[int]) -> str:
    console = Console(record=True, width=100, file=io.StringIO())
    render_fleet(fleet_plan(COSTS, profiles, cuts, steps), console, "a fleet")
    return console.export_text()


def test_a_client_alone_takes_its_schedule() -> None:
    found = fleet_plan(COSTS, FLEET[:1], [2], [3])
    plan = replace(COSTS.plan(2), local_steps=3)
    alone_s = schedule(plan, COSTS.cost(plan), FLEET[0], COSTS.server).alone_s()
    assert found.round_s == pytest.approx(alone_s)
    assert found.rows[0].finish_s == pytest.approx(alone_s)


def test_uniform_cuts_are_played_with_equal_steps() -> None:
    found = fleet_plan(COSTS, FLEET, [1, 2, 3], [2, 4, 6])
    assert len(found.uniform_s) == COSTS.deepest_cut
    for index, seconds in enumerate(found.uniform_s):
        assert seconds == pytest.approx(fleet_plan(COSTS, FLEET, [index + 1] * 3, [4, 4, 4]).round_s)


def test_fewer_steps_end_sooner_and_more_than_planned_are_possible() -> None:
    few, many = (fleet_plan(COSTS, FLEET, [1, 1, 1], [count] * 3).round_s for count in (2, 8))
    assert few < many


def test_the_page_names_every_client_and_the_round() -> None:
    text = text_of(FLEET, [1, 2, 3], [2, 4, 6])
    assert all(f"{client} {profile.name}" in text for client, profile in enumerate(FLEET))
    assert "The first round takes" in text
    assert "everyone at cut" in text


def test_of_many_clients_the_slowest_are_shown() -> None:
    fleet = [replace(preset("phone"), name=f"phone-{k}", flops_per_s=1e10 * (1 + k)) for k in range(CLIENTS_SHOWN + 5)]
    text = text_of(fleet, [1] * len(fleet), [1] * len(fleet))
    assert f"The {CLIENTS_SHOWN} slowest of {CLIENTS_SHOWN + 5} clients are shown." in text
    assert "phone-0 " in text
