"""From costs to stages and rounds of the virtual clock."""

from __future__ import annotations

from dataclasses import replace

import pytest
from unit.cost_shapes import DEVICE, SERVER, cost_model

from splitft.adapt.schedule import round_seconds, schedule, step_seconds, step_stages
from splitft.clock import STEP_KINDS, U_SHAPED_STEP_KINDS, ClientSchedule, Network, Stage, simulate_round
from splitft.errors import ConfigError


def test_stages_are_those_of_the_clock_and_add_up() -> None:
    for fields, kinds in (({}, STEP_KINDS), ({"exit_on_client": True, "tail_blocks": 2}, U_SHAPED_STEP_KINDS)):
        model = cost_model(local_steps=5, **fields)
        cost = model.cost(model.plan(2, client=7))
        assert tuple(stage.kind for stage in step_stages(cost, DEVICE, SERVER)) == kinds
        seconds = step_seconds(cost, DEVICE, SERVER)
        transfers = sum(kind in ("uplink", "downlink", "uplink_gradient", "downlink_gradient") for kind in kinds)
        assert seconds.client_s == pytest.approx(cost.client_flops / 1e8)
        assert seconds.server_s == pytest.approx(cost.server_flops / 1e9)
        assert seconds.link_s == pytest.approx(cost.uplink_bytes / 1e6 + cost.downlink_bytes / 2e6 + transfers * 0.01)
        timing = simulate_round([schedule(cost.plan, cost, DEVICE, SERVER)])
        adapters_s = cost.adapters_up_bytes / 1e6 + cost.adapters_down_bytes / 2e6 + 2 * 0.01
        assert timing.clients[0].client == 7
        assert timing.duration_s == pytest.approx(5 * seconds.total_s + adapters_s)


def test_counted_bytes_can_replace_predicted_ones() -> None:
    cost = cost_model().cost(cost_model().plan(2))
    counted = replace(cost, activations_up_bytes=cost.activations_up_bytes + 1e6)
    assert step_seconds(counted, DEVICE, SERVER).link_s == pytest.approx(step_seconds(cost, DEVICE, SERVER).link_s + 1.0)


def down(kind: str, byte_count: float) -> Stage:
    return Stage(kind, "link", byte_count / 2e6, 0.01, byte_count, "down")


def up(kind: str, byte_count: float) -> Stage:
    return Stage(kind, "link", byte_count / 1e6, 0.01, byte_count, "up")


def test_transfers_carry_bytes_and_direction() -> None:
    cost = cost_model(exit_on_client=True).cost(cost_model(exit_on_client=True).plan(2))
    links = [stage for stage in step_stages(cost, DEVICE, SERVER) if stage.resource == "link"]
    assert links == [
        up("uplink", cost.activations_up_bytes),
        down("downlink", cost.activations_down_bytes),
        up("uplink_gradient", cost.gradients_up_bytes),
        down("downlink_gradient", cost.gradients_down_bytes),
    ]


def test_a_whole_client_only_computes() -> None:
    model = cost_model(exit_on_client=True, local_steps=3)
    cost = model.cost(model.plan(6))
    assert step_stages(cost, DEVICE, SERVER) == (Stage("whole_step", "client", cost.client_flops / 1e8),)
    timing = simulate_round([schedule(cost.plan, cost, DEVICE, SERVER)])
    assert set(timing.clients[0].busy_s) == {"adapters_down", "whole_step", "adapters_up"}
    assert timing.server_busy_s == 0.0


def test_a_round_begins_with_what_the_client_lacks() -> None:
    cost = cost_model(local_steps=2).cost(cost_model(local_steps=2).plan(2))
    plain = schedule(cost.plan, cost, DEVICE, SERVER)
    assert plain.before == (down("adapters_down", cost.adapters_down_bytes),)
    assert plain.after == (up("adapters_up", cost.adapters_up_bytes),)
    moved = schedule(cost.plan, cost, DEVICE, SERVER, fetch_bytes=5e6, download_bytes=7.0, upload_bytes=9.0, extra_up_bytes=2.0)
    assert moved.before == (down("blocks_down", 5e6), down("adapters_down", 7.0))
    assert moved.after == (up("adapters_up", 11.0),)
    assert moved.steps == plain.steps
    nothing = schedule(cost.plan, cost, DEVICE, SERVER, download_bytes=0.0, upload_bytes=0.0)
    assert (nothing.before, nothing.after) == ((), ())
    assert schedule(cost.plan, cost, DEVICE, SERVER, upload_bytes=0.0, extra_up_bytes=3.0).after == (up("adapters_up", 3.0),)


