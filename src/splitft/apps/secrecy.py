"""Secure aggregation in a configuration: what it does not go with, each with the reason, and what the engine is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from splitft.adapt.fixed import Fixed
from splitft.engine.secure_round import Secrecy
from splitft.errors import ConfigError
from splitft.secure.cohorts import require_cuts

if TYPE_CHECKING:
    from splitft.apps.assemble import Components
    from splitft.config import RunConfig
    from splitft.config_secure import SecureAggregationSection

NAME = "secure_aggregation"


def secrecy_of(section: SecureAggregationSection) -> Secrecy | None:
    """How a run sums updates behind masks, or None."""
    return Secrecy(section.threshold, section.minimum, section.limit) if section.enabled else None


def secrecy_clashes(section: SecureAggregationSection, config: RunConfig, built: Components) -> Iterator[str]:
    """One line for everything that secure aggregation contradicts."""
    if not section.enabled:
        return
    if not built.aggregator.linear:
        yield (
            f'{NAME} shows the rule nothing but the mean, and aggregator "{config.aggregator.name}" looks at single updates: choose '
            'between sums behind masks ("average", "freeze_a", or "fed_avgm", "fed_adam", "fed_yogi" over one) and rules that check '
            "updates"
        )
    if config.clients.buffer:
        yield f"{NAME} needs clients that end a round together: set clients.buffer to 0"
    if not built.synchronisation.always:
        yield f'{NAME} sums in every round, and synchronisation "{config.synchronisation.name}" looks at single updates: take "every_round"'
    if config.split.server != "per_client":
        yield f'{NAME} needs split.server = "per_client"; it is "{config.split.server}"'
    if config.adapter_uplink.name != "identity":
        yield f'{NAME} sends whole numbers behind masks, which no codec makes smaller: set adapter_uplink = "identity"'
    if 0.0 < section.threshold <= 0.5:
        yield f"{NAME}.threshold is {section.threshold}: with half of the clients or fewer a server could open single updates"
    yield from _of_clients(section, config, built)


def _of_clients(section: SecureAggregationSection, config: RunConfig, built: Components) -> Iterator[str]:
    """How many there are, and how deep their cuts are."""
    clients = config.clients
    drawn = max(clients.minimum, round(clients.participation * clients.count))
    if clients.count and min(drawn, clients.count) < section.minimum:
        yield (
            f"{NAME} hides an adapter among {section.minimum} clients or more, and a round has {min(drawn, clients.count)}: raise "
            "clients.count, clients.participation or clients.minimum"
        )
    cuts = built.policy.cuts if isinstance(built.policy, Fixed) else ()
    if len(cuts) > 1:
        yield from _of_cuts(cuts, section.minimum)
    if config.train.moments == "keep" and len(set(cuts)) != 1:
        yield (
            f"train.moments = \"keep\" sends a block's moments to the server when a cut goes back, and they tell of one client's gradients "
            f'what {NAME} hides: set train.moments = "reset", or policy "fixed" with one cut for all'
        )


def _of_cuts(cuts: Sequence[int], minimum: int) -> Iterator[str]:
    try:
        require_cuts(cuts, minimum)
    except ConfigError as problem:
        yield f"policy.cuts with {NAME}: {problem}"
