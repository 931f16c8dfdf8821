"""Rows of sessions in a pass of the server: padded to the pass's width on the way in, taken apart on the way out.

Axes: b sequences of a session, t tokens, d channels, q tokens without padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from splitft.engine.intake import Arrival
from splitft.engine.narrow import decode
from splitft.lora import AdapterBank
from splitft.types import IGNORE_LABEL


def entering(bank: AdapterBank, group: Sequence[Arrival], leaves: Sequence[Tensor], device: torch.device) -> dict[int, Tensor]:
    """What joins a pass before which block: the states [s*b t d] of the arrivals with that cut, made of what came through a bottleneck."""
    entries: dict[int, Tensor] = {}
    for cut in sorted({arrival.session.ownership.plan.cut for arrival in group}):
        mine = [k for k, arrival in enumerate(group) if arrival.session.ownership.plan.cut == cut]
        rows = torch.tensor([group[k].session.row for k in mine], device=device)
        entries[cut] = decode(bank, "cut", cut, torch.cat([leaves[k] for k in mine]), rows, len(mine))
    return entries


def tokens_of(tensor: Tensor, arrival: Arrival) -> Tensor:
    """The tokens [q d] of one session's rows [b t d] of a pass, padding of the pass and of the session left out."""
    own = tensor[:, : arrival.hidden.shape[1]].reshape(-1, tensor.shape[-1])
    return own if arrival.valid is None else own[arrival.valid.to(own.device)]


def widen(hidden: Tensor, width: int) -> Tensor:
    """Rows [b t d] padded with zeros to the pass's width."""
    if hidden.shape[1] == width:
        return hidden.detach().clone()
    wide = hidden.new_zeros((hidden.shape[0], width, hidden.shape[2]))
    wide[:, : hidden.shape[1]] = hidden.detach()
    return wide


def widen_labels(labels: Tensor | None, width: int) -> Tensor:
    """Labels [b t] with none at the padding."""
    assert labels is not None
    wide = torch.full((labels.shape[0], width), IGNORE_LABEL)
    wide[:, : labels.shape[1]] = labels
    return wide
