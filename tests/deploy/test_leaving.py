"""Everything that leaves a client, field by field: what is not on this list does not leave. A new field has to be added here, in sight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from splitft.deploy import letters
from splitft.deploy.letters import Letter, read
from splitft.messages import PACKET_KINDS, RoundEnd, ScoreEnd, StepFields, Type, decode
from splitft.transport.framing import Hello as TransportHello

from .federation_scenes import scene
from .hostile import bent
from .process_scenes import Ground

pytestmark = pytest.mark.timeout(60)

# Letters, typed. `data` is a digest of the text, `facts` sums over a round's values that codecs know.
LETTERS: dict[Letter, tuple[type[msgspec.Struct], tuple[str, ...]]] = {
    Letter.FETCH: (letters.Fetch, ("sha256", "offset")),
    Letter.READY: (
        letters.Ready,
        ("rows", "tokens", "documents", "held_out_rows", "data", "memory_bytes", "snapshots", "device"),
    ),
    Letter.OPENED: (letters.Opened, ("round", "ok", "moments")),
    Letter.REPORT: (letters.Report, ("round", "step_losses", "tokens", "seconds", "facts")),
    Letter.REFUSED: (letters.Refused, ("round", "text", "remedy", "strikes", "final")),
}
GREETINGS = {
    letters.Hello: ("major", "minor", "version", "name", "takeover", "needs"),
    TransportHello: ("process", "server", "received", "filled", "greeting"),
}
# Frames: their fields, and the tensors they carry. Labels only where labels are on the server; beside a step's fields: tokens of each row,
# multiples with tokens.bucket_tokens (test_leaving_lengths.py). normaliser, targets and tokens are counts of targets: true ones, of a
# micro-batch, a step and a round, for the server to weigh by.
STEP = ("round", "client", "step", "micro", "normaliser", "targets", "squared_norm", "loss_sum")
FRAMES: dict[Type, tuple[tuple[str, ...], tuple[str, ...]]] = {
    Type.STEP_UP: (STEP, ("activations", "labels")),
    Type.GRADIENT_UP: (STEP, ("gradients",)),
    Type.ROUND_END: (("round", "client", "tokens", "squared_norm", "loss_sum"), ("adapters",)),
    Type.SCORE_UP: (STEP, ("activations", "labels")),
    Type.SCORE_END: (("round", "client", "loss_sum", "correct", "tokens"), ()),
}


def names(form: Any) -> tuple[str, ...]:
    return tuple(one.name for one in msgspec.structs.fields(form))


def test_the_list_is_what_the_forms_have() -> None:
    for form, listed in [*LETTERS.values(), *GREETINGS.items()]:
        assert names(form) == listed, form
    assert tuple(StepFields.__dataclass_fields__) == STEP
    for kind, (fields, packets) in FRAMES.items():
        assert PACKET_KINDS[kind] == packets
        assert fields == {Type.ROUND_END: names(RoundEnd), Type.SCORE_END: names(ScoreEnd)}.get(kind, STEP)


@pytest.mark.parametrize("labels", ["server", "client"])
def test_nothing_else_leaves_in_a_whole_federation(tmp_path: Path, ground: Ground, labels: str) -> None:
    """Of everything that three clients send in a run: kinds, fields and tensors, and no labels where they stay at home."""
    ground.copy_to(tmp_path)
    sent: list[tuple[int, bytes]] = []

    def note(kind: int, payload: bytes) -> list[tuple[int, bytes]]:
        sent.append((kind, bytes(payload)))
        return [(kind, payload)]

    with scene(tmp_path, rounds=2, split={"labels": labels}) as fed:
        fed.all_clients(link_of=bent(note))
        fed.end()
    kinds = {kind for kind, _ in sent}
    assert kinds <= {Letter.FRAME, *LETTERS}
    assert {Letter.FRAME, Letter.READY, Letter.OPENED, Letter.REPORT} <= kinds
    seen: dict[Type, set[int]] = {}
    for kind, payload in sent:
        if kind != Letter.FRAME:
            form, listed = LETTERS[Letter(kind)]
            assert set(msgspec.msgpack.decode(payload)) <= set(listed)
            read(form, payload)
            continue
        frame = decode(payload)
        assert frame.kind in FRAMES
        seen.setdefault(frame.kind, set()).add(len(frame.packets))
    assert seen[Type.STEP_UP] == ({2} if labels == "server" else {1})
    assert seen[Type.SCORE_UP] == ({2} if labels == "server" else {1})
    assert (Type.GRADIENT_UP in seen) == (labels == "client")
