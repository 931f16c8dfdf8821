"""From a configuration to a run that can start: the one place where concrete classes meet."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from splitft import catalog
from splitft.adapt.base import Policy
from splitft.adapt.cost import CostModel
from splitft.adapt.fleets import Device, draw_fleet
from splitft.adapt.profiles import PRESETS, assign_profiles, find_profile, load_profiles
from splitft.aggregate.base import Aggregator
from splitft.apps.bottleneck_setup import begin_bottlenecks, with_bottleneck, with_noise
from splitft.apps.capacity import kept_kinds, largest_pass, open_shelf
from splitft.apps.combinations import clashes_of
from splitft.apps.costs import client_costs
from splitft.apps.executors import executor_of, in_slots, require_engine
from splitft.compress.base import Codec
from splitft.compress.feedback import Feedback
from splitft.compress.same import Same
from splitft.config import Component, RunConfig
from splitft.control.base import Controller
from splitft.data.base import FederatedData, Partition, Source
from splitft.data.federate import federate
from splitft.data.order import BatchOrder
from splitft.engine.attendance import Attendance
from splitft.engine.rounds import Executor, Rules
from splitft.engine.settings import Federation, TrainSettings
from splitft.errors import ConfigError, ResourceError
from splitft.lora import Layout
from splitft.models.anatomy import describe
from splitft.models.attention import suited
from splitft.models.base import Anatomy
from splitft.models.load import causal_class, load_model, load_model_config, load_tokenizer
from splitft.optimizer import AdamW, Schedule
from splitft.peft_format import read_adapter
from splitft.ranks.base import RankPolicy
from splitft.selfcheck import inspect_family
from splitft.split import SplitModel
from splitft.sync.base import Synchronisation
from splitft.types import ModelShape, Profile
from splitft.work.base import WorkPolicy

OnStage = Callable[[str], None]
CODEC_SEAMS = ("uplink", "downlink", "exit_downlink", "exit_uplink", "adapter_uplink", "adapter_downlink")
# What stands for "same": at a U-shape's exit, the codec of the same kind of tensor at the cut; of adapters, that of the other direction.
SAME_AS = {"exit_downlink": "uplink", "exit_uplink": "downlink", "adapter_downlink": "adapter_uplink"}


@dataclass(frozen=True)
class Components:
    """The configuration's components, built."""

    source: Source
    partition: Partition
    policy: Policy
    ranks: RankPolicy
    work: WorkPolicy
    uplink: Codec
    downlink: Codec
    exit_downlink: Codec
    exit_uplink: Codec
    adapter_uplink: Codec
    adapter_downlink: Codec
    controller: Controller
    aggregator: Aggregator
    synchronisation: Synchronisation


@dataclass(frozen=True)
class Base:
    """The base model of a run: configuration, tokenizer, anatomy, dtype and attention (a plainer one where the family lacks it)."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    dtype: torch.dtype
    attention: str
    device: torch.device


@dataclass(frozen=True)
class Assembly:
    """All fixed parts of a run, and the adapter it starts from [p]. `close` lets go of what the executor holds beside memory."""

    config: RunConfig
    base: Base
    federation: Federation
    data: FederatedData
    executor: Executor
    components: Components
    costs: tuple[CostModel, ...]
    devices: tuple[Device, ...]
    rules: Rules
    shape: ModelShape
    start: Tensor
    identity: dict[str, Any]
    close: Callable[[], None] = lambda: None


def build_components(config: RunConfig) -> Components:
    """Every component of the configuration; ConfigError with the problems of all of them."""
    seams = ("data", "partition", "policy", "ranks", "work", *CODEC_SEAMS, "controller", "aggregator", "synchronisation")
    chosen: dict[str, Component] = {seam: getattr(config, seam) for seam in seams}
    found = [line for seam, one in chosen.items() for line in catalog.problems(seam, one.name, one.fields)]
    built: dict[str, Any] = {}
    for seam, one in chosen.items() if not found else ():
        try:
            built[seam] = catalog.build(seam, one.name, one.fields)
        except ConfigError as problem:
            found += [f"{seam}: {line}" for line in (problem.problems or (str(problem),))]
    if found:
        raise ConfigError(
            f"The configuration has {len(found)} problem{'s' if len(found) > 1 else ''}.",
            "docs/configuration.md lists every field.",
            tuple(found),
        )
    _settle_codecs(built, config.lora.rank)
    built["uplink"] = with_noise(config.bottleneck, built["uplink"])
    names = {"data": "source"}
    components = Components(**{names.get(seam, seam): built[seam] for seam in seams})
    if clashes := tuple(clashes_of(config, components)):
        raise ConfigError("The chosen methods do not fit together.", "docs/methods.md says what goes with what.", clashes)
    return components


def _settle_codecs(built: dict[str, Any], rank: int) -> None:
    """Put codecs where sections say "same", and tell each what it is for."""
    for seam, like in SAME_AS.items():
        if isinstance(built[seam], Same):
            built[seam] = built[like]
            if seam == "adapter_downlink" and isinstance(built[seam], Feedback):
                # Down, the next change is against what the client has: it makes up for what was lost by itself.
                built[seam] = built[seam].inner
    for seam in ("uplink", "exit_downlink"):
        built[seam] = built[seam].for_adapters(rank, gradients=False)
    for seam in ("downlink", "exit_uplink"):
        built[seam] = built[seam].for_adapters(rank, gradients=True)


def choose_device(name: str) -> torch.device:
    """The device to compute on. Raises ResourceError when the one asked for is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    if not available[name]:
        usable = ", ".join(kind for kind, there in available.items() if there)
        raise ResourceError(f"engine.device is {name!r}, this machine offers {usable}.", "choose another device, or 'auto'.")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Type of the frozen weights. `auto`: bfloat16 where the hardware multiplies it natively (CUDA; CPUs with AMX or AVX-512 BF16, where
    such a product takes a quarter of the time), else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:
        native = device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if native else torch.float32


