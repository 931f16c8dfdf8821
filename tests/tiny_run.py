"""A run small enough to be repeated dozens of times: a tiny model folder, a text file, a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from splitft.config import RunConfig, parse_config

from .data_tokenizer import byte_tokenizer
from .support import build_sized

WORDS = [
    "round",
    "client",
    "server",
    "cut",
    "layer",
    "adapter",
    "rank",
    "token",
    "loss",
    "gradient",
    "block",
    "model",
    "train",
    "share",
    "private",
    "data",
    "split",
]


def model_folder(folder: Path, family: str = "gpt2") -> Path:
    """A tiny random model with a byte tokenizer, as `from_pretrained` reads it."""
    tokenizer = byte_tokenizer()
    build_sized(family, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text_file(path: Path, documents: int = 40, seed: int = 0) -> Path:
    draw = np.random.default_rng(seed)
    path.write_text("\n\n".join(" ".join(draw.choice(WORDS, draw.integers(5, 40))) for _ in range(documents)) + "\n", encoding="utf-8")
    return path


def tiny_config(folder: Path, **changes: Any) -> RunConfig:
    """Three clients, cuts 1 2 3, three rounds of two steps, moments kept. `changes` replace components and single fields."""
    model = folder / "model"
    if not model.is_dir():
        model_folder(model)
        text_file(folder / "text.txt")
    values: dict[str, Any] = {
        "name": "tiny",
        "seed": 1,
        "rounds": 3,
        # The same numbers on every processor; the self-check has tests of its own and a tenth of a second is much for this model.
        "model": {"path": str(model), "dtype": "float32", "self_check": False},
        "lora": {"rank": 2, "alpha": 4.0},
        "data": {"name": "text", "path": str(folder / "text.txt")},
        "tokens": {"block_tokens": 16},
        "partition": {"name": "length_dirichlet", "alpha": 1.0},
        "clients": {"count": 3},
        "policy": {"name": "fixed", "cuts": [1, 2, 3]},
        "train": {"local_steps": 2, "batch_size": 2, "moments": "keep", "learning_rate": 5e-3},
        "evaluate": {"max_rows": 2},
        "run": {"folder": str(folder / "runs")},
    }
    for name, change in changes.items():
        values[name] = {**values.get(name, {}), **change} if isinstance(change, dict) and "name" not in change else change
    return parse_config(values)
