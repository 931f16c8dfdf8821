"""The rivals, in stock transformers + PEFT + torch.optim: unsplit training, and the usual loop over split clients.

Both in float32, or with float32 weights under bfloat16 autocast, which is what transformers' Trainer does with `bf16=True`.

Axes: n clients, t tokens, d width, v vocabulary.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.setups import ALPHA, CLIP_NORM, LEARNING_RATE, RANK, TARGETS, WEIGHT_DECAY, sharing


def quiet() -> None:
    """Silence one warning: PEFT asks transformers for a property the latter has renamed."""
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def adapted(model: PreTrainedModel) -> Any:
    """A copy of `model` as a stock PEFT model with the rank and targets every contestant has."""
    from peft import LoraConfig, get_peft_model

    quiet()
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS), fan_in_fan_out=True)
    return get_peft_model(sharing(model), config).train()


def trainable(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def optimizer(parameters: Sequence[nn.Parameter]) -> torch.optim.AdamW:
    """The fused kernel, which transformers' Trainer takes by itself."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)


def mixed_precision(autocast: bool) -> contextlib.AbstractContextManager[Any]:
    """What Trainer's bf16 option does around the forward; nothing without it."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext()


class Unsplit:
    """One adapter on the whole model; the tokens of all clients are one batch."""

    def __init__(self, model: PreTrainedModel, autocast: bool = False) -> None:
        self.model = adapted(model)
        self.autocast = autocast
        self.parameters = trainable([self.model])
        self.optimizer = optimizer(self.parameters)

    def step(self, ids: Tensor) -> float:
        """One optimizer step on [n t]; the loss before it."""
        with mixed_precision(self.autocast):
            loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimizer.step()
        return loss.item()


class SequentialClient:
    """A client and the server's part for it, both stock PEFT: its own adapter on frozen weights shared with all others."""

    def __init__(self, base: Any, cut: int, autocast: bool) -> None:
        self.body: Any = sharing(base).get_base_model()
        self.cut, self.autocast = cut, autocast
        blocks = self.body.transformer.h
        self.front, self.back = trainable(blocks[:cut]), trainable(blocks[cut:])
        self.optimizers = [optimizer(self.front), optimizer(self.back)]

    def step(self, ids: Tensor) -> float:
        """Client forward, server forward and backward, client backward, two optimizer steps on ids [1 t]. Nothing is encoded."""
        transformer = self.body.transformer
        with mixed_precision(self.autocast):
            hidden = transformer.wte(ids) + transformer.wpe(torch.arange(ids.shape[1])[None])
            for block in transformer.h[: self.cut]:
                hidden = block(hidden)
            received = hidden.detach().requires_grad_(True)
            state = received
            for block in transformer.h[self.cut :]:
                state = block(state)
            logits = self.body.lm_head(transformer.ln_f(state))
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        for one in self.optimizers:
            one.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        hidden.backward(received.grad)
        nn.utils.clip_grad_norm_(self.front + self.back, CLIP_NORM)
        for one in self.optimizers:
            one.step()
        return loss.item()


class SequentialLoop:
    """Client after client, each with a front pass and a server pass of its own."""

    def __init__(self, model: PreTrainedModel, cuts: Sequence[int], autocast: bool = False) -> None:
        base = adapted(model)
        self.clients = [SequentialClient(base, cut, autocast) for cut in cuts]

    def step(self, ids: Tensor) -> float:
        """One optimizer step of every client on its row of ids [n t]; the mean loss."""
        losses = [client.step(ids[k : k + 1]) for k, client in enumerate(self.clients)]
        return sum(losses) / len(losses)
