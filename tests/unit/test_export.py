"""apps/export.py: the adapter of a run's newest checkpoint, or the merged model, into a new folder; refusals write nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from splitft.apps.export import export, run_layout
from splitft.apps.session import FederatedRun, write_run_adapter
from splitft.config import override
from splitft.engine import checkpoint
from splitft.errors import AdapterError, CheckpointError, ConfigError, ModelError
from splitft.lora import Layout
from splitft.peft_format import CONFIG, WEIGHTS, merge_into, read_adapter, write_adapter

from ..tiny_run import tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FederatedRun]:
    """Two rounds of two clients, stopped without finishing: export needs a checkpoint only."""
    folder = tmp_path_factory.mktemp("export")
    opened = FederatedRun(tiny_config(folder, rounds=2, clients={"count": 2}, policy={"name": "fixed", "cuts": [1, 2]}))
    for _ in opened.rounds():
        pass
    yield opened
    opened.close()


def test_the_exported_adapter_is_that_of_the_newest_checkpoint(run: FederatedRun, tmp_path: Path) -> None:
    folder = export(run.folder, tmp_path / "adapter")
    found = read_adapter(folder, run.assembly.base.anatomy.blocks_path)
    layout = run.assembly.federation.layout
    assert found.layout(dict(run.assembly.federation.split.keys)) == layout
    assert torch.equal(layout.row(found.factors), checkpoint.load(checkpoint.newest(run.folder)).adapters)


def test_the_merged_model_opens_in_transformers_and_holds_the_update(run: FederatedRun, tmp_path: Path) -> None:
    folder = export(run.folder, tmp_path / "merged", merged=True)
    found = tf.AutoModelForCausalLM.from_pretrained(folder)
    wanted = tf.AutoModelForCausalLM.from_pretrained(run.config.model.path)
    layout, path = run.assembly.federation.layout, run.assembly.base.anatomy.blocks_path
    before = {name: tensor.clone() for name, tensor in wanted.state_dict().items()}
    merge_into(wanted, layout, run.state.adapters, path)
    changed = {name for name, tensor in wanted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert len(changed) == len(layout.entries)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, wanted.state_dict()[name].to(tensor.dtype)), name
    assert tf.AutoTokenizer.from_pretrained(folder)("abc").input_ids == run.assembly.base.tokenizer("abc").input_ids


def test_an_adapter_is_exported_without_reading_weights(run: FederatedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = load_file(export(run.folder, tmp_path / "whole") / WEIGHTS)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(tf.GPT2LMHeadModel, "from_pretrained", refuse)
    found = load_file(export(run.folder, tmp_path / "adapter") / WEIGHTS)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(ModelError, match="weights were read"):
        export(run.folder, tmp_path / "merged", merged=True)


def test_the_layout_of_a_started_adapter_is_found_without_weights(run: FederatedRun, tmp_path: Path) -> None:
    """Its ranks come from the adapter the run began with, not from the configuration."""
    split = run.assembly.federation.split
    keys = {key: width for key, width in split.keys_of_all().items() if key.module == "mlp.c_fc"}
    layout = Layout.of(keys, {key: 1 + key.block for key in keys}, 0.5)
    path = run.assembly.base.anatomy.blocks_path
    folder = write_adapter(tmp_path / "adapter", layout, layout.initial_row(0), path, "base", True)
    config = override(run.config, [f"lora.adapter={folder}"])
    assert run_layout(config) == (layout, path, True)


def test_the_adapter_names_where_the_base_model_is(run: FederatedRun, tmp_path: Path) -> None:
    write_run_adapter(tmp_path / "of-run", run.assembly, run._run, {})
    for folder in (export(run.folder, tmp_path / "adapter"), tmp_path / "of-run"):
        facts = json.loads((folder / CONFIG).read_text())
        assert (facts["base_model_name_or_path"], facts["revision"]) == (run.config.model.path, None)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "checkpoints").symlink_to(run.folder / "checkpoints")
    (copy / "config.toml").write_text(override(run.config, ["model.revision=v2"]).to_toml())
    assert json.loads((export(copy, tmp_path / "revised") / CONFIG).read_text())["revision"] == "v2"


def test_a_folder_with_something_in_it_is_left_alone(run: FederatedRun, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    for target in (tmp_path, tmp_path / "mine"):
        with pytest.raises(ConfigError, match="exists and is not empty") as caught:
            export(run.folder, target)
        assert "nothing was written" in caught.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine").read_text() == "keep"


def test_an_empty_folder_may_be_filled(run: FederatedRun, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert set(load_file(export(run.folder, tmp_path / "empty") / WEIGHTS))


@pytest.mark.parametrize("merged", [False, True])
def test_what_is_no_run_folder_or_has_no_checkpoint_is_refused(run: FederatedRun, tmp_path: Path, merged: bool) -> None:
    with pytest.raises(CheckpointError, match="is not a run folder"):
        export(tmp_path / "nothing", tmp_path / "out", merged)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.toml").write_bytes((run.folder / "config.toml").read_bytes())
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        export(bare, tmp_path / "out", merged)
    assert not (tmp_path / "out").exists()


def test_a_configuration_that_was_edited_afterwards_is_noticed(run: FederatedRun, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "checkpoints").symlink_to(run.folder / "checkpoints")
    (copy / "config.toml").write_text(override(run.config, ["lora.rank=5"]).to_toml())
    with pytest.raises(AdapterError, match=r"checkpoint holds \d+ adapter parameters, the configuration gives \d+"):
        export(copy, tmp_path / "out")
