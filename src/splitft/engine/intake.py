"""What the server accepts: every message of a session is checked against its plan and decoded before anything changes.

The functions here change no state; what they return is applied by the server once all messages of a turn have passed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from splitft.compress.base import Samples, State
from splitft.engine.adapters import AdapterStreams, receive_change
from splitft.engine.batches import length_mask
from splitft.engine.exchange import Ownership, decode_vector, packet_of, size_of, spread
from splitft.engine.labels import Known, receive_labels
from splitft.engine.narrow import crossing_width
from splitft.engine.settings import Federation
from splitft.engine.streams import samples_of
from splitft.errors import ProtocolError
from splitft.messages import Frame, RoundEnd, StepFields
from splitft.types import IGNORE_LABEL
from splitft.wire import Stream

IN_ORDER = "messages must come in order; restart the round."
SAME_PLAN = "both sides must run the same plan and version."


@dataclass
class Session:
    """The server's side of one client in one round; `row` is its bank row.

    `step` and `micro` name the micro-batch that is due next. `due`: an optimizer step waits for the client's part of the gradient norm.
    `in_pass`: a U-shaped pass waits for the client's gradient. `gone`: nothing more is expected of it. `short`: it was asked to end the
    round early. `normaliser` is that of the step under way, `counted` the targets of its micro-batches so far.
    """

    ownership: Ownership
    row: int
    uplink: Stream
    downlink: Stream
    exit_down: Stream
    exit_up: Stream
    step: int = 0
    micro: int = 0
    due: bool = False
    in_pass: bool = False
    finished: bool = False
    gone: bool = False
    short: bool = False
    squared_norm: float = 0.0
    targets: int = 0
    normaliser: int = 0
    counted: int = 0
    labels: Known = field(default_factory=dict)
    adapters: AdapterStreams = field(default_factory=lambda: AdapterStreams(None, None, None))
    begun: Tensor | None = None

    @property
    def client(self) -> int:
        return self.ownership.plan.client

    def advance(self, accumulation: int) -> None:
        """The next micro-batch is due."""
        self.micro += 1
        if self.micro == accumulation:
            self.step, self.micro = self.step + 1, 0


@dataclass
class Arrival:
    """One session's tensor in a pass: its message, tokens per sequence, hidden state [b t d] and which positions are tokens; the samples it
    is of, and the labels that are known after it."""

    session: Session
    fields: StepFields
    lengths: Tensor
    hidden: Tensor
    valid: Tensor | None
    labels: Tensor | None
    receiver: State
    samples: Samples | None
    known: Known


@dataclass(frozen=True)
class Returned:
    """A U-shaped client's gradient [b t d] with respect to what it was sent."""

    session: Session
    gradient: Tensor
    receiver: State


@dataclass(frozen=True)
class Ending:
    """A client's own adapters [q] (None: it keeps them) and the norm that closes its last step."""

    session: Session
    vector: Tensor | None
    squared_norm: float
    targets: int
    receiver: State = None


