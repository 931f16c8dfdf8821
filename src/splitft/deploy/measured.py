"""The time line of a round as it was measured: the real clock where a simulation has its virtual one.

The server knows when a message came, when it was served and when it was answered; the client reports how long it computed and waited.
What is left of its waiting is the network's, divided between up and down by bytes: an estimate, since two clocks are never compared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from splitft.clock import ClientTiming, RoundTiming, TimelineEntry
from splitft.deploy.letters import Report
from splitft.engine.attendance import Attended, attend
from splitft.engine.planning import Prepared
from splitft.engine.settings import RoundResult

if TYPE_CHECKING:
    from splitft.deploy.part import Part
    from splitft.deploy.round import Round
    from splitft.engine.rounds import Run


def attended_of(run: Run, index: int, prepared: Prepared, result: RoundResult, played: Round) -> Attended:
    """Who came through, and when everything happened, in seconds since the run began to train."""
    rules = replace(run.rules.attendance, deadline_s=0.0)
    micro, start_s = run.federation.settings.gradient_accumulation, run.state.virtual_s
    planned = attend(prepared.plans, index, run.devices, run.costs, prepared.traffic, rules, micro, start_s)
    duration_s = max([part.finish_s for part in played.parts.values()], default=0.0)
    timings, line = [], []
    for client, part in sorted(played.parts.items()):
        up_bytes, down_bytes = result.ledger.total(client, "up"), result.ledger.total(client, "down")
        timings.append(_timing(client, part, start_s, duration_s, up_bytes, down_bytes))
        line += [TimelineEntry(client, kind, start_s + begin_s, start_s + end_s) for kind, begin_s, end_s in part.spans if end_s > begin_s]
        if duration_s > part.finish_s:
            line.append(TimelineEntry(client, "barrier_wait", start_s + part.finish_s, start_s + duration_s))
    served_s = sum(part.served_s for part in played.parts.values())
    timing = RoundTiming(start_s, duration_s, tuple(timings), tuple(line), served_s)
    return Attended(result.plans, frozenset(played.lost), timing, planned.predicted_s)


def _timing(client: int, part: Part, start_s: float, duration_s: float, up_bytes: int, down_bytes: int) -> ClientTiming:
    seconds = dict((part.report or Report(0)).seconds)
    waited_s = max(0.0, seconds.pop("waiting", 0.0))
    network_s = max(0.0, waited_s - part.served_s - part.queued_s)
    share = up_bytes / (up_bytes + down_bytes) if up_bytes + down_bytes else 0.5
    busy_s = {kind: max(0.0, seconds.get(kind, 0.0)) for kind in ("front_forward", "exit", "front_backward") if seconds.get(kind)}
    busy_s |= {"uplink": network_s * share, "back": part.served_s, "downlink": network_s * (1.0 - share)}
    return ClientTiming(client, start_s + part.finish_s, busy_s, part.queued_s, max(0.0, duration_s - part.finish_s))
