"""The server under clients that break the protocol: each fault is refused by name, and nobody else's numbers change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from splitft.compress.base import Packet
from splitft.compress.identity import Identity
from splitft.engine.exchange import round_end_frame
from splitft.engine.settings import Federation
from splitft.errors import CodecError, ProtocolError, SplitftError
from splitft.messages import RoundAccepted, RoundEnd, Type, decode, round_frame

from .drive import Drive, federation_of, refields, reframe, repacket, tensor_packet

Bad = Callable[[Drive, bytes], bytes]
BAD_CLIENT = 1


@pytest.fixture(scope="module")
def fed() -> Federation:
    return federation_of()


def short(packet: Packet) -> Packet:
    rows = packet.shape[0] - 1
    size = len(packet.payload) // packet.shape[0] * rows
    return Packet(packet.codec, packet.dtype, (rows, *packet.shape[1:]), packet.payload[:size])


def long(packet: Packet) -> Packet:
    size = len(packet.payload) // packet.shape[0]
    return Packet(packet.codec, packet.dtype, (packet.shape[0] + 1, *packet.shape[1:]), bytes(packet.payload) + bytes(size))


def poisoned(packet: Packet) -> Packet:
    values = np.frombuffer(packet.payload, np.float32).copy()
    values[3] = np.nan
    return Packet(packet.codec, packet.dtype, packet.shape, values.tobytes())


def outside(packet: Packet) -> Packet:
    labels = np.frombuffer(packet.payload, np.uint16).copy()
    labels[0] = 96
    return Packet(packet.codec, packet.dtype, packet.shape, labels.tobytes())


def early_end(drive: Drive, message: bytes) -> bytes:
    return round_end_frame(
        replace(drive.plan.plans[0], client=BAD_CLIENT), drive.plan.round, 10, 0.0, 0.0, torch.zeros(5), Identity()
    ).encode()


def lengths_of(message: bytes) -> tuple[int, ...]:
    return decode(message).lengths


# Name -> the message instead of the second STEP_UP, the error, words of it.
FAULTS: dict[str, tuple[Bad, type[SplitftError], str]] = {
    "empty": (lambda drive, message: b"", ProtocolError, "0 arrived"),
    "garbage": (lambda drive, message: b"\x00" * len(message), ProtocolError, "not a splitft frame"),
    "truncated": (lambda drive, message: message[:-1], ProtocolError, "arrived"),
    "with a tail": (lambda drive, message: message + b"\x00", ProtocolError, "arrived"),
    "another round": (lambda drive, message: refields(message, round=3), ProtocolError, "round 3, step 1, micro-batch 0; due are round 4"),
    "another client's name": (lambda drive, message: refields(message, client=0), ProtocolError, "client 1 sent"),
    "the step before": (lambda drive, message: refields(message, step=0), ProtocolError, "step 0, micro-batch 0; due"),
    "a step ahead": (lambda drive, message: refields(message, step=2), ProtocolError, "step 2, micro-batch 0; due"),
    "a huge step": (lambda drive, message: refields(message, step=2**32 - 1), ProtocolError, "step 4294967295"),
    "a server's type": (lambda drive, message: reframe(message, kind=Type.STEP_DOWN, packets=()), ProtocolError, "STEP_DOWN, which only"),
    "an opening": (lambda drive, message: reframe(message, kind=Type.ROUND_START, packets=()), ProtocolError, "ROUND_START, which only"),
    "an acceptance": (
        lambda drive, message: round_frame(Type.ROUND_ACCEPTED, RoundAccepted(round=4, client=1)).encode(),
        ProtocolError,
        "only a server",
    ),
    "a gradient": (lambda drive, message: reframe(message, kind=Type.GRADIENT_UP, packets=()), ProtocolError, "gradient for no open pass"),
    "an early end": (early_end, ProtocolError, "closed the round with . of 2 steps"),
    "an end with a step's fields": (lambda drive, message: reframe(message, kind=Type.ROUND_END), ProtocolError, "ROUND_END"),
    "a step with an end's fields": (
        lambda drive, message: reframe(early_end(drive, message), kind=Type.STEP_UP),
        ProtocolError,
        "bytes of fields",
    ),
    "one sequence less": (
        lambda drive, message: reframe(message, lengths=lengths_of(message)[:-1]),
        ProtocolError,
        r"1 sequences .*due are 2",
    ),
    "one sequence more": (
        lambda drive, message: reframe(message, lengths=(*lengths_of(message), 1)),
        ProtocolError,
        r"3 sequences .*due are 2",
    ),
    "no sequences": (lambda drive, message: reframe(message, lengths=()), ProtocolError, "0 sequences"),
    "an empty sequence": (lambda drive, message: reframe(message, lengths=(0, sum(lengths_of(message)))), ProtocolError, "sequences"),
    "one token less": (lambda drive, message: repacket(message, 0, short), ProtocolError, "a tensor of shape"),
    "one token more": (lambda drive, message: repacket(message, 0, long), ProtocolError, "a tensor of shape"),
    "lengths that lie": (
        lambda drive, message: reframe(message, lengths=tuple(n + 1 for n in lengths_of(message))),
        ProtocolError,
        "tokens of width",
    ),
    "a sequence longer than the model": (
        lambda drive, message: reframe(message, lengths=(1_000_000, *lengths_of(message)[1:])),
        ProtocolError,
        "a sequence of 1000000 tokens, at most",
    ),
    "NaN": (lambda drive, message: repacket(message, 0, poisoned), CodecError, "1 of .* values are NaN"),
    "another codec": (
        lambda drive, message: repacket(message, 0, lambda packet: Packet(2, packet.dtype, packet.shape, packet.payload)),
        CodecError,
        "codec 2 reached identity",
    ),
    "a payload that does not fill its shape": (
        lambda drive, message: repacket(message, 0, lambda packet: Packet(1, packet.dtype, packet.shape, packet.payload[:-4])),
        CodecError,
        "does not fill shape",
    ),
    "no packets": (lambda drive, message: reframe(message, packets=()), ProtocolError, "carries 0 packets, number 1 is due"),
    "no labels": (
        lambda drive, message: reframe(message, packets=decode(message).packets[:1]),
        ProtocolError,
        "number 2 is due",
    ),
    "one label less": (lambda drive, message: repacket(message, 1, short), ProtocolError, "labels of shape"),
    "labels of another type": (
        lambda drive, message: repacket(message, 1, lambda packet: tensor_packet(packet, torch.zeros(packet.shape))),
        ProtocolError,
        "labels of shape",
    ),
    "a label outside the vocabulary": (
        lambda drive, message: repacket(message, 1, outside),
        ProtocolError,
        "label 96 is outside",
    ),
}


@pytest.fixture(scope="module")
def calm(fed: Federation) -> Drive:
    """The round nobody disturbs."""
    return Drive(fed).play()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_refused_by_name_and_other_sessions_give_the_same_numbers(fed: Federation, calm: Drive, name: str) -> None:
    change, error, words = FAULTS[name]
    caught: list[SplitftError] = []

    def disturb(drive: Drive, turn: int, client: int, message: bytes) -> None:
        if (turn, client) == (1, BAD_CLIENT):
            with pytest.raises(error, match=words) as refused:
                drive.server.handle([(client, change(drive, message))])
            caught.append(refused.value)

    found = Drive(fed).play(disturb, frozenset({BAD_CLIENT}))
    assert len(caught) == 1
    assert caught[0].remedy
    for client in (0, 2):
        values, losses, tokens = found.result(client)
        wanted, wanted_losses, wanted_tokens = calm.result(client)
        assert torch.equal(values, wanted)
        assert (losses, tokens) == (wanted_losses, wanted_tokens)
        assert found.server.sessions[client].finished


@pytest.mark.parametrize("name", FAULTS)
def test_after_a_refusal_the_right_message_gives_the_right_numbers(fed: Federation, calm: Drive, name: str) -> None:
    """Nothing of a refused message was applied, so the client may still send the right one."""
    change, error, _ = FAULTS[name]

    def disturb(drive: Drive, turn: int, client: int, message: bytes) -> None:
        if (turn, client) == (1, BAD_CLIENT):
            with pytest.raises(error):
                drive.server.handle([(client, change(drive, message))])

    found = Drive(fed).play(disturb)
    for client in range(3):
        assert torch.equal(found.result(client)[0], calm.result(client)[0])
        assert found.result(client)[1:] == calm.result(client)[1:]


@pytest.mark.parametrize("stranger", [3, -1, 10**9])
def test_a_client_that_is_not_in_the_round_is_refused(fed: Federation, stranger: int) -> None:
    drive = Drive(fed)
    for message in (drive.waiting[0], early_end(drive, b"")):
        with pytest.raises(ProtocolError, match=f"client {stranger} is not in round 4"):
            drive.server.handle([(stranger, message)])


def test_a_finished_client_is_refused(fed: Federation, calm: Drive) -> None:
    message = Drive(fed).waiting[0]
    with pytest.raises(ProtocolError, match="client 0 has finished round 4"):
        calm.server.handle([(0, message)])


def test_the_same_step_twice_is_refused_and_changes_nothing(fed: Federation, calm: Drive) -> None:
    def disturb(drive: Drive, turn: int, client: int, message: bytes) -> None:
        if (turn, client) == (0, BAD_CLIENT):
            drive.deliver(client)
            with pytest.raises(ProtocolError, match="step 0, micro-batch 0; due"):
                drive.server.handle([(client, message)])
            # The loop delivers what waits now: the next step. So this client is one turn ahead from here on.

    found = Drive(fed).play(disturb)
    for client in range(3):
        assert torch.equal(found.result(client)[0], calm.result(client)[0])


ENDS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "another client's name": (lambda message: changed_end(message, client=0), "closed round 4 as client 0"),
    "another round": (lambda message: changed_end(message, round=5), "closed round 5"),
    "one parameter less": (lambda message: repacket(message, 0, short), r"due are \d+ parameters"),
    "one parameter more": (lambda message: repacket(message, 0, long), r"due are \d+ parameters"),
    "a matrix": (
        lambda message: repacket(message, 0, lambda packet: Packet(1, packet.dtype, (1, *packet.shape), packet.payload)),
        r"due are \d+ parameters",
    ),
}


def changed_end(message: bytes, **fields: object) -> bytes:
    frame = decode(message)
    end = frame.read(RoundEnd)
    values = {name: getattr(end, name) for name in end.__struct_fields__}
    return round_frame(Type.ROUND_END, RoundEnd(**{**values, **fields}), frame.packets).encode()


@pytest.mark.parametrize("name", [*ENDS, "NaN"])
def test_a_bad_end_is_refused_and_others_end_as_they_would(fed: Federation, calm: Drive, name: str) -> None:
    change, words = ENDS.get(name, (lambda message: repacket(message, 0, poisoned), "values are NaN"))
    refused: list[int] = []

    def disturb(drive: Drive, turn: int, client: int, message: bytes) -> None:
        if client == BAD_CLIENT and decode(message).kind == Type.ROUND_END:
            with pytest.raises((ProtocolError, CodecError), match=words):
                drive.server.handle([(client, change(message))])
            assert not drive.server.sessions[client].finished
            refused.append(turn)

    found = Drive(fed).play(disturb, frozenset({BAD_CLIENT}), from_turn=2)
    assert refused == [2]
    for client in (0, 2):
        assert torch.equal(found.result(client)[0], calm.result(client)[0])


def test_a_wrong_type_is_refused_before_a_step_is_closed(fed: Federation) -> None:
    drive = Drive(fed)
    drive.deliver(BAD_CLIENT)
    session = drive.server.sessions[BAD_CLIENT]
    before = drive.server.bank.values.clone()
    for bad in (early_end(drive, b""), refields(drive.waiting[BAD_CLIENT], round=9)):
        with pytest.raises(ProtocolError):
            drive.server.handle([(BAD_CLIENT, bad)])
    assert session.due
    assert (session.step, session.micro) == (1, 0)
    assert torch.equal(drive.server.bank.values, before)


U_SHAPED: dict[str, tuple[Callable[[Drive, bytes], bytes], type[SplitftError], str]] = {
    "a gradient of fewer tokens": (lambda drive, message: repacket(message, 0, short), ProtocolError, "a gradient of shape"),
    "a gradient of more tokens": (lambda drive, message: repacket(message, 0, long), ProtocolError, "a gradient of shape"),
    "a gradient with NaN": (lambda drive, message: repacket(message, 0, poisoned), CodecError, "NaN"),
    "a gradient without packets": (lambda drive, message: reframe(message, packets=()), ProtocolError, "number 1 is due"),
    "an end instead": (early_end, ProtocolError, "closed the round with . of 2 steps"),
}


@pytest.mark.parametrize("name", U_SHAPED)
def test_u_shaped_faults_leave_the_pass_open_for_the_right_gradient(fed: Federation, name: str) -> None:
    change, error, words = U_SHAPED[name]
    calm = Drive(fed, u_shape=True).play()

    def disturb(drive: Drive, turn: int, client: int, message: bytes) -> None:
        if (turn, client) == (1, BAD_CLIENT):
            assert decode(message).kind == Type.GRADIENT_UP
            with pytest.raises(error, match=words):
                drive.server.handle([(client, change(drive, message))])

    found = Drive(fed, u_shape=True).play(disturb)
    for client in range(3):
        assert torch.equal(found.result(client)[0], calm.result(client)[0])
    assert found.server.open == []


def test_a_gradient_answered_once_is_refused_the_second_time(fed: Federation) -> None:
    drive = Drive(fed, u_shape=True)
    drive.deliver(0)
    gradient = drive.waiting[0]
    drive.deliver(0)
    with pytest.raises(ProtocolError, match="gradient for no open pass"):
        drive.server.handle([(0, gradient)])
