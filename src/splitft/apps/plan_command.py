"""`splitft plan`: flops, bytes, memory and seconds of every cut on the configured devices, before anything is trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from transformers import AutoModelForCausalLM

from splitft.adapt.base import Policy
from splitft.adapt.choose import reference_step_s
from splitft.adapt.cost import CostModel
from splitft.adapt.schedule import step_seconds
from splitft.apps.assemble import CODEC_SEAMS, Components, build_components, fleet_of, load_base
from splitft.apps.costs import cost_model
from splitft.apps.plan import mark_configured, plan_table, render_plan
from splitft.apps.plan_codecs import plan_codecs, render_codecs, shapes_of, streams_of
from splitft.apps.plan_fleet import TABLES_SHOWN, Manner, fleet_plan, render_fleet
from splitft.apps.privacy_setup import settle, told_before
from splitft.config import RunConfig
from splitft.lora import Layout
from splitft.models.anatomy import describe, select_targets
from splitft.peft_format import read_adapter
from splitft.types import Key, ModelShape, Profile


def widths_of(shape: ModelShape, targets: str | list[str], bypassed: Collection[str] = ()) -> dict[Key, tuple[int, int]]:
    """Every adapted projection of a model with its (input, output) width, from its shape alone; `bypassed` ones take no adapter."""
    return {
        Key(index, one.module): (one.inputs, one.outputs)
        for index, block in enumerate(shape.blocks)
        for one in select_targets(tuple(one for one in block.projections if one.module not in bypassed), targets)
    }


def planned_layout(config: RunConfig, shape: ModelShape, blocks_path: str, bypassed: Collection[str] = ()) -> Layout:
    """The adapters the run would train: those of the configuration, or of the PEFT adapter it starts from, with their own ranks."""
    if config.lora.adapter:
        return read_adapter(Path(config.lora.adapter), blocks_path).layout(widths_of(shape, "all"))
    targets = config.lora.targets if isinstance(config.lora.targets, str) else list(config.lora.targets)
    return Layout.of(widths_of(shape, targets, bypassed), config.lora.rank, config.lora.alpha / config.lora.rank)


def cuts_by_profile(
    config: RunConfig, policy: Policy, shape: ModelShape, profiles: Sequence[Profile], costs: CostModel
) -> dict[Profile, set[int]]:
    """The cuts the policy would start each profile's clients with. Where the data decide who has which cut, every profile shows all."""
    if named := undealt_cuts(config, len(profiles)):
        return {profile: set(named) for profile in profiles}
    cuts = starting_cuts(policy, shape, profiles, costs)
    return {profile: {cut for cut, own in zip(cuts, profiles, strict=True) if own == profile} for profile in profiles}


def undealt_cuts(config: RunConfig, profiles: int) -> list[int]:
    """The cuts the configuration names, where only the data decide who has which; else none."""
    named = list(config.policy.fields.get("cuts", []))
    return named if config.clients.count == 0 and len(named) not in (0, 1, profiles) else []


def starting_cuts(policy: Policy, shape: ModelShape, profiles: Sequence[Profile], costs: CostModel) -> list[int]:
    """The cut the policy would start each client with."""
    cuts = policy.init(shape, profiles, [costs] * len(profiles)).get("cuts", [])
    assert isinstance(cuts, list)
    return cuts


def show_codecs(config: RunConfig, components: Components, costs: CostModel, cuts: Sequence[int], dtype: torch.dtype) -> None:
    """Print what the codecs would send in the whole run."""
    codecs = {name: getattr(components, name) for name in CODEC_SEAMS}
    streams = streams_of(shapes_of(config, costs, cuts, dtype), codecs, config.split.labels == "client")
    render_codecs(plan_codecs(streams), Console())


def show_noise(config: RunConfig, components: Components, layout: Layout, hidden_size: int) -> None:
    """Print what noise the run would have. Raises ConfigError for a privacy budget that cannot be met, as the run would."""
    clients = config.clients.count
    settled = settle(config, components, layout, clients) if clients else components
    for text in told_before(config, settled, layout, clients, hidden_size):
        Console().print(Text(text), soft_wrap=True)


def show_plan(config: RunConfig) -> None:
    """Print a table for each device profile of the configuration. The model is built without weights and no data is read.

    So every row counts as full, and where the data decide how many clients there are (`clients.count` = 0) there is one per profile.
    """
    components = build_components(config)
    base = load_base(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base.config)
    shape = describe(model, config.model.path)
    layout = planned_layout(config, shape, base.anatomy.blocks_path, base.anatomy.bypassed)
    devices, server = fleet_of(config, config.clients.count or len(config.clients.profiles))
    profiles = [device.profile for device in devices]
    costs = cost_model(config, shape, server, components, layout, base, config.tokens.block_tokens)
    console = Console()
    reference_s = reference_step_s([costs] * len(profiles), profiles)
    planned_cuts = cuts_by_profile(config, components.policy, shape, profiles, costs)
    step = f"{config.train.batch_size} x {config.tokens.block_tokens} tokens a step"
    if len(set(profiles)) > TABLES_SHOWN:
        cuts = starting_cuts(components.policy, shape, profiles, costs)
        alone = {
            client: step_seconds(costs.cost(costs.plan(cut)), profile, server).total_s
            for client, (cut, profile) in enumerate(zip(cuts, profiles, strict=True))
        }
        steps = components.work.steps(alone, config.train.local_steps)
        title = f"{config.model.path} on {len(profiles)} devices, server {server.name}, {step}"
        manner = Manner(config.split.server, config.train.gradient_accumulation, config.seed)
        shown = fleet_plan(costs, profiles, cuts, [steps[client] for client in range(len(profiles))], manner)
        render_fleet(shown, console, title)
        show_codecs(config, components, costs, cuts, base.dtype)
        show_noise(config, components, layout, shape.hidden_size)
        return
    reason = "set by policy.cuts" if config.policy.fields.get("cuts") else f"where policy {config.policy.name} starts"
    for profile in dict.fromkeys(profiles):
        planned = planned_cuts[profile]
        title = f"{config.model.path} on {profile.name}, server {server.name}, {step}"
        render_plan(mark_configured(plan_table(costs, profile, reference_s), planned, reason), console, title)
    note = f"No data were read: every row counts as full ({config.tokens.block_tokens} tokens). A run takes each client's mean row length."
    if not config.clients.count:
        held = f"{len(profiles)} client{'s' if len(profiles) > 1 else ''}"
        note += f" clients.count = 0: the data decide how many clients there are, and what is sent in all is counted for {held} below."
    console.print(Text(note, style="dim"))
    cuts = undealt_cuts(config, len(profiles)) or starting_cuts(components.policy, shape, profiles, costs)
    show_codecs(config, components, costs, cuts, base.dtype)
    show_noise(config, components, layout, shape.hidden_size)
