"""How often a server may open a round: a few times where noise protects what leaves, and that is remembered on the disk."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as settings_of_tests
from hypothesis import strategies as st

from splitft.apps.client_setup import ClientWorkshop
from splitft.apps.server_setup import source_of
from splitft.compress.base import Codec
from splitft.compress.entropy import Entropy
from splitft.compress.identity import Identity
from splitft.compress.noise import Noise
from splitft.deploy.cache import ModelCache
from splitft.deploy.disk import write_private
from splitft.deploy.host import Host
from splitft.deploy.letters import PART_BYTES, Letter, Open, Ready, Welcome, pack, read
from splitft.deploy.member import Member
from splitft.deploy.openings import BATCHES, FILE, MOST_NOISY, MOST_OPENINGS, RUN_FILE, OneRun, Openings
from splitft.deploy.policy import ClientPolicy
from splitft.errors import Interrupted, PolicyError, ProtocolError, ResourceError, SplitftError
from splitft.messages import Type, decode
from splitft.waits import Waits

from ..tiny_run import text_file
from .federation_scenes import scene, wait_for
from .hostile import Said, bent, lying
from .process_scenes import Ground, Nursery, federation

pytestmark = pytest.mark.timeout(60)


def settings(*codecs: Codec, adapters: Codec | None = None) -> Any:
    return SimpleNamespace(codecs=codecs, adapter_uplink=adapters or Identity())


NOISY, PLAIN = settings(Entropy(Noise()), Identity()), settings(Identity())


def refused(problem: SplitftError) -> None:
    raise problem


def test_a_noisy_round_is_opened_a_few_times_and_a_restart_forgets_nothing(tmp_path: Path) -> None:
    for number in range(MOST_NOISY):
        Openings(tmp_path / "kept").count(5, "train", NOISY, refused)
        assert (tmp_path / "kept" / FILE).stat().st_mode & 0o077 == 0, number
    with pytest.raises(PolicyError, match=rf"opened round 5 more than {MOST_NOISY} times"):
        Openings(tmp_path / "kept").count(5, "train", NOISY, refused)
    Openings(tmp_path / "kept").count(6, "train", NOISY, refused)
    Openings(tmp_path / "other").count(5, "train", NOISY, refused)


def test_noise_on_adapters_counts_too_and_without_any_noise_a_round_may_be_opened_often(tmp_path: Path) -> None:
    openings = Openings(tmp_path)
    for _ in range(MOST_OPENINGS):
        openings.count(1, "train", PLAIN, refused)
    assert not (tmp_path / FILE).exists()
    with pytest.raises(PolicyError, match="more than 100 times"):
        openings.count(1, "train", PLAIN, refused)
    for _ in range(MOST_NOISY):
        openings.count(2, "train", settings(Identity(), adapters=Noise()), refused)
    with pytest.raises(PolicyError):
        openings.count(2, "train", settings(Identity(), adapters=Noise()), refused)


def test_a_count_that_was_changed_is_refused_and_a_disk_that_refuses_is_waited_for(tmp_path: Path) -> None:
    waited: list[str] = []
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder belongs")

    def wait(problem: SplitftError) -> None:
        assert isinstance(problem, ResourceError)
        waited.append(problem.message)
        blocked.unlink()

    Openings(blocked / "kept").count(1, "train", NOISY, wait)
    assert len(waited) == 1
    assert (blocked / "kept" / FILE).is_file()
    (blocked / "kept" / FILE).write_text("[1]")
    with pytest.raises(PolicyError, match="how often rounds were opened"):
        Openings(blocked / "kept").count(1, "train", NOISY, refused)


def test_a_server_that_goes_back_again_and_again_is_left(tmp_path: Path) -> None:
    """A client is stopped and started in the midst of round 1: each time the server opens it again, until the client has had enough."""
    public = {
        "tokens": {"held_out": 0.0, "common_held_out": 0.1},
        "federation": {"held_out": str(text_file(tmp_path / "public.txt", documents=12, seed=9))},
    }

    def until(kind: int, payload: bytes) -> list[Said]:
        if kind == Letter.FRAME and decode(payload).kind == Type.STEP_UP:
            raise Interrupted("killed in the midst of a round.")
        return [(kind, payload)]

    with scene(tmp_path, seats=1, uplink={"name": "noise", "multiple": 0.1}, **public) as fed:
        for _ in range(MOST_NOISY):
            with pytest.raises(Interrupted):
                fed.client(0, link_of=bent(until)).end(20)
            wait_for(lambda: fed.house.host.seats[0].session is None)
        with pytest.raises(PolicyError, match="noise on what leaves averages out"):
            fed.client(0).end(20)
        fed.members.clear()


@pytest.mark.parametrize("field", [{"purpose": "train1"}, {"purpose": ""}, {"purpose": None}, {"batches": -1}, {"batches": 1 << 60}])
def test_a_purpose_with_a_count_of_its_own_is_none(field: dict[str, Any]) -> None:
    honest = {"round": 1, "frame": b"", "purpose": "evaluate", "batches": 3}
    assert read(Open, pack(honest)).purpose == "evaluate"
    with pytest.raises(ProtocolError, match="Open: "):
        read(Open, pack(honest | field))


def test_the_same_batches_are_sent_three_times_in_whatever_rounds(tmp_path: Path) -> None:
    for round_index in range(1, 1 + MOST_NOISY):
        Openings(tmp_path).count(round_index, "train", NOISY, refused, range(10))
    with pytest.raises(PolicyError, match=f"asks for batch 0 of this client's data more than {MOST_NOISY} times"):
        Openings(tmp_path).count(8, "train", NOISY, refused, range(10))
    with pytest.raises(PolicyError, match="asks for batch 9 "):
        Openings(tmp_path).count(8, "train", NOISY, refused, range(9, 19))
    Openings(tmp_path).count(8, "evaluate", NOISY, refused)
    Openings(tmp_path).count(8, "train", NOISY, refused, range(10, 20))
    Openings(tmp_path / "plain").count(8, "train", PLAIN, refused, range(90, 99))
    assert not (tmp_path / "plain").exists()


def test_batches_that_overlap_are_counted_one_by_one_and_none_is_left_out(tmp_path: Path) -> None:
    """A server that knows the order of the rows could else choose, in every round, the batch that has the row it wants."""
    openings = Openings(tmp_path)
    for first in range(MOST_NOISY):
        openings.count(1 + first, "train", NOISY, refused, range(first, first + 10))
    with pytest.raises(PolicyError, match="asks for batch 3 "):
        openings.count(9, "train", NOISY, refused, range(3, 13))
    with pytest.raises(PolicyError, match=r"goes on at batch 13 .* sent 0 to 11, and none is left out"):
        openings.count(9, "train", NOISY, refused, range(13, 23))
    openings.count(9, "train", NOISY, refused, range(12, 22))


def test_a_count_of_an_older_release_goes_on(tmp_path: Path) -> None:
    """It knew of no batches: the first that are named are where it goes on."""
    write_private(tmp_path / FILE, b'{"5 train": 3, "6 train": 2}')
    openings = Openings(tmp_path)
    with pytest.raises(PolicyError, match="opened round 5 more"):
        openings.count(5, "train", NOISY, refused, range(40, 50))
    openings.count(6, "train", NOISY, refused, range(50, 60))
    for first in (61, 49):
        with pytest.raises(PolicyError, match=f"goes on at batch {first}"):
            openings.count(7, "train", NOISY, refused, range(first, first + 10))


def test_what_did_not_leave_is_not_counted_so_a_straggler_can_go_on_for_ever(tmp_path: Path) -> None:
    """At every deadline one step of ten is done, and the next round goes on behind it; and a round in three is begun again."""
    openings, at = Openings(tmp_path), 0
    for round_index in range(1, 60):
        batches = range(at, at + 10)
        for _ in range(2 if round_index % 3 == 0 else 1):
            openings.count(round_index, "train", NOISY, refused, batches)
            openings.unsent(batches[1:])
        at += 1
    kept = json.loads((tmp_path / FILE).read_text())[BATCHES]
    assert kept[-1] == [at, 0], "nothing behind the last that left"
    assert {count for _, count in kept} == {0, 1, 2}


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6), st.integers(0, 6)), max_size=40))
@settings_of_tests(max_examples=60, deadline=None)
def test_whatever_a_server_asks_no_batch_leaves_more_than_three_times(asked: list[tuple[int, int, int]]) -> None:
    """Openings of any batches, each cut off anywhere: against a count kept batch by batch."""
    left: Counter[int] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for round_index, (first, length, done) in enumerate(asked, 1):
            batches = range(first, first + length)
            near = not left or min(left) <= first <= max(left) + 1
            allowed = near and max((left[batch] for batch in batches), default=0) < MOST_NOISY
            try:
                Openings(Path(folder)).count(round_index, "train", NOISY, refused, batches)
            except PolicyError:
                assert length, "nothing is asked for"
                assert not allowed
                continue
            assert allowed or not length
            left.update(batches[:done])
            openings = Openings(Path(folder))
            openings.noisy = True
            openings.unsent(batches[done:])
    assert max(left.values(), default=0) <= MOST_NOISY
    assert not left or set(left) == set(range(min(left), max(left) + 1))


WELCOME = Welcome(1, 0, "test", "run", 1, 0, 5, "{}", "a" * 64, [])


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({}, True),
        ({"round": 3, "rounds": 9, "version": "2"}, True),
        ({"run": "run2"}, False),
        ({"seat": 2}, False),
        ({"model": "b"}, False),
    ],
)
def test_a_client_stays_in_the_run_it_came_for(tmp_path: Path, changed: dict[str, Any], same: bool) -> None:
    """Counts and pledges are kept by run, seat and model, which the server names."""
    ready = Ready(rows=10, tokens=160, documents=10, held_out_rows=0, data="d", memory_bytes=1)
    sent: list[int] = []
    link: Any = SimpleNamespace(send=lambda kind, payload: sent.append(kind), limit_bytes=0)
    workshop: Any = SimpleNamespace(settle=lambda welcome, fetch: ready, limit_bytes=lambda: 1)
    member = Member(link, workshop, tmp_path, lambda event, facts: None, lambda: False, Waits())
    member._enter(WELCOME)
    kept, again = member.kept, msgspec.structs.replace(WELCOME, **changed)
    if same:
        member._enter(again)
        assert member.kept == kept
        return
    with pytest.raises(PolicyError, match="one of them was another when this client came in"):
        member._enter(again)
    assert (member.kept, sent) == (kept, [Letter.READY, Letter.REFUSED])


def test_a_supervisor_is_no_person(tmp_path: Path) -> None:
    """Under noise a run that is not over is on the disk: a server that makes a client end, and something start it, gets no new count."""
    other = msgspec.structs.replace(WELCOME, run="run2")
    for seat, codecs in enumerate((PLAIN, NOISY)):
        run = OneRun(tmp_path / str(seat))
        run.hold(WELCOME)
        Openings(tmp_path / str(seat) / "kept", run).count(1, "train", codecs, refused, range(3))
    OneRun(tmp_path / "0").hold(other)
    OneRun(tmp_path / "1").hold(WELCOME)
    with pytest.raises(PolicyError, match="was in another, with noise or sealed sums, that has not ended") as raised:
        OneRun(tmp_path / "1").hold(other)
    assert str(tmp_path) in raised.value.remedy
    assert str(tmp_path) not in raised.value.message, "which the server hears"
    OneRun(tmp_path / "1").over()
    OneRun(tmp_path / "1").hold(other)
    write_private(tmp_path / "1" / RUN_FILE, b"{}")
    with pytest.raises(PolicyError, match="does not say which run") as raised:
        OneRun(tmp_path / "1").hold(WELCOME)
    assert str(tmp_path) not in raised.value.message


def test_under_noise_another_configuration_needs_the_operator(tmp_path: Path) -> None:
    """With another seed the rows of a batch are others: a server could choose one for every round."""
    public = {
        "tokens": {"held_out": 0.0, "common_held_out": 0.1},
        "federation": {"held_out": str(text_file(tmp_path / "public.txt", documents=12, seed=9))},
    }
    found: dict[str, str] = {}
    for name, uplink in (("noise", {"name": "noise", "multiple": 0.1}), ("plain", {"name": "identity"})):
        with scene(tmp_path / name, seats=1, uplink=uplink, **public) as fed:
            host = fed.house.host
            home = tmp_path / name / "home"
            home.mkdir()
            text = tmp_path / name / "texts" / "c0.txt"
            made = ClientWorkshop(
                lambda text=text: source_of(text, {}),  # type: ignore[misc]
                ClientPolicy(),
                ModelCache(home / "cache"),
                "cpu",
                memory_mb=1000,
                adapter_folder=home / "adapter",
            )
            welcome = host.greet(0, "client-0")
            changed = msgspec.structs.replace(welcome, config=json.dumps(json.loads(welcome.config) | {"seed": 7}))

            def fetch(sha256: str, offset: int, host: Host = host) -> bytes:
                return host.parts.read(sha256, offset, PART_BYTES)

            made.settle(welcome, fetch)
            made.settle(msgspec.structs.replace(welcome, round=2), fetch)
            try:
                made.settle(changed, fetch)
            except PolicyError as problem:
                found[name] = problem.message
    assert list(found) == ["noise"]
    assert "another than when this client came in" in found["noise"]


def noisy(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "seats": 1,
        "uplink": {"name": "noise", "multiple": 0.1},
        "tokens": {"held_out": 0.0, "common_held_out": 0.1},
        "federation": {"held_out": str(text_file(folder / "public.txt", documents=12, seed=9))},
        **more,
    }


def test_a_server_that_asks_for_the_same_rows_in_every_round_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new round, and a client that is told to begin afresh at its first batch: honest clients did, without end."""
    rounds: list[int] = []

    def again(kind: int, payload: bytes) -> list[Said]:
        if kind != Letter.OPEN:
            return [(kind, payload)]
        opened = read(Open, payload)
        rounds.append(opened.round)
        return [(kind, pack(msgspec.structs.replace(opened, batches=0, base=None)))]

    with scene(tmp_path, **noisy(tmp_path, rounds=8)) as fed:
        lying(fed, monkeypatch, say=again)
        with pytest.raises(PolicyError, match="asks for batch 0 of this client's data more than 3 times"):
            fed.client(0).end(30)
        fed.members.clear()
    assert rounds[:4] == [1, 2, 3, 4]
    assert set(rounds) == {1, 2, 3, 4}, "nothing comes of a fifth"


