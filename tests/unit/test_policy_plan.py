"""`splitft plan` and the `fixed` policy when the configuration bounds the cuts."""

from __future__ import annotations

from pathlib import Path

import pytest
from unit.cost_shapes import DEVICE, SHAPE, cost_model

from splitft.adapt.choose import choose_cut, fitting_cuts
from splitft.adapt.fixed import Fixed
from splitft.apps.plan import mark_configured, plan_table
from splitft.apps.plan_command import show_plan
from splitft.errors import ConfigError

from ..tiny_run import tiny_config


def test_rows_begin_at_the_shallowest_cut_and_keep_their_own_figures() -> None:
    model, free = cost_model(minimum_cut=3, maximum_cut=5), cost_model()
    rows, all_rows = plan_table(model, DEVICE, 1e9), plan_table(free, DEVICE, 1e9)
    assert [row.cut for row in rows] == [3, 4, 5]
    for row in rows:
        same = all_rows[row.cut - 1]
        assert (row.client_memory_bytes, row.step_s, row.fits) == (same.client_memory_bytes, same.step_s, same.fits)
    assert [row.cut for row in rows if row.chosen] == [choose_cut(model, DEVICE, 1e9).cut] == [5]
    assert "split.maximum_cut allows no deeper one" in rows[-1].reason
    assert "there is no deeper one" in all_rows[-1].reason
    assert [option.plan.cut for option in fitting_cuts(model, DEVICE)] == [3, 4, 5]


def test_what_stops_a_deeper_cut_is_named_by_its_own_figures() -> None:
    rows = plan_table(cost_model(minimum_cut=3), DEVICE, 1e-9)
    chosen = next(row for row in rows if row.chosen)
    assert chosen.cut == 3
    assert "no cut within" in chosen.reason
    limit = plan_table(cost_model(minimum_cut=2), DEVICE, plan_table(cost_model(), DEVICE)[3].step_s / 1.25 * 1.001)
    deepest = next(row for row in limit if row.chosen)
    assert deepest.cut == 4
    assert "cut 5 would take" in deepest.reason


def test_the_reason_of_a_policy_is_its_own() -> None:
    rows = plan_table(cost_model(), DEVICE, 1e9)
    marked = mark_configured(rows, {2}, "where policy search starts")
    assert marked[1].chosen
    assert marked[1].reason == "where policy search starts; derived, it would be 6."


def test_fixed_cuts_outside_the_bounds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy\.cuts\[0\] is 1; allowed is 2\.\.4.*or change split\.minimum_cut"):
        Fixed((1,)).init(SHAPE, [DEVICE], [cost_model(minimum_cut=2, maximum_cut=4)])
    assert Fixed((4,)).init(SHAPE, [DEVICE], [cost_model(minimum_cut=2, maximum_cut=4)]) == {"cuts": [4]}


@pytest.mark.parametrize("name", ["resource", "search", "splitft", "combined"])
def test_the_command_shows_where_every_policy_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    show_plan(tiny_config(tmp_path, policy={"name": name}, split={"minimum_cut": 2}))
    out = capsys.readouterr().out
    assert "set by policy.cuts" not in out
    assert f"where policy {name} starts" in out or "deepest within" in out or "fastest" in out
    assert "Cut 1:" not in out
