"""The parts that a benchmark stands on: the bare bank trains as PEFT does, counts are the closed forms, both engines do equal work."""

from __future__ import annotations

import json
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import bare_bank, codecs, floor_counts, floor_stages, floors, flower, growth, plots, setups, stock, throughput  # noqa: E402
from benchmarks.flower_app import task  # noqa: E402

from splitft.apps.plots import text_px  # noqa: E402
from splitft.peft_format import write_adapter  # noqa: E402
from splitft.wire import Wire  # noqa: E402

IDS = torch.arange(3, 43).reshape(4, 10)
CASE = setups.Case("tiny", "float32", 4, 16, 2)


def exact_bank(monkeypatch: pytest.MonkeyPatch, clients: int) -> bare_bank.BareBank:
    """A bank whose cut is exact, with the adapters that everybody starts from here."""
    monkeypatch.setattr(bare_bank, "through_bytes", lambda tensor: tensor)
    bank = bare_bank.BareBank(setups.build_model("tiny", "float32"), clients)
    draw = torch.Generator().manual_seed(7)
    for module in bank.model.modules():
        if isinstance(module, bare_bank.BankProjection):
            start = torch.randn(module.down.shape[1:], generator=draw) / 10
            module.down.data[:] = start
    return bank


def test_the_bare_bank_trains_as_peft_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "CLIP_NORM", 1e9)  # the bank does not clip
    bank = exact_bank(monkeypatch, 1)
    rival = stock.Unsplit(setups.build_model("tiny", "float32"))
    projections = [one for one in bank.model.modules() if isinstance(one, bare_bank.BankProjection)]
    layers = [one for one in rival.model.modules() if hasattr(one, "lora_A")]
    assert len(projections) == len(layers) == 4 * 3
    for projection, layer in zip(projections, layers, strict=True):
        layer.lora_A["default"].weight.data[:] = projection.down.data[0].T
    ids = IDS[:1]
    assert [bank.step(ids) for _ in range(4)] == pytest.approx([rival.step(ids) for _ in range(4)], rel=1e-5)
    for projection, layer in zip(projections, layers, strict=True):
        torch.testing.assert_close(projection.up.data[0].T, layer.lora_B["default"].weight.data, rtol=2e-3, atol=2e-6)


def test_clients_of_the_bare_bank_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    together, alone = exact_bank(monkeypatch, 4), [exact_bank(monkeypatch, 1) for _ in range(4)]
    for _ in range(3):
        loss = together.step(IDS)
        assert loss == pytest.approx(statistics.fmean(one.step(IDS[k : k + 1]) for k, one in enumerate(alone)), rel=1e-5)


def test_the_bare_banks_cut_carries_bfloat16() -> None:
    values = torch.tensor([1.0, 1.0 + 2**-12, -3.25e30])
    assert torch.equal(bare_bank.through_bytes(values), values.bfloat16().float())


def test_counted_operations_are_those_of_a_forward() -> None:
    model = setups.build_model("tiny", "float32")
    model.set_attn_implementation("eager")  # its products are counted as such
    split = setups.cohort_model(model)
    base = setups.federation(CASE, split, setups.CODECS["cast"])
    work = floor_counts.count(CASE, split, base.layout)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(CASE.clients, CASE.tokens, dtype=torch.int64), use_cache=False)
    found = {operation.__name__: count for operation, count in counter.get_flop_counts()["Global"].items()}
    assert work["frozen forward"].flops == found["addmm"]
    assert work["frozen backward"].flops == found["addmm"] - 2 * CASE.step_tokens * 32 * 96
    # The head's product is done twice, once for the gradient, for all positions but a sequence's last.
    assert work["head"].flops == 2 * found["mm"] * (CASE.tokens - 1) / CASE.tokens
    # A forward has two products over all pairs of positions; a step six, over half of them.
    assert work["attention"].flops == found["bmm"] * 6 / 2 / 2
    assert work["low-rank"].flops == 3 * 2 * CASE.step_tokens * base.layout.parameters
    assert work["optimizer"].moved_bytes == 9 * 4 * CASE.clients * base.layout.parameters


