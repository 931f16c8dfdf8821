"""What a client says when it gives up: nothing of its data, its files or its machine, on the wire or at the server. A canary is planted in
everything that messages about data quote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from splitft import errors
from splitft.deploy.letters import MOST_WORDS, Letter, Refused, Welcome, read, refusal
from splitft.deploy.member import Member
from splitft.errors import DataError, PolicyError, ProtocolError, SplitftError
from splitft.waits import Waits

from .federation_scenes import scene, wait_for
from .hostile import bent
from .process_scenes import Ground, Nursery, federation
from .test_security_process import Tap, listening

pytestmark = pytest.mark.timeout(60)

CANARY = "zebrafinch"
WORDS = (CANARY.encode(), CANARY.encode("utf-16-le"), b"7194", b"/texts/", b"patient")


def key(folder: Path) -> Path:
    """The name of a field is what a record is about."""
    return written(folder / "key.jsonl", '{"text": "ok"}\n{"diagnosis zebrafinch-7194": 1}\n')


def first_key(folder: Path) -> Path:
    return written(folder / "first.jsonl", '{"zebrafinch 7194": "ok"}\n')


def owner(folder: Path) -> Path:
    """A folder whose file is named for a patient, and whose second record has a number in place of text."""
    (folder / "patient").mkdir()
    written(folder / "patient" / "zebrafinch-7194.jsonl", '{"text": "ok"}\n{"text": 7194}\n')
    return folder / "patient" / "zebrafinch-7194.jsonl"


def file_name(folder: Path) -> Path:
    return written(folder / "patient_zebrafinch.txt", "\n")


def broken(folder: Path) -> Path:
    return written(folder / "patient.jsonl", '{"text": "ok"}\n{"text": "zebrafinch 7194\n')


def broken_letters(folder: Path) -> Path:
    path = folder / "zebrafinch.txt"
    path.write_bytes(b"zebrafinch 7194 \xff\xfe")
    return path


def listing(folder: Path) -> Path:
    """A folder without a file that is read: the message lists what it holds."""
    (folder / "ward").mkdir()
    written(folder / "ward" / "patient_zebrafinch_7194.dat", "x")
    return folder / "ward"


def missing(folder: Path) -> Path:
    written(folder / "patient_zebrafinch_7194.txt", "x")
    return folder / "patient_zebrafinch_7195.txt"


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


PLANTED: list[Callable[[Path], Path]] = [key, first_key, owner, file_name, broken, broken_letters, listing, missing]


def seen_in(blob: bytes) -> list[bytes]:
    return [word for word in WORDS if word in blob]


def planted(folder: Path) -> list[Path]:
    found = []
    for plant in PLANTED:
        (folder / plant.__name__).mkdir(parents=True)
        found.append(plant(folder / plant.__name__))
    return found


def test_a_client_that_cannot_read_its_data_says_nothing_of_them(tmp_path: Path) -> None:
    """Plain text through a tap: letters, the wire with all that gRPC puts on it, the server's page and every file of the run."""
    said: list[bytes] = []

    def note(kind: int, payload: bytes) -> list[tuple[int, bytes]]:
        said.append(payload)
        return [(kind, payload)]

    with scene(tmp_path, 1, rounds=1) as made, Tap("127.0.0.1", made.port) as tap:
        tap.kept = []
        for text in planted(tmp_path / "own"):
            with pytest.raises(DataError) as raised:
                made.client(0, port=tap.port, text=text, link_of=bent(note)).end(20)
            assert seen_in(str(raised.value).encode()), "the client's own operator reads all of it"
            wait_for(lambda: made.house.host.seats[0].session is None)
        made.client(0, port=tap.port, link_of=bent(note))
        made.end(40)
        status = json.dumps(made.house.status.snapshot())
    assert status.count("its data cannot be used (DataError); its own log says why.") == len(PLANTED)
    assert not seen_in(status.encode())
    wire = b"".join(tap.kept)
    assert b"its data cannot be used (DataError)" in wire, "the search looks at what is sent"
    assert not seen_in(wire)
    assert not [one for one in said if seen_in(one)]
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"journal.jsonl"} <= {path.name for path in files}
    assert not [path for path in files if seen_in(path.read_bytes())]


