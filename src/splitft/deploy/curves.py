"""The curves of a run by round, for the status page: as many points as a screen can show, however long the run lasts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MOST_POINTS = 2000
NAMES = ("perplexity", "held_out_loss", "loss", "up_bytes", "down_bytes", "seconds")

_Point = dict[str, float | None]


def finite(value: object) -> float | None:
    """`value` as a float; None for what is missing or not finite."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


class Curves:
    """Figures by round. Past MOST_POINTS every second point goes, then three of four ...; the first and the latest round always stay."""

    def __init__(self) -> None:
        self._points: dict[int, _Point] = {}
        self._stride = 1

    def trained(self, record: Mapping[str, Any]) -> None:
        """Take the journal's event `round`: mean loss over the participants by what they predicted, bytes, seconds."""
        clients = [one for one in record.get("clients", ()) if one.get("status") != "lost"]
        weighted = [(finite(one.get("loss_mean")), finite(one.get("targets")) or 0.0) for one in clients]
        known = [(loss, weight) for loss, weight in weighted if loss is not None and weight > 0.0]
        whole = sum(weight for _, weight in known)
        self._add(
            int(record["round"]),
            {
                "loss": sum(loss * weight for loss, weight in known) / whole if whole else None,
                "up_bytes": float(moved_bytes(record, "up")),
                "down_bytes": float(moved_bytes(record, "down")),
                "seconds": finite(record.get("wall_s")),
            },
        )

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Take the journal's event `evaluation`: loss and perplexity of the joined model on held-out text."""
        scores = record.get("global") or {}
        self._add(int(record["round"]), {"perplexity": finite(scores.get("perplexity")), "held_out_loss": finite(scores.get("loss"))})

    def _add(self, number: int, values: _Point) -> None:
        if number not in self._points and self._points:
            latest = next(reversed(self._points))
            if latest % self._stride:
                del self._points[latest]
        self._points.setdefault(number, {}).update(values)
        while len(self._points) > MOST_POINTS:
            self._stride *= 2
            self._points = {at: point for at, point in self._points.items() if at % self._stride == 0 or at == number}

    def shown(self) -> dict[str, list[float | None] | list[int]]:
        """Column by column, in order of rounds; None where a round has no such figure."""
        rounds = sorted(self._points)
        columns = {name: [_shortened(self._points[at].get(name)) for at in rounds] for name in NAMES}
        return {"round": rounds, **columns}


def moved_bytes(record: Mapping[str, Any], direction: str) -> int:
    """Bytes of one direction over all participants of the journal's event `round`."""
    return sum(int(count) for one in record.get("clients", ()) for count in (one.get("bytes") or {}).get(direction, {}).values())


def _shortened(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
