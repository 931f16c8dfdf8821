"""`splitft plan`: flops, bytes, memory and seconds of every cut on the configured devices, before anything is trained."""

from __future__ import annotations

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from splitft.adapt.choose import reference_step_s
from splitft.apps.assemble import build_components, cost_model, device_profiles, load_base
from splitft.apps.plan import plan_table, render_plan
from splitft.config import RunConfig
from splitft.lora import Layout
from splitft.models.anatomy import describe, select_targets
from splitft.types import Key, ModelShape


def widths_of(shape: ModelShape, targets: str | list[str]) -> dict[Key, tuple[int, int]]:
    """Every adapted projection of a model with its (input, output) width, from its shape alone."""
    return {
        Key(index, one.module): (one.inputs, one.outputs)
        for index, block in enumerate(shape.blocks)
        for one in select_targets(block.projections, targets)
    }


def show_plan(config: RunConfig) -> None:
    """Print a table for each device profile of the configuration. The model is built without weights and no data is read."""
    components = build_components(config)
    base = load_base(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base.config)
    shape = describe(model, config.model.path)
    targets = config.lora.targets if isinstance(config.lora.targets, str) else list(config.lora.targets)
    layout = Layout.of(widths_of(shape, targets), config.lora.rank, config.lora.alpha / config.lora.rank)
    profiles, server = device_profiles(config, config.clients.count or 1)
    costs = cost_model(config, shape, server, components, layout, base, config.tokens.block_tokens)
    console = Console()
    reference_s = reference_step_s(costs, profiles)
    for profile in dict.fromkeys(profiles):
        step = f"{config.train.batch_size} x {config.tokens.block_tokens} tokens a step"
        title = f"{config.model.path} on {profile.name}, server {server.name}, {step}"
        render_plan(plan_table(costs, profile, reference_s), console, title)