def test_a_floor_is_the_longer_of_arithmetic_and_copying() -> None:
    machine = floor_counts.Machine({"float32": 100.0, "bfloat16": 400.0}, 50.0, 10.0)
    assert machine.floor_s(floor_counts.Work(200.0, 50.0), "float32") == 2.0
    assert machine.floor_s(floor_counts.Work(200.0, 50.0), "bfloat16") == 1.0
    assert machine.floor_s(floor_counts.Work(0.0, 50.0, long=True), "float32") == 5.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stages_of_a_step_add_up_to_it(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = floor_counts._product_rate
    monkeypatch.setattr(floor_counts, "_product_rate", lambda shape, kind: real(tuple(min(size, 128) for size in shape), kind))
    row = floors.measure_case(replace(CASE, dtype=dtype), 1)
    parts = {one["stage"]: one["seconds"] for one in row["stages"]}
    assert list(parts) == list(floor_counts.STAGES)
    assert sum(parts.values()) == pytest.approx(row["step_s"])
    assert all(seconds > 0 for name, seconds in parts.items() if name != "rest")
    assert f"| **a step** | {row['step_s'] * 1000:.1f} | 100% |" in floors.table([row])


class Event:
    """As much of a profiled event as stages are told by."""

    def __init__(self, name: str, parent: Event | None, shapes: list[list[int]] | None = None) -> None:
        self.name, self.cpu_parent, self.input_shapes = name, parent, shapes or []


def test_an_operation_belongs_to_the_part_it_ran_in_or_to_what_it_is() -> None:
    step = Event("stage step", None)
    back = Event(f"{floor_stages.BACKWARD}: ProjectedBackward", step)
    inside = Event("ProjectedBackward", back)
    frozen = {(32, 96), (96, 32)}
    cases = {
        "": Event("aten::mm", None, [[4, 32], [32, 96]]),
        "frozen forward": Event("aten::addmm", Event("Projected", step), [[96], [4, 32], [32, 96]]),
        "frozen backward": Event("aten::mm", inside, [[4, 96], [96, 32]]),
        "low-rank": Event("aten::bmm", inside, [[2, 8, 96], [2, 96, 4]]),
        "head": Event("aten::mm", Event("stage head", step), [[4, 32], [32, 96]]),
        "wire": Event("aten::copy_", Event("stage wire", back)),
        "attention": Event("aten::bmm", Event("CausalAttention", step), [[2, 8, 96], [2, 96, 4]]),
        "elementwise": Event("aten::native_layer_norm", step),
        "rest": Event("Optimizer hooks", step),
    }
    assert {name: floor_stages.stage_of(event, frozen) for name, event in cases.items()} == {name: name for name in cases}
    assert floor_stages.stage_of(Event("aten::mul_", inside), frozen) == "low-rank"
    assert floor_stages.stage_of(Event("aten::copy_", cases["frozen forward"]), frozen) == "frozen forward"


def test_every_crossing_is_timed_and_the_engine_is_left_as_it_was() -> None:
    carry, names = Wire.carry, ("identity", "cast", "int8", "residual")
    scope = codecs.Scope(models=("tiny",), dtypes=("float32",), codecs=names, clients=4, tokens=16, steps=2, repeats=1, widths=())
    rows = codecs.measure(scope, lambda line: None)
    assert Wire.carry is carry
    assert [row["codec"] for row in rows] == list(names)
    for row in rows:
        assert 0 < row["share"] < 1
        assert 0 < row["first_share"] < 1
        assert row["crossing_s"] < row["step_s"]
    assert len(codecs.table(rows).splitlines()) == 2 + 4


def growth_row(clients: int, train_s: float, peak_bytes: int) -> dict[str, Any]:
    facts = {"clients": clients, "steps": 2, "peak_bytes": peak_bytes, "baseline_bytes": 300_000_000, "weight_bytes": 15_000_000}
    stages = [{"plan": 0.5, "train": train_s, "whole": train_s + 1}]
    return facts | {"stages": stages, "adapter_bytes": 1_000_000, "dtype": "float32", "checkpoint_bytes": 2_000_000_000}


GROWTH = [growth_row(10, 0.2, 500_000_000), growth_row(100, 2.2, 1_000_000_000), growth_row(1000, 20.0, 4_060_000_000)]


def test_growth_is_told_per_client_step_and_per_client() -> None:
    assert growth.client_step_s(GROWTH[1]) == pytest.approx(0.011)
    assert growth.slope_bytes(GROWTH) == pytest.approx(3.4e6)
    assert growth.expected_bytes(GROWTH, GROWTH[1]) == 500e6 + 90 * 3e6
    text = growth.table(GROWTH)
    assert "| 100 | 11.0 | 1.10 | 1,000 | 770 |" in text
    assert "3.40 MB" in text
    assert "**1.13** times" in text
    assert "A whole round of 1,000 clients, 2 steps each: 21.0 s (plan 0.5 s, train 20.0 s)" in text


@pytest.mark.slow
def test_growth_runs_through_the_public_interface() -> None:
    rows = growth.measure(growth.Scope(points=((2, 2),), sequence_tokens=16, steps=1, documents=40), lambda line: None)
    assert len(rows[0]["stages"]) == 2
    assert all(one["train"] > 0 and one["whole"] >= one["train"] for one in rows[0]["stages"])
    assert rows[0]["peak_bytes"] > rows[0]["baseline_bytes"] > rows[0]["weight_bytes"] > 0
    assert rows[0]["checkpoint_bytes"] > 2 * rows[0]["adapter_bytes"]


def test_flower_clients_and_the_cohort_do_equal_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "MODEL", "embedded")
    case, rounds = setups.Case("embedded", "float32", 2, 16, 2), 2
    split = setups.cohort_model(setups.build_model("embedded", "float32"))
    base = setups.federation(setups.with_steps(case, rounds * case.steps), split, setups.CODECS["identity"])
    ours = flower.run_cohort(base, case, rounds)
    save_file({"ids": torch.stack(setups.step_batches(base, rounds * case.steps), 1).contiguous()}, tmp_path / "tokens.safetensors")
    model = flower.resolve("embedded")
    write_adapter(tmp_path / "adapter", base.layout, base.layout.initial_row(0), split.anatomy.blocks_path, model, True)
    work = {"folder": str(tmp_path), "model": model, "clients": 2, "rounds": rounds, "steps": 2, "autocast": False}
    work |= {"learning_rate": setups.LEARNING_RATE, "weight_decay": setups.WEIGHT_DECAY, "clip_norm": setups.CLIP_NORM}
    parsed = task.Work.parse(json.dumps(work))
    adapter, losses = task.state(parsed), []
    for index in range(1, rounds + 1):  # what Flower's FedAvg does with clients of equal weight
        found = [task.train(parsed, client, index, adapter) for client in range(2)]
        adapter = {name: (found[0][0][name] + found[1][0][name]) / 2 for name in adapter}
        losses.append(statistics.fmean(loss for _, loss in found))
    assert ours["losses"] == pytest.approx(losses, rel=1e-5)
    # Not only the base model twice: the second round has the first one's average.
    fresh = throughput.base_losses(setups.build_model("embedded", "float32"), setups.step_batches(base, 3)[2])
    assert abs(ours["losses"][1] - statistics.fmean(fresh)) > 1e-3
    flower.require_same_losses("float32", ours["losses"], losses)
    with pytest.raises(RuntimeError, match="round 2 in float32 starts from"):
        flower.require_same_losses("float32", ours["losses"], [losses[0], losses[1] * 1.01])


