"""Fixtures that several files share."""

from __future__ import annotations

from .reliability_fixtures import ground, nursery, undisturbed

__all__ = ["ground", "nursery", "undisturbed"]
