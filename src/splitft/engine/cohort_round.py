"""One cohort in one round: its bank of adapters, its passes through the model, its optimizer steps, its bytes.

With one set of server adapters for all clients (`shared`, `sequential`) the bank has one row more: a client's own blocks use the
client's row, the server's blocks use the last one, so a block may have several rows in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from splitft.compress.base import Packet
from splitft.engine.batches import Batch, gather, label_packet, require_targets
from splitft.engine.exchange import Ownership, decode_vector, encode_vector, put, round_end_frame, round_start_frame, take
from splitft.engine.ledger import Ledger
from splitft.engine.settings import SHARED_SERVER, ClientState, Federation, OnStep, RoundResult, Starts, is_low, load_moments, next_state
from splitft.lora import AdapterBank
from splitft.loss import Targets, training_loss
from splitft.messages import FRAME_BYTES, STEP_BYTES, RoundAccepted, Type, round_frame
from splitft.optimizer import clip_factor
from splitft.rng import numpy_stream
from splitft.split import Route
from splitft.types import Plan, RoundPlan
from splitft.wire import Stream, Wire, cross


class Cohort:
    """Plans in client order, a bank row and a moments row for each. Goes through the model at most `size` clients at a time."""

    def __init__(
        self,
        federation: Federation,
        plans: Sequence[Plan],
        round_plan: RoundPlan,
        first_step: int,
        starts: Starts,
        states: dict[int, ClientState],
        size: int,
    ) -> None:
        self.federation = federation
        self.plans = plans
        self.round = round_plan.round
        self.turns = round_plan.turns
        self.first_step = first_step
        self.size = size
        self.before = [states.get(plan.client, ClientState()) for plan in plans]
        self.ownership = [Ownership(plan, federation.split.blocks) for plan in plans]
        settings = federation.settings
        self.shared = settings.one_server_set
        extra = [states.get(SHARED_SERVER, ClientState())] if self.shared else []
        self.bank = AdapterBank(federation.layout, len(plans) + len(extra), federation.device, trained=federation.trained)
        self.moments = load_moments(
            [*self.before, *extra], federation.layout, settings, federation.device, [*plans, *(None for _ in extra)]
        )
        self.ledger = Ledger()
        self.loss_sums = torch.zeros(len(plans), dtype=torch.float64)
        self.squared = torch.zeros(len(plans), dtype=torch.float64)
        # Four tensors a step at most: at the cut up and down, at a U-shape's exit down and up.
        self.at_cut = [(Stream.open(settings.uplink), Stream.open(settings.downlink)) for _ in plans]
        self.at_exit = [(Stream.open(settings.downlink), Stream.open(settings.uplink)) for _ in plans]
        self._receive(starts)

    def take_over(self, before: Cohort) -> None:
        """Begin with the server's adapters and moments as another cohort left them."""
        with torch.no_grad():
            self.bank.values[-1] = before.bank.values[-1]
        for mine, theirs in ((self.moments.first, before.moments.first), (self.moments.second, before.moments.second)):
            mine[-1] = theirs[-1]
        self.moments.steps[-1] = before.moments.steps[-1]

    def shared_state(self) -> ClientState:
        """What outlives the round of the server's one set of adapters."""
        return next_state(ClientState(), 0, self.federation.settings, self.moments, len(self.plans))

    def train(self, on_step: OnStep) -> RoundResult:
        """All local steps of all clients; a client with fewer steps sits out the last ones."""
        settings, count = self.federation.settings, len(self.plans)
        losses: list[list[float]] = [[] for _ in self.plans]
        tokens, targets = [0] * count, [0] * count
        for company, step in self._companies():
            rows = self._rows(company)
            self.bank.gradients[rows] = 0.0
            for start in range(0, len(company), self.size):
                chosen = company[start : start + self.size]
                seen, trained, sums = self._accumulate(chosen, step)
                for j, k in enumerate(chosen):
                    tokens[k], targets[k] = tokens[k] + seen[j], targets[k] + trained[j]
                    self.loss_sums[k] += sums[j]
                    losses[k].append(sums[j] / trained[j])
            self._optimize(company, rows, step)
            on_step(len(company))
        return self._send(losses, tokens, targets, settings.gradient_accumulation)

    def _companies(self) -> Iterator[tuple[list[int], int]]:
        """Who takes an optimizer step together, and which of their steps it is: all that have it left; or, where the server steps after
        every batch, one after the other, in the order of the virtual clock (without one: drawn for every step)."""
        steps = [plan.local_steps for plan in self.plans]
        active = [[k for k, count in enumerate(steps) if count > step] for step in range(max(steps))]
        if self.federation.settings.server != "alternating":
            yield from ((company, step) for step, company in enumerate(active))
            return
        row_of, done = {plan.client: k for k, plan in enumerate(self.plans)}, [0] * len(steps)
        for client in self.turns or self._drawn_turns(active):
            k = row_of[client]
            yield [k], done[k]
            done[k] += 1

    def _drawn_turns(self, active: list[list[int]]) -> Iterator[int]:
        for step, company in enumerate(active):
            order = numpy_stream(self.federation.settings.seed, "turns", self.round, step).permutation(len(company))
            yield from (self.plans[company[position]].client for position in order.tolist())

    def _rows(self, company: list[int]) -> list[int] | slice:
        """The bank rows that a company trains; all of them as one slice where that is so."""
        if len(company) == len(self.plans):
            return slice(None)
        return [*company, *([len(self.plans)] if self.shared else [])]

    def _accumulate(self, chosen: list[int], step: int) -> tuple[list[int], list[int], list[float]]:
        """Gradients of one optimizer step of the chosen sessions, all micro-batches; their tokens, targets and summed nll."""
        batches = self._batches(chosen, step)
        normaliser = torch.stack([batch.targets for batch in batches]).sum(0)
        require_targets(normaliser, [self.federation.clients[self.plans[k].client] for k in chosen])
        sums, seen = torch.zeros(len(chosen), dtype=torch.float64), [0] * len(chosen)
        for batch in batches:
            sums += self._pass(chosen, batch, normaliser)
            seen = [a + b for a, b in zip(seen, batch.tokens, strict=True)]
        return seen, normaliser.tolist(), sums.tolist()

    def _batches(self, chosen: list[int], step: int) -> list[Batch]:
        """The micro-batches of one optimizer step of the chosen sessions."""
        accumulation = self.federation.settings.gradient_accumulation
        clients = [self.federation.clients[self.plans[k].client] for k in chosen]
        orders = [self.federation.orders[self.plans[k].client] for k in chosen]
        return [
            gather(clients, orders, [self.before[k].batches + step * accumulation + micro for k in chosen], self.federation.device)
            for micro in range(accumulation)
        ]

    def _pass(self, chosen: list[int], batch: Batch, normaliser: Tensor) -> Tensor:
        """Forward and backward of one micro-batch; the summed nll of each chosen session [n]."""
        split = self.federation.split
        sequences = batch.lengths.shape[1]
        wires = self._wires(chosen, batch, sequences)

        def crossing(index: int, hidden: Tensor) -> Tensor:
            for wire in wires.get(index, ()):
                hidden = cross(hidden, wire)
            return hidden

        route = self._route(chosen, batch.ids.shape[0])
        route.cross = crossing
        hidden = split.run(route, batch.ids, batch.mask)
        weight = (1.0 / normaliser.float()).repeat_interleave(sequences).to(hidden.device)
        loss, row_sums = training_loss(hidden, Targets.of(batch.labels, hidden.device), weight, split.head, split.anatomy)
        loss.backward()  # type: ignore[no-untyped-call]
        self._count_step(chosen, batch, sequences)
        return row_sums.cpu().reshape(-1, sequences).sum(1)

    def _route(self, chosen: list[int], rows: int) -> Route:
        """Which bank row each session uses at each block."""
        sessions, device = len(chosen), self.federation.device
        if not self.shared:
            own = None if sessions == len(self.plans) else torch.tensor(chosen, device=device)
            return Route(rows, bank=self.bank, bank_rows=own, sessions=sessions)
        server_row = len(self.plans)
        table: dict[int, tuple[Tensor | None, int]] = {}
        for block in range(self.federation.split.blocks):
            used = [k if block in self.ownership[k].held else server_row for k in chosen]
            # Where all use the server's row they are one session with more sequences.
            distinct = used[:1] if set(used) == {server_row} else used
            table[block] = (torch.tensor(distinct, device=device), len(distinct))
        return Route(rows, bank=self.bank, block_rows=table.__getitem__, sessions=sessions)

    def _wires(self, chosen: list[int], batch: Batch, sequences: int) -> dict[int, list[Wire]]:
        """Behind which block which sessions' rows cross; a session is counted by its place among the chosen."""
        wires: dict[int, list[Wire]] = {}
        plans = [self.plans[k] for k in chosen]

        def place(
            index: int, sessions: list[int], streams: list[tuple[Stream, Stream]], names: tuple[tuple[str, str], tuple[str, str]]
        ) -> None:
            def record(session: int, is_forward: bool, packet: Packet) -> None:
                direction, kind = names[0] if is_forward else names[1]
                self.ledger.add(plans[session].client, direction, kind, packet.size_bytes)  # type: ignore[arg-type]

            mine = [streams[chosen[j]] for j in sessions]
            wires.setdefault(index, []).append(
                Wire(sessions, sequences, batch.padded_lengths, [f for f, _ in mine], [b for _, b in mine], record)
            )

        split = [j for j, plan in enumerate(plans) if not plan.is_whole(self.federation.split.blocks)]
        for cut in sorted({plans[j].cut for j in split}):
            at_cut = [j for j in split if plans[j].cut == cut]
            place(cut - 1, at_cut, self.at_cut, (("up", "activations"), ("down", "gradients")))
        u_shaped = [j for j in split if plans[j].exit_on_client]
        for end in sorted({self.ownership[chosen[j]].server_end for j in u_shaped}):
            at_end = [j for j in u_shaped if self.ownership[chosen[j]].server_end == end]
            place(end - 1, at_end, self.at_exit, (("down", "activations"), ("up", "gradients")))
        return wires

    def _count_step(self, chosen: list[int], batch: Batch, sequences: int) -> None:
        """Labels, and the frames around the packets: their lengths follow from the message format."""
        labels = batch.labels.reshape(len(chosen), -1)
        axis = torch.arange(batch.ids.shape[1])
        for j, k in enumerate(chosen):
            plan = self.plans[k]
            if plan.is_whole(self.federation.split.blocks):
                continue
            step_up, other = FRAME_BYTES + STEP_BYTES + 4 * sequences, FRAME_BYTES + STEP_BYTES
            if plan.exit_on_client:
                self.ledger.add(plan.client, "up", "control", step_up + other)
                self.ledger.add(plan.client, "down", "control", 2 * other)
                continue
            valid = (axis[None, :] < batch.lengths[j][:, None]).reshape(-1)
            self.ledger.add(plan.client, "up", "labels", label_packet(labels[j][valid], self.federation.vocabulary).size_bytes)
            self.ledger.add(plan.client, "up", "control", step_up)
            self.ledger.add(plan.client, "down", "control", other)

    def _optimize(self, company: list[int], rows: list[int] | slice, step: int) -> None:
        """Clip each client by its own global norm and take an optimizer step; `rows` are the company's, and the shared one's."""
        settings, bank, whole = self.federation.settings, self.bank, isinstance(rows, slice)
        rate = self._rate(company, step)
        if self.shared:
            bank.gradients[-1] /= len(company)  # the server's batch is the company's together: the mean of their losses
        values, gradients, moments = bank.values[rows], bank.gradients[rows], self.moments.select(rows, slice(None))
        squared = torch.linalg.vector_norm(gradients, dim=1).cpu().double().square()
        if settings.clip_norm > 0:
            # One client with the server's one set: the norm over both. Several: each set by its own, for a step of the server's belongs
            # to no single client.
            together = squared.sum().expand_as(squared) if self.shared and len(company) == 1 else squared
            factors = clip_factor(together, settings.clip_norm)
            gradients.mul_(factors.to(gradients.dtype).to(gradients.device)[:, None])
        settings.optimizer.step(values, gradients, moments, rate, bank.trained)
        if whole:
            self.moments.steps = moments.steps
        else:
            with torch.no_grad():
                bank.values[rows] = values
            self.moments.first[rows], self.moments.second[rows], self.moments.steps[rows] = moments.first, moments.second, moments.steps
        self.squared[company] = squared[: len(company)]

    def _rate(self, company: list[int], step: int) -> float | Tensor:
        """The learning rate of a company's step: one, or [rows, 1] where its members divide the round differently."""
        settings = self.federation.settings
        rates = [settings.rate(self.first_step, step, self.plans[k].local_steps) for k in company]
        if len(set(rates)) == 1:
            return rates[0]
        mean = [sum(rates) / len(rates)] if self.shared else []
        return torch.tensor([*rates, *mean], dtype=torch.float64)

    def _receive(self, starts: Starts) -> None:
        """Every client's start; its own blocks' part arrives as a message, unless it goes on from what it has."""
        federation, codec = self.federation, self.federation.settings.adapter_codec
        values = self.bank.values
        for k, plan in enumerate(self.plans):
            row = starts(plan)
            with torch.no_grad():
                values[k] = row.to(values.device)
            columns = self.ownership[k].client_columns(federation.layout, federation.trained)
            frame = round_start_frame(plan, self.round, self.first_step, federation.settings, take(row, columns))
            self.ledger.add_frame(plan.client, "down", frame)
            if plan.download and not codec.lossless:
                with torch.no_grad():
                    put(values[k], columns, decode_vector(frame.packets[0], codec).to(values.device))
        if self.shared:
            with torch.no_grad():
                values[-1] = starts(_at_full_rank(self.plans[0])).to(values.device)

    def _send(self, losses: list[list[float]], tokens: list[int], targets: list[int], accumulation: int) -> RoundResult:
        """Every client's adapters after the round; its own blocks' part travels as a message."""
        federation, settings = self.federation, self.federation.settings
        values = self.bank.values.to("cpu", copy=True)
        states = {}
        for k, plan in enumerate(self.plans):
            ownership = self.ownership[k]
            if self.shared:
                columns = ownership.server_columns(federation.layout)
                values[k, columns] = values[-1, columns]
            own = ownership.upload_columns(federation.layout, federation.trained)
            frame = round_end_frame(
                plan,
                self.round,
                targets[k],
                float(self.squared[k]),
                float(self.loss_sums[k]),
                take(values[k], own),
                settings.adapter_codec,
            )
            self.ledger.add_frame(plan.client, "up", frame)
            accepted = round_frame(Type.ROUND_ACCEPTED, RoundAccepted(round=self.round, client=plan.client))
            self.ledger.add_frame(plan.client, "down", accepted)
            if plan.upload and not settings.adapter_codec.lossless:
                put(values[k], own, decode_vector(encode_vector(take(values[k], own), settings.adapter_codec), settings.adapter_codec))
            states[plan.client] = next_state(
                self.before[k], plan.local_steps * accumulation, settings, self.moments, k, is_low(plan, federation.layout)
            )
        if self.shared:
            states[SHARED_SERVER] = self.shared_state()
        return RoundResult(tuple(self.plans), values[: len(self.plans)], tokens, losses, self.ledger, states, targets)


def _at_full_rank(plan: Plan) -> Plan:
    return replace(plan, ranks=())
