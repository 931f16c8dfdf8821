"""Optimizer moments on their way between client and server, when a cut moves and a block changes hosts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from splitft.compress.base import Packet
from splitft.engine.exchange import packet_bytes, parse_packet
from splitft.engine.scoring import PLAIN_CODEC, read_plain
from splitft.engine.settings import ClientState
from splitft.errors import ProtocolError
from splitft.lora import Layout


def moments_packet(layout: Layout, first: Tensor, second: Tensor, blocks: tuple[int, int]) -> bytes:
    """First and second moments [2 q] of the adapters of blocks [from, to), of a whole row [p] each."""
    _check_blocks(layout, blocks)
    columns = layout.columns(*blocks)
    both = torch.stack([first[columns], second[columns]]).to("cpu", torch.float32).contiguous()
    return packet_bytes(Packet(PLAIN_CODEC, both.dtype, tuple(both.shape), both.view(-1).view(torch.uint8).numpy().tobytes()))


def _check_blocks(layout: Layout, blocks: tuple[int, int]) -> None:
    if not 0 <= blocks[0] < blocks[1] <= 1 + max(entry.key.block for entry in layout.entries):
        raise ProtocolError(f"moments of blocks {blocks[0]} to {blocks[1]} are to move.", "check the other side's version.")


def put_moments(layout: Layout, first: Tensor, second: Tensor, blocks: tuple[int, int], data: bytes) -> None:
    """Write them into rows [p], in place. Raises ProtocolError for another number of them, values that are not finite, or a second
    moment below zero."""
    columns = layout.columns(*blocks)
    both = read_plain(parse_packet(data), (2, columns.stop - columns.start))
    if bool((both[1] < 0).any()):
        raise ProtocolError("a second moment is negative.", "the other side's state is damaged; begin afresh.")
    first[columns], second[columns] = both[0].to(first), both[1].to(second)


def given(layout: Layout, state: ClientState, data: bytes, blocks: tuple[int, int]) -> ClientState:
    """A client's state with the moments of blocks that the other side hands over. Raises ProtocolError."""
    assert state.first is not None
    assert state.second is not None
    _check_blocks(layout, blocks)
    first, second = state.first.clone(), state.second.clone()
    put_moments(layout, first, second, blocks, data)
    return replace(state, first=first, second=second)