def test_a_round_can_be_cut_short() -> None:
    cost = cost_model(local_steps=6).cost(cost_model(local_steps=6).plan(2))

    def made(micro: int = 1, steps: int | None = None, lost: bool = False) -> ClientSchedule:
        return schedule(cost.plan, cost, DEVICE, SERVER, micro=micro, steps=steps, lost=lost)

    assert [len(made(2, steps).steps) for steps in (None, 0, 1, 2, 3, 9)] == [6, 0, 2, 4, 6, 6]
    assert made(2).micro == 2
    lost = made(steps=3, lost=True)
    assert (len(lost.steps), lost.after, lost.before) == (3, (), made().before)
    timing = simulate_round([made(2)])
    assert len(timing.clients[0].step_ends_s) == 3
    with pytest.raises(ConfigError, match="a round of -1 steps"):
        made(steps=-1)
    with pytest.raises(ConfigError, match="0 exchanges would form a step"):
        made(micro=0)


# --- what policies ask


def test_one_client_needs_what_its_step_needs() -> None:
    """A step, and its share of the round's adapters: a fifth of theirs in rounds of five steps."""
    model = cost_model(local_steps=5)
    for cut in (1, 4):
        cost = model.cost(model.plan(cut))
        step_s = step_seconds(cost, DEVICE, SERVER).total_s
        both_ways_s = cost.adapters_down_bytes / DEVICE.downlink_bytes_per_s + cost.adapters_up_bytes / DEVICE.uplink_bytes_per_s
        share_s = (both_ways_s + 2 * DEVICE.latency_s) / 5
        assert round_seconds([model], [DEVICE], [cut]) == pytest.approx(step_s + share_s)
        assert round_seconds([model], [DEVICE], [cut], steps=7, micro=2) == pytest.approx(2 * step_s + share_s)
        whole_s = schedule(model.plan(cut), cost, DEVICE, SERVER).alone_s()
        assert round_seconds([model], [DEVICE], [cut], steps=5) == pytest.approx(whole_s / 5)
    assert round_seconds([], [], []) == 0.0


def test_a_crowd_waits_for_the_server_and_slots_help() -> None:
    model = cost_model(server=replace(SERVER, flops_per_s=1e7))
    alone_s = round_seconds([model], [DEVICE], [2])
    crowd_s = round_seconds([model] * 8, [DEVICE] * 8, [2] * 8)
    work_s = model.cost(model.plan(2)).server_flops / 1e7
    assert crowd_s > max(alone_s, 8 * work_s)
    roomy = replace(model, network=Network(server_slots=8))
    assert round_seconds([roomy] * 8, [DEVICE] * 8, [2] * 8) == pytest.approx(alone_s)


def test_pipelining_and_shared_links_are_in_the_estimate() -> None:
    model = cost_model()
    clients = ([DEVICE] * 4, [2] * 4)
    plain_s = round_seconds([model] * 4, *clients, micro=4)
    pipelined = replace(model, network=Network(pipeline=True))
    assert round_seconds([pipelined] * 4, *clients, micro=4) < plain_s
    narrow = replace(model, network=Network(shared=True, uplink_bytes_per_s=1e5, downlink_bytes_per_s=1e5))
    assert round_seconds([narrow] * 4, *clients, micro=4) > plain_s


def test_impossible_questions_are_refused() -> None:
    with pytest.raises(ConfigError, match="steps is 0"):
        round_seconds([cost_model()], [DEVICE], [1], steps=0)
    with pytest.raises(ConfigError, match="cut 9 of client 0 is out of range"):
        round_seconds([cost_model()], [DEVICE], [9])