def test_honest_faults_cost_a_noisy_run_nothing(tmp_path: Path) -> None:
    """In every round the client is stopped once in the midst of it; the run goes to its end, and what was counted is what left."""
    stopped: set[int] = set()

    def until(kind: int, payload: bytes) -> list[Said]:
        if kind == Letter.FRAME and (frame := decode(payload)).kind == Type.STEP_UP:
            fields = frame.step()
            if fields.step == 1 and fields.round not in stopped:
                stopped.add(fields.round)
                raise Interrupted("killed in the midst of a round.")
        return [(kind, payload)]

    with scene(tmp_path, **noisy(tmp_path, rounds=5)) as fed:
        for _ in range(5):
            with pytest.raises(Interrupted):
                fed.client(0, link_of=bent(until)).end(20)
            wait_for(lambda: fed.house.host.seats[0].session is None)
            assert (tmp_path / "home-0" / "state" / RUN_FILE).exists()
        fed.client(0, link_of=bent(until))
        fed.end(40)
    assert stopped == {1, 2, 3, 4, 5}
    assert not list((tmp_path / "home-0" / "state").glob(RUN_FILE)), "the run is over: the next may have another name"
    [kept] = (tmp_path / "home-0" / "state").rglob(FILE)
    counts = json.loads(kept.read_text())
    assert {name: counts[name] for name in counts if name != BATCHES} == {f"{number} train": 2 for number in range(1, 6)}
    assert counts[BATCHES] == [[first, count] for start in range(0, 15, 3) for first, count in ((start, 2), (start + 2, 1))] + [[15, 0]]


@pytest.mark.timeout(110)
def test_under_noise_a_server_is_killed_in_every_round_and_the_run_goes_to_its_end(
    nursery: Nursery, ground: Ground, tmp_path: Path
) -> None:
    """And a client at once with it: rounds are opened again from the last checkpoint, by the same processes and by new ones."""
    changes = {name: change for name, change in noisy(tmp_path).items() if name != "seats"}
    with federation(nursery, ground, tmp_path, rounds=4, **changes) as made:
        for count, passes in enumerate((2, 5, 5)):  # the second update of the round after that which is done again
            made.serve(failpoint=f"update_taken:{passes}")
            if count == 0:
                made.join_all()
            assert made.server.wait(40) == 137, "the point was never reached"
            made.clients[count].kill()
            made.join(count)
        made.serve()
        made.finish(60)
    kept = [json.loads(path.read_text()) for path in (tmp_path / "clients").rglob(FILE)]
    assert len(kept) == 3
    assert all([counts[f"{number} train"] for number in range(1, 5)] == [2, 2, 2, 1] for counts in kept), kept
    assert all(counts[BATCHES][-1] == [12, 0] for counts in kept)
    assert not list((tmp_path / "clients").rglob(RUN_FILE))
