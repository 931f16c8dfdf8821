"""The journal's events from a round's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from splitft.clock import ClientTiming
from splitft.engine.attendance import Attended
from splitft.engine.checkpoint import Pending
from splitft.engine.evaluate import Score
from splitft.engine.planning import Prepared
from splitft.engine.secure_round import Unsealed
from splitft.engine.settings import RoundResult
from splitft.types import Observation


@dataclass
class Trained:
    """A round between training and aggregation. `truncated`: share of the global adapter's energy a client's ranks could not hold.

    Of an asynchronous round: `records` are what the journal says of the clients whose updates are merged (their training may lie
    rounds back), `pending` the updates that are still on their way, and the round lasts from `start_s` to `end_s`. `notes`: what is to be
    remembered once the round is committed. `unsealed`: the updates, where they were aggregated securely with clients elsewhere.
    """

    prepared: Prepared
    attended: Attended
    result: RoundResult
    truncated: Mapping[int, float]
    records: list[dict[str, Any]] | None = None
    pending: dict[int, Pending] = field(default_factory=dict)
    span_s: tuple[float, float] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    unsealed: Unsealed | None = None


def evaluation_event(index: int, total: Score, clients: Sequence[Score | None]) -> dict[str, Any]:
    """Event `evaluation`: the joined model after round `index` (0: before training). Clients without a score are left out."""
    return {
        "event": "evaluation",
        "round": index,
        "global": total.to_json(),
        "clients": [{"client": client, **one.to_json()} for client, one in enumerate(clients) if one is not None],
    }


def client_record(trained: Trained, row: int, timed: ClientTiming) -> dict[str, Any]:
    """What the event `round` says of one participant."""
    result, attended = trained.result, trained.attended
    plan, losses = result.plans[row], result.step_losses[row]
    status = "lost" if plan.client in attended.lost else "partial" if plan.local_steps < trained.prepared.steps[plan.client] else "done"
    record = {
        "client": plan.client,
        "cut": plan.cut,
        "rank": plan.rank,
        "steps": plan.local_steps,
        "status": status,
        "tokens": result.tokens[row],
        "targets": result.targets[row],
        "loss_first": losses[0],
        "loss_mean": sum(losses) / len(losses),
        "loss_last": losses[-1],
        "finish_s": timed.finish_s,
        "server_wait_s": timed.server_wait_s,
        "barrier_wait_s": timed.barrier_wait_s,
        "predicted_s": attended.predicted_s[plan.client],
        "busy_s": dict(timed.busy_s),
        "bytes": result.ledger.of(plan.client),
    }
    if plan.client in trained.prepared.refused:
        record["refused_cut"] = trained.prepared.refused[plan.client]
    if plan.client in result.facts:
        record["codec"] = result.facts[plan.client]
    if plan.ranks:
        record["ranks"] = list(plan.ranks)
        record["truncated"] = trained.truncated.get(plan.client, 0.0)
    return record


def client_records(trained: Trained) -> list[dict[str, Any]]:
    """One record per participant, in client order."""
    if trained.records is not None:
        return trained.records
    by_client = {one.client: one for one in trained.attended.timing.clients}
    return [client_record(trained, row, by_client[plan.client]) for row, plan in enumerate(trained.result.plans)]


def round_event(
    index: int, trained: Trained, wall_s: float, learning_rate: float, aggregated: bool, metrics: Mapping[str, float]
) -> dict[str, Any]:
    """Event `round`: plans, losses, bytes and times of every participant, and the round's time line."""
    timing, step_losses = trained.attended.timing, trained.result.step_losses
    longest = max((len(losses) for losses in step_losses), default=0)
    per_step = [[losses[step] for losses in step_losses if step < len(losses)] for step in range(longest)]
    start_s, end_s = trained.span_s or (timing.start_s, timing.end_s)
    return {
        "event": "round",
        "round": index,
        "clients": client_records(trained),
        "step_losses": [sum(losses) / len(losses) for losses in per_step],
        "virtual_start_s": start_s,
        "virtual_end_s": end_s,
        "wall_s": wall_s,
        "learning_rate": learning_rate,
        "aggregated": aggregated,
        "metrics": dict(metrics),
        "timeline": [list(entry) for entry in timing.timeline],
    }


def observations_of(event: Mapping[str, Any], scored: Mapping[str, Any] | None, base_loss: Mapping[str, float]) -> list[dict[str, Any]]:
    """What the policy is told of this round, as plain values for the checkpoint: of everyone whose update came through."""
    held_out = {one["client"]: one["loss"] for one in scored["clients"]} if scored else {}
    found = []
    for one in event["clients"]:
        if one["status"] == "lost":
            continue
        wait_s = one["server_wait_s"] + one["barrier_wait_s"]
        found.append(
            Observation(
                client=one["client"],
                round=event["round"],
                tokens=one["tokens"],
                loss=one["loss_mean"],
                virtual_s=one["finish_s"] - one.get("start_s", event["virtual_start_s"]),
                wait_s=wait_s,
                uplink_bytes=sum(one["bytes"]["up"].values()),
                downlink_bytes=sum(one["bytes"]["down"].values()),
                held_out_loss=held_out.get(one["client"]),
                base_loss=base_loss.get(str(one["client"])),
                busy_s=sum(one["busy_s"].values()),
                predicted_s=one["predicted_s"],
            )
        )
    return [dict(vars(one)) for one in found]
