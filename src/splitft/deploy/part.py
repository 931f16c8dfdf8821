"""One participant of a round on the network."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from splitft.deploy.letters import Report
from splitft.transport.values import Message
from splitft.types import Plan


@dataclass
class Part:
    """How far one participant is. `waiting`: frames that have come and are not served. Seconds are since the round began; at
    `moved_s` it last came forward, when its session had received `moved_bytes`."""

    plan: Plan
    stage: str = "absent"
    waiting: deque[tuple[Message, float]] = field(default_factory=deque)
    report: Report | None = None
    steps: int = 0
    openings: int = 0
    asked_s: float = math.inf
    moved_s: float = 0.0
    moved_bytes: int = 0
    finish_s: float = 0.0
    served_s: float = 0.0
    queued_s: float = 0.0
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    replied_s: float = 0.0
