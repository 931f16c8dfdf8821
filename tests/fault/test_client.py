"""The client under a server that breaks the protocol: each wrong reply is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from splitft.compress.base import Packet
from splitft.compress.identity import Identity
from splitft.engine.client import Client
from splitft.engine.exchange import encode_vector
from splitft.engine.settings import ClientState
from splitft.errors import CodecError, ProtocolError, SplitftError
from splitft.messages import RoundAccepted, RoundStart, Type, decode, round_frame

from .drive import Drive, federation_of, reframe, repacket


@pytest.fixture(scope="module")
def fed() -> Any:
    return federation_of()


def opening(drive: Drive, **fields: Any) -> bytes:
    """Client 0's ROUND_START with other fields."""
    values: dict[str, Any] = {
        "round": 4, "client": 0, "cut": 1, "tail_blocks": 0, "exit_on_client": False, "local_steps": 2, "gradient_accumulation": 1,
        "batch_size": 2, "rank": 3, "clip_norm": 0.5, "first_step": 0, "rates": [1e-3, 1e-3],
    }  # fmt: skip
    columns = drive.federation.layout.columns(0, 1)
    vector = torch.zeros(columns.stop - columns.start)
    return round_frame(Type.ROUND_START, RoundStart(**{**values, **fields}), (encode_vector(vector, Identity()),)).encode()


def poisoned(packet: Packet) -> Packet:
    values = np.frombuffer(packet.payload, np.float32).copy()
    values[0] = np.inf
    return Packet(packet.codec, packet.dtype, packet.shape, values.tobytes())


def shorter(packet: Packet) -> Packet:
    size = len(packet.payload) // packet.shape[0]
    return Packet(packet.codec, packet.dtype, (packet.shape[0] - 1, *packet.shape[1:]), packet.payload[:-size])


def narrower(packet: Packet) -> Packet:
    return Packet(packet.codec, packet.dtype, (packet.shape[0] * 2, packet.shape[1] // 2), packet.payload)


REPLIES: dict[str, tuple[Callable[[bytes], bytes], type[SplitftError], str]] = {
    "empty": (lambda reply: b"", ProtocolError, "0 arrived"),
    "truncated": (lambda reply: reply[:-1], ProtocolError, "arrived"),
    "another program": (lambda reply: b"HTTP/1.1 400 Bad Request\r\n\r\n" * 4, ProtocolError, "another program"),
    "a hidden state": (lambda reply: reframe(reply, kind=Type.HIDDEN_DOWN), ProtocolError, "expected STEP_DOWN, got HIDDEN_DOWN"),
    "an acceptance": (
        lambda reply: round_frame(Type.ROUND_ACCEPTED, RoundAccepted(round=4, client=0)).encode(),
        ProtocolError,
        "expected STEP_DOWN, got ROUND_ACCEPTED",
    ),
    "one token less": (lambda reply: repacket(reply, 0, shorter), ProtocolError, "tokens of width 32"),
    "another width": (lambda reply: repacket(reply, 0, narrower), ProtocolError, "tokens of width 32"),
    "infinity": (lambda reply: repacket(reply, 0, poisoned), CodecError, "infinite"),
}


@pytest.mark.parametrize("name", REPLIES)
def test_a_wrong_reply_to_a_step_is_refused_by_name(fed: Any, name: str) -> None:
    change, error, words = REPLIES[name]
    drive = Drive(fed)
    ((_, reply),) = drive.server.handle([(0, drive.waiting[0])])
    with pytest.raises(error, match=words):
        drive.talks[0].send(change(reply))


@pytest.mark.parametrize("name", [name for name in REPLIES if name not in ("a hidden state", "an acceptance")])
def test_a_wrong_hidden_state_is_refused_by_name(fed: Any, name: str) -> None:
    change, error, words = REPLIES[name]
    drive = Drive(fed, u_shape=True)
    ((_, reply),) = drive.server.handle([(0, drive.waiting[0])])
    assert decode(reply).kind == Type.HIDDEN_DOWN
    with pytest.raises(error, match=words):
        drive.talks[0].send(change(reply))


def test_another_client_s_plan_is_refused(fed: Any) -> None:
    drive = Drive(fed)
    with pytest.raises(ProtocolError, match="client 0 was sent the plan of client 2"):
        next(Client(fed, 0, ClientState()).round(opening(drive, client=2)))


def test_a_round_does_not_begin_with_another_message(fed: Any) -> None:
    drive = Drive(fed)
    with pytest.raises(ProtocolError, match="expected ROUND_START, got STEP_UP"):
        next(Client(fed, 0, ClientState()).round(drive.waiting[0]))


def test_adapters_of_another_plan_are_refused(fed: Any) -> None:
    drive = Drive(fed)
    with pytest.raises(ProtocolError, match="parameters are due"):
        next(Client(fed, 0, ClientState()).round(opening(drive, cut=2)))


def test_adapters_that_are_not_finite_are_refused(fed: Any) -> None:
    drive = Drive(fed)
    with pytest.raises(CodecError, match="infinite"):
        next(Client(fed, 0, ClientState()).round(repacket(opening(drive), 0, poisoned)))


def test_the_acceptance_of_another_client_is_refused(fed: Any) -> None:
    drive = Drive(fed)
    while decode(drive.waiting[0]).kind != Type.ROUND_END:
        drive.deliver(0)
    reply = round_frame(Type.ROUND_ACCEPTED, RoundAccepted(round=4, client=2)).encode()
    with pytest.raises(ProtocolError, match="accepted client 2, this is 0"):
        drive.talks[0].send(reply)


def test_a_round_that_failed_leaves_the_client_s_state_as_before(fed: Any) -> None:
    """The round is the unit of recovery: only an accepted round moves the client's place in its data."""
    drive = Drive(fed)
    drive.deliver(0)
    client = drive.clients[0]
    with pytest.raises(ProtocolError):
        drive.talks[0].send(b"")
    assert client.state == ClientState()
