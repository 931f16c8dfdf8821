"""`splitft export`: a run's adapter as stock PEFT reads it, or merged into the base model."""

from __future__ import annotations

from pathlib import Path

from splitft.apps.assemble import load_base, load_split, start_adapter
from splitft.config import load_config
from splitft.engine import checkpoint
from splitft.errors import AdapterError, CheckpointError, ConfigError
from splitft.models.load import load_model
from splitft.peft_format import merge_into, write_adapter, write_merged


def export(run_dir: Path, to: Path, merged: bool = False) -> Path:
    """Write the adapter of a run's newest checkpoint to the folder `to`; with `merged` the whole model with the adapter added in.

    Raises ConfigError when `to` holds something else already, CheckpointError when the run has no checkpoint.
    """
    from transformers.pytorch_utils import Conv1D

    if not (run_dir / "config.toml").is_file():
        raise CheckpointError(f"{run_dir} is not a run folder: it has no config.toml.", "Name a folder such as runs/demo.")
    if to.exists() and any(to.iterdir() if to.is_dir() else [to]):
        raise ConfigError(f"--to {to} exists and is not empty.", "name a new folder; nothing was written.")
    config = load_config(run_dir / "config.toml")
    state = checkpoint.load(checkpoint.newest(run_dir))
    base = load_base(config)
    split, _, model = load_split(config, base)
    layout, _ = start_adapter(config, split)
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    if layout.parameters != state.adapters.shape[0]:
        raise AdapterError(
            f"the checkpoint holds {state.adapters.shape[0]} adapter parameters, the configuration gives {layout.parameters}.",
            "restore config.toml.",
        )
    if not merged:
        return write_adapter(to, layout, state.adapters, base.anatomy.blocks_path, config.model.path, transposed)
    model = load_model(config.model.path, base.config, base.dtype, base.attention, revision=config.model.revision)
    merge_into(model, layout, state.adapters, base.anatomy.blocks_path)
    if base.attention != config.model.attention:
        model.set_attn_implementation(config.model.attention)
    return write_merged(to, model, base.tokenizer)
