"""Adapters on their way: whole and bit for bit, or, with a codec that loses something, as changes against what both ends know.

Down, the change is against the adapters as the client last received them (before its first round: the start, which everyone knows), so
what a codec loses is part of the next change. Up, it is against what the client began the round with; the server adds it to the adapters
it meant to send, so that what was lost on the way down is not lost to the federation. A change travels as rows of ROW values, the last one
filled up with zeros.

Axes: p adapter parameters, q parameters that travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from splitft.compress.base import Packet, Samples
from splitft.engine.exchange import packet_bytes, parse_packet
from splitft.engine.settings import TrainSettings
from splitft.engine.streams import ADAPTERS_DOWN, ADAPTERS_UP, StreamStates, form_of
from splitft.errors import ProtocolError
from splitft.types import Plan
from splitft.wire import PLACES, Stream, StreamName, carry_together

ROW = 128
# By place of a stream: sums over what was sent there.
Facts: TypeAlias = dict[str, dict[str, float]]


@dataclass
class AdapterStreams:
    """A client's streams of adapters in a round (None: adapters travel bit for bit), the adapters [p] it last received, and what of this
    round's [q] has not come through."""

    up: Stream | None
    down: Stream | None
    known: Tensor | None
    missing: Tensor | None = None

    @classmethod
    def open(cls, settings: TrainSettings, plan: Plan, round_index: int, before: StreamStates | None, start: Tensor) -> AdapterStreams:
        """The streams of a round, which go on from those before it."""

        def stream(place: str) -> Stream | None:
            codec = settings.adapter_uplink if place == ADAPTERS_UP else settings.adapter_downlink
            if codec.lossless:
                return None
            ends = None if before is None else before.at(place, form_of(codec, None), codec)
            own = settings.secret if settings.secret and place == ADAPTERS_UP else settings.seed
            return Stream.open(codec, StreamName(own, plan.client, round_index, place), ends)

        up, down = stream(ADAPTERS_UP), stream(ADAPTERS_DOWN)
        known = None if down is None else start if before is None or before.known is None else before.known
        return cls(up, down, known)

    def remembered(self, settings: TrainSettings, states: StreamStates) -> StreamStates:
        """The states of a round's steps with those of its adapters."""
        streams = ((ADAPTERS_UP, self.up, settings.adapter_uplink), (ADAPTERS_DOWN, self.down, settings.adapter_downlink))
        for place, stream, codec in streams:
            if stream is not None and (stream.sender is not None or stream.receiver is not None):
                states = states.with_ends(place, form_of(codec, None), codec, stream.ends)
        return replace(states, known=self.known)


def send_change(stream: Stream, change: Tensor, segment: int) -> bytes:
    """A change [q] as a packet."""
    rows = _rows(change)
    return packet_bytes(stream.send(rows, _samples(len(rows), segment)))


def receive_change(stream: Stream, data: bytes | memoryview, size: int, segment: int) -> Tensor:
    """A change [q] from its packet. Raises ProtocolError or CodecError."""
    packet, count = parse_packet(data), -(-size // ROW)
    if packet.shape != (count, ROW):
        raise ProtocolError(
            f"a change of adapters of shape {packet.shape} arrived, due are {size} parameters in {count} rows of {ROW}.",
            "both sides must run the same plan.",
        )
    return stream.receive(packet, _samples(count, segment)).float().reshape(-1)[:size]


def carry_changes(streams: Sequence[Stream], changes: Sequence[Tensor], segments: Sequence[int]) -> tuple[list[Tensor], list[bytes]]:
    """The changes [q] of many clients as their other ends decode them, and their packets, in one pass."""
    rows = [_rows(change) for change in changes]
    counts = [len(part) for part in rows]
    samples = [_samples(count, segment) for count, segment in zip(counts, segments, strict=True)]
    decoded, packets = carry_together(streams, torch.cat(rows), counts, samples)
    parts = torch.split(decoded, counts)
    found = [part.float().reshape(-1)[: len(change)] for part, change in zip(parts, changes, strict=True)]
    return found, [packet_bytes(packet) for packet in packets]


def adapter_packet_bytes(settings: TrainSettings, size: int, up: bool) -> float:
    """About how many bytes so many parameters take on the wire."""
    codec = settings.adapter_uplink if up else settings.adapter_downlink
    empty = Packet(0, torch.float32, (0, ROW), b"").size_bytes
    if codec.lossless:
        return empty + 4 * size
    return empty + (codec.expected_bytes(-(-size // ROW), ROW, torch.float32, 1) if size else 0)


def _rows(change: Tensor) -> Tensor:
    flat = change.detach().to("cpu", torch.float32)
    return torch.nn.functional.pad(flat, (0, -len(flat) % ROW)).reshape(-1, ROW)


def _samples(count: int, segment: int) -> Samples:
    """Adapters count as one sample, every segment of theirs as another one."""
    return Samples((segment,), (count,)) if count else Samples((), ())


def facts_of(steps: Sequence[Stream], adapters: AdapterStreams) -> Facts:
    """What the codecs of a client's streams say of what was sent in a round, by place; streams of codecs that say nothing are left out."""
    streams = [*zip(PLACES, steps, strict=True), (ADAPTERS_UP, adapters.up), (ADAPTERS_DOWN, adapters.down)]
    return {place: dict(stream.facts) for place, stream in streams if stream is not None and stream.facts}


def facts_together(client: Facts, server: Facts) -> Facts:
    """What both ends say, each of what it sends, in the order of an engine that has both."""
    both = {**client, **server}
    return {place: both[place] for place in (*PLACES, ADAPTERS_UP, ADAPTERS_DOWN) if place in both}
