"""Noise before a run: the rule told how many clients and rounds it is to cover, the user told what it buys, what would undo it refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from splitft.aggregate.base import Aggregator
from splitft.aggregate.private import SEEDED, Private
from splitft.aggregate.wrapper import Wrapper
from splitft.apps.assemble import Components
from splitft.compress.noise import Noise, noise_in
from splitft.config import RunConfig
from splitft.engine.adapters import ROW
from splitft.lora import Layout

# At which the epsilon of a row is told.
ROW_DELTA = 1e-5
REPLACED = {"replace": "one client's data replaced by anything", "absent": "one client's update counted as zero"}


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
    rule = found.settled(clients, config.rounds)
    rule.require_useful(layout, participants_of(config, clients))
    return replace(components, aggregator=_with(components.aggregator, rule))


def participants_of(config: RunConfig, clients: int) -> int:
    """How many of so many clients take part in a round."""
    return min(clients, max(config.clients.minimum, round(config.clients.participation * clients)))


def federation_clashes(config: RunConfig, built: Components) -> Iterator[str]:
    """One line for everything that would break the claim of a private rule in a federation only."""
    found = private_in(built.aggregator)
    if found is None:
        return
    if config.federation.update_norm_factor > 0:
        yield (
            "federation.update_norm_factor: whose update counts would depend on the lengths of all before the clip, which the claim of "
            'aggregator "private" does not cover; set it to 0: updates are clipped, and those that are not finite stay refused'
        )
    if found.secret_seed:
        yield f"aggregator.secret_seed is in the configuration, which clients are sent, and {SEEDED}: set it to 0"


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


def told_before(config: RunConfig, components: Components, layout: Layout, clients: int, hidden_size: int) -> Iterator[str]:
    """What noise there will be in a run of so many clients and what it buys, in words, before it starts. `components` are settled; 0
    clients: how many there are is not known yet."""
    position = "the vector of one position"
    leaving = [("uplink", components.uplink, config.bottleneck.channels or hidden_size, position)]
    if config.split.labels == "client":
        leaving.append(("exit_uplink", components.exit_uplink, hidden_size, position))
    leaving.append(("adapter_uplink", components.adapter_uplink, ROW, f"{ROW} values of an adapter's change"))
    for name, codec, width, row in leaving:
        if (noise := noise_in(codec)) is not None:
            yield f"noise on {name}: {_of_rows(noise, width, row)}"
    if config.split.labels == "client" and noise_in(components.uplink) is not None:
        if noise_in(components.exit_uplink) is None:
            yield "exit_uplink has no noise: labels can be read from the gradients that a U-shape returns"
        if noise_in(components.exit_downlink) is not None:
            yield 'exit_downlink puts noise on what the server sends, which hides nothing: set exit_downlink = "cast"'
    if (rule := private_in(components.aggregator)) is not None:
        yield f"aggregator private: {_of_merges(rule, layout, participants_of(config, clients))}"
    if config.secure_aggregation.enabled:
        yield (
            f"secure aggregation: clients' own adapters are summed among {config.secure_aggregation.minimum} clients or more; what "
            "activations, labels and gradients tell the same server it does not hide"
        )
    yield from cautions(config, components.aggregator)


def _of_rows(noise: Noise, width: int, row: str) -> str:
    """The size of a codec's noise, and what it buys one row: `row` says what that is."""
    epsilon = noise.epsilon_of_rows(ROW_DELTA)
    size = f"{noise.in_units_of_rms(width):.3g} times the root mean square of a row"
    if epsilon is None:
        return f"{size} on every channel: obfuscation, no epsilon"
    return (
        f"{size} at the clip, on every channel; epsilon {epsilon:.3g} at delta {ROW_DELTA:g} for one row ({row}) sent once; a text is many "
        "rows, and every epoch sends them again"
    )


def _of_merges(rule: Private, layout: Layout, participants: int) -> str:
    """The forecast of a private rule."""
    if rule.multiplier() == 0:
        return "clip without noise: no epsilon"
    if participants == 0:
        return "the forecast needs the number of clients, which follows from the data; splitft run tells it before it starts"
    found = rule.forecast(layout, participants)
    size = (
        f"{found.merges} merges of {participants} participants, noise multiplier {found.multiplier:.3g} (clips on the sum), the noise on "
        f"the mean {found.noise_to_clip:.3g} times as long as the longest update"
    )
    if rule.secret_seed:
        return f"{size}; no epsilon: {SEEDED}"
    return f"{size}; epsilon {found.epsilon:.3g} at delta {found.delta:.2g} for {REPLACED[rule.unit]}"
