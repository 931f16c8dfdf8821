"""The cost model against counted flops, closed forms and its own conservation laws."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from unit.cost_shapes import BLOCK, DEVICE, SHAPE, cost_model

from splitft.adapt.choose import MEMORY_SHARE, SLACK, choose_cut, choose_cuts, reference_step_s
from splitft.adapt.cost import CostModel
from splitft.errors import ConfigError, ResourceError
from splitft.types import Profile

TOKENS = 32
MODULES = ("attn.c_attn",)


def test_flops_follow_the_formulas() -> None:
    cost = cost_model().cost(cost_model().plan(2))
    matrices, attention, lora = 2 * TOKENS * 13_000, 4 * TOKENS * 16 * 32, 2 * TOKENS * 4 * (32 + 96)
    unneeded = 2 * TOKENS * (32 * 96 + 4 * 32)
    assert cost.front_forward_flops == 2 * (matrices + attention + lora)
    assert cost.front_backward_flops == 2 * (matrices + 2 * attention + 2 * lora) - unneeded
    assert cost.back_backward_flops == 4 * (matrices + 2 * attention + 2 * lora)
    assert cost.exit_forward_flops == cost.exit_backward_flops == 2 * TOKENS * 3200


def test_moving_the_cut_moves_work_and_creates_none() -> None:
    costs = cost_model().every_cut()
    assert [cost.plan.cut for cost in costs] == [1, 2, 3, 4, 5, 6]
    assert len({round(cost.client_flops + cost.server_flops) for cost in costs}) == 1
    assert len({(cost.uplink_bytes, cost.downlink_bytes) for cost in costs}) == 1
    weights = {cost.client_memory.weights_bytes + cost.server_memory.weights_bytes for cost in costs}
    assert weights == {4 * (3200 + 64 + 3200 + 6 * 13_000)}
    assert [cost.client_memory.total_bytes for cost in costs] == sorted(cost.client_memory.total_bytes for cost in costs)


def test_u_shape_brings_exit_and_tail_to_the_client() -> None:
    plain = cost_model().cost(cost_model().plan(2))
    model = cost_model(exit_on_client=True, tail_blocks=1)
    shaped = model.cost(model.plan(2))
    assert shaped.client_flops + shaped.server_flops == pytest.approx(plain.client_flops + plain.server_flops)
    assert shaped.server_flops == pytest.approx(plain.back_forward_flops * 3 / 4 + plain.back_backward_flops * 3 / 4)
    assert (shaped.labels_up_bytes, plain.labels_up_bytes) == (0, TOKENS * 4)
    assert shaped.uplink_bytes == 2 * plain.activations_up_bytes
    assert shaped.downlink_bytes == 2 * plain.gradients_down_bytes
    assert shaped.adapters_up_bytes == 1.5 * plain.adapters_up_bytes
    assert model.deepest_cut == 5


def test_bytes_have_a_closed_form() -> None:
    model = cost_model(uplink_bytes_per_value=0.5, downlink_bytes_per_value=1.0, packet_header_bytes=10, local_steps=3, adapter_bytes=2)
    totals = model.cost(model.plan(2)).round_bytes()
    adapters = 2 * 4 * (32 + 96) * 2
    assert totals == {
        "up": {"activations": 3 * (TOKENS * 32 * 0.5 + 10), "gradients": 0.0, "labels": 3 * (TOKENS * 4 + 10), "adapters": adapters},
        "down": {"activations": 0.0, "gradients": 3 * (TOKENS * 32 + 10), "adapters": adapters},
    }


def test_memory_of_adapters_moments_and_weights() -> None:
    model = cost_model(weight_bytes=2)
    memory = model.cost(model.plan(3)).client_memory
    assert memory.weights_bytes == 2 * (3200 + 3 * 13_000)
    assert memory.adapters_bytes == 3 * 4 * (32 + 96) * 4
    assert memory.optimizer_bytes == 3 * memory.adapters_bytes
    assert memory.total_bytes == sum((memory.weights_bytes, memory.adapters_bytes, memory.optimizer_bytes, memory.activations_bytes))


def test_a_tied_head_is_held_once_on_the_client() -> None:
    tied = cost_model(replace(SHAPE, tied=True), exit_on_client=True)
    untied = cost_model(exit_on_client=True)
    difference = untied.cost(untied.plan(1)).client_memory.weights_bytes - tied.cost(tied.plan(1)).client_memory.weights_bytes
    assert difference == 4 * 3200
    tied_server, server = cost_model(replace(SHAPE, tied=True)), cost_model()
    assert tied_server.cost(tied_server.plan(1)).server_memory == server.cost(server.plan(1)).server_memory


def test_checkpointing_trades_memory_for_a_second_forward() -> None:
    plain, saving = cost_model().cost(cost_model().plan(4)), cost_model(checkpointing=True).cost(cost_model().plan(4))
    assert saving.front_backward_flops == plain.front_backward_flops + plain.front_forward_flops
    assert saving.client_memory.activations_bytes < plain.client_memory.activations_bytes / 2


def test_rank_comes_from_the_plan_and_modules_match_by_ending() -> None:
    model = cost_model(modules=("c_proj",))
    low, high = model.cost(model.plan(1)), model.cost(replace(model.plan(1), rank=8))
    assert low.adapters_up_bytes == 4 * 4 * ((32 + 32) + (128 + 32))
    assert high.adapters_up_bytes == 2 * low.adapters_up_bytes
    everything = cost_model(modules=())
    assert everything.cost(everything.plan(1)).adapters_up_bytes > low.adapters_up_bytes


def test_a_whole_model_sends_adapters_and_nothing_else() -> None:
    for tail_blocks in (0, 2):
        model = cost_model(exit_on_client=True, tail_blocks=tail_blocks)
        whole, split = model.cost(model.plan(6 - tail_blocks)), model.cost(model.plan(3))
        assert (whole.whole, split.whole) == (True, False)
        assert (whole.uplink_bytes, whole.downlink_bytes, whole.server_flops) == (0.0, 0.0, 0.0)
        assert whole.adapters_up_bytes == whole.adapters_down_bytes == 6 * 4 * (32 + 96) * 4
        assert whole.client_flops == pytest.approx(split.client_flops + split.server_flops)
    everything_but_the_exit = cost_model().cost(cost_model().plan(6))
    assert not everything_but_the_exit.whole
    assert everything_but_the_exit.uplink_bytes > 0


def test_every_adapter_has_its_own_rank() -> None:
    model = cost_model(modules=("attn.c_attn", "mlp.c_proj"))
    plan = model.plan(2)
    assert model.cost(replace(plan, ranks=(4,) * 12)) == replace(model.cost(plan), plan=replace(plan, ranks=(4,) * 12))
    # attn.c_attn comes before mlp.c_proj in every block: widths 128 and 160.
    ranks = (1, 2, 3, 0, *(5,) * 8)
    cost = model.cost(replace(plan, ranks=ranks))
    assert cost.adapters_up_bytes == cost.adapters_down_bytes == 4 * (128 * (1 + 3) + 160 * 2)
    assert cost.client_memory.adapters_bytes == 4 * (128 * (1 + 3) + 160 * 2)
    assert cost.server_memory.adapters_bytes == 4 * 4 * 5 * (128 + 160)
    bare = model.cost(replace(plan, ranks=(0,) * 12))
    assert cost.front_forward_flops - bare.front_forward_flops == 2 * TOKENS * (128 * (1 + 3) + 160 * 2)
    assert cost.front_backward_flops - bare.front_backward_flops == 4 * TOKENS * (128 * 4 + 160 * 2) - 2 * TOKENS * 32
    assert cost.client_memory.activations_bytes - bare.client_memory.activations_bytes == TOKENS * 4 * (1 + 2 + 3)


def test_ranks_follow_the_module_path_and_not_the_order_in_the_model() -> None:
    backwards = replace(SHAPE, blocks=(replace(BLOCK, projections=BLOCK.projections[::-1]),) * 6)
    ranks = tuple(range(24))
    first, second = (cost_model(shape, modules=()) for shape in (SHAPE, backwards))
    assert first.cost(replace(first.plan(1), ranks=ranks)) == second.cost(replace(second.plan(1), ranks=ranks))
    assert first.cost(replace(first.plan(1), ranks=ranks)).adapters_up_bytes == 4 * (1 * 64 + 2 * 160 + 3 * 160)


@pytest.mark.parametrize("ranks", [(4,) * 5, (4,) * 7, (4, 4, 4, 4, 4, -1)])
def test_ranks_that_do_not_fit_are_refused(ranks: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"client 3 has {len(ranks)} ranks, the smallest {min(ranks)}; small has 6 adapted"):
        cost_model().cost(replace(cost_model().plan(2, client=3), ranks=ranks))


def test_adapters_that_stay_are_not_sent() -> None:
    model = cost_model()
    whole = model.cost(model.plan(2)).adapters_up_bytes
    kept = model.cost(replace(model.plan(2), download=False, upload=False))
    assert (kept.adapters_down_bytes, kept.adapters_up_bytes) == (0.0, 0.0)
    segment = model.cost(replace(model.plan(2), segment=1, segments=4))
    assert (segment.adapters_down_bytes, segment.adapters_up_bytes) == (whole, whole / 4)


def test_a_block_costs_its_weights_to_fetch() -> None:
    wide = replace(BLOCK, parameters=99_000)
    model = cost_model(replace(SHAPE, blocks=(BLOCK, wide, BLOCK)), weight_bytes=2)
    assert [model.block_bytes(block) for block in range(3)] == [26_000.0, 198_000.0, 26_000.0]
    deeper = model.cost(model.plan(2)).client_memory.weights_bytes - model.cost(model.plan(1)).client_memory.weights_bytes
    assert model.block_bytes(1) == deeper


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"local_steps": 0}, "local_steps is 0"),
        ({"modules": ("atn.c_attn",)}, r"has a projection 'atn.c_attn'.*Did you mean 'attn.c_attn'"),
        ({"tail_blocks": 1}, "tail_blocks is 1 but the exit is on the server"),
        ({"tail_blocks": 6, "exit_on_client": True}, r"small has 6 blocks, so 0\.\.5"),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cost_model(**fields)


@pytest.mark.parametrize("cut", [0, -1, 7])
def test_a_cut_outside_the_model_is_refused(cut: int) -> None:
    model = cost_model()
    with pytest.raises(ConfigError, match=rf"cut {cut} of client 5 is out of range; small allows 1\.\.6"):
        model.cost(model.plan(cut, client=5))


# --- choosing a cut


def device(name: str, flops_per_s: float, memory_bytes: float = 1e9, rate: float = 1e6) -> Profile:
    return Profile(name, flops_per_s, memory_bytes, rate, rate, 0.0)


def test_a_fast_client_goes_deeper_than_a_slow_one() -> None:
    model = cost_model()
    slow, middle, fast = device("slow", 1e7), device("middle", 1e8), device("fast", 1e10)
    choices = choose_cuts([model] * 4, (slow, middle, fast, middle))
    cuts = [choice.cut for choice in choices]
    assert cuts[0] == 1
    assert cuts[0] <= cuts[1] < cuts[2] == 6
    assert choices[1] == choices[3]
    limit_s = SLACK * reference_step_s([model] * 4, (slow, middle, fast, middle))
    assert all(choice.limit_s == limit_s for choice in choices)
    assert choices[0].step_s > limit_s  # slower than the limit at every cut: it gets its fastest
    assert all(choice.step_s <= limit_s for choice in choices[1:])


def test_clients_are_measured_against_the_median_of_their_own_costs() -> None:
    costs, device_a = [cost_model(sequence_tokens=tokens) for tokens in (8, 64, 64)], device("a", 1e8)
    choices = choose_cuts(costs, (device_a,) * 3)
    assert choices[0].limit_s == choices[1].limit_s == SLACK * reference_step_s([costs[1]], (device_a,))
    assert choices[0] == choose_cut(costs[0], device_a, reference_step_s(costs, (device_a,) * 3))
    assert choices[1] == choices[2] == choose_cut(costs[1], device_a)
    assert choose_cuts([], ()) == ()


def test_a_slow_link_makes_blocks_nearly_free() -> None:
    model = cost_model()
    assert choose_cut(model, device("wired", 1e8, rate=1e9)).cut < choose_cut(model, device("modem", 1e8, rate=1e3)).cut


def test_memory_bounds_the_cut_and_is_named() -> None:
    model = cost_model()
    need_bytes = model.cost(model.plan(3)).client_memory.total_bytes
    choice = choose_cut(model, device("small", 1e12, memory_bytes=need_bytes / MEMORY_SHARE), reference_s=1e9)
    assert (choice.cut, choice.limited_by) == (3, "memory")
    assert choose_cut(model, device("roomy", 1e12), reference_s=1e9).limited_by == "blocks"
    assert choose_cut(model, device("slow", 1e7, rate=1e9)).limited_by == "time"


def test_a_device_too_small_for_any_cut_is_refused_by_name() -> None:
    with pytest.raises(ResourceError, match=r"no cut of small fits the device 'badge': the smallest needs \d+ bytes"):
        choose_cut(cost_model(), device("badge", 1e8, memory_bytes=1000))
    with pytest.raises(ResourceError, match="'badge'"):
        reference_step_s([cost_model()] * 2, (DEVICE, device("badge", 1e8, memory_bytes=1000)))


def test_cost_model_does_not_need_equal_blocks() -> None:
    wide = replace(BLOCK, parameters=99_000, active_parameters=50_000)
    model = cost_model(replace(SHAPE, blocks=(BLOCK, wide, BLOCK)))
    assert isinstance(model, CostModel)
    first, second = model.cost(model.plan(1)), model.cost(model.plan(2))
    assert second.client_memory.weights_bytes - first.client_memory.weights_bytes == 4 * 99_000
    assert second.front_forward_flops - first.front_forward_flops > 2 * TOKENS * 50_000


def test_a_cost_that_was_asked_for_before_is_the_same_with_the_plan_at_hand() -> None:
    """Costs are remembered by all of a plan they depend on; client, steps and segment number are not of it."""
    model = cost_model()
    plans = [
        replace(model.plan(cut, client), local_steps=steps, ranks=ranks, upload=upload, segments=segments, segment=segments - 1)
        for client, (cut, steps, ranks, upload, segments) in enumerate(
            itertools.product((1, 3), (1, 5), ((), (1, 2, 3, 4, 5, 6)), (True, False), (1, 2))
        )
    ]
    for plan in [*plans, *reversed(plans)]:
        assert model.cost(plan) == cost_model().cost(plan)
        assert model.cost(plan).plan is plan or model.cost(plan).plan == plan
    assert model == cost_model()
    assert hash(model) == hash(cost_model())