def step_up(session: Session, frame: Frame, federation: Federation, round_index: int) -> Arrival:
    """A STEP_UP as an arrival. Raises ProtocolError or CodecError."""
    fields, plan = frame.step(), session.ownership.plan
    if plan.is_whole(federation.split.blocks):
        raise ProtocolError(f"client {session.client} holds the whole model and sent a step.", SAME_PLAN)
    _check_order(session, fields, round_index)
    if session.in_pass:
        raise ProtocolError(f"client {session.client} sent another batch before the gradient of the last.", IN_ORDER)
    if fields.step >= plan.local_steps:
        raise ProtocolError(f"client {session.client} sent step {fields.step + 1} of {plan.local_steps}.", IN_ORDER)
    _check_norm(session, fields.squared_norm)
    sequences, samples = _sequences(session, frame, federation)
    packet = packet_of(frame, 0)
    total = sum(sequences)
    _check_targets(session, fields, total, federation)
    channels = crossing_width(federation.layout, federation.split.hidden_size)
    if packet.shape != (total, channels):
        raise ProtocolError(
            f"client {session.client} sent a tensor of shape {packet.shape} for {total} tokens of width {channels}.", SAME_PLAN
        )
    decoded, receiver = session.uplink.codec.decode(packet, session.uplink.receiver, samples)
    lengths, known = torch.tensor(sequences), session.labels
    width = int(lengths.max())
    mask = length_mask(lengths, width)
    valid = None if mask is None else mask.reshape(-1).bool()
    like = torch.empty(0, device=federation.device, dtype=federation.split.dtype)
    hidden = spread(decoded, torch.Size((len(lengths), width, channels)), valid, like)
    labels = None
    if not plan.exit_on_client:
        flat = torch.full((len(lengths) * width,), IGNORE_LABEL)
        read, known = receive_labels(packet_of(frame, 1), federation.vocabulary, total, known, samples)
        flat[slice(None) if valid is None else valid] = read
        labels = flat.reshape(len(lengths), width)
        if int((labels != IGNORE_LABEL).sum()) != fields.targets:
            raise ProtocolError(f"client {session.client} names {fields.targets} targets, its labels hold another number.", SAME_PLAN)
    return Arrival(session, fields, lengths, hidden, valid, labels, receiver, samples, known)


def _check_targets(session: Session, fields: StepFields, tokens: int, federation: Federation) -> None:
    """The targets of a step weigh its client's update, so they are counted: no more than tokens in a micro-batch, and together what every
    micro-batch of the step has named."""
    counted = (0 if fields.micro == 0 else session.counted) + fields.targets
    last = fields.micro == federation.settings.gradient_accumulation - 1
    same = fields.micro == 0 or fields.normaliser == session.normaliser
    if not (fields.targets <= tokens and same and fields.normaliser >= max(1, counted) and (not last or counted == fields.normaliser)):
        raise ProtocolError(
            f"client {session.client} names {fields.targets} targets in a batch of {tokens} tokens, {counted} so far in the step, of "
            f"{fields.normaliser}.",
            "a step needs at least one target, and its micro-batches have them all.",
        )


def _sequences(session: Session, frame: Frame, federation: Federation) -> tuple[tuple[int, ...], Samples | None]:
    """Tokens of each sequence, and their samples where a codec remembers by sample. Raises ProtocolError when numbers are missing."""
    settings = federation.settings
    count, most = settings.batch_size, settings.row_tokens or positions_of(federation)
    numbers, due = frame.lengths, 2 * count if settings.keyed else count
    if len(numbers) != due or not all(numbers[:count]):
        named = " with their samples" if settings.keyed else ""
        raise ProtocolError(
            f"client {session.client} sent {len(numbers) * count // due} sequences{named} (numbers {numbers[:4]}), due are {count}.",
            "check train.batch_size and the codecs.",
        )
    if max(numbers[:count]) > most:
        # Before anything is decoded: at a variable rate a few bytes may claim any number of tokens.
        raise ProtocolError(f"client {session.client} sent a sequence of {max(numbers[:count])} tokens, at most {most} are due.", SAME_PLAN)
    rows = len(federation.clients[session.client].train)
    if settings.keyed and max(numbers[count:]) >= rows:
        raise ProtocolError(f"client {session.client} names sample {max(numbers[count:])}, it has {rows}.", "check the client's data.")
    return numbers[:count], samples_of(numbers[count:], numbers[:count]) if settings.keyed else None


def gradient_up(session: Session, frame: Frame, arrival: Arrival | None, round_index: int) -> Returned:
    """A GRADIENT_UP for the pass that `arrival` is in. Raises ProtocolError or CodecError."""
    if arrival is None or not session.in_pass:
        raise ProtocolError(f"client {session.client} sent a gradient for no open pass.", IN_ORDER)
    _check_order(session, frame.step(), round_index)
    packet = packet_of(frame, 0)
    total, width = int(arrival.lengths.sum()), arrival.hidden.shape[-1]
    if packet.shape != (total, width):
        raise ProtocolError(f"client {session.client} sent a gradient of shape {packet.shape}, due is {(total, width)}.", SAME_PLAN)
    decoded, receiver = session.exit_up.codec.decode(packet, session.exit_up.receiver, arrival.samples)
    return Returned(session, spread(decoded, arrival.hidden.shape, arrival.valid, arrival.hidden), receiver)