@pytest.mark.timeout(110)
def test_nor_does_a_server_s_log(nursery: Nursery, ground: Ground, tmp_path: Path) -> None:
    """The commands: the client's console has the message, nothing of the server's has any of it."""
    log = tmp_path / "runs" / "fed" / "server.log"
    with federation(nursery, ground, tmp_path, seats=1, clients={"minimum": 1}, rounds=1, federation={"join_s": 0.0}) as made:
        made.serve()
        listening(made)
        for count, text in enumerate(planted(tmp_path / "own")[:5], 1):
            client = made.join(0, text=text)
            assert client.wait(40) == DataError.exit_code, client.text()
            wait_for(lambda count=count: log.read_text().count("cannot be used (DataError)") >= count)  # type: ignore[misc]
        assert seen_in((tmp_path / "client-0.log").read_bytes())
        made.join(0)
        made.finish(60)
    files = [path for path in [*(tmp_path / "runs").rglob("*"), tmp_path / "server.log"] if path.is_file()]
    assert {"server.log", "journal.jsonl"} <= {path.name for path in files}
    assert not [path for path in files if seen_in(path.read_bytes())]


def kinds() -> list[type[SplitftError]]:
    return [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, SplitftError)]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_of_errors_only_words_about_the_server_leave(kind: type[SplitftError]) -> None:
    """Every class: one that is new says nothing either, until it is put on the list of those that speak of the server."""
    made = refusal(3, kind("field 'zebrafinch' of /home/patient/7194.txt", "look into /home/patient/zebrafinch"))
    assert (made.round, made.final, made.remedy) == (3, True, "")
    if kind in (PolicyError, ProtocolError):
        assert CANARY in made.text
        return
    assert not seen_in(made.text.encode())
    assert made.text.endswith("its own log says why.")


def test_a_new_kind_of_a_known_one_says_nothing() -> None:
    class NarrowerError(PolicyError):
        """Of the client's own."""

    assert refusal(0, NarrowerError("zebrafinch")).text == "it cannot go on; its own log says why."
    assert len(refusal(0, PolicyError("x" * 9999)).text) == MOST_WORDS


@pytest.mark.parametrize("where", ["door", "round", "sealing"])
def test_wherever_a_client_gives_up(tmp_path: Path, where: str) -> None:
    """All places from which a client says that it leaves."""
    sent: list[tuple[int, bytes]] = []
    link: Any = SimpleNamespace(send=lambda kind, payload: sent.append((kind, payload)), limit_bytes=0)

    def fails(*_: Any) -> Any:
        raise DataError("/texts/patient.jsonl:2: field 'zebrafinch' is 7194.", "look into /texts/patient.jsonl")

    workshop: Any = SimpleNamespace(settle=fails)
    member = Member(link, workshop, tmp_path, lambda event, facts: None, lambda: False, Waits())
    member._train = fails  # type: ignore[method-assign]
    member.sealing = cast(Any, SimpleNamespace(answer=fails))
    welcome = Welcome(1, 0, "test", "run", 0, 0, 1, "{}", "model", [])
    orders: dict[str, Callable[[], None]] = {
        "door": lambda: member._enter(welcome),
        "round": lambda: member._work(cast(Any, SimpleNamespace(round=1, purpose="train"))),
        "sealing": lambda: member._seal(cast(Any, SimpleNamespace(kind=12, payload=b""))),
    }
    with pytest.raises(DataError, match=CANARY):
        orders[where]()
    [(kind, payload)] = sent
    assert kind == Letter.REFUSED
    assert not seen_in(payload)
    assert read(Refused, payload).text == "its data cannot be used (DataError); its own log says why."
