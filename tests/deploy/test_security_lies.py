"""Malformed and lying messages by the thousand against a live server with an honest client beside: nothing moves, nobody falls."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import strategies as st

from splitft.deploy import letters
from splitft.deploy.host import Seat
from splitft.deploy.letters import Letter
from splitft.errors import ProtocolError
from splitft.messages import Frame, RoundEnd, StepFields, Type, decode

from .federation_scenes import Scene, adapters_of, scene, wait_for
from .hostile import MIB, READY, Liar, Lie, Said, bent, collected, liars, rss_bytes
from .security_runs import COMMON, honest_alone, honest_first, merged

pytestmark = pytest.mark.timeout(120)
LIARS = 5
DEEP_EACH = 2
RUN: dict[str, Any] = {
    "rounds": 40,
    # A liar that says it holds rows out is asked to measure them, and never answers: somebody has to say how long that is waited for.
    "clients": {"minimum": 1, "quorum": 0.01, "deadline_s": 2.0},
    "policy": {"name": "fixed", "cuts": [1] * (LIARS + 1)},
    "train": {"local_steps": 1, "batch_size": 2, "moments": "keep", "learning_rate": 5e-3},
    "evaluate": {"every_rounds": 40, "max_rows": 2},
    "federation": {"join_s": 5.0, "strikes": 1_000_000},
}

TWO = {"name": "fixed", "cuts": [1, 1]}


@dataclass(frozen=True)
class Setting:
    """What all tests of this file share: everything an honest client says, and the adapters of its run alone."""

    folder: Path
    recorded: list[Said]
    alone: torch.Tensor

    def frame(self, kind: Type) -> Frame:
        return next(frame for number, data in self.recorded if number == Letter.FRAME and (frame := decode(data)).kind == kind)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder, said = tmp_path_factory.mktemp("lies"), list[Said]()

    def record(kind: int, payload: bytes) -> list[Said]:
        said.append((kind, payload))
        return [(kind, payload)]

    with scene(folder, LIARS + 1, **merged(COMMON, {**RUN, "name": "recorded", "rounds": 1, "federation": {"join_s": 0.0}})) as fed:
        fed.client(0, link_of=bent(record))
        fed.end()
    alone = honest_alone(folder, LIARS + 1, 1, **RUN)
    return Setting(folder, said, alone)


def at_round(frame: Frame, index: int, **fields: Any) -> Frame:
    """A recorded frame of the client in seat 0, as one of another client's present round."""
    if frame.kind == Type.ROUND_END:
        return replace(frame, fields=msgspec.msgpack.encode(msgspec.structs.replace(frame.read(RoundEnd), round=index, **fields)))
    return replace(frame, fields=StepFields(**{**vars(frame.step()), "round": index, **fields}).pack())


@contextmanager
def attacked(setting: Setting, scripts: list[list[list[Lie]]], name: str) -> Iterator[tuple[Scene, list[Liar]]]:
    """The run with liars in all other seats. Afterwards the honest client has what it has alone, and the server has not grown."""
    with scene(setting.folder, LIARS + 1, **merged(COMMON, {**RUN, "name": name})) as fed:
        honest_first(fed, 1)
        with liars(Liar(fed.port, f"liar-{number}", scripts[number]) for number in range(LIARS)) as found:
            wait_for(lambda: fed.run.engine.state.round >= 3 or not fed.thread.is_alive())
            before = rss_bytes()
            folder = fed.end()
            grown = rss_bytes() - before
            yield fed, found
        assert grown < 64 * MIB, grown / MIB
        assert torch.equal(adapters_of(folder), setting.alone)


