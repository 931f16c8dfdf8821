"""Labels of a step on their way to the server: of a sample it has had before they are not sent again, where samples are named.

Axes: q tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from splitft.compress.base import Packet, Samples
from splitft.engine.batches import label_bytes, label_packet, read_labels
from splitft.engine.streams import StreamStates
from splitft.errors import ProtocolError
from splitft.wire import Ends

PLACE = "up labels"
FORM = "labels"
# Labels [t] of samples by id. A sample that is there is known at both ends.
Known: TypeAlias = Mapping[int, Tensor]


class LabelMemory:
    """Labels by sample as both ends remember them."""

    def flatten(self, state: Known) -> dict[str, Tensor]:
        if not state:
            return {}
        sizes = torch.tensor([[sample, len(labels)] for sample, labels in state.items()])
        return {"samples": sizes, "labels": torch.cat(list(state.values())).to(torch.int32)}

    def restore(self, tensors: Mapping[str, Tensor]) -> Known:
        if "samples" not in tensors:
            return {}
        ids, sizes = tensors["samples"].unbind(1)
        parts = torch.split(tensors["labels"], sizes.tolist())
        return dict(zip(ids.tolist(), parts, strict=True))


MEMORY = LabelMemory()


def known_labels(states: StreamStates | None, receiver: bool = False) -> Known:
    """The labels that an end remembers."""
    ends = None if states is None else states.at(PLACE, FORM, MEMORY)
    return {} if ends is None else ends.receiver if receiver else ends.sender


def with_labels(states: StreamStates, known: Known) -> StreamStates:
    """The states with what both ends know of labels."""
    return states.with_ends(PLACE, FORM, MEMORY, Ends(known, known)) if known else states


def fresh_of(known: Known, samples: Samples) -> list[bool]:
    """Which samples of a batch are sent with labels: those not seen before, and of one that stands twice only the first."""
    seen = set(known)
    fresh = []
    for sample in samples.ids:
        fresh.append(sample not in seen)
        seen.add(sample)
    return fresh


def send_labels(labels: Tensor, vocabulary: int, known: Known, samples: Samples | None) -> tuple[Packet, Known]:
    """The packet of a step's labels [q], and what both ends know after it. Without `samples` all labels are sent."""
    if samples is None:
        return label_packet(labels, vocabulary), known
    parts, fresh = torch.split(labels, list(samples.rows)), fresh_of(known, samples)
    sent = [part for part, new in zip(parts, fresh, strict=True) if new]
    after = {**known, **{one: part.to(torch.int32) for one, part, new in zip(samples.ids, parts, fresh, strict=True) if new}}
    return label_packet(torch.cat(sent) if sent else labels[:0], vocabulary), after


def receive_labels(packet: Packet, vocabulary: int, count: int, known: Known, samples: Samples | None) -> tuple[Tensor, Known]:
    """Labels [count] of a step, and what is known after it. Raises ProtocolError when number or values are not those due."""
    if samples is None:
        return read_labels(packet, vocabulary, count), known
    fresh = fresh_of(known, samples)
    due = [rows if new else 0 for rows, new in zip(samples.rows, fresh, strict=True)]
    parts = torch.split(read_labels(packet, vocabulary, sum(due)), due)
    for sample, rows, new in zip(samples.ids, samples.rows, fresh, strict=True):
        if not new and sample in known and len(known[sample]) != rows:
            raise ProtocolError(
                f"sample {sample} came with {rows} tokens, it had {len(known[sample])} before.", "a sample must not change in a run."
            )
    after = {**known, **{one: part.to(torch.int32) for one, part, new in zip(samples.ids, parts, fresh, strict=True) if new}}
    if (total := sum(len(after[one]) for one in samples.ids)) != count:
        raise ProtocolError(f"labels of {total} tokens for a batch of {count}.", "a sample must not change in a run.")
    return torch.cat([after[one].long() for one in samples.ids]), after


def count_labels(tokens: int, vocabulary: int, known: Known, samples: Samples | None) -> tuple[int, Known]:
    """Bytes of a step's labels, for an engine that needs not carry them."""
    if samples is None:
        return label_bytes(tokens, vocabulary), known
    fresh = fresh_of(known, samples)
    sent = sum(rows for rows, new in zip(samples.rows, fresh, strict=True) if new)
    nothing = torch.empty(0, dtype=torch.int32)
    return label_bytes(sent, vocabulary), {**known, **{one: nothing for one, new in zip(samples.ids, fresh, strict=True) if new}}
