"""A client of the federation: embedding and first blocks (in a U-shape also the exit), its data, its adapters.

A round is a generator: it yields each message to send and is given the reply, so any transport can drive it (in-process in lockstep with
other clients, or over a network alone). The client computes the same whoever is on the other side.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import replace

import torch
from torch import Tensor

from splitft.clock import monotonic_s
from splitft.compress.base import Samples
from splitft.engine.adapters import AdapterStreams, Facts, facts_of, receive_change, send_change
from splitft.engine.batches import Batch, gather, require_targets
from splitft.engine.exchange import (
    Columns,
    Ownership,
    decode_vector,
    packet_bytes,
    packet_of,
    put,
    round_end_frame,
    size_of,
    spread,
    take,
)
from splitft.engine.labels import known_labels, send_labels, with_labels
from splitft.engine.narrow import decode as decode_state
from splitft.engine.narrow import encode, narrows
from splitft.engine.settings import ClientState, Federation, is_low, load_moments, next_state
from splitft.engine.streams import open_step_streams, samples_of, states_after
from splitft.errors import ProtocolError
from splitft.lora import AdapterBank
from splitft.loss import Targets, training_loss
from splitft.messages import Frame, RoundAccepted, RoundStart, StepFields, Type, decode, step_frame
from splitft.optimizer import clip_factor
from splitft.split import Route
from splitft.transport.base import NEXT, Posted
from splitft.types import Plan
from splitft.wire import Stream

Talk = Generator[bytes, bytes, None]


def expect(data: bytes, kind: Type) -> Frame:
    """The frame in `data`, which must be of this type. Raises ProtocolError."""
    frame = decode(data)
    if frame.kind != kind:
        raise ProtocolError(f"expected {kind.name}, got {frame.kind.name}.", "both sides must run the same version and plan.")
    return frame


def expect_answer(data: bytes, kind: Type, asked: StepFields) -> Frame:
    """The frame in `data`, which must answer this micro-batch and no other. Raises ProtocolError."""
    frame = expect(data, kind)
    got = frame.step()
    if (got.round, got.client, got.step, got.micro) != (asked.round, asked.client, asked.step, asked.micro):
        raise ProtocolError(
            f"{kind.name} answers round {got.round}, step {got.step}, micro-batch {got.micro} of client {got.client}; asked was round "
            f"{asked.round}, step {asked.step}, micro-batch {asked.micro}.",
            "the server mixes its clients up; restart it.",
        )
    return frame


def plan_of(start: RoundStart) -> Plan:
    """The plan a ROUND_START carries."""
    return Plan(
        start.client,
        start.cut,
        start.local_steps,
        start.rank,
        start.exit_on_client,
        start.tail_blocks,
        tuple(start.ranks),
        start.download,
        start.upload,
        start.segment,
        start.segments,
        (start.activations_dial, start.gradients_dial),
    )


class Client:
    """One participant in one round. `federation.split` needs only this client's blocks; `layout` names the columns of all keys."""

    def __init__(self, federation: Federation, client: int, state: ClientState) -> None:
        self.federation = federation
        self.client = client
        self.before = state
        self.step_losses: list[float] = []
        self.tokens = 0
        self.loss_sum = 0.0
        self.targets = 0
        self.state = state
        # Asked from outside while a round goes on: end it after the present step.
        self.stop_early = False
        # How many micro-batches of a step may be on their way at a time (1: each waits for its answer).
        self.window = 1
        # Look at every gradient [q d] and at the adapters [q] that arrive; they may refuse them.
        self.inspect_gradient: Callable[[Tensor], None] = lambda tensor: None
        self.inspect_adapters: Callable[[Tensor], None] = lambda vector: None
        self.seconds = {"front_forward": 0.0, "exit": 0.0, "front_backward": 0.0}

    def round(self, opening: bytes) -> Talk:
        """The whole round; sends STEP_UP (and GRADIENT_UP) per micro-batch, then ROUND_END. Raises ProtocolError on a wrong message."""
        frame = expect(opening, Type.ROUND_START)
        self.start = frame.read(RoundStart)
        if self.start.client != self.client:
            raise ProtocolError(f"client {self.client} was sent the plan of client {self.start.client}.", "check the server's roster.")
        self._prepare(frame)
        squared, step = 0.0, 0
        while step < self.start.local_steps and not (step and self.stop_early):
            squared = yield from self._step(step, squared)
            step += 1
        settings = self.federation.settings
        end = round_end_frame(self.plan, self.start.round, self.targets, squared, self.loss_sum, self._update(), settings.adapter_uplink)
        batches = step * self.start.gradient_accumulation
        state = next_state(self.before, batches, settings, self.moments, 0, is_low(self.plan, self.federation.layout))
        streams = states_after(settings, self.plan, (self.uplink, self.downlink, self.exit_down, self.exit_up))
        self.state = replace(state, streams=self.adapters.remembered(settings, with_labels(streams, self.labels)))
        accepted = expect((yield end.encode()), Type.ROUND_ACCEPTED).read(RoundAccepted)
        if accepted.client != self.client:
            raise ProtocolError(f"the server accepted client {accepted.client}, this is {self.client}.", "check the server's roster.")

    def facts(self) -> Facts:
        """What the codecs that send from this end say of the round."""
        return facts_of((self.uplink, self.downlink, self.exit_down, self.exit_up), self.adapters)

    def _prepare(self, frame: Frame) -> None:
        start, federation = self.start, self.federation
        self._check_start(frame)
        self.plan = plan_of(start)
        self.ownership = Ownership(self.plan, federation.split.blocks)
        # A U-shape's decoder may stand behind the last block.
        own = [*self.ownership.client_blocks(), *([federation.split.blocks] if start.exit_on_client else [])]
        self.bank = AdapterBank(federation.layout, 1, federation.device, own, federation.trained)
        settings = federation.settings
        self.adapters = AdapterStreams.open(settings, self.plan, start.round, self.before.streams, federation.start)
        self._begin(frame)
        self.moments = load_moments([self.before], federation.layout, settings, federation.device, [self.plan])
        self.uplink, self.downlink, self.exit_down, self.exit_up = open_step_streams(settings, self.plan, start.round, self.before.streams)
        self.labels = known_labels(self.before.streams)

    def _begin(self, frame: Frame) -> None:
        """The adapters of this client's blocks: what it knows (the start, or its own of the round before), and what was sent."""
        federation, start = self.federation, self.start
        if not start.download or federation.trained is not None:
            known = self.ownership.client_columns(federation.layout)
            own = self.before.adapter if self.before.adapter is not None and not start.download else federation.start
            with torch.no_grad():
                put(self.bank.values[0], known, take(own, known).to(federation.device))
        if start.download:
            columns = self.ownership.client_columns(federation.layout, federation.trained)
            vector = self._received(frame.packets[0], columns).to(federation.device)
            self.inspect_adapters(vector)
            with torch.no_grad():
                put(self.bank.values[0], columns, vector)
        if self.adapters.up is not None:
            self.begun = take(self.bank.values[0].cpu(), self.ownership.upload_columns(federation.layout, federation.trained))

    def _received(self, data: bytes | memoryview, columns: Columns) -> Tensor:
        """The adapters [q] that arrived, whole or as a change against those that came last."""
        stream, known = self.adapters.down, self.adapters.known
        if stream is None or known is None:
            return decode_vector(data, self.federation.settings.adapter_downlink)
        vector = take(known, columns) + receive_change(stream, data, size_of(columns), 0)
        self.adapters.known = known.clone()
        put(self.adapters.known, columns, vector)
        return vector

    def _update(self) -> Tensor | bytes:
        """What this client contributes: its own adapters, or its packet of their change since the round began."""
        vector = take(self.bank.values[0].cpu(), self.ownership.upload_columns(self.federation.layout, self.federation.trained))
        if self.adapters.up is None or not self.plan.upload:
            return vector
        return send_change(self.adapters.up, vector - self.begun, self.plan.segment)

    def _check_start(self, frame: Frame) -> None:
        """Refuse a plan this client cannot follow. Raises ProtocolError."""
        start, blocks = self.start, self.federation.split.blocks
        deepest = blocks - start.tail_blocks
        faults = {
            f"cut {start.cut} of a model with {blocks} blocks and {start.tail_blocks} tail blocks": not 1 <= start.cut <= deepest,
            f"{start.tail_blocks} tail blocks": start.tail_blocks < 0 or (start.tail_blocks > 0 and not start.exit_on_client),
            f"{len(start.rates)} learning rates for {start.local_steps} steps": len(start.rates) != start.local_steps
            or start.local_steps < 1,
            "a learning rate or clip_norm that is negative or not finite": not all(
                math.isfinite(x) and x >= 0 for x in (*start.rates, start.clip_norm)
            ),
            f"batch {start.batch_size}, accumulation {start.gradient_accumulation}": (start.batch_size, start.gradient_accumulation)
            != (self.federation.settings.batch_size, self.federation.settings.gradient_accumulation),
            "no adapters": start.download == (not frame.packets),
            f"{len(start.ranks)} ranks for {len(self.federation.layout.entries)} adapted projections": bool(start.ranks)
            and [0 <= rank <= entry.rank for rank, entry in zip(start.ranks, self.federation.layout.entries, strict=False)]
            != [True] * max(len(start.ranks), len(self.federation.layout.entries)),
            f"cut {start.cut}, where the run has no bottleneck": not self._has_bottleneck(),
            f"segment {start.segment} of {start.segments}": not 0 <= start.segment < start.segments,
            f"codecs' dial at {start.activations_dial} and {start.gradients_dial}": not all(
                math.isfinite(one) and one > 0 for one in (start.activations_dial, start.gradients_dial)
            ),
        }
        for fault, wrong in faults.items():
            if wrong:
                raise ProtocolError(f"the plan for client {self.client} has {fault}.", "check the server's configuration.")

    def _has_bottleneck(self) -> bool:
        """Whether everything this plan sends goes through a bottleneck, if the run has any."""
        plan, layout, blocks = plan_of(self.start), self.federation.layout, self.federation.split.blocks
        if not narrows(layout) or plan.is_whole(blocks):
            return True
        there = {(one.place, one.boundary) for one in layout.matrices}
        return ("cut", plan.cut) in there and (not plan.exit_on_client or ("exit", blocks - plan.tail_blocks) in there)

    def _step(self, step: int, squared_before: float) -> Generator[bytes, bytes, float]:
        """One optimizer step; returns the squared norm of this client's own gradients, which the server still needs."""
        federation, start = self.federation, self.start
        data, order = [federation.clients[self.client]], [federation.orders[self.client]]
        first = self.before.batches + step * start.gradient_accumulation
        batches = [gather(data, order, [first + micro], federation.device) for micro in range(start.gradient_accumulation)]
        normaliser = sum(int(batch.targets[0]) for batch in batches)
        require_targets(torch.tensor([normaliser]), data)
        self.bank.zero_gradients()
        steps = [
            StepFields(start.round, self.client, step, micro, normaliser, int(batch.targets[0]), squared_before)
            for micro, batch in enumerate(batches)
        ]
        if self.window > 1 and len(steps) > 1 and not start.exit_on_client and not self.plan.is_whole(federation.split.blocks):
            results = yield from self._overlapped(steps, batches)
        else:
            results = []
            for fields, batch in zip(steps, batches, strict=True):
                if self.plan.is_whole(federation.split.blocks):
                    results.append(self._alone(fields, batch))
                else:
                    results.append(
                        (yield from (self._exit_here(fields, batch) if start.exit_on_client else self._exit_there(fields, batch)))
                    )
        loss_sum, server_squared = sum(one.loss_sum for one in results), results[-1].squared_norm
        self.tokens += sum(batch.tokens[0] for batch in batches)
        self.targets += normaliser
        own = self.bank.squared_norms()
        if start.clip_norm > 0:
            self.bank.scale_gradients(clip_factor(own + server_squared, start.clip_norm))
        federation.settings.optimizer.step(self.bank.values, self.bank.gradients, self.moments, start.rates[step], self.bank.trained)
        self.step_losses.append(loss_sum / normaliser)
        self.loss_sum += loss_sum
        return float(own[0])

    def _front(self, batch: Batch) -> Tensor:
        """What crosses the cut: the state behind the front, or what a bottleneck leaves of it."""
        route = Route(batch.ids.shape[0], last=self.plan.cut - 1, bank=self.bank)
        hidden = self.federation.split.run(route, batch.ids, self.federation.split.needed_mask(batch.mask))
        return encode(self.bank, "cut", self.plan.cut, hidden)

    def _alone(self, fields: StepFields, batch: Batch) -> StepFields:
        """The whole model is here: nothing crosses a cut."""
        split = self.federation.split
        hidden = split.run(Route(batch.ids.shape[0], bank=self.bank), batch.ids, split.needed_mask(batch.mask))
        weight = torch.full((batch.ids.shape[0],), 1.0 / fields.normaliser, device=hidden.device)
        loss, sums = training_loss(hidden, Targets.of(batch.labels, hidden.device), weight, split.head, split.anatomy)
        loss.backward()  # type: ignore[no-untyped-call]
        return fields.with_result(float(sums.sum()), 0.0)

    def _overlapped(self, steps: list[StepFields], batches: list[Batch]) -> Generator[bytes, bytes, list[StepFields]]:
        """The micro-batches of a step with up to `window` of them on their way: the same numbers, since no weight changes within a step."""
        sent: deque[tuple[StepFields, Tensor, Tensor | None, Samples | None]] = deque()
        results: list[StepFields] = []
        for fields, batch in zip(steps, batches, strict=True):
            if len(sent) == self.window:
                results.append(self._finish_there((yield NEXT), *sent.popleft()))
            message, hidden, valid, samples = self._begin_there(fields, batch)
            yield Posted(message)
            sent.append((fields, hidden, valid, samples))
        while sent:
            results.append(self._finish_there((yield NEXT), *sent.popleft()))
        return results

    def _exit_there(self, fields: StepFields, batch: Batch) -> Generator[bytes, bytes, StepFields]:
        """Labels travel; the server computes the loss."""
        message, hidden, valid, samples = self._begin_there(fields, batch)
        return self._finish_there((yield message), fields, hidden, valid, samples)

    def _begin_there(self, fields: StepFields, batch: Batch) -> tuple[bytes, Tensor, Tensor | None, Samples | None]:
        """The message of a batch, and what its answer will need."""
        began_s = monotonic_s()
        hidden = self._front(batch)
        valid = batch.mask.reshape(-1).bool() if batch.mask is not None else None
        samples = self._samples(batch)
        labels = _valid(batch.labels.reshape(-1), valid)
        packet, self.labels = send_labels(labels, self.federation.vocabulary, self.labels, samples)
        packets = self._send(self.uplink, hidden, valid, samples), packet_bytes(packet)
        message = step_frame(Type.STEP_UP, fields, _named(batch, samples), packets).encode()
        self._spend("front_forward", began_s)
        return message, hidden, valid, samples

    def _finish_there(self, data: bytes, fields: StepFields, hidden: Tensor, valid: Tensor | None, samples: Samples | None) -> StepFields:
        """The backward of a batch whose gradient has come."""
        began_s = monotonic_s()
        reply = expect_answer(data, Type.STEP_DOWN, fields)
        gradient = self._receive(self.downlink, reply, hidden, valid, samples)
        self.inspect_gradient(gradient)
        hidden.backward(gradient)  # type: ignore[no-untyped-call]
        self._spend("front_backward", began_s)
        return reply.step()

    def _spend(self, kind: str, began_s: float) -> None:
        self.seconds[kind] += monotonic_s() - began_s

    def _exit_here(self, fields: StepFields, batch: Batch) -> Generator[bytes, bytes, StepFields]:
        """Labels stay; the server sends its last hidden state and is sent the gradient of the loss with respect to it."""
        began_s = monotonic_s()
        hidden = self._front(batch)
        valid = batch.mask.reshape(-1).bool() if batch.mask is not None else None
        samples = self._samples(batch)
        frame = step_frame(Type.STEP_UP, fields, _named(batch, samples), (self._send(self.uplink, hidden, valid, samples),))
        self._spend("front_forward", began_s)
        reply = expect_answer((yield frame.encode()), Type.HIDDEN_DOWN, fields)
        began_s = monotonic_s()
        state = self._receive(self.exit_down, reply, hidden, valid, samples).requires_grad_(True)
        split, end = self.federation.split, self.ownership.server_end
        route = Route(batch.ids.shape[0], entries={end: decode_state(self.bank, "exit", end, state)}, bank=self.bank)
        final = split.run(route, None, split.needed_mask(batch.mask))
        weight = torch.full((batch.ids.shape[0],), 1.0 / fields.normaliser, device=final.device)
        loss, sums = training_loss(final, Targets.of(batch.labels, final.device), weight, split.head, split.anatomy)
        loss.backward()  # type: ignore[no-untyped-call]
        assert state.grad is not None
        frame = step_frame(Type.GRADIENT_UP, fields, (), (self._send(self.exit_up, state.grad, valid, samples),))
        self._spend("exit", began_s)
        result = self._finish_there((yield frame.encode()), fields, hidden, valid, samples)
        return result.with_result(float(sums.sum()), result.squared_norm)

    def _samples(self, batch: Batch) -> Samples | None:
        """Which rows of this client's data a batch is, where a codec remembers by sample."""
        return samples_of(batch.samples[0], batch.lengths[0]) if self.federation.settings.keyed else None

    def _send(self, stream: Stream, tensor: Tensor, valid: Tensor | None, samples: Samples | None) -> bytes:
        """The packet of a tensor [b t d], padding left out."""
        return packet_bytes(stream.send(_valid(tensor.detach().reshape(-1, tensor.shape[-1]), valid), samples))

    def _receive(self, stream: Stream, frame: Frame, like: Tensor, valid: Tensor | None, samples: Samples | None) -> Tensor:
        """A tensor shaped as `like` from the frame's packet; padding is zero. Raises ProtocolError for a packet of another shape, before
        memory is taken for it."""
        packet, count = packet_of(frame, 0), like.shape[0] * like.shape[1] if valid is None else int(valid.sum())
        if packet.shape != (count, like.shape[2]):
            raise ProtocolError(
                f"a tensor of shape {packet.shape} arrived, due are {count} tokens of width {like.shape[2]}.", "check the plan."
            )
        return spread(stream.receive(packet, samples), like.shape, valid, like)


def _named(batch: Batch, samples: Samples | None) -> list[int]:
    """The tokens of each sequence, and behind them its sample where that is named."""
    lengths: list[int] = batch.lengths.reshape(-1).tolist()
    return lengths if samples is None else [*lengths, *samples.ids]


def _valid(flat: Tensor, valid: Tensor | None) -> Tensor:
    return flat if valid is None else flat[valid.to(flat.device)]