# -- structured lies -----------------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(-(2**63), 2**64 - 1), st.integers(0, 40), st.floats(), st.sampled_from([2**31, 2**32 - 1, 2**45, 10**9]))
JUNK = st.recursive(
    st.one_of(NUMBERS, st.none(), st.booleans(), st.text(max_size=20), st.binary(max_size=40)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=5,
)
HONEST: dict[Letter, msgspec.Struct] = {
    Letter.FETCH: letters.Fetch("0" * 64, 0),
    Letter.READY: letters.Ready(10, 160, 10, 0, "0" * 64, 1 << 33),
    Letter.OPENED: letters.Opened(1),
    Letter.REPORT: letters.Report(1, [0.1], 10, {"waiting": 0.1}, {"up activations": {"bytes": 1.0}}),
    Letter.REFUSED: letters.Refused(0, "no", "nothing"),
}
# What ends every script, so that no liar's update can count.
LAST: Lie = lambda index: (150, b"")  # noqa: E731


def letter_lies() -> st.SearchStrategy[Lie]:
    """A letter with a field of its own choice, or with any fields at all."""

    def bend(kind: Letter, field: int, value: Any, whole: Any, choice: int) -> Lie:
        honest = msgspec.to_builtins(HONEST[kind], builtin_types=(bytes,))
        names = sorted(honest)
        told: Any = {**honest, names[field % len(names)]: value} if choice else whole
        if isinstance(told, dict) and "round" in told and choice == 1 and names[field % len(names)] != "round":
            return lambda index: (kind, msgspec.msgpack.encode({**told, "round": index}))
        data = msgspec.msgpack.encode(told)
        return lambda index: (kind, data)

    return st.builds(bend, st.sampled_from(sorted(HONEST)), st.integers(0, 9), JUNK, JUNK, st.integers(0, 3))


def frame_lies(setting: Setting, client: int) -> st.SearchStrategy[Lie]:
    """A frame that is right but for its fields, its lengths, or the header of a packet."""
    step, end = setting.frame(Type.STEP_UP), setting.frame(Type.ROUND_END)
    small = st.one_of(st.integers(0, 2**32 - 1), st.integers(0, 4))
    names = st.sampled_from(["client", "step", "micro", "normaliser", "targets"])

    def field(name: str, value: int) -> Lie:
        return lambda index: (Letter.FRAME, at_round(step, index, **{"client": client, name: value}).encode())

    def norm(value: float) -> Lie:
        return lambda index: (Letter.FRAME, at_round(step, index, client=client, squared_norm=value).encode())

    def lengths(numbers: list[int]) -> Lie:
        return lambda index: (Letter.FRAME, replace(at_round(step, index, client=client), lengths=tuple(numbers)).encode())

    def packet(which: int, place: int, value: int, frame: Frame = step) -> Lie:
        packets = [bytearray(one) for one in frame.packets]
        chosen = packets[which % len(packets)]
        size, offset = [(1, 0), (1, 1), (1, 2), (1, 3), (4, 4), (4, 8), (4, 12), (4, 16), (4, 20)][place]
        chosen[offset : offset + size] = (value % 256**size).to_bytes(size, "little")
        bad = replace(frame, packets=tuple(bytes(one) for one in packets))
        return lambda index: (Letter.FRAME, at_round(bad, index, client=client).encode())

    def closing(name: str, value: Any) -> Lie:
        fields = msgspec.to_builtins(end.read(RoundEnd)) | {"client": client}
        bad = lambda index: replace(end, fields=msgspec.msgpack.encode({**fields, "round": index, name: value}))  # noqa: E731
        return lambda index: (Letter.FRAME, bad(index).encode())

    return st.one_of(
        st.builds(field, names, small),
        st.builds(norm, st.floats()),
        st.builds(lengths, st.lists(small, max_size=5)),
        st.builds(packet, st.integers(0, 1), st.integers(0, 8), small),
        st.builds(lambda *more: packet(*more, frame=end), st.just(0), st.integers(0, 8), small),
        st.builds(closing, st.sampled_from(["client", "tokens", "squared_norm", "loss_sum", "x"]), JUNK),
    )


def dealt(deep: list[Lie], flat: list[Lie]) -> list[list[list[Lie]]]:
    """Scripts for every liar and round: a few that reach the engine, many behind them, and the last."""
    rounds = RUN["rounds"]
    found: list[list[list[Lie]]] = [[] for _ in range(LIARS)]
    per_round = -(-len(flat) // (LIARS * rounds))
    for number in range(LIARS):
        for index in range(rounds):
            place = number * rounds + index
            found[number].append(
                [*deep[place * DEEP_EACH : (place + 1) * DEEP_EACH], *flat[place * per_round : (place + 1) * per_round], LAST]
            )
    return found


def test_a_thousand_structured_lies(setting: Setting) -> None:
    deep = [lie for number in range(LIARS) for lie in collected(frame_lies(setting, number + 1), RUN["rounds"] * DEEP_EACH)]
    flat = collected(letter_lies(), 800)
    with attacked(setting, dealt(deep, flat), "structured") as (fed, found):
        assert sum(len(one.said) for one in found) >= 1000
        assert sum(fed.house.host.seats[one].strikes for one in range(1, LIARS + 1)) >= LIARS * 38
        assert fed.house.host.seats[0].strikes == 0


# -- mutations of bytes ---------------------------------------------------------------------------------------------------------------


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to four small changes: bits, numbers, bytes that vanish or come in."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(max(1, min(len(found), draw.choice([24, 120, 1 << 20]))))
        choice = draw.randrange(6)
        if choice == 0 and found:
            found[place] ^= 1 << draw.randrange(8)
        elif choice == 1:
            found[place : place + 4] = struct.pack("<I", draw.choice([0, 1, 2**31, 2**32 - 1, draw.getrandbits(32)]))
        elif choice == 2:
            del found[place : place + draw.randint(1, 40)]
        elif choice == 3:
            found[place:place] = draw.randbytes(draw.randint(1, 40))
        elif choice == 4:
            del found[place:]
        else:
            found += draw.randbytes(draw.randint(1, 8))
    return bytes(found)


def test_a_thousand_mutated_messages(setting: Setting) -> None:
    draw = random.Random(6)
    kinds = [(kind, data) for kind, data in setting.recorded if kind != Letter.FRAME]
    step, end = setting.frame(Type.STEP_UP), setting.frame(Type.ROUND_END)

    def of_frame(client: int) -> Lie:
        frame, seed = draw.choice([step, step, end]), draw.getrandbits(32)
        return lambda index: (Letter.FRAME, mutated(at_round(frame, index, client=client).encode(), random.Random(seed)))

    def of_letter() -> Lie:
        kind, data = draw.choice(kinds)
        bad = mutated(data, draw)
        return lambda index: (kind, bad)

    deep = [of_frame(number + 1) for number in range(LIARS) for _ in range(RUN["rounds"] * DEEP_EACH)]
    with attacked(setting, dealt(deep, [of_letter() for _ in range(800)]), "mutated") as (fed, found):
        assert sum(len(one.said) for one in found) >= 1000
        assert fed.house.host.seats[0].strikes == 0


# -- letters that are well formed and absurd ---------------------------------------------------------------------------------------------

READY_LIES: dict[str, dict[str, Any]] = {
    "rows of enormous length": {"rows": 1, "tokens": 1 << 45},
    "a billion rows": {"rows": 10**9, "tokens": 10**9 * 16},
    "no memory": {"memory_bytes": 0},
    "memory below zero": {"memory_bytes": -(2**63)},
    "all the memory there is": {"memory_bytes": 2**64 - 1},
    "documents below zero": {"documents": -5},
    "data named by a book": {"data": "x" * 900_000},
    "more held out than there is": {"held_out_rows": 2**31},
}


@pytest.mark.parametrize("lie", READY_LIES)
def test_absurd_claims_at_the_beginning_hurt_nobody(setting: Setting, lie: str) -> None:
    ready = msgspec.structs.replace(READY, **READY_LIES[lie])
    changes = merged(COMMON, {**RUN, "rounds": 2, "evaluate": {"max_rows": 2}, "federation": {"join_s": 1.0, "strikes": 5}, "policy": TWO})
    if READY_LIES[lie].get("held_out_rows"):  # what it says it holds out it is asked to measure, and it never answers
        changes = merged(changes, {"clients": {"deadline_s": 1.0}})
    found = []
    for name, said in (("lies", ready), ("none", READY)):
        with scene(
            setting.folder, 2, **merged(changes, {"name": f"{name}-{len(lie)}", "policy": {"name": "fixed", "cuts": [1, 1]}})
        ) as fed:
            with liars([Liar(fed.port, "a-liar", [[LAST]], ready=said)]):
                fed.client(0)
                folder = fed.end(30)
            found.append(adapters_of(folder))
        assert (folder / "journal.jsonl").stat().st_size < 200_000
    assert torch.equal(*found)


def test_a_refusal_that_nobody_is_there_to_hear(setting: Setting) -> None:
    """A bad message and a farewell in one breath: the session is over before the message is refused, which concerns nobody else."""
    with scene(
        setting.folder, 2, **merged(COMMON, {**RUN, "rounds": 1, "name": "breath", "policy": TWO, "federation": {"join_s": 5.0}})
    ) as fed:
        with liars([Liar(fed.port, "a-liar", [])]) as (one,):
            wait_for(lambda: 0 in fed.house.host.seats)
            listener = fed.house.listener
            assert listener is not None
            session = listener.sessions["a-liar"]
        wait_for(lambda: session.over)
        gone = Seat(0, "a-liar", session)
        for _ in range(3):
            fed.house.host.strike(gone, 1, ProtocolError("a lie.", "none."))
        assert gone.excluded
        assert one.end is None
