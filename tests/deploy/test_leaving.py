"""Everything that leaves a client, field by field: what is not on this list does not leave. A new field has to be added here, in sight."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from splitft.deploy import enrolment, letters
from splitft.deploy.certificates import make_request, new_key
from splitft.deploy.letters import Letter, read
from splitft.deploy.sealing import SealedLetter
from splitft.messages import PACKET_KINDS, RoundEnd, ScoreEnd, StepFields, Type, decode
from splitft.secure import protocol
from splitft.transport.framing import Chunk, Form
from splitft.transport.framing import Hello as TransportHello

from .federation_scenes import scene
from .hostile import bent
from .identities import federation
from .process_scenes import Ground
from .test_enrolment import serving, token_for
from .test_sealed_federation import SEATS, changes_of, people

pytestmark = pytest.mark.timeout(60)

# Letters, typed. `data` is a keyed digest of the text (test_leaving_digest.py), `facts` sums over a round's values that codecs know.
# Of a sealing: fresh public keys and a signature; envelopes of shares, each encrypted for another client, and hashes of seeds; the adapters
# and the weight behind masks; a signature under a list of clients; shares of secrets, for the clients in that list or not in it.
LETTERS: dict[Letter | SealedLetter, tuple[type[msgspec.Struct], tuple[str, ...]]] = {
    Letter.FETCH: (letters.Fetch, ("sha256", "offset")),
    Letter.READY: (
        letters.Ready,
        ("rows", "tokens", "documents", "held_out_rows", "data", "memory_bytes", "snapshots", "device"),
    ),
    Letter.OPENED: (letters.Opened, ("round", "ok", "moments")),
    Letter.REPORT: (letters.Report, ("round", "step_losses", "tokens", "seconds", "facts")),
    Letter.REFUSED: (letters.Refused, ("round", "text", "remedy", "strikes", "final")),
    SealedLetter.SEALED_KEYS: (protocol.Keys, ("client", "channel", "mask", "signature")),
    SealedLetter.SEALED_SHARES: (protocol.Shares, ("envelopes", "commitments")),
    SealedLetter.SEALED_INPUT: (protocol.Masked, ("vectors",)),
    SealedLetter.SEALED_CONFIRMATION: (protocol.Confirmation, ("client", "signature")),
    SealedLetter.SEALED_UNMASKING: (protocol.Unmasking, ("keys", "seeds")),
}
# Inside them.
PARTS = {letters.Snapshot: ("round", "digest")}
GREETINGS = {
    letters.Hello: ("major", "minor", "version", "name", "takeover", "needs"),
    TransportHello: ("process", "server", "received", "filled", "greeting"),
}
# Around all of it, and where the session itself speaks: HELLO has the greeting, BEAT and BYE have nothing but this header.
CHUNKS = {Form.HELLO, Form.DATA, Form.BEAT, Form.BYE}
HEADER = ("form", "kind", "total", "offset", "sequence", "received", "released", "piece")
# Once, to get a certificate: the name, the token's secret, and a signing request that holds the name and a public key.
ENROLMENT = {enrolment.Request: ("name", "secret", "request")}
# What only a server sends, named here so that whatever is new has to be put on one side or the other.
SERVER_LETTERS = {Letter.PART, Letter.OPEN, Letter.FINISH, Letter.COMMITTED, Letter.FINISHED} | {
    SealedLetter.SEALED_TERMS,
    SealedLetter.SEALED_BOOK,
    SealedLetter.SEALED_ENVELOPES,
    SealedLetter.SEALED_SURVIVORS,
    SealedLetter.SEALED_CONFIRMATIONS,
}
SERVER_SEALED = {protocol.Terms, protocol.Book, protocol.Envelopes, protocol.Survivors, protocol.Confirmations}
SERVER_FRAMES = {Type.ROUND_START, Type.HIDDEN_DOWN, Type.STEP_DOWN, Type.ROUND_ACCEPTED, Type.SCORE_START, Type.SCORE_DOWN}
SERVER_ENROLMENT = {enrolment.Greeting, enrolment.Answer}
BY_HAND = {enrolment._TokenForm}  # the operator's invitation, which goes to the client
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


def inside(form: Any) -> Iterator[type[msgspec.Struct]]:
    """Every struct that a field of `form` may hold, however deep."""
    for kind in typing.get_args(form):
        yield from inside(kind)
    if isinstance(form, type) and issubclass(form, msgspec.Struct):
        yield form
        for kind in typing.get_type_hints(form).values():
            yield from inside(kind)


def test_the_list_is_what_the_forms_have() -> None:
    for form, listed in [*LETTERS.values(), *PARTS.items(), *GREETINGS.items(), *ENROLMENT.items()]:
        assert names(form) == listed, form
    tops = {form for form, _ in LETTERS.values()} | {*GREETINGS, *ENROLMENT}
    assert {found for form in tops for found in inside(form)} == tops | {*PARTS}
    assert tuple(StepFields.__dataclass_fields__) == STEP
    for kind, (listed, packets) in FRAMES.items():
        assert PACKET_KINDS[kind] == packets
        assert listed == {Type.ROUND_END: names(RoundEnd), Type.SCORE_END: names(ScoreEnd)}.get(kind, STEP)
    assert tuple(one.name for one in fields(Chunk)) == HEADER


def test_every_kind_of_message_has_its_place_in_the_list() -> None:
    """A letter, frame, chunk or message of enrolment that is new is on neither side, and fails here."""
    for known, clients, servers in [
        ({*Letter, *SealedLetter}, {Letter.FRAME, *LETTERS}, SERVER_LETTERS),
        ({*Type}, {*FRAMES}, SERVER_FRAMES),
        ({*Form}, CHUNKS, {Form.WELCOME, Form.DATA, Form.BEAT, Form.CLOSE} - CHUNKS),
        (own_structs(enrolment), {*ENROLMENT}, SERVER_ENROLMENT | BY_HAND),
        (own_structs(protocol), sealed_forms(), SERVER_SEALED),
    ]:
        assert known == clients | servers
        assert not clients & servers


def own_structs(module: Any) -> set[Any]:
    """The structs that a module defines."""
    found = (one for one in vars(module).values() if isinstance(one, type) and issubclass(one, msgspec.Struct))
    return {one for one in found if one.__module__ == module.__name__}


def sealed_forms() -> set[Any]:
    return {form for kind, (form, _) in LETTERS.items() if isinstance(kind, SealedLetter)}


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
    seen = looked_at(sent, {Letter.FRAME, Letter.READY, Letter.OPENED, Letter.REPORT})
    assert seen[Type.STEP_UP] == ({2} if labels == "server" else {1})
    assert seen[Type.SCORE_UP] == ({2} if labels == "server" else {1})
    assert (Type.GRADIENT_UP in seen) == (labels == "client")


def looked_at(sent: list[tuple[int, bytes]], least: set[int]) -> dict[Type, set[int]]:
    """How many packets the frames of each type had, after a look at every field of all that was sent."""
    kinds = {kind for kind, _ in sent}
    assert kinds <= {Letter.FRAME, *LETTERS}
    assert least <= kinds
    listed_of: dict[int, Any] = {int(kind): entry for kind, entry in LETTERS.items()}
    seen: dict[Type, set[int]] = {}
    for kind, payload in sent:
        if kind != Letter.FRAME:
            form, listed = listed_of[kind]
            assert set(msgspec.msgpack.decode(payload, strict=False)) <= set(listed)
            read(form, payload)
            continue
        frame = decode(payload)
        assert frame.kind in FRAMES
        seen.setdefault(frame.kind, set()).add(len(frame.packets))
    return seen


def test_nothing_else_leaves_in_a_sealed_federation(tmp_path: Path) -> None:
    """Beside the letters of a sealing: the ROUND_END then has no adapters."""
    server, known = people(tmp_path)
    sent: list[tuple[int, bytes]] = []

    def note(kind: int, payload: bytes) -> list[tuple[int, bytes]]:
        sent.append((kind, bytes(payload)))
        return [(kind, payload)]

    with scene(tmp_path, SEATS, server, **changes_of(server, rounds=1, policy={"name": "fixed", "cuts": [2]})) as made:
        for k in range(SEATS):
            made.client(k, tls=known[k].tls, name=f"client-{k}", link_of=bent(note))
        made.end(40)
    sealed = {kind for kind in LETTERS if isinstance(kind, SealedLetter)}
    assert looked_at(sent, {Letter.FRAME, Letter.READY, *sealed})[Type.ROUND_END] == {0}


def test_nothing_else_leaves_at_enrolment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One message, of which the signing request says a name and a public key and nothing of the machine."""
    said: list[Any] = []
    send = enrolment.send_message
    # The server has its own name for the function, so only the client is heard.
    monkeypatch.setattr(enrolment, "send_message", lambda stream, message, *more: (said.append(message), send(stream, message, *more)))
    folder = federation(tmp_path / "fed")
    with serving(folder) as server:
        token = token_for(folder, server.port)
        enrolment.enrol(token, tmp_path / "id")
    [message] = said
    assert set(msgspec.to_builtins(message)) == set(ENROLMENT[type(message)])
    assert (message.name, message.secret) == ("alice", token.secret)
    for pem in (message.request, make_request("alice", new_key())):
        request = x509.load_pem_x509_csr(pem)
        assert [(one.oid, one.value) for one in request.subject] == [(NameOID.COMMON_NAME, "alice")]
        assert not list(request.extensions)
        assert not list(request.attributes)
