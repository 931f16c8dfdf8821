"""peft_format.py: folders round trip, unfit or unsupported adapters are named, nothing half-written stays, merging is exact."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from splitft.errors import AdapterError
from splitft.lora import AdapterBank, Layout
from splitft.peft_format import CONFIG, WEIGHTS, adapter_config, merge_into, read_adapter, replace_folder, write_adapter
from splitft.rng import torch_stream
from splitft.split import Route
from splitft.types import Key

from ..support import VOCABULARY, build, split_model

PATH = "model.layers"
WIDTHS = {Key(0, "self_attn.q_proj"): (8, 12), Key(0, "mlp.up_proj"): (8, 6), Key(11, "self_attn.q_proj"): (8, 12)}


def drawn(layout: Layout) -> torch.Tensor:
    return torch.randn(layout.parameters, generator=torch_stream(1, "peft-test"))


def stored(folder: Path, **config: Any) -> Path:
    """A good adapter folder, with fields of its configuration replaced."""
    layout = Layout.of(WIDTHS, 2, 4.0)
    write_adapter(folder, layout, drawn(layout), PATH, "base", False)
    facts = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**facts, **config}))
    return folder


def change(folder: Path, rename: dict[str, str] | None = None, **tensors: torch.Tensor | None) -> Path:
    """Rename, replace or drop tensors of the weights file."""
    found = {(rename or {}).get(name, name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    for name, tensor in tensors.items():
        found.pop(name)
        if tensor is not None:
            found[name] = tensor
    save_file(found, folder / WEIGHTS)
    return folder


FIRST = f"base_model.model.{PATH}.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize("uneven", [False, True])
def test_an_adapter_survives_its_folder(tmp_path: Path, uneven: bool) -> None:
    ranks: Any = {key: 1 + position for position, key in enumerate(sorted(WIDTHS))} if uneven else 3
    scales: Any = {key: 0.5 * (1 + position) for position, key in enumerate(sorted(WIDTHS))} if uneven else 1.5
    layout = Layout.of(WIDTHS, ranks, scales)
    row = drawn(layout)
    found = read_adapter(write_adapter(tmp_path / "adapter", layout, row, PATH, "base", False), PATH)
    assert found.layout(WIDTHS) == layout
    assert torch.equal(layout.row(found.factors), row)


def test_names_and_configuration_are_peft_s(tmp_path: Path) -> None:
    folder = stored(tmp_path / "adapter")
    assert set(load_file(folder / WEIGHTS)) == {
        f"base_model.model.{PATH}.{key.block}.{key.module}.lora_{side}.weight" for key in WIDTHS for side in "AB"
    }
    facts = json.loads((folder / CONFIG).read_text())
    assert (facts["peft_type"], facts["task_type"], facts["r"], facts["lora_alpha"]) == ("LORA", "CAUSAL_LM", 2, 8.0)
    assert facts["target_modules"] == ["mlp.up_proj", "self_attn.q_proj"]
    assert facts["rank_pattern"] == facts["alpha_pattern"] == {}
    assert (facts["base_model_name_or_path"], facts["revision"]) == ("base", None)
    assert adapter_config(Layout.of(WIDTHS, 2, 4.0), PATH, "base", False, "v2")["revision"] == "v2"


def test_the_commonest_rank_is_the_default_and_others_are_patterns() -> None:
    ranks = {key: 4 if key.module == "mlp.up_proj" else 2 for key in WIDTHS}
    facts = adapter_config(Layout.of(WIDTHS, ranks, 4.0), PATH, "base", True)
    assert (facts["r"], facts["lora_alpha"], facts["fan_in_fan_out"]) == (2, 8.0, True)
    assert facts["rank_pattern"] == {r"model\.layers\.0\.mlp\.up_proj": 4}
    assert facts["alpha_pattern"] == {r"model\.layers\.0\.mlp\.up_proj": 16.0}


def test_an_older_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "stale.bin").write_bytes(b"old")
    half = tmp_path / ".adapter.part"
    half.mkdir()
    (half / "half").write_bytes(b"x")
    stored(folder)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert not half.exists()


def test_replacing_moves_the_folder(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    for folder, text in ((new, "new"), (old, "old")):
        folder.mkdir()
        (folder / "file").write_text(text)
    assert replace_folder(new, old) == old
    assert (old / "file").read_text() == "new"
    assert not new.exists()


def test_scales_follow_alpha_rank_and_rslora(tmp_path: Path) -> None:
    key = Key(0, "mlp.up_proj")
    assert read_adapter(stored(tmp_path / "a", lora_alpha=6), PATH).scale[key] == 3.0
    assert read_adapter(stored(tmp_path / "b", lora_alpha=6, use_rslora=True), PATH).scale[key] == pytest.approx(6 / math.sqrt(2))
    found = read_adapter(stored(tmp_path / "c", lora_alpha=6, alpha_pattern={"up_proj": 20, r"layers\.11\..*": 2}), PATH).scale
    assert found == {key: 10.0, Key(0, "self_attn.q_proj"): 3.0, Key(11, "self_attn.q_proj"): 1.0}


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_missing_or_damaged_file_is_refused_naming_the_folder(tmp_path: Path, missing: str) -> None:
    folder = stored(tmp_path / "adapter")
    (folder / missing).write_bytes(b"{")
    with pytest.raises(AdapterError, match=str(folder)) as caught:
        read_adapter(folder, PATH)
    assert CONFIG in caught.value.remedy
    (folder / missing).unlink()
    with pytest.raises(AdapterError, match=missing):
        read_adapter(folder, PATH)


CHANGE_THE_BASE = ("pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga", "of-tomorrow")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "holds a IA3 adapter"),
        ({"use_dora": True}, "use_dora = True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"use_qalora": True, "qalora_group_size": 16}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        *(({"init_lora_weights": name}, f"init_lora_weights = '{name}'") for name in CHANGE_THE_BASE),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        read_adapter(stored(tmp_path / "adapter", **config), PATH)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "Gaussian"])
def test_what_leaves_the_base_alone_is_read_and_unset_features_do_not_count(tmp_path: Path, start: Any) -> None:
    unset = {"target_parameters": None, "trainable_token_indices": None, "alora_invocation_tokens": None, "use_qalora": False}
    folder = stored(tmp_path / "adapter", init_lora_weights=start, qalora_group_size=16, modules_to_save=[], loftq_config={}, **unset)
    assert set(read_adapter(folder, PATH).factors) == set(WIDTHS)


def test_an_adapter_of_a_changed_base_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        read_adapter(stored(tmp_path / "adapter", init_lora_weights="pissa"), PATH)
    assert "path_initial_model_for_weight_conversion" in caught.value.remedy


@pytest.mark.parametrize("config", [{"lora_alpha": "x"}, {"lora_alpha": math.inf}, {"alpha_pattern": {"(": 2}}])
def test_a_wrong_scale_is_refused_naming_the_folder(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=str(tmp_path / "adapter")):
        read_adapter(stored(tmp_path / "adapter", **config), PATH)


def test_foreign_tensors_lone_factors_nan_and_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"has a tensor base_model\.model\.lm_head"):
        read_adapter(change(stored(tmp_path / "foreign"), {FIRST: "base_model.model.lm_head.lora_A.weight"}), PATH)
    with pytest.raises(AdapterError, match=r"transformer\.h"):
        read_adapter(stored(tmp_path / "family"), "transformer.h")
    with pytest.raises(AdapterError, match=r"only one factor for 0\.mlp\.up_proj"):
        read_adapter(change(stored(tmp_path / "lone"), None, **{FIRST: None}), PATH)
    with pytest.raises(AdapterError, match=r"up_proj\.lora_A\.weight holds NaN"):
        read_adapter(change(stored(tmp_path / "nan"), None, **{FIRST: torch.full((2, 8), float("nan"))}), PATH)
    folder = stored(tmp_path / "empty")
    save_file({}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="is empty"):
        read_adapter(folder, PATH)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    found = read_adapter(stored(tmp_path / "adapter"), PATH)
    with pytest.raises(AdapterError, match=r"weights for 11\.self_attn\.q_proj, which the model does not have"):
        found.layout({key: widths for key, widths in WIDTHS.items() if key.block == 0})
    with pytest.raises(AdapterError, match=r"0\.mlp\.up_proj: .*model's widths are \(8, 7\)"):
        found.layout({**WIDTHS, Key(0, "mlp.up_proj"): (8, 7)})
    odd = read_adapter(change(stored(tmp_path / "odd"), None, **{FIRST: torch.zeros(3, 8)}), PATH)
    with pytest.raises(AdapterError, match=r"A \(3, 8\) and B \(6, 2\)"):
        odd.layout(WIDTHS)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_merged_model_computes_what_the_bank_computes(family: str) -> None:
    split = split_model(family, "all")
    layout = Layout.of(split.keys, 3, 1.5)
    bank = AdapterBank(layout, 1)
    with torch.no_grad():
        bank.values.copy_(drawn(layout)[None] * 0.1)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch_stream(2, "ids"))
    merged, plain = build(family), build(family)
    merge_into(merged, layout, bank.values[0], split.anatomy.blocks_path)
    with torch.no_grad():
        found = merged(input_ids=ids, use_cache=False).logits
        wanted = split.logits(split.run(Route(2, bank=bank), ids, None))
        before = plain(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert float((found - before).abs().max()) > 0.01
