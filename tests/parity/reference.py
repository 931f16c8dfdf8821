"""The oracle: unsplit federated LoRA with stock transformers + PEFT + torch.optim.AdamW, written without any of splitft's engine."""

from __future__ import annotations

import copy
import math
import re

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from splitft.engine.settings import Federation
from splitft.types import Key, Plan

from ..support import build

NAME = re.compile(r"\.(\d+)\.(.+)\.lora_(A|B)\.default\.weight$")


def peft_model(federation: Federation, family: str, attention: str = "sdpa") -> torch.nn.Module:
    """The whole model as a stock PEFT model with the federation's targets and rank."""
    modules = sorted({key.module for key in federation.layout.by_key})
    entry = federation.layout.entries[0]
    config = LoraConfig(
        r=entry.rank, lora_alpha=entry.scale * entry.rank, lora_dropout=0.0, fan_in_fan_out=family == "gpt2",
        target_modules=rf".*\.\d+\.({'|'.join(re.escape(module) for module in modules)})",
    )  # fmt: skip
    return get_peft_model(build(family, attention), config)


def tensors(model: torch.nn.Module) -> dict[tuple[Key, str], torch.nn.Parameter]:
    found = {}
    for name, parameter in model.named_parameters():
        match = NAME.search(name)
        if match:
            found[Key(int(match[1]), match[2]), match[3]] = parameter
    return found


def load(model: torch.nn.Module, federation: Federation, row: torch.Tensor) -> None:
    factors = federation.layout.factors(row)
    with torch.no_grad():
        for (key, side), parameter in tensors(model).items():
            parameter.copy_(factors[key].a if side == "A" else factors[key].b)


def store(model: torch.nn.Module, federation: Federation) -> torch.Tensor:
    row = torch.zeros(federation.layout.parameters)
    factors = federation.layout.factors(row)
    for (key, side), parameter in tensors(model).items():
        (factors[key].a if side == "A" else factors[key].b).copy_(parameter.detach())
    return row


def batch_of(federation: Federation, client: int, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask and labels as Hugging Face takes them (labels not shifted)."""
    ids, lengths, trained = federation.clients[client].train.batch(federation.orders[client].indices(index))
    mask = torch.arange(ids.shape[1])[None] < torch.from_numpy(lengths)[:, None]
    ids = torch.from_numpy(ids)
    labels = torch.where(torch.from_numpy(trained) & mask, ids, -100)
    return ids, mask.long(), labels


def rates(federation: Federation, count: int) -> list[float]:
    """Learning rates by transformers' own scheduler."""
    schedule = federation.settings.schedule
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=schedule.peak)
    name = "constant_with_warmup" if schedule.shape == "constant" else schedule.shape
    scheduler = tf.get_scheduler(name, optimizer, num_warmup_steps=schedule.warmup_steps, num_training_steps=schedule.total_steps)
    found = []
    for _ in range(count):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def train_client(federation: Federation, model: torch.nn.Module, plan: Plan, first_batch: int, first_step: int) -> tuple[list[float], int]:
    """The client's local steps in place; the loss of each step and the tokens trained on. A plain PyTorch loop."""
    settings, parameters = federation.settings, [p for p in model.parameters() if p.requires_grad]
    own = settings.optimizer
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(own.beta1, own.beta2), eps=own.epsilon, weight_decay=own.weight_decay)
    learning_rates = rates(federation, first_step + plan.local_steps)
    losses, tokens = [], 0
    for step in range(plan.local_steps):
        micro = [
            batch_of(federation, plan.client, first_batch + step * settings.gradient_accumulation + m)
            for m in range(settings.gradient_accumulation)
        ]
        total = sum(int((labels[:, 1:] != -100).sum()) for _, _, labels in micro)
        optimizer.zero_grad()
        step_loss = 0.0
        for ids, mask, labels in micro:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            loss = (
                torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
                / total
            )
            loss.backward()
            step_loss += loss.item()
        tokens += total
        if settings.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rates[first_step + step]
        optimizer.step()
        losses.append(step_loss)
    assert not any(math.isnan(loss) for loss in losses)
    return losses, tokens


def federated(
    federation: Federation, family: str, start: torch.Tensor, rounds: list[list[Plan]]
) -> tuple[torch.Tensor, list[list[list[float]]]]:
    """FedAvg of LoRA factors weighted by tokens, whole model on every client: the final adapter row, and losses by round and client."""
    model = peft_model(federation, family)
    current, drawn, history, first_step = start.clone(), dict.fromkeys(range(len(federation.clients)), 0), [], 0
    for plans in rounds:
        rows, weights, losses = [], [], []
        for plan in plans:
            local = copy.deepcopy(model)
            load(local, federation, current)
            trace, tokens = train_client(federation, local, plan, drawn[plan.client], first_step)
            drawn[plan.client] += plan.local_steps * federation.settings.gradient_accumulation
            rows.append(store(local, federation).double() * tokens)
            weights.append(tokens)
            losses.append(trace)
        first_step += plans[0].local_steps
        current = (torch.stack(rows).sum(0) / sum(weights)).float()
        history.append(losses)
    return current, history
