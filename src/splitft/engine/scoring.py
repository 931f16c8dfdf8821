"""Measure the joined model on held-out rows that stay with their clients: the forward half of a step, cut where the client's model is.

Nothing is compressed, as the exported adapter will be used without codecs; nothing is learned and no stream moves on. A whole model on
the server's own machine is measured by evaluate.py; the sums agree to float tolerance, since batches are of one client alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from splitft.compress.base import Packet
from splitft.engine.batches import Batch, assemble, label_packet, length_mask, read_labels
from splitft.engine.evaluate import Score, batches_by_length
from splitft.engine.exchange import Ownership, packet_bytes, packet_of, put, spread, take
from splitft.engine.intake import positions_of
from splitft.engine.settings import Federation
from splitft.errors import CodecError, ProtocolError
from splitft.lora import AdapterBank
from splitft.loss import Targets, token_losses
from splitft.messages import (
    Frame,
    RoundAccepted,
    ScoreEnd,
    ScoreStart,
    StepFields,
    Type,
    decode,
    round_frame,
    step_frame,
)
from splitft.split import Route
from splitft.transport.base import Talk
from splitft.types import IGNORE_LABEL, Plan

_ORDER = "measure the slice again from its beginning."
_SAME = "both sides must run the same plan and version."
# What is measured is never compressed: the raw bytes of a tensor, codec 1 on the wire (compress/identity.py).
PLAIN_CODEC = 1
# Nats of one target; no float32 logits give more than a fraction of it.
LARGEST_LOSS = 1e9


def plain_packet(tensor: Tensor) -> bytes:
    """A tensor as it is. Raises CodecError when it is not finite."""
    rows = tensor.detach().contiguous().cpu()
    if not bool(torch.isfinite(rows).all()):
        raise CodecError("a tensor to measure holds a value that is not finite.", "the adapters have diverged.")
    return packet_bytes(Packet(PLAIN_CODEC, rows.dtype, tuple(rows.shape), rows.view(-1).view(torch.uint8).numpy().tobytes()))


def read_plain(packet: Packet, shape: tuple[int, ...]) -> Tensor:
    """The tensor of this shape in a packet. Raises ProtocolError."""
    if packet.codec != PLAIN_CODEC or packet.shape != shape or not packet.dtype.is_floating_point:
        raise ProtocolError(f"a tensor of shape {packet.shape} in codec {packet.codec} arrived, due is {shape} uncompressed.", _SAME)
    if len(packet.payload) != math.prod(shape) * packet.dtype.itemsize:
        raise ProtocolError(f"{len(packet.payload)} bytes arrived for a tensor of shape {shape}.", _SAME)
    tensor = torch.frombuffer(bytearray(packet.payload), dtype=packet.dtype).reshape(shape) if math.prod(shape) else torch.zeros(shape)
    if not bool(torch.isfinite(tensor).all()):
        raise ProtocolError("a tensor to measure holds a value that is not finite.", "the sender's adapters have diverged.")
    return tensor


@dataclass
class _Slice:
    """How far one client's measurement is."""

    plan: Plan
    step: int = 0
    rows: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    tokens: int = 0
    score: Score | None = None


