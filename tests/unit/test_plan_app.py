"""`splitft plan`: the rows and the printed table."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console
from unit.cost_shapes import BLOCK, DEVICE, SHAPE, cost_model

from splitft.adapt.choose import choose_cut
from splitft.apps.plan import PlanRow, plan_table, render_plan, select_rows


def printed(rows: list[PlanRow], title: str = "", width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    render_plan(rows, console, title)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rows_repeat_the_cost_model() -> None:
    model = cost_model()
    rows = plan_table(model, DEVICE)
    assert [row.cut for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        cost = model.cost(model.plan(row.cut))
        assert row.client_flops == cost.client_flops
        assert row.uplink_bytes == cost.uplink_bytes
        assert row.client_memory_bytes == cost.client_memory.total_bytes
        assert row.step_s == pytest.approx(row.client_s + row.link_s + row.server_s)
        assert row.fits


def test_exactly_the_rule_s_cut_is_chosen_and_explained() -> None:
    for reference_s in (None, 1e-9, 0.1, 1e9):
        rows = plan_table(cost_model(), DEVICE, reference_s)
        chosen = [row for row in rows if row.chosen]
        assert [row.cut for row in chosen] == [choose_cut(cost_model(), DEVICE, reference_s).cut]
        assert all(row.reason for row in rows)
    assert "there is no deeper one" in plan_table(cost_model(), DEVICE, 1e9)[-1].reason
    assert "no cut within" in plan_table(cost_model(), DEVICE, 1e-9)[0].reason
    assert "median client's fastest step" in plan_table(cost_model(), DEVICE, 0.1)[-1].reason


def test_reasons_name_what_stops_a_deeper_cut() -> None:
    slow = replace(DEVICE, flops_per_s=1e7, uplink_bytes_per_s=1e9, downlink_bytes_per_s=1e9, latency_s=0.0)
    first, second, *_ = plan_table(cost_model(), slow)
    assert first.chosen
    assert "cut 2 would take" in first.reason
    assert "a step takes" in second.reason
    need_bytes = cost_model().cost(cost_model().plan(2)).client_memory.total_bytes
    tight = plan_table(cost_model(), replace(DEVICE, memory_bytes=2 * need_bytes), 1e9)
    assert "deeper and within the limits too" in tight[0].reason
    assert tight[1].chosen
    assert "cut 3 would need" in tight[1].reason
    assert not tight[2].fits
    assert "allowed are" in tight[2].reason


def test_the_table_fits_a_narrow_terminal_and_marks_the_choice() -> None:
    heavy = replace(BLOCK, parameters=800_000_000, active_parameters=800_000_000)
    model = cost_model(replace(SHAPE, blocks=(heavy,) * 80, hidden_size=8192), batch_size=16, sequence_tokens=2048)
    for rows in (plan_table(cost_model(), DEVICE), plan_table(model, replace(DEVICE, memory_bytes=1e12))):
        text = printed(rows, title="a model on a device")
        assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
        assert "…" not in text
        chosen = next(row for row in rows if row.chosen)
        assert f"> {chosen.cut:>2} " in text
        assert f"Cut {chosen.cut}: the deepest" in text
        assert "a model on a device" in text


def test_a_device_too_small_gets_a_table_and_advice() -> None:
    rows = plan_table(cost_model(), replace(DEVICE, memory_bytes=1000.0))
    assert not any(row.chosen or row.fits for row in rows)
    text = printed(rows)
    assert "No cut fits. Cut 1: it needs" in text
    assert "Use a smaller batch" in text


def test_brackets_in_names_are_not_markup() -> None:
    rows = plan_table(cost_model(), replace(DEVICE, name="[bold]x[/nonsense]"))
    assert "[bold]x[/nonsense]" in printed(rows, title="[red]t[/oops]", width=200)
    assert "[red]t[/oops]" in printed(rows, title="[red]t[/oops]", width=200)


def test_of_many_cuts_a_selection_is_shown() -> None:
    model = cost_model(replace(SHAPE, blocks=(BLOCK,) * 80))
    rows = plan_table(model, DEVICE)
    shown = select_rows(rows)
    chosen = next(row.cut for row in rows if row.chosen)
    cuts = [row.cut for row in shown]
    assert len(shown) <= 16
    assert cuts == sorted(set(cuts))
    assert {1, 80, max(1, chosen - 1), chosen, min(80, chosen + 1)} <= set(cuts)
    assert f"{len(shown)} of 80 cuts are shown." in printed(rows)
    assert select_rows(rows[:16]) == rows[:16]


def test_nothing_to_show_prints_nothing_wrong() -> None:
    assert "cut" in printed([])
