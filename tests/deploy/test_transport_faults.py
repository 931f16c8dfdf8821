"""Every message arrives exactly once and in order, both ways, whatever the network does to the connections."""

from __future__ import annotations

import asyncio
import random
import struct
import threading
import time
from dataclasses import dataclass, field

import pytest
from deploy.transport_scenes import ECHO, LIMIT_BYTES, QUICK, Echo, client, echo_server, take, wait_until
from net.proxy import Proxy

from splitft.transport import link as link_module
from splitft.transport import listener as listener_module
from splitft.transport.budget import Budget
from splitft.transport.flow import Flow
from splitft.transport.framing import Form, decode
from splitft.transport.link import Link
from splitft.transport.listener import Broken, Resumed
from splitft.transport.pipe import Pipe
from splitft.transport.values import Counts, Limits, Message, Timing

pytestmark = pytest.mark.timeout(60)
BOTH = pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])


def numbered(number: int, draw: random.Random, most_bytes: int) -> bytes:
    """A message that says which it is and can be checked whole."""
    length = draw.choice((0, 1, 100, most_bytes // 8, most_bytes))
    return struct.pack("<Q", number) + random.Random(number).randbytes(length)


def talk(link: Link, count: int, seed: int, most_bytes: int) -> None:
    """Send `count` messages, window full, and check that the echoes are the same ones in the same order, and no more."""
    draw = random.Random(seed)
    sent = [numbered(number, draw, most_bytes) for number in range(count)]
    sender = threading.Thread(target=lambda: [link.send(ECHO, payload) for payload in sent], daemon=True)
    sender.start()
    for number in range(count):
        message = take(link)
        assert struct.unpack_from("<Q", message.payload) == (number,)
        assert message.payload == sent[number]
    sender.join(10.0)
    assert link.receive(0.3) is None


@BOTH
def test_connections_cut_at_random(secure: bool) -> None:
    with echo_server(secure, timing=QUICK) as server, Proxy("127.0.0.1", server.port, seed=5) as proxy:
        proxy.cut_after_bytes = (20_000, 300_000)
        with client(proxy.port, secure=secure, timing=QUICK) as link:
            link.open(20.0)
            talk(link, 200, 5, 40_000)
            assert link.counts.reconnects >= 5
            assert server.session().epoch == 1
            assert server.session().counts.messages_received == 200
            proxy.cut_after_bytes = None
            broken = sum(isinstance(event, Broken) for event in server.events)
            resumed = sum(isinstance(event, Resumed) for event in server.events)
            assert broken >= 5
            assert abs(broken - resumed) <= 1


def test_a_long_message_goes_on_where_it_was_cut() -> None:
    """Four mebibytes over connections that each carry less than one and a half: possible only if what arrived is kept."""
    with echo_server(timing=QUICK) as server, Proxy("127.0.0.1", server.port, seed=1) as proxy:
        proxy.cut_after_bytes = (1_000_000, 1_400_000)
        limits = Limits(chunk_bytes=64 << 10)
        with client(proxy.port, timing=QUICK, limits=limits) as link:
            link.open(20.0)
            payload = random.Random(2).randbytes(4 << 20)
            link.send(ECHO, payload)
            assert take(link).payload == payload
            assert link.counts.bytes_sent < 2 * len(payload)


@dataclass
class LossyPipe:
    """One end of a way in memory that drops and repeats chunks."""

    draw: random.Random
    lost: float
    repeated: float
    ahead: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)
    arriving: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)
    counts: Counts = field(default_factory=Counts)
    why: str = "the way ended"
    sealed: bool = False

    async def read(self) -> bytes | None:
        return await self.arriving.get()

    async def write(self, data: bytes) -> bool:
        await asyncio.sleep(0)
        if self.draw.random() >= self.lost:
            for _ in range(2 if self.draw.random() < self.repeated else 1):
                self.ahead.put_nowait(data)
        return True


async def join(flows: tuple[Flow, Flow], draw: random.Random) -> int:
    """Connect two flows again and again until both have everything; returns how often."""
    connections = 0
    while not all(flow.outbox.idle for flow in flows):
        connections += 1
        pipes = (LossyPipe(draw, 0.2, 0.2), LossyPipe(draw, 0.2, 0.2))
        pipes[0].arriving, pipes[1].arriving = pipes[1].ahead, pipes[0].ahead
        stands = [(flow.inbox.received, flow.inbox.filled) for flow in flows]
        for flow, pipe, (received, filled) in zip(flows, pipes, reversed(stands), strict=True):
            assert flow.outbox.can_resume(received, filled)
            flow.attach(pipe, received, filled)  # type: ignore[arg-type]
        done = asyncio.ensure_future(settled(flows))
        await asyncio.wait([flows[0].ended, flows[1].ended, done], return_when=asyncio.FIRST_COMPLETED)
        done.cancel()
        for flow in flows:
            assert not flow.ended.done() or flow.ended.result().what == "broken", flow.ended.result()
            flow.detach()
    return connections


