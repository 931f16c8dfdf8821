"""The cost model of a run: what its configuration and its codecs say of flops, bytes and links."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from splitft.adapt.cost import CostModel
from splitft.clock import Network
from splitft.compress.base import HEADER_BYTES, Codec
from splitft.config import RunConfig
from splitft.data.base import ClientData
from splitft.lora import Layout
from splitft.types import ModelShape, Profile

if TYPE_CHECKING:
    from splitft.apps.assemble import Base, Components


def network_of(config: RunConfig, server: Profile) -> Network:
    """What the clients share: what they send is the server's downlink, what it sends them its uplink."""
    section = config.network
    return Network(
        section.server_slots,
        section.shared_link,
        server.downlink_bytes_per_s,
        server.uplink_bytes_per_s,
        section.downlink_order,
        section.pipeline,
    )


def cost_model(
    config: RunConfig,
    shape: ModelShape,
    server: Profile,
    components: Components,
    layout: Layout,
    base: Base,
    tokens: int,
    epochs: float = 1.0,
) -> CostModel:
    """The cost model of one client whose rows have `tokens` tokens on average and are trained `epochs` times."""
    batch, visits = config.train.batch_size, max(1.0, epochs)

    def bytes_per_value(codec: Codec) -> float:
        """On average over the run: samples are sent for the first time once."""
        first, later = (codec.expected_bytes(*probe, base.dtype, visit, batch) for visit in (0, 1))
        return (first + (visits - 1.0) * later) / visits / values

    # A step's packet: what a codec sends once for each is shared by all rows.
    probe = (batch * tokens, config.bottleneck.channels or shape.hidden_size)
    values = math.prod(probe)
    return CostModel(
        shape=shape,
        server=server,
        batch_size=config.train.batch_size,
        sequence_tokens=tokens,
        rank=max(entry.rank for entry in layout.entries),
        local_steps=config.train.local_steps,
        exit_on_client=config.split.labels == "client",
        tail_blocks=config.split.tail_blocks,
        modules=tuple(sorted({entry.key.module for entry in layout.entries})),
        weight_bytes=base.dtype.itemsize,
        compute_bytes=base.dtype.itemsize,
        uplink_bytes_per_value=bytes_per_value(components.uplink),
        downlink_bytes_per_value=bytes_per_value(components.downlink),
        label_bytes=2 if shape.vocabulary < 65_535 else 4,
        packet_header_bytes=HEADER_BYTES,
        checkpointing=config.model.gradient_checkpointing,
        minimum_cut=config.split.minimum_cut,
        maximum_cut=config.split.maximum_cut,
        network=network_of(config, server),
        crossing_width=config.bottleneck.channels,
    )


def client_costs(
    config: RunConfig,
    shape: ModelShape,
    server: Profile,
    components: Components,
    layout: Layout,
    base: Base,
    clients: Sequence[ClientData],
) -> tuple[CostModel, ...]:
    """One cost model for each client, by the length of its rows and how often the run goes through them."""
    drawn = config.rounds * config.train.local_steps * config.train.gradient_accumulation * config.train.batch_size
    rows = [one.train for one in clients]
    return tuple(
        cost_model(config, shape, server, components, layout, base, math.ceil(one.tokens / len(one)), drawn / len(one)) for one in rows
    )
