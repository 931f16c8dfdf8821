"""Oracle 8: what a run exports opens in stock PEFT and reproduces the evaluation; what stock PEFT wrote can be a run's start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from splitft.apps.export import export
from splitft.apps.session import FederatedRun
from splitft.config import RunConfig
from splitft.errors import AdapterError, ConfigError
from splitft.lora import AdapterBank, Layout
from splitft.peft_format import read_adapter, write_adapter
from splitft.split import Route
from splitft.types import Key

from ..support import FAMILIES, VOCABULARY, build, split_model
from ..tiny_run import model_folder, tiny_config


def finish(config: RunConfig) -> FederatedRun:
    run = FederatedRun(config)
    for _ in run.rounds():
        pass
    run.finish()
    run.close()
    return run


def held_out_loss(model: torch.nn.Module, run: FederatedRun) -> float:
    """Token-weighted loss on the common held-out rows by a plain loop over rows."""
    total, count = 0.0, 0
    rows = run.assembly.data.common_held_out
    limit = run.config.evaluate.max_rows or len(rows)
    with torch.no_grad():
        for index in range(min(limit, len(rows))):
            ids = torch.from_numpy(rows.ids[rows.offsets[index] : rows.offsets[index + 1]]).long()[None]
            trained = torch.from_numpy(rows.trained[rows.offsets[index] : rows.offsets[index + 1]])[1:]
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")[trained]
            total, count = total + losses.sum().item(), count + len(losses)
    return total / count


def evaluations(run: FederatedRun) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (run.folder / "journal.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "evaluation"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapter_and_merged_checkpoint_reproduce_the_evaluation(family: str, tmp_path: Path) -> None:
    model_folder(tmp_path / "model", family)
    (tmp_path / "text.txt").write_text(
        "a b c d e f g h i j k l m n o p\n\n" * 3 + "\n\n".join(f"line {k} of text {k * k}" for k in range(60))
    )
    run = finish(tiny_config(tmp_path, lora={"targets": "all"}))
    first, last = evaluations(run)[0]["global"]["loss"], evaluations(run)[-1]["global"]["loss"]
    assert abs(first - last) > 1e-3, "the run must have changed the model"
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert held_out_loss(base, run) == pytest.approx(first, rel=1e-5)
    assert held_out_loss(PeftModel.from_pretrained(base, run.folder / "adapter"), run) == pytest.approx(last, rel=1e-5)
    plain = export(run.folder, tmp_path / "exported")
    again = PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model"), plain)
    assert held_out_loss(again, run) == pytest.approx(last, rel=1e-5)
    merged = export(run.folder, tmp_path / "merged", merged=True)
    assert held_out_loss(tf.AutoModelForCausalLM.from_pretrained(merged), run) == pytest.approx(last, rel=1e-4)
    assert (
        tf.AutoTokenizer.from_pretrained(merged)("round")["input_ids"]
        == tf.AutoTokenizer.from_pretrained(tmp_path / "model")("round")["input_ids"]
    )
    with pytest.raises(ConfigError, match="not empty"):
        export(run.folder, tmp_path / "merged")


def test_a_merge_keeps_the_type_and_the_configuration_of_the_checkpoint(tmp_path: Path) -> None:
    """However the run computed: bfloat16 weights, dropout off, attention in float32."""
    config = tiny_config(tmp_path, model={"dtype": "bfloat16"}, engine={"device": "cpu"})
    facts = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**facts, "attn_pdrop": 0.1}))
    run = finish(config)
    assert run.assembly.base.dtype == torch.bfloat16
    merged = export(run.folder, tmp_path / "merged", merged=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", merged))
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    path = run.assembly.base.anatomy.blocks_path
    assert changed == {f"{path}.{entry.key.block}.{entry.key.module}.weight" for entry in run.assembly.federation.layout.entries}
    stored = json.loads((merged / "config.json").read_text())
    assert {name: value for name, value in stored.items() if facts.get(name) != value} == {"attn_pdrop": 0.1}
    model = tf.AutoModelForCausalLM.from_pretrained(merged)
    losses = [one["global"]["loss"] for one in evaluations(run)]
    assert held_out_loss(model, run) == pytest.approx(losses[-1], rel=2e-3)
    assert abs(losses[-1] - losses[0]) > 4e-3 * losses[0], "the tolerance must be able to tell the runs apart"


def test_auto_peft_finds_the_embedded_model(tmp_path: Path) -> None:
    """The name `embedded` means nothing outside splitft."""
    config = tiny_config(
        tmp_path,
        rounds=1,
        model={"path": "embedded"},
        train={"local_steps": 1},
        clients={"count": 2},
        policy={"name": "fixed", "cuts": [1, 2]},
    )
    run = finish(config)
    for folder in (run.folder / "adapter", export(run.folder, tmp_path / "exported")):
        model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert held_out_loss(model, run) == pytest.approx(evaluations(run)[-1]["global"]["loss"], rel=2e-3)


def test_an_exported_adapter_can_be_the_start_of_the_next_run(tmp_path: Path) -> None:
    first = finish(tiny_config(tmp_path))
    second = finish(tiny_config(tmp_path, name="second", lora={"adapter": str(first.folder / "adapter")}))
    assert evaluations(second)[0]["global"]["loss"] == pytest.approx(evaluations(first)[-1]["global"]["loss"], rel=1e-6)
    assert evaluations(second)[-1]["global"]["loss"] != evaluations(second)[0]["global"]["loss"]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bloom", "mixtral"])
def test_an_adapter_made_by_stock_peft_gives_the_same_logits_here(family: str, rslora: bool, tmp_path: Path) -> None:
    split = split_model(family, "all")
    modules = sorted({key.module for key in split.keys})[:2]
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=modules, rank_pattern={modules[0]: 5}, alpha_pattern={modules[0]: 4}, use_rslora=rslora,
        fan_in_fan_out=family == "gpt2", init_lora_weights=False,
    )  # fmt: skip
    reference = get_peft_model(build(family), config)
    reference.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    stored = read_adapter(tmp_path / "adapter", split.anatomy.blocks_path)
    layout = stored.layout(split.keys_of_all())
    split.adapt(list(layout.by_key))
    bank = AdapterBank(layout, 1)
    with torch.no_grad():
        bank.values[0] = layout.row(stored.factors)
        ids = torch.arange(3, 15)[None] % VOCABULARY
        found = split.logits(split.run(Route(1, bank=bank), ids, None))
        torch.testing.assert_close(found, reference(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_unequal_ranks_and_scales_survive_the_way_to_stock_peft(family: str, tmp_path: Path) -> None:
    split = split_model(family, "all")
    ranks = {key: 1 + (key.block + len(key.module)) % 3 for key in split.keys}
    layout = Layout.of(split.keys, ranks, {key: 0.5 + key.block for key in split.keys})
    row = layout.initial_row(0) + 0.05 * torch.randn(layout.parameters, generator=torch.Generator().manual_seed(0))
    write_adapter(tmp_path / "adapter", layout, row, split.anatomy.blocks_path, "base", family == "gpt2")
    stock = PeftModel.from_pretrained(build(family), tmp_path / "adapter")
    bank = AdapterBank(layout, 1)
    with torch.no_grad():
        bank.values[0] = row
        ids = torch.arange(3, 15)[None] % VOCABULARY
        found = split.logits(split.run(Route(1, bank=bank), ids, None))
        torch.testing.assert_close(found, stock(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    stored = read_adapter(tmp_path / "adapter", split.anatomy.blocks_path)
    assert torch.equal(layout.row(stored.factors), row)
    assert stored.layout(split.keys_of_all()) == layout


def test_adapters_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    split = split_model("gpt2")
    layout = Layout.of(split.keys, 2, 1.0)
    folder = write_adapter(tmp_path / "adapter", layout, layout.initial_row(0), split.anatomy.blocks_path, "base", True)
    with pytest.raises(AdapterError, match="does not have"):
        read_adapter(folder, "transformer.h").layout({Key(0, "other"): (1, 1)})
    with pytest.raises(AdapterError, match=r"model\.layers"):
        read_adapter(folder, "model.layers")
    with pytest.raises(AdapterError, match="cannot read"):
        read_adapter(tmp_path / "nothing", "transformer.h")
    facts = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**facts, "use_dora": True}))
    with pytest.raises(AdapterError, match="use_dora"):
        read_adapter(folder, "transformer.h")
    (folder / "adapter_config.json").write_text(json.dumps({**facts, "peft_type": "IA3"}))
    with pytest.raises(AdapterError, match="IA3"):
        read_adapter(folder, "transformer.h")
