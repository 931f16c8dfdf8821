"""One cohort in one round: its bank of adapters, its passes through the model, its optimizer steps, its bytes.

With one set of server adapters for all clients (`shared`, `sequential`) the bank has one row more: a client's own blocks use the
client's row, the server's blocks use the last one, so a block may have several rows in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from splitft.engine.adapters import AdapterStreams, carry_changes, facts_of
from splitft.engine.batches import Batch, alike, gather, require_targets
from splitft.engine.crossings import Company
from splitft.engine.exchange import Ownership, encode_vector, put, round_end_frame, round_start_frame, take
from splitft.engine.labels import count_labels, known_labels, with_labels
from splitft.engine.ledger import Ledger
from splitft.engine.settings import SHARED_SERVER, ClientState, Federation, OnStep, RoundResult, Starts, is_low, load_moments, next_state
from splitft.engine.streams import StreamStates, open_step_streams, samples_of, states_after
from splitft.lora import AdapterBank, wide
from splitft.loss import Targets, training_loss
from splitft.messages import FRAME_BYTES, STEP_BYTES, RoundAccepted, Type, round_frame
from splitft.optimizer import clip_factor
from splitft.rng import numpy_stream
from splitft.split import Route
from splitft.types import Plan, RoundPlan


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
        longest = max(int(federation.clients[plan.client].train.lengths.max()) for plan in plans)
        self.budget_tokens = size * longest * federation.settings.batch_size
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
        self.squared = torch.zeros(len(plans), dtype=wide(federation.device), device=federation.device)
        known = [state.streams for state in self.before]
        self.streams = [open_step_streams(settings, plan, self.round, one) for plan, one in zip(plans, known, strict=True)]
        self.adapters = [
            AdapterStreams.open(settings, plan, self.round, one, federation.start) for plan, one in zip(plans, known, strict=True)
        ]
        self.labels = [known_labels(one) for one in known]
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
        tokens, targets = [0] * count, [0] * count
        sums: list[tuple[list[int], list[int], Tensor]] = []  # read at the end only: until then no step waits for a GPU
        for company, step in self._companies():
            rows = self._rows(company)
            self.bank.gradients[slice(None) if rows is None else rows] = 0.0
            for chosen in self._passes(company, step):
                seen, trained, lost = self._accumulate(chosen, step)
                sums.append((chosen, trained, lost))
                for j, k in enumerate(chosen):
                    tokens[k], targets[k] = tokens[k] + seen[j], targets[k] + trained[j]
            self._optimize(company, rows, step)
            on_step(len(company))
        return self._send(self._losses(sums), tokens, targets, settings.gradient_accumulation)

    def _losses(self, sums: list[tuple[list[int], list[int], Tensor]]) -> list[list[float]]:
        """Mean loss of each step of each client, from the summed losses of each pass."""
        losses: list[list[float]] = [[] for _ in self.plans]
        for chosen, trained, lost in sums:
            for k, count, own in zip(chosen, trained, lost.tolist(), strict=True):
                self.loss_sums[k] += own
                losses[k].append(own / count)
        return losses

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

    def _rows(self, company: list[int]) -> list[int] | None:
        """The bank rows that a company trains; None where that is all of them."""
        if len(company) == len(self.plans):
            return None
        return [*company, *([len(self.plans)] if self.shared else [])]

    def _passes(self, company: list[int], step: int) -> list[list[int]]:
        """Who goes through the model together: at most `size` sessions' worth of tokens, those with rows of like length."""
        federation, accumulation = self.federation, self.federation.settings.gradient_accumulation
        widths = []
        for k in company:
            client, first = self.plans[k].client, self.before[k].batches + step * accumulation
            lengths, order = federation.clients[client].train.lengths, federation.orders[client]
            widths.append(max(int(lengths[order.indices(first + micro)].max()) for micro in range(accumulation)))
        batch = federation.settings.batch_size
        return [[company[place] for place in places] for places in alike([width * batch for width in widths], self.budget_tokens)]

    def _accumulate(self, chosen: list[int], step: int) -> tuple[list[int], list[int], Tensor]:
        """Gradients of one optimizer step of the chosen sessions, all micro-batches; their tokens, targets and summed nll [n]."""
        batches = self._batches(chosen, step)
        normaliser = torch.stack([batch.targets for batch in batches]).sum(0)
        require_targets(normaliser, [self.federation.clients[self.plans[k].client] for k in chosen])
        sums, seen = torch.zeros(()), [0] * len(chosen)
        for batch in batches:
            sums = sums + self._pass(chosen, batch, normaliser)
            seen = [a + b for a, b in zip(seen, batch.tokens, strict=True)]
        return seen, normaliser.tolist(), sums

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
        route = self._route(chosen, batch.ids.shape[0])
        route.cross = self._company(chosen, batch, sequences).crossing()
        hidden = split.run(route, batch.ids, split.needed_mask(batch.mask))
        weight = (1.0 / normaliser.float()).repeat_interleave(sequences).to(hidden.device)
        loss, row_sums = training_loss(hidden, Targets.of(batch.labels, hidden.device), weight, split.head, split.anatomy)
        loss.backward()  # type: ignore[no-untyped-call]
        self._count_step(chosen, batch, sequences)
        return row_sums.reshape(-1, sequences).sum(1)

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

    def _company(self, chosen: list[int], batch: Batch, sequences: int) -> Company:
        """Who goes through this pass, and how they cross."""
        told = [samples_of(batch.samples[j], batch.lengths[j]) for j in range(len(chosen))] if self.federation.settings.keyed else None
        return Company(
            self.bank,
            [self.ownership[k] for k in chosen],
            [self.streams[k] for k in chosen],
            chosen,
            len(self.plans) if self.shared else None,
            sequences,
            batch.padded_lengths,
            told,
            self.ledger,
        )

    def _count_step(self, chosen: list[int], batch: Batch, sequences: int) -> None:
        """Labels, and the frames around the packets: their lengths follow from the message format."""
        for j, k in enumerate(chosen):
            plan = self.plans[k]
            if plan.is_whole(self.federation.split.blocks):
                continue
            told = samples_of(batch.samples[j], batch.lengths[j]) if self.federation.settings.keyed else None
            named = sequences if told is None else 2 * sequences
            step_up, other = FRAME_BYTES + STEP_BYTES + 4 * named, FRAME_BYTES + STEP_BYTES
            if plan.exit_on_client:
                self.ledger.add(plan.client, "up", "control", step_up + other)
                self.ledger.add(plan.client, "down", "control", 2 * other)
                continue
            size, self.labels[k] = count_labels(batch.tokens[j], self.federation.vocabulary, self.labels[k], told)
            self.ledger.add(plan.client, "up", "labels", size)
            self.ledger.add(plan.client, "up", "control", step_up)
            self.ledger.add(plan.client, "down", "control", other)

    def _optimize(self, company: list[int], rows: list[int] | None, step: int) -> None:
        """Clip each client by its own global norm and take an optimizer step; `rows` are the company's, and the shared one's."""
        settings, bank = self.federation.settings, self.bank
        rate = self._rate(company, step)
        if self.shared:
            bank.gradients[-1] /= len(company)  # the server's batch is the company's together: the mean of their losses
        gradients = bank.gradients if rows is None else bank.gradients[rows]
        squared = torch.linalg.vector_norm(gradients, dim=1).to(wide(gradients.device)).square()
        if settings.clip_norm > 0:
            # One client with the server's one set: the norm over both. Several: each set by its own, for a step of the server's belongs
            # to no single client.
            together = squared.sum().expand_as(squared) if self.shared and len(company) == 1 else squared
            self._clip(rows, clip_factor(together, settings.clip_norm))
        settings.optimizer.step(bank.values, bank.gradients, self.moments, rate, bank.trained, rows)
        self.squared[company] = squared[: len(company)]

    def _clip(self, rows: list[int] | None, factors: Tensor) -> None:
        """Multiply the gradients of these rows by their factors [n]; most often all are one, and then a CPU reads and writes nothing."""
        if factors.device.type == "cpu" and bool((factors == 1.0).all()):
            return
        gradients, factors = self.bank.gradients, factors.to(self.bank.gradients)[:, None]
        if rows is None:
            gradients.mul_(factors)
        else:
            for row, factor in zip(rows, factors, strict=True):
                gradients[row].mul_(factor)

    def _rate(self, company: list[int], step: int) -> float | Tensor:
        """The learning rate of a company's step: one, or one per row [rows] where its members divide the round differently."""
        settings = self.federation.settings
        rates = [settings.rate(self.first_step, step, self.plans[k].local_steps) for k in company]
        if len(set(rates)) == 1:
            return rates[0]
        mean = [sum(rates) / len(rates)] if self.shared else []
        return torch.tensor([*rates, *mean], dtype=torch.float64)

    def _receive(self, starts: Starts) -> None:
        """Every client's start; its own blocks' part arrives as a message, unless it goes on from what it has."""
        federation, codec = self.federation, self.federation.settings.adapter_downlink
        values = self.bank.values
        changed = self._receive_changes(starts)
        sent: dict[tuple[object, ...], tuple[Tensor, bytes]] = {}
        for k, plan in enumerate(self.plans):
            row = starts(plan)
            if k not in changed:
                with torch.no_grad():
                    values[k] = row.to(values.device)
            columns = self.ownership[k].client_columns(federation.layout, federation.trained)
            same = (row.data_ptr(), plan.cut, plan.tail_blocks, plan.exit_on_client, plan.ranks)
            if (
                plan.download and k not in changed and same not in sent
            ):  # most clients begin with the same adapters: encoded once, counted for each
                sent[same] = row, encode_vector(take(row, columns), codec)
            data = changed[k] if k in changed else sent[same][1] if plan.download else b""
            frame = round_start_frame(plan, self.round, self.first_step, federation.settings, data)
            self.ledger.add_frame(plan.client, "down", frame)
        if self.shared:
            with torch.no_grad():
                values[-1] = starts(_at_full_rank(self.plans[0])).to(values.device)
        self.begun = values.to("cpu", copy=True) if not federation.settings.adapter_uplink.lossless else values[:0]

    def _receive_changes(self, starts: Starts) -> dict[int, bytes]:
        """Starts that travel as changes: the packet of each client that is sent one. Afterwards it has what it decodes."""
        chosen = [k for k, plan in enumerate(self.plans) if plan.download and self.adapters[k].down is not None]
        if not chosen:
            return {}
        layout, trained, values = self.federation.layout, self.federation.trained, self.bank.values
        columns = {k: self.ownership[k].client_columns(layout, trained) for k in chosen}
        rows = {k: starts(self.plans[k]) for k in chosen}
        known = {k: self.adapters[k].known for k in chosen}
        before = {k: take(row, columns[k]) for k, row in known.items() if row is not None}
        changes = [take(rows[k], columns[k]).cpu() - before[k] for k in chosen]
        decoded, packets = carry_changes([one for k in chosen if (one := self.adapters[k].down)], changes, [0] * len(chosen))
        for k, change in zip(chosen, decoded, strict=True):
            received = before[k] + change
            row = self.federation.start.clone() if known[k] is None else known[k].clone()  # type: ignore[union-attr]
            put(row, columns[k], received)
            self.adapters[k].known = row
            self.adapters[k].missing = take(rows[k], columns[k]).cpu() - received
            with torch.no_grad():
                values[k] = rows[k].to(values.device)
                put(values[k], columns[k], received.to(values.device))
        return dict(zip(chosen, packets, strict=True))

    def _send_changes(self, values: Tensor) -> dict[int, bytes]:
        """Adapters that travel back as changes: the packet of each client that sends one. Afterwards `values` [n p] has what is decoded."""
        chosen = [k for k, plan in enumerate(self.plans) if plan.upload and self.adapters[k].up is not None]
        if not chosen:
            return {}
        layout, trained = self.federation.layout, self.federation.trained
        columns = {k: self.ownership[k].upload_columns(layout, trained) for k in chosen}
        changes = [take(values[k], columns[k]) - take(self.begun[k], columns[k]) for k in chosen]
        streams = [one for k in chosen if (one := self.adapters[k].up)]
        decoded, packets = carry_changes(streams, changes, [self.plans[k].segment for k in chosen])
        for k, change in zip(chosen, decoded, strict=True):
            put(values[k], columns[k], take(self.begun[k], columns[k]) + change)
        return dict(zip(chosen, packets, strict=True))

    def _send(self, losses: list[list[float]], tokens: list[int], targets: list[int], accumulation: int) -> RoundResult:
        """Every client's adapters after the round; its own blocks' part travels as a message."""
        federation, settings = self.federation, self.federation.settings
        values, squared = self.bank.values.to("cpu"), self.squared.tolist()
        states, facts = {}, {}
        if self.shared:
            for k, ownership in enumerate(self.ownership):
                columns = ownership.server_columns(federation.layout)
                values[k, columns] = values[-1, columns]
        changed = self._send_changes(values)
        for k, plan in enumerate(self.plans):
            own = self.ownership[k].upload_columns(federation.layout, federation.trained)
            frame = round_end_frame(
                plan,
                self.round,
                targets[k],
                squared[k],
                float(self.loss_sums[k]),
                changed[k] if k in changed else take(values[k], own),
                settings.adapter_uplink,
            )
            self.ledger.add_frame(plan.client, "up", frame)
            accepted = round_frame(Type.ROUND_ACCEPTED, RoundAccepted(round=self.round, client=plan.client))
            self.ledger.add_frame(plan.client, "down", accepted)
            state = next_state(self.before[k], plan.local_steps * accumulation, settings, self.moments, k, is_low(plan, federation.layout))
            states[plan.client] = replace(state, streams=self._remembered(k))
            if found := facts_of(self.streams[k], self.adapters[k]):
                facts[plan.client] = found
        for k, adapters in enumerate(self.adapters):
            if adapters.missing is not None:
                own = self.ownership[k].client_columns(federation.layout, federation.trained)
                put(values[k], own, take(values[k], own) + adapters.missing)
        if self.shared:
            states[SHARED_SERVER] = self.shared_state()
        return RoundResult(tuple(self.plans), values[: len(self.plans)], tokens, losses, self.ledger, states, targets, facts=facts)

    def _remembered(self, k: int) -> StreamStates | None:
        """What the ends of a client's streams keep for its next round."""
        states = states_after(self.federation.settings, self.plans[k], self.streams[k])
        states = self.adapters[k].remembered(self.federation.settings, with_labels(states, self.labels[k]))
        return states if states.forms or states.known is not None else None


def _at_full_rank(plan: Plan) -> Plan:
    return replace(plan, ranks=())
