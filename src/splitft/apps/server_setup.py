"""The parts of a federation's server: the whole model, seats instead of data, what clients are told, the pieces they may fetch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from splitft import catalog
from splitft.apps.assemble import (
    Assembly,
    Base,
    Components,
    OnStage,
    build_components,
    fleet_of,
    identity_of,
    load_base,
    load_split,
    rules_of,
    start_adapter,
    train_settings,
)
from splitft.apps.bottleneck_setup import begin_bottlenecks, cuts_of
from splitft.apps.costs import client_costs
from splitft.apps.privacy_setup import federation_clashes, settle
from splitft.compress.noise import noise_in
from splitft.config import RunConfig
from splitft.data.base import ClientData, DistantRows, FederatedData, Source, TokenRows
from splitft.data.federate import public_rows
from splitft.data.order import BatchOrder
from splitft.deploy.letters import PartInfo
from splitft.deploy.parts import ModelParts
from splitft.engine.rounds import Executor
from splitft.engine.settings import ClientState, Federation, OnStep, RoundResult, Starts
from splitft.errors import ConfigError, ProtocolError
from splitft.models.anatomy import block_count
from splitft.models.load import resolve
from splitft.types import RoundPlan

# What binds both sides and is sent to clients. Where data lies, who takes part and how the server works is nobody else's business.
SHARED_SECTIONS = (
    "name",
    "seed",
    "rounds",
    "model",
    "lora",
    "tokens",
    "split",
    "bottleneck",
    "train",
    "uplink",
    "downlink",
    "exit_downlink",
    "exit_uplink",
    "adapter_uplink",
    "adapter_downlink",
    "aggregator",
    "secure_aggregation",
    "evaluate",
)
ENGINE = "federation"


class Elsewhere(Executor):
    """Stands where a simulation has its executor: here the clients train, and a conductor asks them to."""

    def train(self, plan: RoundPlan, first_step: int, starts: Starts, states: dict[int, ClientState], on_step: OnStep) -> RoundResult:
        raise ConfigError("this run's clients are elsewhere.", "start it with: splitft server")


def assemble_server(config: RunConfig, on_stage: OnStage = lambda name: None, folder: Path | None = None) -> Assembly:
    """Build everything a server needs. Raises the error of whatever does not fit."""
    components = build_components(config)
    if problems := tuple(unfit(config, components)):
        raise ConfigError("The configuration cannot be run as a federation.", "docs/deploy.md says what a federation can do.", problems)
    on_stage("check the model")
    base = load_base(config)
    on_stage("load the model")
    split, shape, _ = load_split(config, base)
    layout, start = start_adapter(config, split)
    begin_bottlenecks(base, split, layout, start)
    count = config.clients.count
    clients = tuple(
        ClientData(seat, f"seat-{seat}", 0, DistantRows(1, config.tokens.block_tokens), DistantRows(0, 0)) for seat in range(count)
    )
    orders = tuple(BatchOrder(1, config.train.batch_size, config.seed, seat) for seat in range(count))
    components = settle(config, components, layout, count)
    settings = train_settings(config, components)
    trained = components.aggregator.trained(layout)
    federation = Federation(split, layout, clients, orders, settings, shape.vocabulary, base.device, start, trained)
    drawn, server = fleet_of(config, count)
    devices = tuple(replace(one, availability=1.0, dropout=0.0, jitter=0.0) for one in drawn)
    data = FederatedData(clients, _public(config, base), {"federation": config.name}, [], [[] for _ in clients], 0.0)
    identity = identity_of(config, split, data, layout) | {"engine": ENGINE, "seats": count}
    costs = client_costs(config, shape, server, components, layout, base, clients)
    return Assembly(
        config, base, federation, data, Elsewhere(), components, costs, devices, rules_of(config, layout), shape, start, identity
    )


def costs_for(config: RunConfig, built: Assembly) -> Callable[[tuple[ClientData, ...]], Any]:
    """Remakes the cost models when it is known how much text clients have."""
    _, server = fleet_of(config, config.clients.count)
    return lambda clients: client_costs(config, built.shape, server, built.components, built.federation.layout, built.base, clients)


def _public(config: RunConfig, base: Base) -> TokenRows:
    """The server's own public text to measure on; none: no rows."""
    if not config.federation.held_out:
        return DistantRows(0, 0)
    documents = source_of(Path(config.federation.held_out), {}).documents()
    return public_rows(documents, base.tokenizer, config.tokens.packing, config.tokens.block_tokens)


