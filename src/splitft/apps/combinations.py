"""What goes with what: methods that contradict each other are refused before anything is loaded, each with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from splitft.apps.assemble import Components
    from splitft.config import RunConfig


def clashes_of(config: RunConfig, built: Components) -> Iterator[str]:
    """One line for every contradiction between the chosen methods."""
    rule, name, server = built.aggregator, config.aggregator.name, config.split.server
    asynchronous, drift = config.clients.buffer > 0, not built.synchronisation.always
    if not built.ranks.uniform:
        if not rule.unequal_ranks:
            yield f'ranks "{config.ranks.name}" makes unequal ranks, which aggregator "{name}" cannot merge; "product" can'
        for wanted, text in ((asynchronous, "clients.buffer"), (drift, "synchronisation"), (server == "unaveraged", "split.server")):
            if wanted:
                yield f'{text} needs adapters that keep their factors from round to round: set ranks = "uniform"'
    if server == "unaveraged" and not rule.partial_uploads:
        yield f'split.server = "unaveraged" sends only the server\'s part, which aggregator "{name}" cannot merge; "average" can'
    if server != "per_client":
        for wanted, text in ((asynchronous, "clients.buffer"), (drift, f'synchronisation "{config.synchronisation.name}"')):
            if wanted:
                yield f'{text} needs split.server = "per_client": with "{server}" no session could go on by itself'
    if rule.folds:
        for wanted, text in ((asynchronous, "clients.buffer"), (drift, "synchronisation"), (server == "unaveraged", "split.server")):
            if wanted:
                yield f'aggregator "{name}" changes the frozen weights of everyone at once, which {text} does not allow'
    if server in ("shared", "sequential"):
        for wanted, text in ((config.network.shared_link, "network.shared_link"), (config.network.pipeline, "network.pipeline")):
            if wanted:
                yield f'{text} is not modelled where clients wait for each other: split.server is "{server}"'
    if asynchronous and drift:
        yield "clients.buffer and a synchronisation rule both decide when to merge: choose one"
    if rule.segments > 1 and (asynchronous or drift):
        yield f'aggregator "{name}" uploads segments in turn, which needs a merge in every round'
    if drift and config.clients.participation < 1.0:
        yield f'synchronisation "{config.synchronisation.name}" lets clients go on by themselves: set clients.participation = 1.0'
    if config.engine.name == "workers":
        if rule.folds:
            yield f'aggregator "{name}" changes the frozen weights, which only engine.name = "cohort" does so far'
        if server in ("shared", "alternating", "sequential"):
            yield f'split.server = "{server}" runs only with engine.name = "cohort" so far'