def load_base(config: RunConfig) -> Base:
    """What is known of the model before its weights are read, self-check included."""
    device = choose_device(config.engine.device)
    if config.model.device_map and device.type != "cuda":
        raise ResourceError(
            f"model.device_map is {config.model.device_map!r}; this run computes on {device.type}.",
            "it spreads a model over several GPUs: leave it out here.",
        )
    dtype = choose_dtype(config.model.dtype, device)
    model_config = load_model_config(config.model.path, config.model.revision)
    tokenizer = load_tokenizer(config.model.path, config.model.revision)
    attention: str = config.model.attention
    if device.type == "cpu" and attention == "sdpa":
        attention = suited(causal_class(model_config), model_config)
    anatomy = inspect_family(model_config, config.model.path, attention, config.model.self_check)
    positions = int(getattr(model_config.get_text_config(), "max_position_embeddings", 0) or 0)
    if positions and config.tokens.block_tokens > positions:
        raise ConfigError(
            f"tokens.block_tokens is {config.tokens.block_tokens}; {config.model.path!r} has {positions} positions.",
            f"set it to {positions} or less.",
        )
    return Base(model_config, tokenizer, anatomy, dtype, attention, device)


def load_split(config: RunConfig, base: Base) -> tuple[SplitModel, ModelShape, PreTrainedModel]:
    """The whole model in slots, its shape for the cost model, and the transformers model inside."""
    placed = config.model.device_map
    model = load_model(config.model.path, base.config, base.dtype, base.attention, revision=config.model.revision, device_map=placed)
    shape = describe(model, config.model.path)
    return in_slots(config, base.anatomy, model if placed else model.to(base.device)), shape, model


def start_adapter(config: RunConfig, split: SplitModel) -> tuple[Layout, Tensor]:
    """The layout of all adapters and the row [p] to start from: fresh, or the PEFT adapter the configuration names."""
    if not config.lora.adapter:
        layout = Layout.of(split.keys, config.lora.rank, config.lora.alpha / config.lora.rank)
        layout = with_bottleneck(config, layout, split)
        return layout, layout.initial_row(config.seed)
    stored = read_adapter(Path(config.lora.adapter), split.anatomy.blocks_path)
    layout = stored.layout(split.keys_of_all())
    split.adapt(list(layout.by_key))
    layout = with_bottleneck(config, layout, split)
    return layout, layout.row(stored.factors)


def assemble(config: RunConfig, on_stage: OnStage = lambda name: None, folder: Path | None = None) -> Assembly:
    """Build everything; the slow parts are announced to `on_stage`. Raises the error of whatever does not fit.

    `folder` is the run's, where it may keep scratch files; without one, what clients keep is in memory, the old beside the new.
    """
    from splitft.apps.privacy_setup import settle

    components = build_components(config)
    require_engine(config)
    on_stage("check the model")
    base = load_base(config)
    if components.aggregator.folds and base.dtype != torch.float32:
        raise ConfigError(
            f'aggregator "{config.aggregator.name}" adds small changes to the frozen weights, which {base.dtype} would round away.',
            'set model.dtype = "float32".',
        )
    on_stage("read the data")
    data = read_data(config, components, base)
    on_stage("load the model")
    split, shape, _ = load_split(config, base)
    layout, start = start_adapter(config, split)
    begin_bottlenecks(base, split, layout, start)
    components = settle(config, components, layout, len(data.clients))
    settings = train_settings(config, components)
    orders = tuple(BatchOrder(len(one.train), settings.batch_size, config.seed, one.client) for one in data.clients)
    trained = components.aggregator.trained(layout)
    kinds = kept_kinds(config, components.synchronisation.always)
    shelf = None if folder is None else open_shelf(config, len(data.clients), layout.parameters, kinds, folder)
    federation = Federation(split, layout, data.clients, orders, settings, shape.vocabulary, base.device, start, trained, shelf)
    devices, server = fleet_of(config, len(data.clients))
    if not components.synchronisation.always and any(one.availability < 1 or one.dropout > 0 for one in devices):
        raise ConfigError(
            f'synchronisation "{config.synchronisation.name}" would drop the work of clients that are missing at an aggregation.',
            "choose a fleet without drop-outs in which everyone is available.",
        )
    costs = client_costs(config, shape, server, components, layout, base, data.clients)
    executor, close = executor_of(config, components, base, federation, largest_pass(config, federation, costs, kinds), on_stage)
    return Assembly(
        config,
        base,
        federation,
        data,
        executor,
        components,
        costs,
        devices,
        rules_of(config, layout),
        shape,
        start,
        identity_of(config, split, data, layout),
        close,
    )


