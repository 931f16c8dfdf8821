"""The codecs' dial from round to round: what a controller is told of a round, the probe slice, what the journal says of both.

A controller that asks for it gets a probe: of a few clients, in turn, the first rows of the batch they would train next go through the
joined model twice, with the tensor at the cut once as 16-bit values and once through the client's codec as its stream stands, so that
stale caches count as they are. Nothing is learned from the probe and no stream moves on. Its bytes are counted: the uncompressed tensor
and its labels up (in a U-shape the last hidden state down, twice); the server works out by itself what its end of the codec would have
had, but for codecs whose ends remember different things: their packet is counted too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from splitft.compress.base import HEADER_BYTES, Packet
from splitft.control.base import Signal
from splitft.engine.batches import Batch, gather, label_bytes
from splitft.engine.exchange import Ownership
from splitft.engine.settings import ClientState
from splitft.engine.streams import open_step_streams, samples_of
from splitft.lora import AdapterBank
from splitft.loss import Targets, token_losses
from splitft.messages import FRAME_BYTES, STEP_BYTES
from splitft.split import Route
from splitft.types import Plan
from splitft.wire import Stream

if TYPE_CHECKING:
    from splitft.engine.record import Trained
    from splitft.engine.rounds import Run
    from splitft.engine.settings import Federation

STATE = "controller"
PROBE_ROUND = 1 << 30  # streams of a probe draw random numbers of their own


def dial_of(run: Run) -> tuple[float, float]:
    """The dial of the round that comes next, of activations and of gradients."""
    dial = run.controller.first(run.state.notes.get(STATE) or run.controller.init(run.rules.seed))
    return dial.activations, dial.gradients


def observe(
    run: Run,
    index: int,
    trained: Trained,
    adapters: Tensor,
    scored: Mapping[str, Any] | None,
    states: Mapping[int, ClientState],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """After a round with joined `adapters` [p]: what the event says of the dial, and the notes with the controller's next state.

    Call it before the event is made: the probe's bytes go into the round's ledger.
    """
    plans = trained.result.plans
    if not plans or (not run.controller.probes and run.controller.fixed):
        dial = plans[0].dial if plans else (1.0, 1.0)
        return ({} if dial == (1.0, 1.0) else {"dial": _named(dial)}), {}
    probe = _probe(run, index, trained, adapters, states) if run.controller.probes and trained.records is None else {}
    signal = _signal(run, index, trained, scored, probe)
    _, state, facts = run.controller.step(signal, run.state.notes.get(STATE) or run.controller.init(run.rules.seed))
    event: dict[str, Any] = {"dial": _named(plans[0].dial)}
    if probe:
        event["probe"] = probe
    if facts:
        event["controller"] = dict(facts)
    return event, {STATE: dict(state)}


def _named(dial: tuple[float, float]) -> dict[str, float]:
    return {"activations": dial[0], "gradients": dial[1]}


def _signal(run: Run, index: int, trained: Trained, scored: Mapping[str, Any] | None, probe: Mapping[str, float]) -> Signal:
    result = trained.result
    sums: dict[str, dict[str, float]] = {"activations": {}, "gradients": {}}
    plain_bytes = sent_bytes = 0.0
    for places in result.facts.values():
        for place, facts in places.items():
            plain_bytes, sent_bytes = plain_bytes + facts.get("plain_bytes", 0.0), sent_bytes + facts.get("bytes", 0.0)
            kind = place.split()[1]
            for name, amount in facts.items() if kind in sums else ():
                sums[kind][name] = sums[kind].get(name, 0.0) + amount
    up = sum(result.ledger.total(plan.client, "up") for plan in result.plans)
    down = sum(result.ledger.total(plan.client, "down") for plan in result.plans)
    losses = [loss for steps in result.step_losses for loss in steps]
    activations, gradients = sums["activations"], sums["gradients"]

    def share(facts: Mapping[str, float], part: str, whole: str) -> float | None:
        return facts[part] / facts[whole] if part in facts and facts.get(whole, 0.0) > 0 else None

    errors = [share(facts, "squared_error", "squared") for facts in (activations, gradients)]
    return Signal(
        round=index,
        rounds=run.rules.rounds,
        uplink_bytes=up,
        downlink_bytes=down,
        uncompressed_bytes=int(up + down - sent_bytes + plain_bytes),
        held_out_loss=None if scored is None else scored["global"]["loss"],
        base_loss=_mean(run.state.notes.get("base_loss", {}).values()),
        train_loss=_mean(losses),
        clean_loss=probe.get("clean_loss"),
        coded_loss=probe.get("coded_loss"),
        activation_error=None if errors[0] is None else errors[0] ** 0.5,
        gradient_error=None if errors[1] is None else errors[1] ** 0.5,
        residual_share=share(activations, "residual_squared", "known_squared"),
        skipped_share=share(activations, "skipped", "samples"),
    )


def _mean(values: Any) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _probe(run: Run, index: int, trained: Trained, adapters: Tensor, states: Mapping[int, ClientState]) -> dict[str, float]:
    """Loss of the probe slice with and without the codecs, and its bytes; nothing when every client holds the whole model."""
    federation, plans = run.federation, trained.result.plans
    split = [plan for plan in plans if not plan.is_whole(federation.split.blocks)]
    if not split:
        return {}
    wanted = run.rules.probe_rows
    count = min(len(split), wanted)
    chosen = [split[((index - 1) * count + k) % len(split)] for k in range(count)]
    bank = AdapterBank(federation.layout, 1, federation.device)
    with torch.no_grad():
        bank.values.copy_(adapters[None].to(federation.device))
    sums, targets, total_bytes = [0.0, 0.0], 0, 0
    for place, plan in enumerate(chosen):
        rows = min(wanted // count + (place < wanted % count), federation.settings.batch_size)
        state = states.get(plan.client, ClientState())
        batch = _next_rows(federation, plan.client, state, rows)
        streams = open_step_streams(federation.settings, plan, PROBE_ROUND + index, state.streams)
        packets: list[Packet] = []
        for way, used in enumerate((None, streams)):
            sums[way] += _loss(federation, bank, plan, batch, used, packets)
        targets += int(batch.targets.sum())
        coded_bytes = 0 if streams[0].codec.mirrored else packets[0].size_bytes
        total_bytes += _count(trained, federation, plan, batch, coded_bytes)
    if not targets:
        return {}
    return {"clean_loss": sums[0] / targets, "coded_loss": sums[1] / targets, "bytes": float(total_bytes), "tokens": float(targets)}


def _next_rows(federation: Federation, client: int, state: ClientState, rows: int) -> Batch:
    """The first rows of the batch that a client would train next."""
    order = federation.orders[client]
    shorter = replace(order, batch_size=rows)
    step = state.batches * order.batch_size // rows
    return gather([federation.clients[client]], [shorter], [step], federation.device)


def _loss(
    federation: Federation, bank: AdapterBank, plan: Plan, batch: Batch, streams: tuple[Stream, ...] | None, packets: list[Packet]
) -> float:
    """Summed nll of a batch whose tensors cross the cut (and a U-shape's exit) as 16-bit values, or through these streams, whose `packets`
    are kept."""
    split = federation.split
    end = Ownership(plan, split.blocks).server_end
    samples = samples_of(batch.samples[0], batch.lengths[0])
    valid = None if batch.mask is None else batch.mask.reshape(-1).bool()

    def crossing(block: int, hidden: Tensor) -> Tensor:
        at_cut, at_exit = block == plan.cut - 1, plan.exit_on_client and block == end - 1
        if not at_cut and not at_exit:
            return hidden
        if streams is None:
            return hidden.to(torch.bfloat16).to(hidden.dtype)
        flat = hidden.reshape(-1, hidden.shape[-1])
        rows = flat if valid is None else flat[valid]
        decoded, packet = streams[0 if at_cut else 2].carry(rows, samples)
        packets.append(packet)
        if valid is None:
            return decoded.reshape(hidden.shape)
        result = torch.zeros_like(flat)
        result[valid] = decoded
        return result.reshape(hidden.shape)

    with torch.no_grad():
        route = Route(batch.ids.shape[0], bank=bank)
        route.cross = crossing
        hidden = split.run(route, batch.ids, split.needed_mask(batch.mask))
        targets = Targets.of(batch.labels, hidden.device)
        picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, targets.positions)
        losses, _ = token_losses(picked, split.logits, targets.labels, split.model.config.get_text_config().vocab_size)
    return float(losses.double().sum())


def _count(trained: Trained, federation: Federation, plan: Plan, batch: Batch, coded_bytes: int) -> int:
    """Enter a client's probe in the ledger, with `coded_bytes` of the packet where that travels too; its bytes."""
    tokens, sequences = batch.tokens[0], batch.ids.shape[0]
    tensor_bytes = HEADER_BYTES + 2 * tokens * federation.split.hidden_size
    frame_bytes = FRAME_BYTES + STEP_BYTES + 4 * sequences * (2 if federation.settings.keyed else 1)
    ledger = trained.result.ledger
    ledger.add(plan.client, "up", "activations", tensor_bytes + coded_bytes)
    ledger.add(plan.client, "up", "control", frame_bytes)
    total = tensor_bytes + coded_bytes + frame_bytes
    if plan.exit_on_client:
        ledger.add(plan.client, "down", "activations", 2 * tensor_bytes)
        ledger.add(plan.client, "up", "control", 8)  # both losses
        return total + 2 * tensor_bytes + 8
    labels = label_bytes(tokens, federation.vocabulary)
    ledger.add(plan.client, "up", "labels", labels)
    return total + labels
