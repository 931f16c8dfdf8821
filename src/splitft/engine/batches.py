"""Batches as tensors: the rows of one client or of a whole cohort, with shifted labels.

Axes: s sessions, b sequences of a session, t tokens of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from splitft.compress.base import HEADER_BYTES, Packet
from splitft.data.base import ClientData
from splitft.data.order import BatchOrder
from splitft.errors import DataError, ProtocolError
from splitft.loss import shift_labels
from splitft.types import IGNORE_LABEL

LABEL_CODEC = 0


@dataclass(frozen=True)
class Batch:
    """ids, labels [s*b t]; lengths [s b]; `targets` [s] positions to predict, `tokens` [s] tokens of each session;
    `samples` [s b] which rows of its client's data each session's sequences are (none where nobody asks).

    `mask` [s*b t] is None when no sequence is padded. ids and mask are on the device that computes, the rest on the CPU.
    """

    ids: Tensor
    labels: Tensor
    lengths: Tensor
    mask: Tensor | None
    targets: Tensor
    tokens: list[int]
    samples: list[list[int]] = field(default_factory=list)

    @property
    def padded_lengths(self) -> Tensor | None:
        return None if self.mask is None else self.lengths


def length_mask(lengths: Tensor, width: int) -> Tensor | None:
    """Mask [rows width] of sequences with these lengths (any shape); None when all are full."""
    flat = lengths.reshape(-1)
    if bool((flat == width).all()):
        return None
    return (torch.arange(width)[None, :] < flat[:, None]).to(torch.int64)


ALIKE = 0.8
LEAST_TOKENS = 1024


def alike(widths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Positions of `widths` (tokens of a session if it were padded to nothing but itself) in groups that share a pass.

    A pass pads all sessions to its widest, so they are taken by width; a group ends where the next session would take it over the budget,
    or is less than ALIKE of the widest while the group has LEAST_TOKENS, which is what a pass needs to use the processor well.
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(widths)), key=lambda one: -widths[one]):
        if groups:
            count, widest = len(groups[-1]), widths[groups[-1][0]]
            fits = (count + 1) * widest <= budget_tokens
            if fits and (widths[place] >= ALIKE * widest or count * widest < LEAST_TOKENS):
                groups[-1].append(place)
                continue
        groups.append([place])
    return [sorted(group) for group in groups]


def gather(clients: Sequence[ClientData], orders: Sequence[BatchOrder], steps: Sequence[int], device: torch.device) -> Batch:
    """The batch number `steps[k]` of each client, padded to the longest sequence of all. One read per client, one tensor for all."""
    chosen = [order.indices(step) for order, step in zip(orders, steps, strict=True)]
    parts = [client.train.batch(rows) for client, rows in zip(clients, chosen, strict=True)]
    width = max(ids.shape[1] for ids, _, _ in parts)
    sequences = parts[0][0].shape[0]
    ids = np.zeros((len(parts), sequences, width), dtype=np.int64)
    trained = np.zeros((len(parts), sequences, width), dtype=bool)
    lengths = np.zeros((len(parts), sequences), dtype=np.int64)
    for position, (part, part_lengths, part_trained) in enumerate(parts):
        ids[position, :, : part.shape[1]] = part
        trained[position, :, : part.shape[1]] = part_trained
        lengths[position] = part_lengths
    batch = assemble(ids.reshape(-1, width), trained.reshape(-1, width), lengths, device)
    return replace(batch, samples=[rows.tolist() for rows in chosen])


def assemble(ids: np.ndarray, trained: np.ndarray, lengths: np.ndarray, device: torch.device) -> Batch:
    """A batch from arrays: ids, trained [s*b t], lengths [s b]."""
    token_ids, counts = torch.from_numpy(ids), torch.from_numpy(lengths)
    mask = length_mask(counts, ids.shape[1])
    labels = shift_labels(token_ids, torch.from_numpy(trained))
    if mask is not None:
        labels = labels.masked_fill(mask == 0, IGNORE_LABEL)
    targets = (labels != IGNORE_LABEL).reshape(lengths.shape[0], -1).sum(1)
    return Batch(token_ids.to(device), labels, counts, None if mask is None else mask.to(device), targets, counts.sum(1).tolist())


def require_targets(batch_targets: Tensor, clients: Sequence[ClientData]) -> None:
    """DataError when a client's optimizer step has nothing to predict."""
    for count, client in zip(batch_targets.tolist(), clients, strict=True):
        if count == 0:
            raise DataError(
                f"client {client.name!r} drew a step without a single target token.",
                "its answers may be cut off: raise tokens.block_tokens or train.batch_size.",
            )


def label_packet(labels: Tensor, vocabulary: int) -> Packet:
    """Labels [q] of a step as a packet: two bytes each while the vocabulary allows, else four. The largest value means: no target."""
    dtype = torch.uint16 if vocabulary < 65_535 else torch.int32
    ignore = 65_535 if dtype == torch.uint16 else 2_147_483_647
    coded = torch.where(labels == IGNORE_LABEL, ignore, labels).cpu().to(torch.int32)
    narrow = coded.numpy().astype(np.uint16) if dtype == torch.uint16 else coded.numpy()
    return Packet(LABEL_CODEC, dtype, tuple(labels.shape), narrow.tobytes())


def label_bytes(count: int, vocabulary: int) -> int:
    """Length of the packet of so many labels."""
    return HEADER_BYTES + count * (2 if vocabulary < 65_535 else 4)


def read_labels(packet: Packet, vocabulary: int, count: int) -> Tensor:
    """Labels [count] from a packet. Raises ProtocolError when the count or a label is out of range."""
    wide = packet.dtype == torch.int32
    if packet.codec != LABEL_CODEC or packet.dtype not in (torch.uint16, torch.int32) or packet.shape != (count,):
        raise ProtocolError(f"labels of shape {packet.shape} for {count} tokens.", "run the same splitft version on both sides.")
    ignore = 2_147_483_647 if wide else 65_535
    if len(packet.payload) != count * packet.dtype.itemsize:
        raise ProtocolError(
            f"{len(packet.payload)} bytes of labels arrived for {count} tokens.", "run the same splitft version on both sides."
        )
    raw = np.frombuffer(packet.payload, dtype=np.int32 if wide else np.uint16).astype(np.int64)
    labels = np.where(raw == ignore, IGNORE_LABEL, raw)
    if count and (labels.max() >= vocabulary or (labels[labels != IGNORE_LABEL] < 0).any()):
        raise ProtocolError(f"label {labels.max()} is outside the vocabulary of {vocabulary}.", "both sides must use the same tokenizer.")
    return torch.from_numpy(labels)
