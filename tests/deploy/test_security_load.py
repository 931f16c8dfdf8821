"""Too much, too slow, too large when unpacked: refused before it costs anything, while an honest client trains beside."""

from __future__ import annotations

import itertools
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import zstandard

from splitft.deploy.identity import Identity, ServerIdentity
from splitft.deploy.letters import Fetch, Letter, pack
from splitft.engine.server import Server
from splitft.messages import Frame, Type
from splitft.transport import framing
from splitft.transport.values import Limits, Timing

from .federation_scenes import Scene, adapters_of, scene, wait_for
from .hostile import MIB, Liar, Lie, bent, hello, in_frames, liars, raw, repacked, rss_bytes
from .process_scenes import Ground
from .security_runs import COMMON, honest_alone, honest_first, merged
from .transport_scenes import client, client_tls, echo_server

pytestmark = pytest.mark.timeout(90)
LAST: Lie = lambda index: (150, b"")  # noqa: E731


@contextmanager
def training(folder: Path, ground: Ground, tls: bool = False, **changes: Any) -> Iterator[tuple[Scene, list[float]]]:
    """A federation whose first client trains round after round, and the moments at which it sent its steps."""
    ground.copy_to(folder)
    values = merged(COMMON, {"rounds": 1000, "clients": {"minimum": 1}, "federation": {"join_s": 0.0}, "evaluate": {"every_rounds": 1000}})
    fed = folder / "federation"
    if tls:
        values = merged(values, {"federation": {"identity": str(fed), "enroll_address": "off"}})
    with scene(folder, 3, ServerIdentity.load(fed) if tls else None, **merged(values, changes)) as made:
        moments: list[float] = []

        def clocked(kind: int, payload: bytes) -> list[tuple[int, bytes]]:
            moments.append(time.monotonic())
            return [(kind, payload)]

        made.client(0, tls=Identity.load(folder / "clients" / "client-0").tls if tls else None, link_of=bent(clocked))
        wait_for(lambda: made.run.engine.state.round >= 2)
        del moments[:]
        yield made, moments
        before = made.run.engine.state.round
        wait_for(lambda: made.run.engine.state.round > before)
        assert made.house.host.seats[0].strikes == 0


def longest_s(moments: list[float]) -> float:
    return max((late - early for early, late in itertools.pairwise(moments)), default=0.0)


def test_oversize(tmp_path: Path, ground: Ground) -> None:
    with training(tmp_path, ground) as (made, moments):
        before = rss_bytes()
        with raw(made.port) as one:
            assert one.greet(hello("large")) is not None
            header = framing.HEADER.pack(framing.MAGIC, framing.Form.DATA, 1, 0, 256 * MIB, 0, 1, 0, 0)
            one.send(header + framing.CHECKSUM.pack(zlib.crc32(b"abc", zlib.crc32(header))) + b"abc")
            refusal = one.refusal()
        assert refusal.code == "protocol"
        assert "256" in refusal.text or str(256 * MIB) in refusal.text
        for pair in (("x-padding", "a" * (64 << 10)), ("x-padding-bin", b"a" * (64 << 10))):
            with raw(made.port, metadata=(pair,)) as one:
                assert one.greet(hello("wordy")) is None
                assert one.call.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE)
        assert rss_bytes() - before < 16 * MIB
        assert longest_s(moments) < 1.0


def test_one_byte_more_than_the_round_allows(tmp_path: Path, ground: Ground) -> None:
    with training(tmp_path, ground, federation={"join_s": 1.0}) as (made, _):
        limit = next(iter(made.house.listener.sessions.values())).limit_bytes  # type: ignore[union-attr]
        with liars([Liar(made.port, "large", [[lambda index: (Letter.FRAME, bytes(limit + 1))]])]) as (one,):
            wait_for(lambda: one.end is not None)
            assert one.end is not None
            assert one.end.code == "protocol"
            assert "allowed now is" in one.end.text