def round_end(session: Session, frame: Frame, federation: Federation, round_index: int) -> Ending:
    """A ROUND_END. Raises ProtocolError or CodecError."""
    end: RoundEnd = frame.read(RoundEnd)
    if end.client != session.client or end.round != round_index:
        raise ProtocolError(f"client {session.client} closed round {end.round} as client {end.client}.", "check the client's identity.")
    plan = session.ownership.plan
    if plan.is_whole(federation.split.blocks):
        _check_alone(session, end, federation)
    else:
        _check_finished(session, end)
    _check_norm(session, end.squared_norm)
    if plan.upload != bool(frame.packets):
        raise ProtocolError(f"client {session.client} closed the round with{'' if frame.packets else 'out'} adapters.", SAME_PLAN)
    if not plan.upload:
        return Ending(session, None, end.squared_norm, end.tokens)
    due = size_of(session.ownership.upload_columns(federation.layout, federation.trained))
    if session.adapters.up is not None:
        assert session.begun is not None
        before = session.adapters.up.receiver
        change = receive_change(session.adapters.up, frame.packets[0], due, plan.segment)
        after, session.adapters.up.receiver = session.adapters.up.receiver, before
        return Ending(session, session.begun + change, end.squared_norm, end.tokens, after)
    vector = decode_vector(frame.packets[0], federation.settings.adapter_uplink)
    if vector.shape != (due,):
        raise ProtocolError(f"client {session.client} sent adapters of shape {tuple(vector.shape)}, due are {due} parameters.", SAME_PLAN)
    return Ending(session, vector, end.squared_norm, end.tokens)


def _check_finished(session: Session, end: RoundEnd) -> None:
    """All steps went through this server, and their targets are the ones reported."""
    whole = session.step == session.ownership.plan.local_steps or (session.short and session.step > 0)
    if not whole or session.micro or session.in_pass:
        raise ProtocolError(
            f"client {session.client} closed the round with {session.step} of {session.ownership.plan.local_steps} steps done.",
            "finish the steps.",
        )
    if end.tokens != session.targets:
        raise ProtocolError(f"client {session.client} reports {end.tokens} trained tokens, its steps had {session.targets}.", SAME_PLAN)


def _check_alone(session: Session, end: RoundEnd, federation: Federation) -> None:
    """A client with the whole model trained out of sight: what it reports can only be bounded."""
    settings, plan = federation.settings, session.ownership.plan
    sequences = plan.local_steps * settings.gradient_accumulation * settings.batch_size
    most = sequences * (settings.row_tokens or positions_of(federation))
    if not 0 < end.tokens <= most:
        raise ProtocolError(
            f"client {session.client} reports {end.tokens} trained tokens; {plan.local_steps} steps have 1 to {most}.", SAME_PLAN
        )


def positions_of(federation: Federation) -> int:
    """The most tokens that the model can take in a row."""
    return int(getattr(federation.split.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20)


def _check_order(session: Session, fields: StepFields, round_index: int) -> None:
    if (fields.client, fields.round, fields.step, fields.micro) != (session.client, round_index, session.step, session.micro):
        raise ProtocolError(
            f"client {session.client} sent client {fields.client}, round {fields.round}, step {fields.step}, micro-batch {fields.micro}; "
            f"due are round {round_index}, step {session.step}, micro-batch {session.micro}.",
            IN_ORDER,
        )


def _check_norm(session: Session, squared_norm: float) -> None:
    if not (math.isfinite(squared_norm) and squared_norm >= 0):
        raise ProtocolError(f"client {session.client} sent the squared gradient norm {squared_norm}.", "its training has diverged.")