async def settled(flows: tuple[Flow, Flow]) -> None:
    while not all(flow.outbox.idle for flow in flows):
        await asyncio.sleep(0.005)


async def lossy_talk(seed: int) -> tuple[list[bytes], list[bytes], list[bytes], list[bytes], int]:
    draw = random.Random(seed)
    limits, timing = Limits(chunk_bytes=1000), Timing(heartbeat_s=0.05, liveness_s=0.5)
    got: tuple[list[bytes], list[bytes]] = ([], [])

    def keep(side: int, message: Message) -> None:
        got[side].append(bytes(message.payload))
        message.release()

    loop, budget = asyncio.get_running_loop(), Budget(1 << 20)
    flows = (
        Flow(loop, limits, timing, budget, lambda message: keep(0, message)),
        Flow(loop, limits, timing, budget, lambda message: keep(1, message)),
    )
    sent = tuple([numbered(number, draw, 3000) for number in range(60)] for _ in range(2))
    for flow, messages in zip(flows, sent, strict=True):
        for payload in messages:
            flow.push(1, payload)
    connections = await join(flows, draw)
    for flow in flows:
        flow.dispose()
    assert budget.used_bytes == 0
    return *sent, *got, connections


def test_chunks_lost_and_repeated() -> None:
    """20 % lost and 20 % repeated each way, 20 seeds."""

    async def all_seeds() -> None:
        for seed, (sent, sent_back, got_back, got, connections) in enumerate(
            await asyncio.gather(*(lossy_talk(seed) for seed in range(20)))
        ):
            assert got == sent, seed
            assert got_back == sent_back, seed
            assert connections > 5

    asyncio.run(all_seeds())


@dataclass
class TappedPipe(LossyPipe):
    """Remembers every piece of a message it was given, lost or not: (sequence, offset, bytes)."""

    pieces: list[tuple[int, int, bytes]] = field(default_factory=list)

    async def write(self, data: bytes) -> bool:
        chunk = decode(data)
        if chunk.form == Form.DATA:
            self.pieces.append((chunk.sequence, chunk.offset, bytes(chunk.piece)))
        return await super().write(data)


def test_what_is_sent_again_is_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece that goes out, for the first time or again, is that part of its message and of no other making."""
    pieces: list[tuple[int, int, bytes]] = []
    monkeypatch.setitem(globals(), "LossyPipe", lambda draw, lost, repeated: TappedPipe(draw, lost, repeated, pieces=pieces))
    sent, sent_back, _, _, _ = asyncio.run(lossy_talk(3))
    messages = [one for pair in zip(sent, sent_back, strict=True) for one in pair]
    again = 0
    seen: set[tuple[int, int]] = set()
    for sequence, offset, piece in pieces:
        assert any(one[offset : offset + len(piece)] == piece for one in (sent[sequence - 1], sent_back[sequence - 1]))
        again += (sequence, offset) in seen
        seen.add((sequence, offset))
    assert again > len(messages)


class Unsteady:
    """Makes pipes that lose and repeat chunks, the greeting's included, over the real gRPC."""

    def __init__(self, seed: int, lost: float, repeated: float) -> None:
        draw = self.draw = random.Random(seed)

        class UnsteadyPipe(Pipe):
            async def write(self, data: bytes) -> bool:
                if draw.random() < lost:
                    return True
                if draw.random() < repeated and not await super().write(data):
                    return False
                return await super().write(data)

        self.pipe = UnsteadyPipe


