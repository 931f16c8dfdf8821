"""The seam of work policies: how many local steps each participant takes in a round."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar


class WorkPolicy(ABC):
    """Divides a round's steps over its participants. Final subclasses are frozen dataclasses; fields are their configuration."""

    references: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def steps(self, step_s: Mapping[int, float], local_steps: int) -> dict[int, int]:
        """Local steps of every participant (the keys of `step_s`: seconds of one of its steps at its cut, on its device as last seen).

        `local_steps` is what each would take if all took the same. Equal arguments give equal answers; everyone gets at least one step.
        """
