"""Load a model, whole or only what one side owns.

A side's model is built by the family's own class with the blocks of other sides left out before any weight is read, so the loader of
transformers (names, shards, conversions, tying) only ever asks for tensors that exist on this side.
"""

from __future__ import annotations

import difflib
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from splitft.errors import ModelError
from splitft.models.anatomy import block_count, find_blocks, find_head, without_dropout
from splitft.models.attention import build_with

EMBEDDED = "embedded"
# transformers builds models with switches of the whole process: one at a time, whatever thread asks.
BUILDING = threading.RLock()
ASSETS = Path(__file__).resolve().parent.parent / "assets"


class NotOwned(nn.Module):
    """Stands where another side's block or head would be; holds no tensors and cannot run."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        for name, value in vars(like).items():
            if not name.startswith("_") and isinstance(value, str | int | float | bool):
                setattr(self, name, value)


def resolve(path: str) -> str:
    """The absolute folder or the hub name behind model.path; `embedded` is the model that comes with the package.

    Raises ModelError when a local folder is meant but not there.
    """
    if path == EMBEDDED:
        folder = ASSETS / "model"
        if not (folder / "config.json").is_file():
            raise ModelError("the embedded model is missing from this installation.", "reinstall splitft, or set model.path to a folder.")
        return str(folder)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{path} has no config.json.", "model.path must be a folder written by save_pretrained, or a hub name.")
        return str(folder.absolute())
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or (folder.parent != Path() and folder.parent.is_dir())
    if looks_local:
        names = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, names, n=1)
        hint = f" Did you mean {folder.parent / near[0]}?" if near else ""
        raise ModelError(
            f"model.path: there is no folder {path}.{hint}", "give a folder with config.json, a hub name such as gpt2, or 'embedded'."
        )
    return path


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' loading reports and progress bars out of our output."""
    before, hub = transformers_logging.get_verbosity(), logging.getLogger("huggingface_hub")
    hub_before = hub.level
    transformers_logging.set_verbosity(logging.ERROR)
    hub.setLevel(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        hub.setLevel(hub_before)


def load_model_config(path: str, revision: str = "", keep_dropout: bool = False) -> PretrainedConfig:
    """The model's configuration, dropout rates at zero unless `keep_dropout`. Raises ModelError when it cannot be read."""
    where = resolve(path)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(where, revision=revision or None, trust_remote_code=False)
            return config if keep_dropout else without_dropout(config)
    except Exception as problem:
        raise ModelError(f"model.path: cannot read the configuration of {path!r}: {_first_line(problem)}", _REMEDY) from problem


_REMEDY = (
    "if it is a folder, there is none of that name seen from here, or it lacks config.json or *.safetensors; "
    "if it is a hub name, check the spelling and the network (HF_HUB_OFFLINE=1 forbids downloads)."
)


def load_tokenizer(path: str, revision: str = "") -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises ModelError when there is none."""
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(resolve(path), revision=revision or None, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as problem:
        raise ModelError(f"model.path: cannot load a tokenizer for {path!r}: {_first_line(problem)}", _REMEDY) from problem


def load_model(
    path: str,
    config: PretrainedConfig,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    attention: str = "sdpa",
    blocks: Sequence[int] | None = None,
    needs_exit: bool = True,
    revision: str = "",
    device_map: str = "",
) -> PreTrainedModel:
    """The causal LM with frozen weights in `dtype` (`auto`: the checkpoint's own); with `blocks`, only those blocks' tensors are read.

    `needs_exit` false leaves out an LM head that is a tensor of its own. `device_map` ("auto", "balanced", "sequential") spreads the blocks
    over the GPUs, as accelerate does it. Only safetensors files are read. Raises ModelError.
    """
    cls = causal_class(config)
    chosen = cls if blocks is None else _partial(cls, frozenset(blocks), needs_exit)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "use_safetensors": True, "revision": revision or "main"}
    if device_map:
        options["device_map"] = device_map
    where = resolve(path)
    try:
        with BUILDING, quiet_transformers():
            model = build_with(lambda name: chosen.from_pretrained(where, attn_implementation=name, **options), attention)
    except Exception as problem:
        raise ModelError(f"model.path: cannot load {path!r}: {_first_line(problem)}", _REMEDY) from problem
    missing = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)
    if missing:
        raise ModelError(
            f"{path!r} has no tensor for {missing[0]} ({len(missing)} are missing).", "the checkpoint does not belong to its config.json."
        )
    model.requires_grad_(False)
    return model.eval()


def causal_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The causal LM class of a configuration; ModelError when the family has none."""
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise ModelError(f"{config.model_type} has no causal language model in the installed transformers.", "choose a decoder-only model.")
    return mapping[type(config)]  # type: ignore[no-any-return]


def _partial(cls: type[PreTrainedModel], owned: frozenset[int], needs_exit: bool) -> type[PreTrainedModel]:
    """The class with other sides' blocks (and the head, unless needed) left out at construction."""

    def build(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        _, blocks = find_blocks(self, block_count(config))
        for index, block in enumerate(list(blocks)):
            if index not in owned:
                blocks[index] = NotOwned(block)
        if not needs_exit and not getattr(config.get_text_config(), "tie_word_embeddings", False):
            path, head = find_head(self)
            parent, _, name = path.rpartition(".")
            setattr(self.get_submodule(parent), name, NotOwned(head))

    return type(cls.__name__, (cls,), {"__init__": build, "__module__": cls.__module__})


def _first_line(problem: Exception) -> str:
    text = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {text[0] if text else ''}"