def test_flower_is_left_out_with_a_reason_where_it_is_not() -> None:
    said: list[str] = []
    assert flower.measure(flower.Scope(), said.append) == []
    assert said == [flower.NO_PYTHON]


def test_flower_table_sets_both_beside_each_other() -> None:
    facts = {"dtype": "float32", "clients": 8, "tokens": 128, "steps": 8, "rounds": 6}
    rows = [facts | {"engine": "flower", "median_round_s": 6.0, "total_s": 60.0, "version": "1.41.0"}]
    rows.append(facts | {"engine": "cohort", "median_round_s": 1.5, "total_s": 9.0})
    assert "| float32 | 6.00 | 1.50 | **4.0×** | 60.0 | 9.0 |" in flower.table(rows)


def plot_rows() -> dict[str, list[dict[str, Any]]]:
    """Results of every plotted benchmark, with the longest labels they can have."""
    speeds = []
    for model in ("embedded", "gpt2-small"):
        for place, (clients, tokens) in enumerate(throughput.SIZES[model]):
            for kind, factor in (("float32", 1.0), ("bfloat16", 1.7)):
                for way, speed in (("peft", 11_000.0), ("loop", 900.0), ("bare", 20_000.0), ("cohort", 30_000.0 + 100 * place)):
                    row = {"model": model, "clients": clients, "tokens": tokens, "way": way, "precision": kind}
                    speeds.append(row | {"tokens_per_s": speed * factor, "speed_to": {"best_peft": 12.3}})
    stages = [{"stage": name, "seconds": 0.4, "floor_s": 0.1} for name in floor_counts.STAGES]
    cases = [{"model": model, "dtype": kind} for model in ("embedded", "gpt2-small") for kind in ("float32", "bfloat16")]
    floor_rows = [case | {"clients": 8, "tokens": 128, "step_s": 0.4 * len(stages), "stages": stages} for case in cases]
    return {"throughput": speeds, "growth": GROWTH, "floors": floor_rows}


@pytest.mark.parametrize("name", plots.PLOTS)
def test_a_plot_stands_alone_and_keeps_its_text_inside(name: str) -> None:
    text = plots.PLOTS[name][0](plot_rows()[name])
    assert text == plots.PLOTS[name][0](plot_rows()[name])
    assert not re.search(r"nan|inf\b|https?://(?!www\.w3\.org)", text, re.IGNORECASE)
    root = ElementTree.fromstring(text)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    marks = [one for one in root.iter() if one.tag.endswith("}text")]
    assert len(marks) > 10
    boxes = []
    for mark in marks:
        words = mark.text or ""
        long, x, y = text_px(words), float(mark.attrib["x"]), float(mark.attrib["y"])
        left = x - long * {"middle": 0.5, "end": 1.0}.get(mark.attrib.get("text-anchor", ""), 0.0)
        assert left >= 0, words
        assert left + long <= width, words
        assert 0 < y < height, words
        boxes.append((left, left + long, y - 10, y + 2, words))
    for k, one in enumerate(boxes):
        for other in boxes[:k]:
            apart = one[0] >= other[1] or other[0] >= one[1] or one[2] >= other[3] or other[2] >= one[3]
            assert apart, (one[4], other[4])


def test_only_what_was_measured_is_drawn(tmp_path: Path) -> None:
    assert [path.name for path in plots.write_plots({"growth": {"rows": GROWTH}, "memory": {"rows": []}}, tmp_path)] == [
        "benchmarks_growth.svg"
    ]
