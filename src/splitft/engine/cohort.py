"""Train many clients in one batched pass: the simulation's executor.

All clients of a cohort go through the model together; every block multiplies the frozen weights once for all of them, the bank adds each
client's adapters, and behind each client's cut its rows cross a wire of real bytes. Nothing loops over clients between the cuts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from splitft.compress.base import Packet
from splitft.engine.batches import Batch, gather, label_packet, require_targets
from splitft.engine.exchange import Ownership, decode_vector, encode_vector, put, round_end_frame, round_start_frame, take
from splitft.engine.ledger import Ledger
from splitft.engine.settings import ClientState, Federation, OnStep, RoundResult, load_moments, next_state
from splitft.lora import AdapterBank
from splitft.loss import Targets, training_loss
from splitft.messages import FRAME_BYTES, STEP_BYTES, RoundAccepted, Type, round_frame
from splitft.optimizer import clip_factor
from splitft.split import Route
from splitft.types import Plan, RoundPlan
from splitft.wire import Stream, Wire, cross

CPU_COHORT_TOKENS = 8192
DEVICE_COHORT_TOKENS = 65_536


class CohortExecutor:
    """Trains a round's participants `cohort_size` at a time (0: about 8,000 tokens a pass on a CPU, 65,000 on a GPU)."""

    def __init__(self, federation: Federation, cohort_size: int = 0) -> None:
        self.federation = federation
        longest = max(int(client.train.lengths.max()) for client in federation.clients)
        budget = CPU_COHORT_TOKENS if federation.device.type == "cpu" else DEVICE_COHORT_TOKENS
        self.size = cohort_size or max(1, budget // (longest * federation.settings.batch_size))

    def train(self, plan: RoundPlan, first_step: int, adapters: Tensor, states: dict[int, ClientState], on_step: OnStep) -> RoundResult:
        """Every participant's local steps from the global adapters [p]; `on_step` is told the client-steps done after each pass."""
        by_steps: dict[int, list[Plan]] = {}
        for one in plan.plans:
            by_steps.setdefault(one.local_steps, []).append(one)
        parts = []
        for group in by_steps.values():
            for start in range(0, len(group), self.size):
                cohort = _Cohort(self.federation, group[start : start + self.size], plan.round, first_step, states)
                parts.append(cohort.train(adapters, on_step))
        return _join(parts)


def _join(parts: list[RoundResult]) -> RoundResult:
    """The results of all cohorts, in client order."""
    pairs = sorted(((one.client, p, k) for p, part in enumerate(parts) for k, one in enumerate(part.plans)), key=lambda item: item[0])
    ledger = Ledger()
    states: dict[int, ClientState] = {}
    for part in parts:
        ledger.clients.update(part.ledger.clients)
        states.update(part.states)
    return RoundResult(
        plans=tuple(parts[p].plans[k] for _, p, k in pairs),
        values=torch.stack([parts[p].values[k] for _, p, k in pairs]),
        tokens=[parts[p].tokens[k] for _, p, k in pairs],
        targets=[parts[p].targets[k] for _, p, k in pairs],
        step_losses=[parts[p].step_losses[k] for _, p, k in pairs],
        ledger=ledger,
        states=states,
    )


class _Cohort:
    """One cohort in one round: plans in client order, a bank row and a moments row for each."""

    def __init__(
        self, federation: Federation, plans: Sequence[Plan], round_index: int, first_step: int, states: dict[int, ClientState]
    ) -> None:
        self.federation = federation
        self.plans = plans
        self.round = round_index
        self.first_step = first_step
        self.before = [states.get(plan.client, ClientState()) for plan in plans]
        self.ownership = [Ownership(plan, federation.split.blocks) for plan in plans]
        self.bank = AdapterBank(federation.layout, len(plans), federation.device)
        self.moments = load_moments(self.before, federation.layout, federation.settings, federation.device)
        self.ledger = Ledger()
        self.loss_sums = torch.zeros(len(plans), dtype=torch.float64)
        settings = federation.settings
        # Four tensors a step at most: at the cut up and down, at a U-shape's exit down and up.
        self.at_cut = [(Stream.open(settings.uplink), Stream.open(settings.downlink)) for _ in plans]
        self.at_exit = [(Stream.open(settings.downlink), Stream.open(settings.uplink)) for _ in plans]

    def train(self, adapters: Tensor, on_step: OnStep) -> RoundResult:
        settings, count = self.federation.settings, len(self.plans)
        self._receive(adapters)
        steps = self.plans[0].local_steps
        losses: list[list[float]] = [[] for _ in self.plans]
        tokens, targets = [0] * count, [0] * count
        squared = torch.zeros(count, dtype=torch.float64)
        for step in range(steps):
            batches = self._batches(step)
            normaliser = torch.stack([batch.targets for batch in batches]).sum(0)
            require_targets(normaliser, [self.federation.clients[plan.client] for plan in self.plans])
            self.bank.zero_gradients()
            sums = torch.zeros(count, dtype=torch.float64)
            for batch in batches:
                sums += self._pass(batch, normaliser)
                tokens = [a + b for a, b in zip(tokens, batch.tokens, strict=True)]
            targets = [a + b for a, b in zip(targets, normaliser.tolist(), strict=True)]
            squared = self._optimize(self.first_step + step)
            self.loss_sums += sums
            for k, loss in enumerate((sums / normaliser).tolist()):
                losses[k].append(loss)
            on_step(count)
        return self._send(losses, tokens, targets, squared, steps * settings.gradient_accumulation)

    def _batches(self, step: int) -> list[Batch]:
        """The micro-batches of one optimizer step."""
        accumulation = self.federation.settings.gradient_accumulation
        clients = [self.federation.clients[plan.client] for plan in self.plans]
        orders = [self.federation.orders[plan.client] for plan in self.plans]
        return [
            gather(clients, orders, [state.batches + step * accumulation + micro for state in self.before], self.federation.device)
            for micro in range(accumulation)
        ]

    def _pass(self, batch: Batch, normaliser: Tensor) -> Tensor:
        """Forward and backward of one micro-batch; the summed nll of each client [n]."""
        split = self.federation.split
        sequences = batch.lengths.shape[1]
        wires = self._wires(batch, sequences)

        def crossing(index: int, hidden: Tensor) -> Tensor:
            for wire in wires.get(index, ()):
                hidden = cross(hidden, wire)
            return hidden

        route = Route(batch.ids.shape[0], cross=crossing, bank=self.bank, sessions=len(self.plans))
        hidden = split.run(route, batch.ids, batch.mask)
        weight = (1.0 / normaliser.float()).repeat_interleave(sequences).to(hidden.device)
        loss, row_sums = training_loss(hidden, Targets.of(batch.labels, hidden.device), weight, split.head, split.anatomy)
        loss.backward()  # type: ignore[no-untyped-call]
        self._count_step(batch, sequences)
        return row_sums.cpu().reshape(-1, sequences).sum(1)

    def _wires(self, batch: Batch, sequences: int) -> dict[int, list[Wire]]:
        """Behind which block which clients' rows cross."""
        wires: dict[int, list[Wire]] = {}

        def place(
            index: int, sessions: list[int], streams: list[tuple[Stream, Stream]], names: tuple[tuple[str, str], tuple[str, str]]
        ) -> None:
            def record(session: int, is_forward: bool, packet: Packet) -> None:
                direction, kind = names[0] if is_forward else names[1]
                self.ledger.add(self.plans[session].client, direction, kind, packet.size_bytes)  # type: ignore[arg-type]

            chosen = [streams[k] for k in sessions]
            wires.setdefault(index, []).append(
                Wire(sessions, sequences, batch.padded_lengths, [f for f, _ in chosen], [b for _, b in chosen], record)
            )

        for cut in sorted({plan.cut for plan in self.plans}):
            at_cut = [k for k, plan in enumerate(self.plans) if plan.cut == cut]
            place(cut - 1, at_cut, self.at_cut, (("up", "activations"), ("down", "gradients")))
        u_shaped = [k for k, plan in enumerate(self.plans) if plan.exit_on_client]
        for end in sorted({self.ownership[k].server_end for k in u_shaped}):
            at_end = [k for k in u_shaped if self.ownership[k].server_end == end]
            place(end - 1, at_end, self.at_exit, (("down", "activations"), ("up", "gradients")))
        return wires

    def _count_step(self, batch: Batch, sequences: int) -> None:
        """Labels, and the frames around the packets: their lengths follow from the message format."""
        labels = batch.labels.reshape(len(self.plans), -1)
        axis = torch.arange(batch.ids.shape[1])
        for k, plan in enumerate(self.plans):
            step_up, other = FRAME_BYTES + STEP_BYTES + 4 * sequences, FRAME_BYTES + STEP_BYTES
            if plan.exit_on_client:
                self.ledger.add(plan.client, "up", "control", step_up + other)
                self.ledger.add(plan.client, "down", "control", 2 * other)
                continue
            valid = (axis[None, :] < batch.lengths[k][:, None]).reshape(-1)
            self.ledger.add(plan.client, "up", "labels", label_packet(labels[k][valid], self.federation.vocabulary).size_bytes)
            self.ledger.add(plan.client, "up", "control", step_up)
            self.ledger.add(plan.client, "down", "control", other)

    def _optimize(self, step: int) -> Tensor:
        """Clip each client by its own global norm and take an optimizer step; the clients' part of the squared norm [n]."""
        settings, bank = self.federation.settings, self.bank
        squared = bank.squared_norms()
        if settings.clip_norm > 0:
            bank.scale_gradients(clip_factor(squared, settings.clip_norm))
        settings.optimizer.step(bank.values, bank.gradients, self.moments, settings.schedule.rate(step))
        return squared

    def _receive(self, adapters: Tensor) -> None:
        """Every client starts from the global adapters; its own blocks' part arrives as a message."""
        codec = self.federation.settings.adapter_codec
        with torch.no_grad():
            self.bank.values.copy_(adapters.to(self.bank.values.device)[None, :])
        for k, plan in enumerate(self.plans):
            columns = self.ownership[k].client_columns(self.federation.layout)
            frame = round_start_frame(plan, self.round, self.first_step, self.federation.settings, take(adapters, columns))
            self.ledger.add_frame(plan.client, "down", frame)
            if not codec.lossless:
                put(self.bank.values[k], columns, decode_vector(frame.packets[0], codec).to(self.bank.values.device))

    def _send(self, losses: list[list[float]], tokens: list[int], targets: list[int], squared: Tensor, batches: int) -> RoundResult:
        """Every client's adapters after the round; its own blocks' part travels as a message."""
        settings, layout = self.federation.settings, self.federation.layout
        values = self.bank.values.to("cpu", copy=True)
        states = {}
        for k, plan in enumerate(self.plans):
            columns = self.ownership[k].client_columns(layout)
            own = take(values[k], columns)
            frame = round_end_frame(
                plan.client, self.round, targets[k], float(squared[k]), float(self.loss_sums[k]), own, settings.adapter_codec
            )
            self.ledger.add_frame(plan.client, "up", frame)
            self.ledger.add_frame(
                plan.client, "down", round_frame(Type.ROUND_ACCEPTED, RoundAccepted(round=self.round, client=plan.client))
            )
            if not settings.adapter_codec.lossless:
                put(values[k], columns, decode_vector(encode_vector(own, settings.adapter_codec), settings.adapter_codec))
            states[plan.client] = next_state(self.before[k], batches, settings, self.moments, k)
        return RoundResult(tuple(self.plans), values, tokens, losses, self.ledger, states, targets)