@dataclass
class Scorer:
    """The server's side of one measurement of the adapters [p]; `plans` say where each client's model is cut, `rows` how many rows it
    says it holds out (where that is not in the federation's data)."""

    federation: Federation
    adapters: Tensor
    plans: Sequence[Plan]
    round: int
    batch_size: int
    max_rows: int
    slices: dict[int, _Slice] = field(default_factory=dict)
    rows: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bank = AdapterBank(self.federation.layout, 1, self.federation.device)
        with torch.no_grad():
            self.bank.values.copy_(self.adapters[None].to(self.federation.device))

    def opening(self, client: int) -> Frame:
        """The message that asks a client; asked again, it begins again."""
        plan = next(one for one in self.plans if one.client == client)
        self.slices[client] = _Slice(plan)
        columns = Ownership(plan, self.federation.split.blocks).client_columns(self.federation.layout)
        fields = ScoreStart(self.round, client, plan.cut, plan.tail_blocks, plan.exit_on_client, self.batch_size, self.max_rows)
        return round_frame(Type.SCORE_START, fields, (plain_packet(take(self.adapters, columns)),))

    def answer(self, client: int, data: bytes | bytearray | memoryview) -> bytes:
        """The reply to one message of a client. Raises ProtocolError or CodecError."""
        one, frame = self.slices.get(client), decode(data)
        if one is None or one.score is not None:
            raise ProtocolError(f"client {client} sent {frame.kind.name}, nothing is measured with it.", _ORDER)
        if frame.kind == Type.SCORE_END:
            return self._end(one, frame)
        if frame.kind != Type.SCORE_UP:
            raise ProtocolError(f"client {client} sent {frame.kind.name} while its slice is measured.", _ORDER)
        return self._batch(one, frame)

    def _batch(self, one: _Slice, frame: Frame) -> bytes:
        fields, plan, federation = frame.step(), one.plan, self.federation
        if (fields.round, fields.client, fields.step) != (self.round, plan.client, one.step):
            raise ProtocolError(f"client {plan.client} sent batch {fields.step} of round {fields.round}, due is {one.step}.", _ORDER)
        row_most = federation.settings.row_tokens or positions_of(federation)
        padded = len(frame.lengths) * max(frame.lengths, default=0)
        if not frame.lengths or not all(frame.lengths) or max(frame.lengths) > row_most or padded > self.batch_size * row_most:
            raise ProtocolError(f"client {plan.client} measures {len(frame.lengths)} rows of {padded} tokens together.", _SAME)
        one.rows += len(frame.lengths)
        if one.rows > self._most_rows(plan.client):
            raise ProtocolError(f"client {plan.client} measures {one.rows} rows, it has {self._most_rows(plan.client)}.", _SAME)
        lengths, total, width = torch.tensor(frame.lengths), sum(frame.lengths), max(frame.lengths)
        mask = length_mask(lengths, width)
        valid = None if mask is None else mask.reshape(-1).bool()
        hidden_size = federation.split.hidden_size
        decoded = read_plain(packet_of(frame, 0), (total, hidden_size))
        like = torch.empty(0, device=federation.device, dtype=federation.split.dtype)
        hidden = spread(decoded, torch.Size((len(lengths), width, hidden_size)), valid, like)
        one.step += 1
        split = federation.split
        end = Ownership(plan, split.blocks).server_end
        route = Route(len(lengths), end - 1 if plan.exit_on_client else None, {plan.cut: hidden}, bank=self.bank)
        with torch.no_grad():
            needed = split.needed_mask(mask)
            final = split.run(route, None, None if needed is None else needed.to(federation.device))
        if plan.exit_on_client:
            return step_frame(Type.SCORE_DOWN, fields, (), (plain_packet(_valid(final, valid)),)).encode()
        labels = torch.full((len(lengths) * width,), IGNORE_LABEL)
        labels[slice(None) if valid is None else valid] = read_labels(packet_of(frame, 1), federation.vocabulary, total)
        loss_sum, correct, tokens = _sums(federation, final, labels.reshape(len(lengths), width))
        one.loss_sum, one.correct, one.tokens = one.loss_sum + loss_sum, one.correct + correct, one.tokens + tokens
        return step_frame(Type.SCORE_DOWN, fields.with_result(loss_sum, 0.0), (), ()).encode()

    def _most_rows(self, client: int) -> int:
        """Rows of a client's slice, as far as it has said."""
        held_out = self.rows.get(client, len(self.federation.clients[client].held_out))
        return min(held_out, self.max_rows) if self.max_rows > 0 else held_out

    def _end(self, one: _Slice, frame: Frame) -> bytes:
        end: ScoreEnd = frame.read(ScoreEnd)
        if (end.round, end.client) != (self.round, one.plan.client):
            raise ProtocolError(f"client {one.plan.client} closed the measurement of round {end.round} as client {end.client}.", _ORDER)
        if not (math.isfinite(end.loss_sum) and end.loss_sum >= 0 and 0 <= end.correct <= end.tokens):
            raise ProtocolError(f"client {end.client} measured a loss of {end.loss_sum}, {end.correct} of {end.tokens} right.", _SAME)
        most = self._most_rows(end.client) * (self.federation.settings.row_tokens or positions_of(self.federation))
        if end.tokens > most or end.loss_sum > LARGEST_LOSS * max(1, end.tokens):
            raise ProtocolError(f"client {end.client} measured {end.tokens} targets of {most} with a loss of {end.loss_sum:.3g}.", _SAME)
        there = not one.plan.exit_on_client
        one.score = Score(one.loss_sum, one.correct, one.tokens) if there else Score(float(end.loss_sum), int(end.correct), int(end.tokens))
        return round_frame(Type.ROUND_ACCEPTED, RoundAccepted(round=self.round, client=end.client)).encode()