def read_data(config: RunConfig, components: Components, base: Base) -> FederatedData:
    """All clients' rows. Raises DataError."""
    return federate(
        components.source.documents(),
        base.tokenizer,
        components.partition,
        config.clients.count,
        config.seed,
        config.tokens.packing,
        config.tokens.block_tokens,
        config.tokens.held_out,
        config.tokens.common_held_out,
        vocabulary=int(base.config.get_text_config().vocab_size),
        bucket_tokens=config.tokens.bucket_tokens,
    )


def train_settings(config: RunConfig, components: Components) -> TrainSettings:
    train = config.train
    return TrainSettings(
        batch_size=train.batch_size,
        gradient_accumulation=train.gradient_accumulation,
        schedule=Schedule(train.learning_rate, config.rounds * train.local_steps, train.warmup_steps, train.schedule),
        optimizer=AdamW(train.beta1, train.beta2, train.epsilon, train.weight_decay),
        clip_norm=train.clip_norm,
        keep_moments=train.moments == "keep",
        uplink=components.uplink,
        downlink=components.downlink,
        adapter_uplink=components.adapter_uplink,
        adapter_downlink=components.adapter_downlink,
        seed=config.seed,
        server=config.split.server,
        round_steps=train.local_steps,
        row_tokens=config.tokens.block_tokens,
        exit_downlink=components.exit_downlink,
        exit_uplink=components.exit_uplink,
    )


def rules_of(config: RunConfig, layout: Layout) -> Rules:
    # A round of fewer than an adapter is hidden among opens no sum: it is not begun.
    hidden_among = config.secure_aggregation.minimum if config.secure_aggregation.enabled else 0
    return Rules(
        rounds=config.rounds,
        local_steps=config.train.local_steps,
        rank=max(entry.rank for entry in layout.entries),
        exit_on_client=config.split.labels == "client",
        tail_blocks=config.split.tail_blocks,
        attendance=Attendance(
            config.seed,
            config.clients.participation,
            max(config.clients.minimum, hidden_among),
            config.clients.deadline_s,
            config.clients.quorum,
            config.clients.late == "partial",
            config.split.server,
        ),
        fetch_blocks=config.clients.fetch_blocks,
        buffer=config.clients.buffer,
        staleness=config.clients.staleness,
        evaluate_every=config.evaluate.every_rounds,
        evaluate_batch=config.evaluate.batch_size,
        evaluate_rows=config.evaluate.max_rows,
        probe_rows=config.evaluate.probe_rows,
        keep_checkpoints=config.run.keep_checkpoints,
        seed=config.seed,
    )


def fleet_of(config: RunConfig, clients: int) -> tuple[tuple[Device, ...], Profile]:
    """The clients' devices, in client order, with what the configuration adds to their fleet's uncertainty; and the server's profile."""
    section = config.clients
    known: Mapping[str, Profile] = load_profiles(Path(section.profiles_file)) if section.profiles_file else PRESETS
    drawn = (
        draw_fleet(section.fleet, clients, config.seed, known)
        if section.fleet
        else tuple(Device(profile) for profile in assign_profiles(section.profiles, clients, known))
    )
    devices = tuple(
        replace(
            one,
            availability=one.availability * section.availability,
            dropout=1.0 - (1.0 - one.dropout) * (1.0 - section.dropout),
            jitter=math.hypot(one.jitter, section.speed_jitter),
        )
        for one in drawn
    )
    return devices, find_profile(section.server_profile, known)


def identity_of(config: RunConfig, split: SplitModel, data: FederatedData, layout: Layout) -> dict[str, Any]:
    """What a checkpoint must find again to be resumed: weights, data, layout, and whatever else changes numbers."""
    digest = hashlib.sha256()
    for name, parameter in split.model.named_parameters():
        head = parameter.detach().reshape(-1)[:1024].cpu().double()
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}{head.sum().item()!r}{head.square().sum().item()!r}".encode())
    columns = hashlib.sha256(repr([(str(e.key), e.inputs, e.outputs, e.rank, e.scale) for e in layout.entries]).encode())
    columns.update(b"".join(repr(one).encode() for one in layout.matrices))
    manifest = hashlib.sha256(json.dumps(data.manifest, sort_keys=True).encode())
    identity: dict[str, Any] = {
        "model": digest.hexdigest()[:16],
        "data": manifest.hexdigest()[:16],
        "adapters": columns.hexdigest()[:16],
        "engine": config.engine.name,
        "device": str(next(split.model.parameters()).device.type),
    }
    if config.engine.deterministic:
        identity["threads"] = torch.get_num_threads()
    return identity
