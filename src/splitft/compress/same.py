"""Stands for another codec of the configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Same:
    """The codec that another section of the configuration names: at a U-shape's exit the one for the same kind of tensor at the cut
    (activations as in `uplink`, gradients as in `downlink`); for adapters down the one for adapters
    up, without feedback, which changes against what the client has do not need."""
