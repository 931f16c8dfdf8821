"""The contract of every transport in the catalogue: whole messages, unchanged, each seen once, faults passed on."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import pytest

from splitft.catalog import TRANSPORTS, build
from splitft.errors import ProtocolError
from splitft.transport.base import Transport
from splitft.types import Direction

every_transport = pytest.mark.parametrize("name", TRANSPORTS)
Sent = list[tuple[int, Direction, bytes]]


def transport(name: str) -> Transport:
    built: Transport = build("transport", name, {})
    return built


def talker(client: int, turns: int, heard: dict[int, list[bytes]], size: int = 3) -> Generator[bytes, bytes, None]:
    """Sends `turns` messages of its own and notes the replies."""
    for turn in range(turns):
        heard.setdefault(client, []).append((yield bytes([client, turn]) * size))


def echo(turn: Sequence[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    return [(client, b"re:" + message) for client, message in turn]


@every_transport
def test_every_talk_comes_to_its_end_and_hears_its_own_replies(name: str) -> None:
    heard: dict[int, list[bytes]] = {}
    sent: Sent = []
    turns = {4: 3, 0: 1, 7: 5}
    talks = {client: talker(client, count, heard) for client, count in turns.items()}
    transport(name).carry(talks, echo, lambda *one: sent.append(one))
    for client, count in turns.items():
        wanted = [bytes([client, turn]) * 3 for turn in range(count)]
        assert heard[client] == [b"re:" + message for message in wanted]
        assert [message for who, way, message in sent if (who, way) == (client, "up")] == wanted
        assert [message for who, way, message in sent if (who, way) == (client, "down")] == heard[client]


@every_transport
def test_a_message_is_observed_before_it_is_handled_and_a_reply_before_it_is_heard(name: str) -> None:
    order: list[str] = []

    def talk() -> Generator[bytes, bytes, None]:
        yield b"x"
        order.append("heard")

    def handler(turn: Sequence[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        order.append("handled")
        return echo(turn)

    transport(name).carry({0: talk()}, handler, lambda client, way, message: order.append(way))
    assert order == ["up", "handled", "down", "heard"]


@every_transport
@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_messages_of_any_size_arrive_whole(name: str, size: int) -> None:
    heard: dict[int, list[bytes]] = {}
    transport(name).carry({1: talker(1, 2, heard, size)}, echo, lambda *one: None)
    assert [len(message) for message in heard[1]] == [3 + 2 * size] * 2


@every_transport
def test_a_talk_that_sends_nothing_and_no_talk_at_all_are_fine(name: str) -> None:
    heard: dict[int, list[bytes]] = {}
    transport(name).carry({0: talker(0, 0, heard), 1: talker(1, 1, heard)}, echo, lambda *one: None)
    assert set(heard) == {1}
    transport(name).carry({}, echo, lambda *one: None)


@every_transport
def test_a_reply_may_come_in_a_later_turn(name: str) -> None:
    """A handler that waits for company: the first message is answered only when the second is there."""
    heard: dict[int, list[bytes]] = {}
    waiting: list[tuple[int, bytes]] = []

    def together(turn: Sequence[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        waiting.extend(turn)
        if len(waiting) < 2:
            return []
        ready, waiting[:] = list(waiting), []
        return echo(ready)

    transport(name).carry({0: talker(0, 2, heard), 1: talker(1, 2, heard)}, together, lambda *one: None)
    assert [len(replies) for replies in heard.values()] == [2, 2]


@every_transport
def test_the_handler_s_error_reaches_the_caller(name: str) -> None:
    def refuse(turn: Sequence[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        raise ProtocolError("out of order")

    with pytest.raises(ProtocolError, match="out of order"):
        transport(name).carry({0: talker(0, 1, {})}, refuse, lambda *one: None)


@every_transport
def test_a_client_s_error_reaches_the_caller(name: str) -> None:
    def broken() -> Generator[bytes, bytes, None]:
        yield b"x"
        raise ProtocolError("bad reply")

    with pytest.raises(ProtocolError, match="bad reply"):
        transport(name).carry({0: broken()}, echo, lambda *one: None)


@every_transport
def test_a_reply_that_never_comes_is_an_error_not_a_hang(name: str) -> None:
    def forgetful(turn: Sequence[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        return echo([one for one in turn if one[0] != 1])

    with pytest.raises(ProtocolError, match=r"\[1\]"):
        transport(name).carry({0: talker(0, 2, {}), 1: talker(1, 1, {})}, forgetful, lambda *one: None)
