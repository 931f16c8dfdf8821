"""Adapters in stock PEFT layout: read one as a starting point, write one that `PeftModel.from_pretrained` opens as it is.

A PEFT folder holds `adapter_config.json` and `adapter_model.safetensors` with the names
`base_model.model.<blocks path>.<block>.<module>.lora_A.weight` [rank in] and `.lora_B.weight` [out rank]. Blocks keep their numbers under
any cut, so a client's and the server's adapters together are the adapter of the whole model.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from splitft.errors import AdapterError
from splitft.lora import Layout
from splitft.types import Factors, Key

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = re.compile(r"^base_model\.model\.(?P<path>.+?)\.(?P<block>\d+)\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
# Features of PEFT whose result is not a plain scale * B A on the projections of the blocks; unset is missing, empty, false or "none".
UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "bias",
    "layer_replication",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Initialisations that leave the base weights alone. The others (PiSSA, OLoRA, LoftQ, CorDA ...) change them, and the adapter belongs to
# the changed base.
PLAIN_STARTS = (True, None, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter read from a folder: its factors, and the scale of each key."""

    factors: dict[Key, Factors]
    scale: dict[Key, float]

    def layout(self, widths: Mapping[Key, tuple[int, int]]) -> Layout:
        """Its layout on a model whose projections have these (input, output) widths. Raises AdapterError when it does not fit."""
        for key, (a, b) in self.factors.items():
            if key not in widths:
                raise AdapterError(
                    f"the adapter has weights for {key}, which the model does not have.", "use the base model it was trained on."
                )
            if (a.shape[1], b.shape[0]) != widths[key] or a.shape[0] != b.shape[1]:
                raise AdapterError(
                    f"{key}: the adapter has A {tuple(a.shape)} and B {tuple(b.shape)}, the model's widths are {widths[key]}.",
                    "use the base model it was trained on.",
                )
        return Layout.of({key: widths[key] for key in self.factors}, {key: a.shape[0] for key, (a, _) in self.factors.items()}, self.scale)


