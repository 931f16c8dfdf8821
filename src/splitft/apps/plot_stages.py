"""What the stage kinds of the virtual clock mean to a reader: a few groups, and the seconds each client spent in them."""

from __future__ import annotations

from splitft.apps.report_record import ClientRound, Round, RunRecord

GROUPS: dict[str, str] = {
    "client": "client computes",
    "up": "uplink",
    "server": "server computes",
    "down": "downlink",
    "other": "client, link and server",
    "queue": "waits for the server",
    "barrier": "waits for others",
    "away": "lost until the round ends",
}
WAITS = ("queue", "barrier")
IDLE = (*WAITS, "away")
_KINDS: dict[str, str] = {
    "front_forward": "client",
    "exit": "client",
    "front_backward": "client",
    "whole_step": "client",
    "uplink": "up",
    "uplink_gradient": "up",
    "adapters_up": "up",
    "back": "server",
    "back_backward": "server",
    "downlink": "down",
    "downlink_gradient": "down",
    "adapters_down": "down",
    "blocks_down": "down",
    "server_wait": "queue",
    "barrier_wait": "barrier",
    "away": "away",
}
_ONCE = ("adapters_up", "adapters_down", "blocks_down")


def group_of(kind: str) -> str:
    """The group of a stage kind; kinds a later version may add count as other work."""
    return _KINDS.get(kind, "other")


def client_seconds(record: RunRecord) -> dict[int, dict[str, float]]:
    """Client -> group -> virtual seconds over all its rounds. A round's parts sum to its duration, those of an update that was merged
    asynchronously to the time from its client's start to the merge."""
    table: dict[int, dict[str, float]] = {}
    for item in record.rounds:
        drawn = _drawn_seconds(item)
        for client in item.clients:
            parts = table.setdefault(client.client, {})
            for group, seconds in _parts(item, client, drawn.get(client.client, {})).items():
                parts[group] = parts.get(group, 0.0) + seconds
    return dict(sorted(table.items()))


def idle_s(item: Round, client: ClientRound) -> float:
    """Seconds from the end of a client's work to the end of the round: it waited for others (asynchronously: for the merge) or was lost."""
    if client.finish_s is None or item.duration_s == 0:
        return client.barrier_wait_s
    return max(0.0, item.virtual_end_s - client.finish_s)


def _drawn_seconds(item: Round) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for stage in item.timeline:
        kinds = found.setdefault(stage.client, {})
        kinds[stage.kind] = kinds.get(stage.kind, 0.0) + stage.end_s - stage.start_s
    return found


def _parts(item: Round, client: ClientRound, drawn: dict[str, float]) -> dict[str, float]:
    """One client's round by group: exact from `busy_s`; without it the working time is divided like the steps the time line shows."""
    idle = idle_s(item, client)
    parts = {"queue": client.server_wait_s, "away" if client.status == "lost" else "barrier": idle}
    if client.busy_s:
        for kind, seconds in client.busy_s.items():
            parts[group_of(kind)] = parts.get(group_of(kind), 0.0) + seconds
        return parts
    working = max(0.0, item.duration_s - client.server_wait_s - idle)
    once = {kind: seconds for kind, seconds in drawn.items() if kind in _ONCE}
    steps = {kind: seconds for kind, seconds in drawn.items() if kind not in _ONCE and group_of(kind) not in IDLE}
    total = sum(steps.values())
    if total <= 0:
        return {**parts, "other": working}
    factor = max(0.0, working - sum(once.values())) / total
    for kind, seconds in [*once.items(), *((kind, seconds * factor) for kind, seconds in steps.items())]:
        parts[group_of(kind)] = parts.get(group_of(kind), 0.0) + seconds
    return parts
