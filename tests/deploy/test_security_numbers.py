"""Numbers that poison: not finite, enormous, tiny; in activations, gradients, adapters, measurements. Refused, others untouched."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from splitft.deploy.letters import Letter, Report, pack, read
from splitft.errors import ExcludedError
from splitft.messages import Frame, RoundEnd, ScoreEnd, Type

from .federation_scenes import adapters_of, events_of, scene
from .hostile import Said, bent, filled, in_frames
from .process_scenes import Ground
from .security_runs import COMMON, honest_alone, honest_first, merged

pytestmark = pytest.mark.timeout(90)
# As bfloat16 (the default codec of what crosses the cut) and as float32 (adapters, measurements).
NAN, INFINITY = {2: b"\xc0\x7f", 4: struct.pack("<f", float("nan"))}, {2: b"\x80\x7f", 4: struct.pack("<f", float("inf"))}
LARGE, TINY, ZERO = {2: b"\x4a\x71", 4: struct.pack("<f", 1e30)}, {2: b"\x01\x00", 4: b"\x01\x00\x00\x00"}, {2: bytes(2), 4: bytes(4)}
PLACES: dict[str, tuple[Type, int, dict[str, Any]]] = {
    "activations": (Type.STEP_UP, 2, {}),
    "gradients": (Type.GRADIENT_UP, 2, {"split": {"labels": "client", "tail_blocks": 1}, "policy": {"name": "fixed", "cuts": [1, 2, 1]}}),
    "adapters": (Type.ROUND_END, 2, {}),
    "measurements": (Type.SCORE_UP, 4, {}),
}


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, ground: Ground) -> None:
    ground.copy_to(tmp_path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, ground: Ground) -> Any:
    """The adapters of the honest two, by the changes of a run."""
    known: dict[str, torch.Tensor] = {}

    def of(changes: dict[str, Any]) -> torch.Tensor:
        key = repr(changes)
        if key not in known:
            folder = tmp_path_factory.mktemp("alone")
            ground.copy_to(folder)
            known[key] = honest_alone(folder, **changes)
        return known[key]

    return of


@pytest.mark.parametrize("what", ["nan", "infinity"])
@pytest.mark.parametrize("place", ["activations", "gradients", "adapters"])
def test_what_is_not_finite_is_refused_three_times_and_then_its_sender(tmp_path: Path, alone: Any, place: str, what: str) -> None:
    kind, width, changes = PLACES[place]
    changes = merged(changes, {"rounds": 4, "federation": {"join_s": 5.0}})
    pattern = (NAN if what == "nan" else INFINITY)[width]
    with scene(tmp_path, **merged(COMMON, changes)) as fed:
        honest_first(fed)
        offender = fed.client(2, link_of=bent(in_frames(lambda frame: filled(frame, 0, pattern), kind)))
        heard = fed.heard
        with pytest.raises(ExcludedError):
            offender.end(60)
        del fed.members[2]
        folder = fed.end()
        assert fed.house.host.seats[2].excluded
    told = [facts["text"] for event, facts in heard if event == "refused"]
    assert len(told) == 3
    assert all(any(word in text for word in ("finite", "NaN", "inf")) for text in told), told
    assert [event["round"] for (event,) in zip(events_of(folder)) if any(one["client"] == 2 for one in event["clients"])] == [1, 2, 3]
    assert torch.equal(adapters_of(folder), alone(changes))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("activations", "1e30"),
        ("gradients", "1e30"),
        *(
            pytest.param(*one, marks=pytest.mark.chaos)
            for one in (("activations", "denormals"), ("adapters", "1e30"), ("adapters", "zeros"))
        ),
    ],
)
def test_finite_nonsense_ends_nothing(tmp_path: Path, place: str, value: str) -> None:
    """Finite numbers are taken or refused by what they do; whatever comes of it, the run goes on and all its numbers are finite."""
    kind, width, changes = PLACES[place]
    pattern = {"1e30": LARGE, "denormals": TINY, "zeros": ZERO}[value][width]
    with scene(tmp_path, **merged(COMMON, merged(changes, {"rounds": 2, "federation": {"join_s": 5.0, "strikes": 10}}))) as fed:
        honest_first(fed)
        fed.client(2, link_of=bent(in_frames(lambda frame: filled(frame, 0, pattern), kind)))
        offender, _, _ = fed.members.pop(2)
        folder = fed.end()
        offender.join(20)
    assert bool(torch.isfinite(adapters_of(folder)).all())
    for event in events_of(folder):
        honest = [one for one in event["clients"] if one["client"] != 2]
        assert [one["status"] for one in honest] == ["done", "done"], honest


def test_enormous_numbers_do_not_cross_over_within_a_pass(tmp_path: Path, alone: Any) -> None:
    """Sessions that share a server pass share no number: with another's 1e30 beside it a row has, but for rounding, what it has alone."""

    def tamper(kind: int, payload: bytes) -> list[Said]:
        steps = in_frames(lambda frame: filled(frame, 0, LARGE[2]), Type.STEP_UP)(kind, payload)
        return [one for said in steps for one in in_frames(lambda frame: filled(frame, 0, NAN[4]), Type.ROUND_END)(*said)]

    engine: dict[str, Any] = {
        "engine": {"name": "workers", "threads": 1, "deterministic": False},
        "policy": {"name": "fixed", "cuts": [1, 1, 1]},
    }
    changes = merged(engine, {"rounds": 2, "federation": {"join_s": 5.0, "gather_s": 0.5}})
    with scene(tmp_path, **merged(COMMON, changes)) as fed:
        honest_first(fed)
        fed.client(2, link_of=bent(tamper))
        offender, _, _ = fed.members.pop(2)
        folder = fed.end()
        offender.join(20)
    assert fed.house.host.seats[2].strikes == 2
    torch.testing.assert_close(adapters_of(folder), alone(changes), rtol=1e-3, atol=2e-4)


