"""`splitft export`: a run's adapter as stock PEFT reads it, or merged into the base model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from splitft.apps.assemble import start_adapter
from splitft.apps.bottleneck_setup import write_bottleneck
from splitft.config import RunConfig, load_config
from splitft.engine import checkpoint
from splitft.engine.merging import unfolded
from splitft.errors import AdapterError, CheckpointError, ConfigError
from splitft.lora import Layout
from splitft.models.load import load_model, load_model_config, load_tokenizer, resolve
from splitft.peft_format import merge_into, write_adapter, write_merged
from splitft.selfcheck import inspect_family
from splitft.split import SplitModel


def export(run_dir: Path, to: Path, merged: bool = False) -> Path:
    """Write the adapter of a run's newest checkpoint to the folder `to`; with `merged` the whole model with the adapter added in.

    The adapter needs no weights of the base model. A merge is made on the CPU in the type the base checkpoint has, whatever type the run
    used, and keeps its configuration. Raises ConfigError when `to` holds something else already, CheckpointError when the run has no
    checkpoint.
    """
    if not (run_dir / "config.toml").is_file():
        raise CheckpointError(f"{run_dir} is not a run folder: it has no config.toml.", "Name a folder such as runs/demo.")
    if to.exists() and any(to.iterdir() if to.is_dir() else [to]):
        raise ConfigError(f"--to {to} exists and is not empty.", "name a new folder; nothing was written.")
    config = load_config(run_dir / "config.toml")
    state = checkpoint.load(checkpoint.newest(run_dir))
    if config.split.server == "unaveraged":
        raise ConfigError(
            f"{run_dir} has no joint model: its clients' own parts are never averaged.",
            f"take a client's own adapter, {run_dir / 'adapter-client-0'} and so on; they are in stock PEFT layout.",
        )
    path, revision = config.model.path, config.model.revision
    layout, blocks_path, transposed = run_layout(config)
    if layout.parameters != state.adapters.shape[0]:
        raise AdapterError(
            f"the checkpoint holds {state.adapters.shape[0]} adapter parameters, the configuration gives {layout.parameters}.",
            "restore config.toml.",
        )
    row = state.adapters
    if state.folded:
        layout, row = unfold(config, state, layout, transposed)
    if not merged:
        made = write_adapter(to, layout, row, blocks_path, resolve(path), transposed, revision)
        write_bottleneck(made, layout, row)
        return made
    tokenizer = load_tokenizer(path, revision)
    model = load_model(path, load_model_config(path, revision, keep_dropout=True), "auto", revision=revision)
    merge_into(model, layout, row, blocks_path)
    return write_merged(to, model, tokenizer)


def unfold(config: RunConfig, state: checkpoint.RunState, layout: Layout, transposed: bool) -> tuple[Layout, torch.Tensor]:
    """What an aggregation rule folded into the frozen weights, and the adapter, as one adapter of the rank that takes."""
    base = load_model_config(config.model.path, config.model.revision)
    dtype = next(iter(state.folded.values())).dtype
    anatomy = inspect_family(base, config.model.path, config.model.attention, config.model.self_check)
    split = SplitModel(load_model(config.model.path, base, dtype, revision=config.model.revision), anatomy, "all")
    originals = {key: split.weight(key) for key in layout.by_key}
    return unfolded(layout, state.adapters, {key: state.folded[str(key)] for key in originals}, originals, transposed)


def run_layout(config: RunConfig) -> tuple[Layout, str, bool]:
    """A run's adapter layout, the path of its blocks, and whether weights are stored transposed, from a model without weights."""
    model_config = load_model_config(config.model.path, config.model.revision)
    anatomy = inspect_family(model_config, config.model.path, config.model.attention, config.model.self_check)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    targets = config.lora.targets if isinstance(config.lora.targets, str) else list(config.lora.targets)
    layout, _ = start_adapter(config, SplitModel(model, anatomy, targets))
    return layout, anatomy.blocks_path, any(isinstance(module, Conv1D) for module in model.modules())
