"""What a client of the app does: local steps of stock PEFT on its own tokens.

Axes: n clients, m steps of all rounds, t tokens.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Work:
    """The run, as both engines do it. `folder` holds `tokens.safetensors` (ids [n m t]) and `adapter`, the PEFT adapter to start from."""

    folder: str
    model: str
    clients: int
    rounds: int
    steps: int
    autocast: bool
    learning_rate: float
    weight_decay: float
    clip_norm: float

    @classmethod
    def parse(cls, text: str) -> Work:
        return cls(**json.loads(text))


@cache
def load(work: Work) -> tuple[Any, Tensor]:
    """The model with its adapter and all tokens; kept between the rounds of a process, which saves Flower the time to build them."""
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    torch.set_num_threads(1)  # Flower computes two clients side by side
    config = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    base = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32, **config)
    model = PeftModel.from_pretrained(base, str(Path(work.folder) / "adapter"), is_trainable=True)
    return model.train(), load_file(str(Path(work.folder) / "tokens.safetensors"))["ids"]


def state(work: Work) -> dict[str, Tensor]:
    """The adapter's tensors, as PEFT names them."""
    return {name: value.detach().clone() for name, value in get_peft_model_state_dict(load(work)[0]).items()}


def train(work: Work, client: int, round_index: int, adapter: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """The local steps of one client in one round (from 1) from `adapter`; the adapter after them and the loss before the first."""
    model, ids = load(work)
    set_peft_model_state_dict(model, adapter)
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=work.learning_rate, weight_decay=work.weight_decay, fused=True)
    losses = []
    for step in range((round_index - 1) * work.steps, round_index * work.steps):
        rows = ids[client, step][None]
        with torch.autocast("cpu", dtype=torch.bfloat16) if work.autocast else contextlib.nullcontext():
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, work.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return state(work), losses[0]