def test_a_client_that_asks_for_pieces_and_does_not_take_them(tmp_path: Path, ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every FETCH is 50 bytes and its answer 4 MiB: without a bound the server would keep them all."""
    with training(tmp_path, ground) as (made, moments):
        part = max(made.house.table, key=lambda one: one.size_bytes)
        data = bytes(2 * MIB)
        monkeypatch.setattr(made.house.parts, "read", lambda sha256, offset, count: data + bytes(1))
        before = rss_bytes()
        with raw(made.port) as one:
            assert one.greet(hello("greedy")) is not None
            for number in range(1, 121):  # no answer is ever read; not so fast that the window would end it
                one.send(framing.encode(framing.Form.DATA, pack(Fetch(part.sha256, 0)), kind=Letter.FETCH, sequence=number))
                time.sleep(0.02)
            assert rss_bytes() - before < 96 * MIB
            wait_for(lambda: "greedy" not in made.house.listener.sessions)  # type: ignore[union-attr]
        assert rss_bytes() - before < 96 * MIB
        assert longest_s(moments) < 1.0


def test_one_certificate_cannot_fill_the_door() -> None:
    """Twenty streams of one client that say nothing, before a server with room for sixteen: four may wait, and another comes in at once."""
    timing = Timing(heartbeat_s=0.5, liveness_s=5.0, connect_s=3.0)
    with echo_server(True, limits=Limits(connections=16), timing=timing) as server, ExitStack() as stack:
        greedy = client_tls("greedy")
        silent = [stack.enter_context(raw(server.port, greedy)) for _ in range(20)]
        time.sleep(1.0)
        honest = stack.enter_context(client(server.port, "honest", secure=True))
        began_s = time.monotonic()
        assert honest.open(2.0) == b"welcome honest"
        assert time.monotonic() - began_s < 1.0
        said = [one.read() for one in silent]
        assert [framing.read_note(framing.Close, chunk.piece).code for chunk in said if chunk is not None] == ["full"] * 16
        waited = [one for one, chunk in zip(silent, said, strict=True) if chunk is None]
        assert [one.call.code() for one in waited] == [grpc.StatusCode.DEADLINE_EXCEEDED] * 4
        again = stack.enter_context(raw(server.port, greedy))
        assert again.greet(b"greedy") is not None, "there is room for those that greet"


def test_slow_peers_do_not_slow_the_others(tmp_path: Path, ground: Ground) -> None:
    with training(tmp_path, ground, tls=True) as (made, moments), ExitStack() as stack:
        before, tls = rss_bytes(), Identity.load(tmp_path / "clients" / "client-1").tls
        half_open = [stack.enter_context(socket.create_connection(("127.0.0.1", made.port), 5)) for _ in range(150)]
        for number, one in enumerate(half_open):
            one.sendall(b"\x16\x03\x01\x02\x00" if number % 2 else b"\x16")
        silent = [stack.enter_context(raw(made.port, tls)) for _ in range(12)]
        trickle = stack.enter_context(raw(made.port, Identity.load(tmp_path / "clients" / "client-2").tls))
        assert trickle.greet(hello("client-2")) is not None
        began_s, number = time.monotonic(), 0
        while time.monotonic() - began_s < 3.0:
            half_open[number % len(half_open)].sendall(b"\x00")
            piece = framing.encode(framing.Form.DATA, b"x", kind=1, sequence=1, total=100_000, offset=number)
            trickle.send(piece)
            number += 1
            time.sleep(0.05)
        assert len(silent) == 12
        assert len(moments) > 10
        assert longest_s(moments) <= 1.0
        assert rss_bytes() - before < 64 * MIB
        wait_for(lambda: "client-2" not in made.house.listener.sessions or not made.house.listener.sessions["client-2"].connected)  # type: ignore[union-attr]


# -- bombs -------------------------------------------------------------------------------------------------------------------------------


def zeros_frame(size: int, stated: bool, **parameters: Any) -> bytes:
    if stated:
        return zstandard.ZstdCompressor(level=1).compress(bytes(size))
    options = zstandard.ZstdCompressionParameters(**parameters) if parameters else None
    made = zstandard.ZstdCompressor(level=1) if options is None else zstandard.ZstdCompressor(compression_params=options)
    work = made.compressobj()
    return b"".join([work.compress(bytes(size)), work.flush()])


def lying_frame(size: int) -> bytes:
    """A frame that says it holds `size` bytes, in 13 bytes."""
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", size)


BOMBS: dict[str, bytes] = {
    "a gibibyte, stated": zeros_frame(256 * MIB, True),
    "a gibibyte, not stated": zeros_frame(256 * MIB, False),
    "two frames": zeros_frame(64 * MIB, True) + zeros_frame(64 * MIB, True),
    "the right size, and another frame behind it": zeros_frame(2048, True) + zeros_frame(16 * MIB, True),
    "a huge window": zeros_frame(MIB, False, window_log=27, compression_level=1),
    "a terabyte in 13 bytes": lying_frame(1 << 40),
    "fewer bytes than due": zeros_frame(10, True),
    "no frame at all": b"\x00" * 40,
}


def test_bombs_are_refused_before_they_unfold(tmp_path: Path, ground: Ground) -> None:
    """One bomb a round from seat 2; its update never counts, and the honest two have the bits of a run without it."""
    ground.copy_to(tmp_path)
    codec = {"uplink": {"name": "entropy", "inner": {"name": "cast", "dtype": "bfloat16"}}}
    changes = {**codec, "rounds": len(BOMBS), "federation": {"join_s": 5.0, "strikes": 100}, "evaluate": {"every_rounds": 100}}
    waiting, growth, seconds = list(BOMBS.values()), list[int](), list[float]()

    def explode(frame: Frame) -> bytes:
        packet, bomb = bytes(frame.packets[0]), b"\x01" + waiting[(frame.step().round - 1) % len(waiting)]
        return repacked(frame, 0, packet[:24] + struct.pack("<Q", len(bomb)) + bomb)

    with scene(tmp_path, 3, **merged(COMMON, merged(changes, {"name": "bombs"}))) as fed:
        check = Server._check

        def measured(self: Server, client: int, data: Any, turn: Any) -> None:
            before, began_s = rss_bytes(), time.perf_counter()
            try:
                check(self, client, data, turn)
            finally:
                if client == 2:
                    growth.append(rss_bytes() - before)
                    seconds.append(time.perf_counter() - began_s)

        Server._check = measured  # type: ignore[method-assign]
        try:
            honest_first(fed)
            fed.client(2, link_of=bent(in_frames(explode, Type.STEP_UP)))
            folder = fed.end()
        finally:
            Server._check = check  # type: ignore[method-assign]
        assert fed.house.host.seats[2].strikes == len(BOMBS)
    assert len(growth) == len(BOMBS)
    assert max(growth) < 16 * MIB, growth
    assert max(seconds) < 0.25, seconds
    assert torch.equal(adapters_of(folder), honest_alone(tmp_path, **changes))


def test_compression_of_grpc_itself_is_refused(tmp_path: Path, ground: Ground) -> None:
    with training(tmp_path, ground) as (made, _), raw(made.port, compression=grpc.Compression.Gzip) as one:
        assert one.greet(hello("x" * 50_000)) is None
        assert one.call.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL)
