"""Private runs: the rule told how many clients and rounds its noise is to cover, the user told what that buys, the end checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from splitft.aggregate.base import Aggregator
from splitft.aggregate.private import Private
from splitft.aggregate.wrapper import Wrapper
from splitft.apps.assemble import Components
from splitft.config import RunConfig
from splitft.lora import Layout


def private_in(rule: Aggregator) -> Private | None:
    """The private rule of a run, which a server optimizer may stand around."""
    if isinstance(rule, Private):
        return rule
    return private_in(rule.rule) if isinstance(rule, Wrapper) else None


def settle(config: RunConfig, components: Components, layout: Layout, clients: int) -> Components:
    """The components with a private rule, if there is one, settled for this run. Raises ConfigError when its budget cannot be met or buys
    nothing but noise."""
    found = private_in(components.aggregator)
    if found is None:
        return components
    participants = min(clients, max(config.clients.minimum, round(config.clients.participation * clients)))
    rule = found.settled(clients, config.rounds, participants / clients)
    rule.require_useful(layout, participants)
    return replace(components, aggregator=_with(components.aggregator, rule))


def _with(rule: Aggregator, private: Private) -> Aggregator:
    if isinstance(rule, Private):
        return private
    assert isinstance(rule, Wrapper)
    changed: Any = replace(rule, rule=_with(rule.rule, private))
    found: Aggregator = changed
    return found


def cautions(config: RunConfig, rule: Aggregator) -> Iterator[str]:
    """What the user of a private run is told when it begins."""
    found = private_in(rule)
    if found is None:
        return
    yield from found.cautions
    followed = {"policy": config.policy.name in ("splitft", "combined"), "ranks": config.ranks.name == "importance"}
    for seam in (seam for seam, follows in followed.items() if follows):
        name = getattr(config, seam).name
        yield f'{seam} "{name}" decides by figures of single clients, which the claim of aggregator "private" does not cover.'