def read_adapter(folder: Path, blocks_path: str) -> StoredAdapter:
    """The adapter in a PEFT folder. Raises AdapterError naming the file and what is wrong, or the unsupported feature."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as problem:
        raise AdapterError(f"lora.adapter: cannot read {folder}: {problem}.", f"the folder needs {CONFIG} and {WEIGHTS}.") from problem
    if not isinstance(config, dict):
        raise AdapterError(f"{folder / CONFIG} holds a {type(config).__name__}, not a table.", "use another checkpoint of the adapter.")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} holds a {config.get('peft_type')} adapter.", "only LoRA adapters can be used.")
    _refuse_unsupported(config, folder)
    pairs: dict[Key, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = NAME.match(name)
        if match is None or match["path"] != blocks_path:
            raise AdapterError(f"{folder / WEIGHTS} has a tensor {name}.", f"names must start with base_model.model.{blocks_path}.<block>.")
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{folder / WEIGHTS}: {name} holds NaN or infinity.", "use another checkpoint of the adapter.")
        pairs.setdefault(Key(int(match["block"]), match["module"]), {})[match["side"]] = tensor.float()
    factors, scale = {}, {}
    for key, sides in sorted(pairs.items()):
        if set(sides) != {"A", "B"}:
            raise AdapterError(f"{folder / WEIGHTS} has only one factor for {key}.", "use another checkpoint of the adapter.")
        factors[key] = Factors(sides["A"], sides["B"])
        scale[key] = _scale(config, folder, f"{blocks_path}.{key.block}.{key.module}", sides["A"].shape[0])
    if not factors:
        raise AdapterError(f"{folder / WEIGHTS} is empty.", "use another checkpoint of the adapter.")
    return StoredAdapter(factors, scale)


def _refuse_unsupported(config: dict[str, Any], folder: Path) -> None:
    """AdapterError when the function of the adapter is not the base plus scale * B A."""
    for name in (*UNSUPPORTED, *(name for name in config if name.startswith("alora_"))):
        if config.get(name) and config[name] != "none":
            raise AdapterError(f"{folder} uses {name} = {config[name]!r}.", "only plain LoRA (scale * B A) can be used.")
    start = config.get("init_lora_weights", True)
    if (start.lower() if isinstance(start, str) else start) not in PLAIN_STARTS:
        raise AdapterError(
            f"{folder} uses init_lora_weights = {start!r}, which changed the base weights when it was made.",
            "convert it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), then use the converted adapter.",
        )


def _scale(config: dict[str, Any], folder: Path, module: str, rank: int) -> float:
    """alpha / rank (alpha / sqrt(rank) with rsLoRA) of one module, its own alpha where alpha_pattern names it."""
    try:
        alpha = config["lora_alpha"]
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, re.error) as problem:
        raise AdapterError(
            f"{folder / CONFIG}: lora_alpha or alpha_pattern is wrong: {problem!r}.", "use another checkpoint of the adapter."
        ) from problem
    if not math.isfinite(scale):
        raise AdapterError(f"{folder / CONFIG}: the scale of {module} is {scale}.", "use another checkpoint of the adapter.")
    return scale


def adapter_config(layout: Layout, blocks_path: str, base_model: str, transposed: bool, revision: str = "") -> dict[str, Any]:
    """What adapter_config.json says. The commonest rank and alpha are the defaults, others stand in rank_pattern and alpha_pattern."""
    ranks = [entry.rank for entry in layout.entries]
    alphas = [entry.scale * entry.rank for entry in layout.entries]
    rank, alpha = max(set(ranks), key=ranks.count), max(set(alphas), key=alphas.count)
    names = [re.escape(f"{blocks_path}.{entry.key.block}.{entry.key.module}") for entry in layout.entries]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision or None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "target_modules": sorted({entry.key.module for entry in layout.entries}),
        "rank_pattern": {name: own for name, own in zip(names, ranks, strict=True) if own != rank},
        "alpha_pattern": {name: own for name, own in zip(names, alphas, strict=True) if own != alpha},
    }


def write_adapter(
    folder: Path, layout: Layout, row: Tensor, blocks_path: str, base_model: str, transposed: bool, revision: str = ""
) -> Path:
    """Write an adapter row [p] as a PEFT folder; an older folder of that name is replaced as a whole."""
    tensors = {}
    for key, (a, b) in layout.factors(row).items():
        name = f"base_model.model.{blocks_path}.{key.block}.{key.module}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a.clone(), b.clone()
    temporary = _fresh(folder)
    save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
    facts = adapter_config(layout, blocks_path, base_model, transposed, revision)
    (temporary / CONFIG).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return replace_folder(temporary, folder)


def _fresh(folder: Path) -> Path:
    temporary = folder.with_name(f".{folder.name}.part")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    return temporary


def replace_folder(temporary: Path, folder: Path) -> Path:
    """Force the files to the disk and put the folder in its place."""
    for path in (*temporary.iterdir(), temporary):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    return folder


def merge_into(model: nn.Module, layout: Layout, row: Tensor, blocks_path: str) -> None:
    """Add scale * B A to the frozen weights of a whole, unsplit model in place."""
    from transformers.pytorch_utils import Conv1D

    blocks = model.get_submodule(blocks_path)
    with torch.no_grad():
        for key, (a, b) in layout.factors(row).items():
            module = blocks.get_submodule(f"{key.block}.{key.module}")
            change = layout.by_key[key].scale * (b.double() @ a.double())
            weight: Tensor = module.weight  # type: ignore[assignment]
            weight.copy_((weight.double() + (change.T if isinstance(module, Conv1D) else change).to(weight.device)).to(weight.dtype))


def write_merged(folder: Path, model: Any, tokenizer: Any) -> Path:
    """Write a merged model and its tokenizer as a plain checkpoint; an older folder of that name is replaced as a whole."""
    temporary = _fresh(folder)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    return replace_folder(temporary, folder)
