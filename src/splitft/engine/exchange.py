"""What both ends of a round share: which columns of an adapter row a client holds, and the round's own messages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from splitft.compress.base import Codec, Packet
from splitft.engine.settings import TrainSettings
from splitft.errors import ProtocolError
from splitft.lora import Layout
from splitft.messages import Frame, RoundEnd, RoundStart, Type, round_frame
from splitft.types import Plan

# Chosen columns of an adapter row: ranges where that is enough, else positions [q].
Columns: TypeAlias = list[slice] | Tensor


@dataclass(frozen=True)
class Ownership:
    """Which blocks of a model with `blocks` blocks a client holds under a plan: the front, and in a U-shape the tail."""

    plan: Plan
    blocks: int

    @property
    def server_end(self) -> int:
        """One behind the server's last block."""
        return self.blocks - self.plan.tail_blocks if self.plan.exit_on_client else self.blocks

    @cached_property
    def held(self) -> frozenset[int]:
        """The client's blocks."""
        return frozenset(self.client_blocks())

    def client_blocks(self) -> list[int]:
        return [*range(self.plan.cut), *range(self.server_end, self.blocks)]

    def server_blocks(self) -> list[int]:
        return list(range(self.plan.cut, self.server_end))

    def client_columns(self, layout: Layout, trained: Tensor | None = None) -> Columns:
        """What of a row travels to the client: its own blocks' adapters, at its own ranks, without what nobody trains."""
        own = self._ranges(layout)
        if trained is None and not self.plan.ranks:
            return own
        return _chosen(layout, tuple((part.start, part.stop) for part in own), self.plan.ranks, trained).nonzero()[:, 0]

    def upload_columns(self, layout: Layout, trained: Tensor | None = None) -> Columns:
        """What of a row travels back: the same, or this round's segment of it."""
        columns, plan = self.client_columns(layout, trained), self.plan
        if plan.segments == 1:
            return columns
        every = positions(columns)
        edges = [len(every) * k // plan.segments for k in range(plan.segments + 1)]
        return every[edges[plan.segment] : edges[plan.segment + 1]]

    def client_size(self, layout: Layout, trained: Tensor | None = None) -> int:
        """How many `client_columns` there are, without making them where arithmetic is enough."""
        if trained is not None or not self.plan.ranks or layout.matrices:
            return size_of(self.client_columns(layout, trained))
        ranks = zip(layout.entries, self.plan.ranks, strict=True)
        return sum(min(rank, one.rank) * (one.inputs + one.outputs) for one, rank in ranks if one.key.block in self.held)

    def upload_size(self, layout: Layout, trained: Tensor | None = None) -> int:
        """How many `upload_columns` there are."""
        every, plan = self.client_size(layout, trained), self.plan
        return every * (plan.segment + 1) // plan.segments - every * plan.segment // plan.segments

    def _ranges(self, layout: Layout) -> list[slice]:
        """The columns of the client's blocks, without bottlenecks of other cuts."""
        tail = layout.columns(self.server_end, self.blocks + 1) if self.plan.exit_on_client else slice(0, 0)
        return without([layout.columns(0, self.plan.cut), tail], self.unused(layout))

    def server_columns(self, layout: Layout) -> slice:
        """The columns of the server's blocks, and of what stands behind the last one; bottlenecks of other cuts among them."""
        return layout.columns(self.plan.cut, self.server_end if self.plan.exit_on_client else self.blocks + 1)

    def unused(self, layout: Layout) -> list[slice]:
        """The columns of bottlenecks that this plan's tensors do not go through."""
        plan = self.plan
        own = set() if plan.is_whole(self.blocks) else {("cut", plan.cut)}
        if own and plan.exit_on_client:
            own.add(("exit", self.server_end))
        return [slice(one.start, one.end) for one in layout.matrices if (one.place, one.boundary) not in own]


@lru_cache(maxsize=16)
def _chosen(layout: Layout, ranges: tuple[tuple[int, int], ...], ranks: tuple[int, ...], trained: Tensor | None) -> Tensor:
    """Which columns [p] (bool) lie in the ranges, are used at these ranks, and are trained. Clients of one cut often share all three."""
    mask = torch.zeros(layout.parameters, dtype=torch.bool)
    for start, stop in ranges:
        mask[start:stop] = True
    if ranks:
        mask &= layout.active(ranks)
    return mask if trained is None else mask & trained


def without(ranges: list[slice], others: list[slice]) -> list[slice]:
    """Ranges with other ranges, ascending, taken out."""
    for other in others:
        found = []
        for one in ranges:
            if other.stop <= one.start or other.start >= one.stop:
                found.append(one)
                continue
            found += [part for part in (slice(one.start, other.start), slice(other.stop, one.stop)) if part.start < part.stop]
        ranges = found
    return ranges


def positions(columns: Columns) -> Tensor:
    """The chosen columns one by one [q]."""
    return columns if isinstance(columns, Tensor) else torch.cat([torch.arange(part.start, part.stop) for part in columns])


def take(row: Tensor, columns: Columns) -> Tensor:
    """The chosen columns of a row [p] as one vector."""
    return row[columns.to(row.device)] if isinstance(columns, Tensor) else torch.cat([row[part] for part in columns])


def size_of(columns: Columns) -> int:
    """How many columns are chosen."""
    return len(columns) if isinstance(columns, Tensor) else sum(part.stop - part.start for part in columns)


def put(row: Tensor, columns: Columns, vector: Tensor) -> None:
    """Write a vector from `take` back. Raises ProtocolError when its length does not fit."""
    size = size_of(columns)
    if vector.shape != (size,):
        raise ProtocolError(
            f"adapters of shape {tuple(vector.shape)} arrived, {size} parameters are due.", "both sides must run the same plan."
        )
    if isinstance(columns, Tensor):
        row[columns.to(row.device)] = vector
        return
    start = 0
    for part in columns:
        row[part] = vector[start : start + part.stop - part.start]
        start += part.stop - part.start


def packet_bytes(packet: Packet) -> bytes:
    """Header and payload as one piece."""
    return b"".join((packet.header(), packet.payload))


def parse_packet(data: bytes | memoryview) -> Packet:
    """The single packet in `data`. Raises CodecError or ProtocolError."""
    packet, rest = Packet.parse(memoryview(data))
    if len(rest):
        raise ProtocolError(f"{len(rest)} bytes follow a packet.", "run the same splitft version on both sides.")
    return packet


def round_start_frame(plan: Plan, round_index: int, first_step: int, settings: TrainSettings, adapters: Tensor | bytes) -> Frame:
    """The message that opens a round for one client, with the adapters [q] of its own blocks to start from, which may be encoded already
    (unless it has them)."""
    # A default is left out of the message only where it is left out here.
    dial = {} if plan.dial == (1.0, 1.0) else {"activations_dial": plan.dial[0], "gradients_dial": plan.dial[1]}
    fields = RoundStart(
        round=round_index,
        client=plan.client,
        cut=plan.cut,
        tail_blocks=plan.tail_blocks,
        exit_on_client=plan.exit_on_client,
        local_steps=plan.local_steps,
        gradient_accumulation=settings.gradient_accumulation,
        batch_size=settings.batch_size,
        rank=plan.rank,
        clip_norm=settings.clip_norm,
        first_step=first_step,
        rates=[settings.rate(first_step, step, plan.local_steps) for step in range(plan.local_steps)],
        ranks=list(plan.ranks),
        download=plan.download,
        upload=plan.upload,
        segment=plan.segment,
        segments=plan.segments,
        **dial,
    )
    packets: tuple[bytes, ...] = ()
    if plan.download:
        packets = (adapters if isinstance(adapters, bytes) else encode_vector(adapters, settings.adapter_downlink),)
    return round_frame(Type.ROUND_START, fields, packets)


def round_end_frame(
    plan: Plan, round_index: int, tokens: int, squared_norm: float, loss_sum: float, adapters: Tensor | bytes, codec: Codec
) -> Frame:
    """The message that closes a round for one client, with the adapters [q] of its own blocks, which may be encoded already (unless it
    keeps them)."""
    fields = RoundEnd(round=round_index, client=plan.client, tokens=tokens, squared_norm=squared_norm, loss_sum=loss_sum)
    packets = (adapters if isinstance(adapters, bytes) else encode_vector(adapters, codec),) if plan.upload else ()
    return round_frame(Type.ROUND_END, fields, packets)


def encode_vector(vector: Tensor, codec: Codec) -> bytes:
    packet, _ = codec.encode(vector, codec.init())
    return packet_bytes(packet)


def decode_vector(data: bytes | memoryview, codec: Codec) -> Tensor:
    """Adapters [q] in float32 from their packet."""
    vector, _ = codec.decode(parse_packet(data), codec.init())
    return vector.float()


def spread(decoded: Tensor, shape: torch.Size, valid: Tensor | None, like: Tensor) -> Tensor:
    """Tokens [q d] laid out as [b t d] with zeros for padding. Raises ProtocolError when their number does not fit."""
    count = shape[0] * shape[1] if valid is None else int(valid.sum())
    if decoded.shape != (count, shape[2]):
        raise ProtocolError(
            f"a tensor of shape {tuple(decoded.shape)} arrived, due are {count} tokens of width {shape[2]}.", "check the plan."
        )
    flat = decoded.to(like.device, like.dtype)
    if valid is None:
        return flat.reshape(shape)
    result = like.new_zeros((shape[0] * shape[1], shape[2]))
    result[valid] = flat
    return result.reshape(shape)


def packet_of(frame: Frame, index: int) -> Packet:
    """Packet number `index` of a frame. Raises ProtocolError when it has fewer."""
    if index >= len(frame.packets):
        raise ProtocolError(
            f"{frame.kind.name} carries {len(frame.packets)} packets, number {index + 1} is due.", "check both sides' versions."
        )
    return parse_packet(frame.packets[index])