@pytest.mark.parametrize("seed", range(2))
def test_chunks_lost_and_repeated_over_grpc(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    unsteady = Unsteady(seed, 0.1, 0.2)
    monkeypatch.setattr(listener_module, "Pipe", unsteady.pipe)
    monkeypatch.setattr(link_module, "Pipe", unsteady.pipe)
    timing = Timing(heartbeat_s=0.05, liveness_s=0.5, connect_s=0.2, backoff_s=(0.01, 0.05))
    with echo_server(timing=timing) as server, client(server.port, timing=timing) as link:
        link.open(20.0)
        talk(link, 60, seed, 3000)
        assert link.counts.reconnects > 3
        assert link.counts.duplicates + server.session().counts.duplicates > 3


def test_flipped_bits_are_never_accepted() -> None:
    """Some hundred bits flipped among 1,000 messages on a plain way: none gets through, every message does."""
    with echo_server(timing=QUICK) as server, Proxy("127.0.0.1", server.port, seed=9) as proxy, client(proxy.port, timing=QUICK) as link:
        link.open(20.0)
        proxy.flip_every_bytes = 60_000
        talk(link, 1000, 9, 6_000)
        flips, proxy.flip_every_bytes = proxy.flips, 0
        assert flips > 20
        assert server.session().counts.messages_received == 1000
        assert server.session().epoch == 1


@pytest.mark.parametrize("ways", ["up", "down", "both"])
def test_a_black_hole_is_noticed_and_survived(ways: str) -> None:
    states: list[str] = []
    with (
        echo_server(timing=QUICK) as server,
        Proxy("127.0.0.1", server.port) as proxy,
        client(proxy.port, timing=QUICK, states=states) as link,
    ):
        link.open(20.0)
        link.send(ECHO, b"before")
        take(link)
        proxy.black_hole_up, proxy.black_hole_down = ways != "down", ways != "up"
        fell_s = time.monotonic()
        for number in range(5):
            link.send(ECHO, b"%d" % number)
        wait_until(lambda: any(isinstance(event, Broken) for event in server.events) or ways == "down", 2.0)
        wait_until(lambda: any(state.startswith("broken") for state in states), 2.0)
        assert time.monotonic() - fell_s < 2.0
        time.sleep(0.5)
        proxy.black_hole_up = proxy.black_hole_down = False
        assert [bytes(take(link).payload) for _ in range(5)] == [b"%d" % number for number in range(5)]
        assert server.session().epoch == 1
        assert link.counts.reconnects >= 1


def test_slow_work_is_not_silence() -> None:
    """A reply that takes several times the time of silence does not break the connection: signs of life go on."""

    def slowly(session: listener_module.Session, message: Message) -> None:
        time.sleep(4 * QUICK.liveness_s)
        session.send(message.kind, message.payload)
        message.release()

    states: list[str] = []
    with echo_server(timing=QUICK, answer=slowly) as server, client(server.port, timing=QUICK, states=states) as link:
        link.open(10.0)
        link.send(ECHO, b"think")
        assert take(link).payload == b"think"
        assert states == ["connecting", "connected"]


def test_a_thin_line_is_not_silence() -> None:
    """A message that takes many times the time of silence arrives, in pieces made smaller until they fit."""
    with (
        echo_server(timing=QUICK) as server,
        Proxy("127.0.0.1", server.port) as proxy,
        client(proxy.port, timing=QUICK) as link,
    ):
        link.open(10.0)
        proxy.slice_bytes, proxy.bytes_per_s = 2000, 60_000.0
        payload = random.Random(4).randbytes(150_000)
        link.send(ECHO, payload)
        wait_until(lambda: server.session().counts.messages_received == 1, 30.0)
        proxy.slice_bytes, proxy.bytes_per_s = 0, 0.0
        assert take(link).payload == payload


def test_a_lost_last_message_is_noticed_by_the_next_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    drops = {"left": 0}

    class DropOne(Pipe):
        async def write(self, data: bytes) -> bool:
            if drops["left"] and len(data) > 1000:
                drops["left"] -= 1
                return True
            return await super().write(data)

    monkeypatch.setattr(link_module, "Pipe", DropOne)
    with echo_server(timing=QUICK) as server, client(server.port, timing=QUICK) as link:
        link.open(10.0)
        drops["left"] = 1
        sent_s = time.monotonic()
        link.send(ECHO, bytes(2000))
        assert len(take(link).payload) == 2000
        assert time.monotonic() - sent_s < QUICK.liveness_s
        assert link.counts.reconnects == 1


def test_counts_are_the_bytes_at_the_socket() -> None:
    with echo_server(True) as server, Proxy("127.0.0.1", server.port) as proxy, client(proxy.port, secure=True) as link:
        link.open(10.0)
        before_up, before_down = proxy.bytes_up, proxy.bytes_down
        counted = link.counts
        payload = random.Random(0).randbytes(256 << 10)
        for _ in range(40):
            link.send(ECHO, payload)
            take(link)
        after = link.counts
        wait_until(lambda: server.session().counts.bytes_received == after.bytes_sent)
        assert (proxy.bytes_up - before_up) / (after.bytes_sent - counted.bytes_sent) == pytest.approx(1.0, abs=0.02)
        assert (proxy.bytes_down - before_down) / (after.bytes_received - counted.bytes_received) == pytest.approx(1.0, abs=0.02)
        assert server.session().counts.bytes_sent == pytest.approx(after.bytes_received, rel=0.001)


def test_many_clients_through_a_bad_network() -> None:
    """Faults of one connection do not reach the sessions of others."""
    with echo_server(timing=QUICK) as server, Proxy("127.0.0.1", server.port, seed=3) as proxy:
        proxy.cut_after_bytes = (5_000, 200_000)
        threads = [threading.Thread(target=_one_of_many, args=(proxy.port, f"c{number}", number)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(50.0)
        assert not any(thread.is_alive() for thread in threads)
        assert sorted(_closed_well(server)) == [f"c{number}" for number in range(8)]


def _one_of_many(port: int, name: str, seed: int) -> None:
    with client(port, name, timing=QUICK) as link:
        link.open(20.0)
        talk(link, 40, seed, 20_000)
        link.limit_bytes = LIMIT_BYTES


def _closed_well(server: Echo) -> list[str]:
    return [
        event.session.key for event in server.events if type(event).__name__ == "Opened" and event.session.counts.messages_received == 40
    ]
