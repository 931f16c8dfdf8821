"""What goes with what: methods that contradict each other are refused before anything is loaded, each with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from splitft.apps.bottleneck_setup import bottleneck_clashes
from splitft.apps.secrecy import secrecy_clashes
from splitft.work.equal import Equal

if TYPE_CHECKING:
    from splitft.apps.assemble import Components
    from splitft.config import RunConfig


def clashes_of(config: RunConfig, built: Components) -> Iterator[str]:
    """One line for every contradiction between the chosen methods."""
    yield from _of_ranks(config, built)
    yield from _of_server(config, built)
    yield from _of_folding(config, built)
    yield from _of_merging(config, built)
    yield from _of_privacy(config, built)
    yield from _of_codecs(config, built)
    yield from secrecy_clashes(config.secure_aggregation, config, built)
    yield from bottleneck_clashes(config, built)
    if config.engine.store == "disk" and config.engine.name == "workers":
        yield 'engine.store = "disk" needs cohorts that take turns: engine.name = "workers" has all clients in memory at once'
    if config.model.device_map and config.engine.name == "ray":
        yield 'model.device_map spreads the model of one process over GPUs: every actor of engine.name = "ray" holds the whole on one'
    if config.policy.name == "splitft" and config.tokens.held_out == 0:
        yield 'policy "splitft" goes by the clients\' held-out text: set tokens.held_out above 0'


def moves(config: RunConfig) -> bool:
    """Whether the policy may move cuts."""
    return config.policy.name not in ("fixed", "whole")


def asynchronous(config: RunConfig) -> bool:
    return config.clients.buffer > 0


def _of_ranks(config: RunConfig, built: Components) -> Iterator[str]:
    if built.ranks.uniform:
        return
    if not built.aggregator.unequal_ranks:
        yield (f'ranks "{config.ranks.name}" makes unequal ranks, which aggregator "{config.aggregator.name}" cannot merge; "product" can')
    wanted = {
        "clients.buffer": asynchronous(config),
        "synchronisation": not built.synchronisation.always,
        'split.server = "unaveraged"': config.split.server == "unaveraged",
    }
    for text in (text for text, is_set in wanted.items() if is_set):
        yield f'{text} needs adapters that keep their factors from round to round: set ranks = "uniform"'


def _of_server(config: RunConfig, built: Components) -> Iterator[str]:
    server, name, one_set = config.split.server, config.aggregator.name, config.split.server in ("shared", "alternating", "sequential")
    if server == "unaveraged":
        if not built.aggregator.partial_uploads:
            yield f'split.server = "unaveraged" sends only the server\'s part, which aggregator "{name}" cannot merge; "average" can'
        if moves(config):
            yield f'split.server = "unaveraged" gives every client blocks of its own for good: policy "{config.policy.name}" moves them'
    if server != "per_client":
        for is_set, text in (
            (asynchronous(config), "clients.buffer"),
            (not built.synchronisation.always, f'synchronisation "{config.synchronisation.name}"'),
        ):
            if is_set:
                yield f'{text} needs split.server = "per_client": with "{server}" no session could go on by itself'
    if one_set:
        for is_set, text in ((config.network.shared_link, "network.shared_link"), (config.network.pipeline, "network.pipeline")):
            if is_set:
                yield f'{text} is not modelled where clients share the server\'s adapters: split.server is "{server}"'
        if config.train.moments == "keep" and moves(config):
            yield f'train.moments = "keep" needs cuts that stay: with split.server = "{server}" a moved block has no moments of its own'
        if config.engine.name == "workers":
            yield f'split.server = "{server}" runs only with engine.name = "cohort" so far'
        if config.engine.name == "ray":
            yield f'split.server = "{server}" trains one set of adapters with all clients in turn, which engine.name = "ray" cannot divide'


def _of_folding(config: RunConfig, built: Components) -> Iterator[str]:
    if not built.aggregator.folds:
        return
    name = config.aggregator.name
    wanted = {
        "clients.buffer": asynchronous(config),
        "synchronisation": not built.synchronisation.always,
        "split.server": config.split.server == "unaveraged",
    }
    for text in (text for text, is_set in wanted.items() if is_set):
        yield f'aggregator "{name}" changes the frozen weights of everyone at once, which {text} does not allow'
    if config.train.moments == "keep":
        yield f'aggregator "{name}" begins every round with other adapters: train.moments = "keep" would carry moments of the old ones'
    if config.engine.name == "workers":
        yield f'aggregator "{name}" changes the frozen weights, which only engine.name = "cohort" does so far'


def _of_privacy(config: RunConfig, built: Components) -> Iterator[str]:
    """What would break the claim of a private rule: more of one client in a merge than it clips, decisions by raw updates, and rounds in
    which the data of one client decide how many come through, or how many steps another takes."""
    from splitft.apps.privacy_setup import private_in

    found = private_in(built.aggregator)
    if found is None:
        return
    wanted = {
        f'split.server = "{config.split.server}"': config.split.server != "per_client",
        "clients.buffer": asynchronous(config),
        f'synchronisation "{config.synchronisation.name}"': not built.synchronisation.always,
    }
    for text in (text for text, is_set in wanted.items() if is_set):
        yield f'aggregator "private" counts each client once in every round, clipped and with noise, which {text} does not keep to'
    if config.clients.deadline_s > 0:
        yield (
            f'clients.deadline_s = {config.clients.deadline_s:g} with clients.late = "{config.clients.late}": longer texts take longer, so '
            "who comes through, and with how many steps, would depend on a client's data, and the number of participants and the noise "
            'that are published with it, which aggregator "private" does not cover: set clients.deadline_s = 0'
        )
    if not isinstance(built.work, Equal):
        yield (
            f'work "{config.work.name}" divides steps by the time they take, which follows from the lengths of texts: one client\'s data '
            'would change the updates of all others, and aggregator "private" bounds its own alone: set work = "equal"'
        )


def _of_merging(config: RunConfig, built: Components) -> Iterator[str]:
    drift, clients, name = not built.synchronisation.always, config.clients, config.aggregator.name
    if asynchronous(config) and drift:
        yield "clients.buffer and a synchronisation rule both decide when to merge: choose one"
    if asynchronous(config) and clients.deadline_s > 0:
        yield "clients.buffer waits for nobody, so clients.deadline_s has no meaning with it: set it to 0"
    if built.aggregator.segments > 1 and (asynchronous(config) or drift):
        yield f'aggregator "{name}" uploads segments in turn, which needs a merge in every round'
    least, most = built.aggregator.least_participants, clients.buffer or clients.count
    if clients.count and least > most:
        yield f'aggregator "{name}" needs {least} updates at a time; {"clients.buffer" if clients.buffer else "clients.count"} is {most}'
    if drift:
        if min(clients.participation, clients.availability) < 1.0 or clients.dropout > 0 or clients.deadline_s > 0:
            yield (
                f'synchronisation "{config.synchronisation.name}" would drop the work of clients that are missing at an aggregation: '
                "set clients.participation = 1.0, without drop-outs or a deadline"
            )
        if moves(config):
            yield f'synchronisation "{config.synchronisation.name}" leaves adapters where they are: "{config.policy.name}" moves cuts'


def _of_codecs(config: RunConfig, built: Components) -> Iterator[str]:
    lossy = not (built.adapter_uplink.lossless and built.adapter_downlink.lossless)
    if lossy and not built.synchronisation.always:
        yield (
            f'synchronisation "{config.synchronisation.name}" sends adapters when it has decided to, which only codec "identity" does '
            "so far: leave adapter_uplink and adapter_downlink alone"
        )
    if built.controller.fixed:
        return
    if config.split.max_leak < 1.0:
        yield f'controller "{config.controller.name}" turns the codecs that split.max_leak was measured with: choose one of the two'
    if asynchronous(config):
        yield f'controller "{config.controller.name}" goes by what a whole round gave, which clients.buffer does not have: set it to 0'
    used = [built.uplink, built.downlink, *([built.exit_downlink, built.exit_uplink] if config.split.labels == "client" else [])]
    if all(codec.scaled(2.0) == codec for codec in used):
        yield (
            f'controller "{config.controller.name}" turns a dial that none of the codecs has: use error_bounded, topk, temporal or '
            "lowrank, in any composition"
        )