def source_of(path: Path, fields: dict[str, Any]) -> Source:
    """The data source for a file or folder by its name, with other `fields` of that source. Raises ConfigError."""
    name = fields.pop("name", None) or ("jsonl" if any(one in (".jsonl", ".ndjson") for one in path.suffixes) else "text")
    given = {"path": str(path), **fields}
    if faults := catalog.problems("data", name, given):
        raise ConfigError("The data cannot be read like this.", "docs/configuration.md lists the fields of every source.", tuple(faults))
    source: Source = catalog.build("data", name, given)
    return source


def unfit(config: RunConfig, built: Components) -> Iterator[str]:
    """One line for every choice that only a simulation can follow."""
    if config.split.server != "per_client":
        yield f'split.server is "{config.split.server}": sessions of a federation are each client\'s own ("per_client")'
    if built.aggregator.folds:
        yield f'aggregator "{config.aggregator.name}" changes the frozen weights, which lie with the clients; "product" does not'
    if not built.synchronisation.always:
        yield f'synchronisation "{config.synchronisation.name}": adapters of a federation are joined after every round ("every_round")'
    if config.clients.buffer:
        yield "clients.buffer: rounds of a federation are synchronous, with a deadline and a quorum; set it to 0"
    if not built.controller.fixed:
        yield f'controller "{config.controller.name}" probes clients\' data, which a server does not have; "fixed" does not'
    if config.split.max_leak < 1.0:
        yield "split.max_leak is measured on clients' text, which a server does not have: clients can run splitft audit themselves"
    if config.lora.adapter:
        yield "lora.adapter: clients begin with a fresh adapter; leave it empty"
    if config.clients.count < 1:
        yield "clients.count is the number of seats of the federation; set it to 1 or more"
    if config.tokens.held_out == 0 and not config.federation.held_out:
        yield "nothing is held out to measure on: set tokens.held_out above 0 or federation.held_out to a public text"
    if config.tokens.held_out > 0 and noise_in(built.uplink) is not None:
        yield (
            "uplink adds noise, and clients' held-out rows are measured without codecs: set tokens.held_out = 0 and federation.held_out "
            "to a public text"
        )
    if config.tokens.held_out > 0 and config.bottleneck.channels:
        yield (
            "bottleneck.channels: clients' held-out rows are measured whole, without the bottleneck: set tokens.held_out = 0 and "
            "federation.held_out to a public text"
        )
    yield from federation_clashes(config, built)
    if config.model.device_map:
        yield "model.device_map: the server holds the model on one device; leave it empty"


def shared_config(config: RunConfig, base: Base, seat: int = 0) -> str:
    """What the client of a seat is told of the configuration, as JSON; names of this machine's folders are left out, the weights' type is
    settled, and where the policy names this seat's cut that is the only one announced: whose policy file refuses it stays at the door."""
    values = {name: value for name, value in config.model_dump(mode="json").items() if name in SHARED_SECTIONS}
    model = values["model"] | {"path": "embedded", "revision": "", "device_map": "", "dtype": str(base.dtype).removeprefix("torch.")}
    if config.bottleneck.channels:  # the policy's cuts, which clients are not told
        values["bottleneck"]["cuts"] = cuts_of(config, block_count(base.config))
    named = config.policy.fields.get("cuts") if config.policy.name == "fixed" else None
    if named:
        cut = named[seat % len(named)]
        values["split"] |= {"minimum_cut": cut, "maximum_cut": cut}
    return json.dumps(values | {"model": model})


@dataclass
class ServedParts:
    """The base model's parts, and at the end the joined adapter's files."""

    model: ModelParts
    folder: Path | None = None

    def read(self, sha256: str, offset: int, count: int) -> bytes:
        for info, path in self._files():
            if info.sha256 == sha256:
                if not 0 <= offset <= info.size_bytes:
                    raise ProtocolError(f"there is no byte {offset} of {info.name}.", "run the same splitft version on both sides.")
                with path.open("rb") as file:
                    file.seek(offset)
                    return file.read(count)
        return self.model.read_content(sha256, offset, count)

    def adapter(self) -> list[PartInfo]:
        """The files of the joined adapter; none before the end."""
        return [info for info, _ in self._files()]

    def _files(self) -> list[tuple[PartInfo, Path]]:
        if self.folder is None:
            return []
        found = []
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            path = self.folder / name
            if path.is_file():
                found.append((PartInfo(f"adapter:{name}", hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size), path))
        return found


def checkpoint_folder(config: RunConfig) -> Path:
    """The folder of the base model's files; one from the hub is fetched by the hub's own library."""
    where = resolve(config.model.path)
    if Path(where).is_dir():
        return Path(where)
    from transformers.utils.hub import cached_file

    found = cached_file(where, "config.json", revision=config.model.revision or None)
    return Path(str(found)).parent
