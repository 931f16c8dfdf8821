"""How large updates usually are, and which are absurd beside them: refused, they cost their sender the round and nobody else anything."""

from __future__ import annotations

import math

from torch import Tensor, linalg

from splitft.errors import ProtocolError

# Norms of accepted updates that are remembered, to tell what is usual.
REMEMBERED = 100


class UpdateNorms:
    """`known` are the norms accepted in earlier rounds; more than `factor` times their median is refused (0: any finite one is taken)."""

    def __init__(self, known: list[float], factor: float) -> None:
        self.known, self.factor = known, factor
        self.accepted: dict[int, float] = {}

    def check(self, client: int, update: Tensor, start: Tensor) -> None:
        """Take note of an update as it comes. Raises ProtocolError for one that is not finite, or absurdly large beside those known."""
        change = float(linalg.vector_norm((update.detach().cpu() - start.detach().cpu()).double()))
        if not math.isfinite(change):
            raise ProtocolError(f"the update of client {client} holds a value that is not finite.", "its training has diverged.")
        if problem := self._absurd(client, change, _middle(self.known)):
            raise problem
        self.accepted[client] = change

    def outliers(self) -> dict[int, ProtocolError]:
        """Of a round with nothing before it: updates that are absurd beside the others of the same round, by client."""
        if self.known:
            return {}
        usual = _middle(list(self.accepted.values()))
        found = {client: self._absurd(client, change, usual) for client, change in self.accepted.items()}
        return {client: problem for client, problem in found.items() if problem is not None}

    def remembered(self, lost: set[int]) -> list[float]:
        """What is known after the round, without the updates of the lost."""
        return [*self.known, *(norm for client, norm in sorted(self.accepted.items()) if client not in lost)][-REMEMBERED:]

    def _absurd(self, client: int, change: float, usual: float) -> ProtocolError | None:
        if not (self.factor and usual > 0 and change > self.factor * usual):
            return None
        return ProtocolError(
            f"the update of client {client} has norm {change:.3g}, {self.factor:g} times the usual {usual:.3g} is allowed.",
            "its training has diverged, or federation.update_norm_factor is too small.",
        )


def _middle(norms: list[float]) -> float:
    """The lower median, so that of two the larger is held against the smaller; 0 of none."""
    return sorted(norms)[(len(norms) - 1) // 2] if norms else 0.0
