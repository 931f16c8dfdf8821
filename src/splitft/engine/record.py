"""The journal's events from a round's results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from splitft.clock import RoundTiming
from splitft.engine.evaluate import Score
from splitft.engine.settings import RoundResult
from splitft.types import Observation


def evaluation_event(index: int, total: Score, clients: Sequence[Score | None]) -> dict[str, Any]:
    """Event `evaluation`: the joined model after round `index` (0: before training). Clients without a score are left out."""
    return {
        "event": "evaluation",
        "round": index,
        "global": total.to_json(),
        "clients": [{"client": client, **one.to_json()} for client, one in enumerate(clients) if one is not None],
    }


def round_event(index: int, result: RoundResult, timing: RoundTiming, wall_s: float, learning_rate: float) -> dict[str, Any]:
    """Event `round`: plans, losses, bytes and times of every participant, and the round's time line."""
    by_client = {one.client: one for one in timing.clients}
    clients = []
    for row, plan in enumerate(result.plans):
        losses, timed = result.step_losses[row], by_client[plan.client]
        clients.append(
            {
                "client": plan.client,
                "cut": plan.cut,
                "rank": plan.rank,
                "steps": plan.local_steps,
                "tokens": result.tokens[row],
                "targets": result.targets[row],
                "loss_first": losses[0],
                "loss_mean": sum(losses) / len(losses),
                "loss_last": losses[-1],
                "finish_s": timed.finish_s,
                "server_wait_s": timed.server_wait_s,
                "barrier_wait_s": timed.barrier_wait_s,
                "busy_s": dict(timed.busy_s),
                "bytes": result.ledger.of(plan.client),
            }
        )
    longest = max(len(losses) for losses in result.step_losses)
    per_step = [[losses[step] for losses in result.step_losses if step < len(losses)] for step in range(longest)]
    return {
        "event": "round",
        "round": index,
        "clients": clients,
        "step_losses": [sum(losses) / len(losses) for losses in per_step],
        "virtual_start_s": timing.start_s,
        "virtual_end_s": timing.end_s,
        "wall_s": wall_s,
        "learning_rate": learning_rate,
        "timeline": [list(entry) for entry in timing.timeline],
    }


def observations_of(index: int, result: RoundResult, timing: RoundTiming, scored: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What the policy is told of this round, as plain values for the checkpoint."""
    held_out = {one["client"]: one["loss"] for one in scored["clients"]} if scored else {}
    by_client = {one.client: one for one in timing.clients}
    found = []
    for row, plan in enumerate(result.plans):
        timed = by_client[plan.client]
        found.append(
            asdict(
                Observation(
                    client=plan.client,
                    round=index,
                    tokens=result.tokens[row],
                    loss=sum(result.step_losses[row]) / plan.local_steps,
                    virtual_s=timed.finish_s - timing.start_s,
                    wait_s=timed.server_wait_s + timed.barrier_wait_s,
                    uplink_bytes=result.ledger.total(plan.client, "up"),
                    downlink_bytes=result.ledger.total(plan.client, "down"),
                    held_out_loss=held_out.get(plan.client),
                )
            )
        )
    return found
