"""What the two ends of a client's streams remember from round to round: caches of samples, errors to make up for, adapters it has.

Both ends drop all of it together when it can no longer fit: when a client's cut or its part of the model moves, or a codec changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from splitft.compress.base import Codec, Samples
from splitft.types import Plan
from splitft.wire import PLACES, Ends, Stream, open_streams

if TYPE_CHECKING:
    from splitft.engine.settings import TrainSettings


class Memory(Protocol):
    """Whatever remembers: a codec, or the memory of labels."""

    def flatten(self, state: Any) -> dict[str, Tensor]: ...

    def restore(self, tensors: Mapping[str, Tensor]) -> Any: ...


ADAPTERS_UP, ADAPTERS_DOWN = "up adapters", "down adapters"
BOTH, SENDER, RECEIVER = "both", "sender", "receiver"


@dataclass(frozen=True)
class StreamStates:
    """By place of a stream: its codec, the `forms` it belongs to, its `ends`. `stored`: ends as a checkpoint has them, not yet looked at.

    `known` [p]: the adapters as the client last received them, where changes against them are sent.
    """

    forms: Mapping[str, str] = field(default_factory=dict)
    ends: Mapping[str, Ends] = field(default_factory=dict)
    codecs: Mapping[str, Memory] = field(default_factory=dict)
    stored: Mapping[str, Tensor] = field(default_factory=dict)
    known: Tensor | None = None

    def at(self, place: str, form: str, codec: Memory) -> Ends | None:
        """The ends of a stream, if they belong to this form."""
        if self.forms.get(place) != form:
            return None
        if place in self.ends:
            return self.ends[place]
        if both := self._named(f"{place}.{BOTH}."):
            state = codec.restore(both)
            return Ends(state, state)
        sender, receiver = self._named(f"{place}.{SENDER}."), self._named(f"{place}.{RECEIVER}.")
        return Ends(codec.restore(sender), codec.restore(receiver)) if sender or receiver else None

    def with_ends(self, place: str, form: str, codec: Memory, ends: Ends) -> StreamStates:
        """With the ends of one more stream."""
        return replace(
            self,
            forms={**self.forms, place: form},
            ends={**self.ends, place: ends},
            codecs={**self.codecs, place: codec},
        )

    def _named(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in self.stored.items() if name.startswith(prefix)}


def form_of(codec: Codec, plan: Plan | None) -> str:
    """What a stream's memory belongs to: a codec with its fields, and (tensors of a step) where the model is cut."""
    return repr(codec) if plan is None else f"{codec!r} {plan.cut} {plan.tail_blocks} {plan.exit_on_client}"


def open_step_streams(
    settings: TrainSettings, plan: Plan, round_index: int, before: StreamStates | None
) -> tuple[Stream, Stream, Stream, Stream]:
    """The four streams of a client's steps in a round, which go on from what was left of them."""
    ends = {}
    for place, codec in zip(PLACES, settings.codecs, strict=True):
        if before is not None and (found := before.at(place, form_of(codec, plan), codec)) is not None:
            ends[place] = found
    return open_streams(settings.codecs_at(plan.dial), settings.seed, plan.client, round_index, ends, settings.secret)


def states_after(settings: TrainSettings, plan: Plan, streams: Sequence[Stream]) -> StreamStates:
    """What to remember of a round's steps."""
    states = StreamStates()
    for place, codec, stream in zip(PLACES, settings.codecs, streams, strict=True):
        if stream.sender is not None or stream.receiver is not None:
            states = states.with_ends(place, form_of(codec, plan), codec, stream.ends)
    return states


def joined(client: StreamStates, server: StreamStates) -> StreamStates:
    """The ends that a client and its session keep apart, as one value: of what goes up the client has the sender."""
    ends = {
        place: Ends(client.ends[place].sender, server.ends[place].receiver)
        if place.startswith("up")
        else Ends(server.ends[place].sender, client.ends[place].receiver)
        for place in client.ends
        if place in server.ends
    }
    return replace(client, ends=ends)


def flattened(states: StreamStates) -> dict[str, Tensor]:
    """The ends as named tensors, for a checkpoint; what has been stored and not been used since, as it is."""
    tensors: dict[str, Tensor] = {} if states.known is None else {"known": states.known}
    for place in states.forms:
        if place not in states.ends:
            tensors.update({name: tensor for name, tensor in states.stored.items() if name.startswith(f"{place}.")})
            continue
        ends = states.ends[place]
        shared = ends.sender is ends.receiver
        for side, state in ((BOTH, ends.sender),) if shared else ((SENDER, ends.sender), (RECEIVER, ends.receiver)):
            if state is not None:
                found = states.codecs[place].flatten(state)
                tensors.update({f"{place}.{side}.{name}": tensor for name, tensor in found.items()})
    return tensors


def unflattened(forms: Mapping[str, str], tensors: Mapping[str, Tensor]) -> StreamStates:
    """The inverse of `flattened`; a stream's ends are looked at when it is opened."""
    return StreamStates(dict(forms), {}, {}, {name: tensor for name, tensor in tensors.items() if name != "known"}, tensors.get("known"))


def samples_of(ids: Tensor | Sequence[int], lengths: Tensor | Sequence[int]) -> Samples:
    """The samples of a batch: the rows of a client's data they are, and their tokens."""

    def plain(values: Tensor | Sequence[int]) -> tuple[int, ...]:
        return tuple(values.tolist() if isinstance(values, torch.Tensor) else values)

    return Samples(plain(ids), plain(lengths))