def measure(federation: Federation, client: int, opening: bytes, inspect: Callable[[Tensor], None] = lambda vector: None) -> Talk:
    """A client's side: its held-out rows through the model as the server asks; `inspect` is shown the adapters [q] first. Raises
    ProtocolError on a wrong message."""
    frame = decode(opening)
    start: ScoreStart = frame.read(ScoreStart)
    plan = Plan(client, start.cut, 1, 1, start.exit_on_client, start.tail_blocks)
    if frame.kind != Type.SCORE_START or start.client != client or not 1 <= start.cut <= federation.split.blocks - start.tail_blocks:
        raise ProtocolError(f"client {client} was asked to measure as client {start.client} at cut {start.cut}.", _SAME)
    ownership, split = Ownership(plan, federation.split.blocks), federation.split
    bank = AdapterBank(federation.layout, 1, federation.device)
    columns = ownership.client_columns(federation.layout)
    size = ownership.client_size(federation.layout)
    vector = read_plain(packet_of(frame, 0), (size,)).float()
    inspect(vector)
    with torch.no_grad():
        put(bank.values[0], columns, vector.to(federation.device))
    rows = federation.clients[client].held_out
    taken = rows.select(range(start.max_rows)) if 0 < start.max_rows < len(rows) else rows
    sums = [0.0, 0, 0]
    for step, chosen in enumerate(batches_by_length(taken.lengths, start.batch_size) if len(taken) else ()):
        ids, lengths, trained = taken.batch(chosen)
        batch = assemble(ids, trained, lengths[:, None], federation.device)
        fields = StepFields(start.round, client, step, 0, int(batch.targets.sum()), int(batch.targets.sum()))
        if plan.is_whole(split.blocks):
            with torch.no_grad():
                final = split.run(Route(len(ids), bank=bank), batch.ids, split.needed_mask(batch.mask))
            found = _sums(federation, final, batch.labels)
        else:
            message, valid = _score_up(federation, plan, bank, batch, fields)
            reply = decode((yield message))
            if reply.kind != Type.SCORE_DOWN:
                raise ProtocolError(f"expected SCORE_DOWN, got {reply.kind.name}.", _SAME)
            found = _score_here(federation, plan, bank, batch, reply, valid) if plan.exit_on_client else (0.0, 0, 0)
        sums = [sums[0] + found[0], sums[1] + found[1], sums[2] + found[2]]
    end = ScoreEnd(start.round, client, float(sums[0]), int(sums[1]), int(sums[2]))
    if decode((yield round_frame(Type.SCORE_END, end).encode())).kind != Type.ROUND_ACCEPTED:
        raise ProtocolError("the measurement was not accepted.", _SAME)


def _score_up(federation: Federation, plan: Plan, bank: AdapterBank, batch: Batch, fields: StepFields) -> tuple[bytes, Tensor | None]:
    """The message of one batch, and which positions are tokens."""
    split = federation.split
    with torch.no_grad():
        hidden = split.run(Route(batch.ids.shape[0], last=plan.cut - 1, bank=bank), batch.ids, split.needed_mask(batch.mask))
    valid = None if batch.mask is None else batch.mask.reshape(-1).bool()
    packets = [plain_packet(_valid(hidden, valid))]
    if not plan.exit_on_client:
        flat = batch.labels.reshape(-1)
        packets.append(packet_bytes(label_packet(flat if valid is None else flat[valid.cpu()], federation.vocabulary)))
    return step_frame(Type.SCORE_UP, fields, batch.lengths.reshape(-1).tolist(), packets).encode(), valid


def _score_here(
    federation: Federation, plan: Plan, bank: AdapterBank, batch: Batch, reply: Frame, valid: Tensor | None
) -> tuple[float, int, int]:
    """The rest of a U-shape's forward from what the server sent."""
    split = federation.split
    rows, width = batch.ids.shape
    decoded = read_plain(packet_of(reply, 0), (int(batch.lengths.sum()), split.hidden_size))
    like = torch.empty(0, device=federation.device, dtype=split.dtype)
    hidden = spread(decoded, torch.Size((rows, width, split.hidden_size)), valid, like)
    route = Route(rows, entries={Ownership(plan, split.blocks).server_end: hidden}, bank=bank)
    with torch.no_grad():
        final = split.run(route, None, split.needed_mask(batch.mask))
    return _sums(federation, final, batch.labels)


def _sums(federation: Federation, final: Tensor, labels: Tensor) -> tuple[float, int, int]:
    """nll, right predictions and number of the targets of hidden states [b t d] in front of the head."""
    with torch.no_grad():
        targets = Targets.of(labels, final.device)
        picked = final.reshape(-1, final.shape[-1]).index_select(0, targets.positions)
        vocabulary = federation.split.model.config.get_text_config().vocab_size
        losses, right = token_losses(picked, federation.split.logits, targets.labels, vocabulary)
    return float(losses.double().sum()), int(right.sum()), len(targets.labels)


def _valid(hidden: Tensor, valid: Tensor | None) -> Tensor:
    flat = hidden.reshape(-1, hidden.shape[-1])
    return flat if valid is None else flat[valid.to(flat.device)]