def ended(frame: Frame, **fields: Any) -> bytes:
    form: Any = RoundEnd if frame.kind == Type.ROUND_END else ScoreEnd
    return replace(frame, fields=msgspec.msgpack.encode(msgspec.structs.replace(frame.read(form), **fields))).encode()


SCORE_LIES: dict[str, tuple[Type, Any]] = {
    "activations that are none": (Type.SCORE_UP, lambda frame: filled(frame, 0, NAN[4])),
    "a loss that is none": (Type.SCORE_END, lambda frame: ended(frame, loss_sum=float("nan"))),
    "a loss below zero": (Type.SCORE_END, lambda frame: ended(frame, loss_sum=-1.0)),
    "more right than there are": (Type.SCORE_END, lambda frame: ended(frame, correct=10**9)),
    "an enormous number of targets": (Type.SCORE_END, lambda frame: ended(frame, tokens=2**63, correct=0)),
}
U_SHAPE: dict[str, Any] = {"split": {"labels": "client", "tail_blocks": 1}, "policy": {"name": "fixed", "cuts": [1, 2, 1]}}


@pytest.mark.parametrize("lie", SCORE_LIES)
def test_a_measurement_that_cannot_be_is_refused(tmp_path: Path, lie: str) -> None:
    kind, change = SCORE_LIES[lie]
    with scene(tmp_path, **merged(COMMON, merged(U_SHAPE, {"rounds": 1, "federation": {"join_s": 5.0}}))) as fed:
        honest_first(fed)
        fed.client(2, link_of=bent(in_frames(change, kind)))
        heard = fed.heard
        folder = fed.end()
    assert any(event == "refused" for event, _ in heard)
    for event in events_of(folder, "evaluation"):
        assert [one["client"] for one in event["clients"] if one.get("loss") is not None] == [0, 1]
        assert event["global"]["tokens"] < 10_000


REPORT_LIES: dict[str, dict[str, Any]] = {
    "losses beyond sums": {"step_losses": [1.7e308, 1.7e308]},
    "seconds beyond sums": {"seconds": {"front_forward": 1.7e308, "exit": 1.7e308, "waiting": 1.7e308}},
    "seconds below zero": {"seconds": {"front_forward": -1e300, "waiting": -1e300}},
    "facts of nowhere": {"facts": {"nowhere": {"nothing": 1e308}, "up activations": {"bytes": -1e308, "packets": 1e308}}},
    "a place with a name like a book": {"facts": {"x" * 100_000: {"y" * 100_000: 1.0}}},
    "an enormous number of tokens": {"tokens": 10**9},
}


REPORTED: dict[str, Any] = {"rounds": 2, "federation": {"join_s": 5.0}}


@pytest.fixture(scope="module")
def all_honest(tmp_path_factory: pytest.TempPathFactory, ground: Ground) -> torch.Tensor:
    """The adapters of the run in which nobody lies."""
    folder = tmp_path_factory.mktemp("honest")
    ground.copy_to(folder)
    with scene(folder, **merged(COMMON, {**REPORTED, "name": "honest"})) as fed:
        honest_first(fed, 3)
        return adapters_of(fed.end())


@pytest.mark.parametrize("lie", REPORT_LIES)
def test_a_report_of_lies_changes_no_number_of_training(tmp_path: Path, alone: Any, all_honest: torch.Tensor, lie: str) -> None:
    """The offender's training is honest, its report is not: believed or refused, the run ends with adapters of honest work."""

    def tamper(kind: int, payload: bytes) -> list[Said]:
        if kind == Letter.REPORT:
            return [(kind, pack(msgspec.structs.replace(read(Report, payload), **REPORT_LIES[lie])))]
        return [(kind, payload)]

    with scene(tmp_path, **merged(COMMON, REPORTED)) as fed:
        honest_first(fed)
        fed.client(2, link_of=bent(tamper))
        folder = fed.end()
    found = adapters_of(folder)
    assert torch.equal(found, all_honest) or torch.equal(found, alone(REPORTED))
    assert (folder / "journal.jsonl").stat().st_size < 100_000
