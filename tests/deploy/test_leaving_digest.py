"""The digest of its text that a client names: keyed, so that no guess can be held against it, and the same while the text is."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from splitft.apps import client_setup
from splitft.apps.server_setup import source_of
from splitft.data.base import Document
from splitft.deploy.letters import Letter, Ready, read
from splitft.errors import Interrupted

from .federation_scenes import Scene, adapters_of, events_of, scene, wait_for
from .hostile import Tamper, bent
from .process_scenes import Ground
from .reliability_fixtures import Gates

pytestmark = pytest.mark.timeout(60)


def digests(folder: Path, texts: list[Path], name: str) -> list[str]:
    """What clients with these texts name in READY, in a federation of their own; their homes stay."""
    found: dict[int, str] = {}

    def listening(number: int) -> Tamper:
        def note(kind: int, payload: bytes) -> list[tuple[int, bytes]]:
            if kind == Letter.READY:
                found[number] = read(Ready, payload).data
            return [(kind, payload)]

        return note

    with scene(folder, name=name, rounds=1) as fed:
        for number, text in enumerate(texts):
            fed.client(number, text=text, link_of=bent(listening(number)))
            wait_for(lambda number=number: number in fed.house.host.seats)  # type: ignore[misc]
        fed.end()
    return [found[number] for number in range(len(texts))]


def documents_of(text: Path) -> list[Document]:
    return list(source_of(text, {}).documents())


def guesses(text: Path) -> set[str]:
    """What somebody who guesses the whole text can compute of it: digests as the program makes them, and of the bytes."""
    found, content = {hashlib.sha256(text.read_bytes()).hexdigest(), hashlib.blake2b(text.read_bytes(), digest_size=32).hexdigest()}, b""
    content = b"".join(one.digest() for one in documents_of(text))
    return found | {hashlib.sha256(content).hexdigest(), hashlib.blake2b(content, digest_size=32).hexdigest()}


def test_a_guess_of_the_whole_text_cannot_be_confirmed_and_equal_texts_look_different(ground: Ground, tmp_path: Path) -> None:
    ground.copy_to(tmp_path)
    one, other = (tmp_path / "texts" / f"c{number}.txt" for number in (0, 1))
    first, second, third = digests(tmp_path, [one, one, other], "fed")
    assert len({first, second, third}) == 3, "two clients with one text name two digests"
    assert not {first, second, third} & (guesses(one) | guesses(other))
    keys = [tmp_path / f"home-{number}" / client_setup.DATA_KEY_FILE for number in range(3)]
    assert [key.stat().st_mode & 0o777 for key in keys] == [0o600] * 3
    assert {len(key.read_bytes()) for key in keys} == {32}
    assert len({key.read_bytes() for key in keys}) == 3
    # Who has the key can: it is what keeps the digest from being one of the text alone.
    plain = hashlib.sha256(b"".join(document.digest() for document in documents_of(one))).digest()
    assert first == hashlib.blake2b(plain, key=keys[0].read_bytes(), digest_size=32).hexdigest()


def test_the_same_text_gives_the_same_digest_after_a_restart_and_another_text_another(ground: Ground, tmp_path: Path) -> None:
    ground.copy_to(tmp_path)
    texts = [tmp_path / "texts" / f"c{number}.txt" for number in range(3)]
    before = digests(tmp_path, texts, "first")
    changed = tmp_path / "changed.txt"
    changed.write_text(texts[2].read_text() + "\n\none more document at the end\n")
    again = digests(tmp_path, [texts[0], texts[1], changed], "second")
    assert again[:2] == before[:2]
    assert again[2] != before[2]


@pytest.mark.parametrize("lost", [False, True])
def test_a_client_that_lost_its_key_is_one_with_another_text(
    lost: bool, ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server says so, the client begins afresh and takes part; one that kept the key goes on as before."""
    ground.copy_to(tmp_path)
    gates = Gates({3})
    gates.put_up(monkeypatch)
    with scene(tmp_path, rounds=4) as fed:
        fed.all_clients()
        wait_for(lambda: fed.run.state.round >= 2)
        thread, _, stop = fed.members.pop(1)
        stop.set()
        with pytest.raises(Interrupted):
            thread.end(20)
        if lost:
            (tmp_path / "home-1" / client_setup.DATA_KEY_FILE).unlink()
        fed.client(1)
        wait_for(lambda: fed.house.host.seats[1].session is not None)
        gates.shut.clear()
        folder = fed.end()
        assert ("its training data is another than before: it begins afresh" in words(fed)) == lost
    assert [one["status"] for one in events_of(folder)[-1]["clients"]] == ["done"] * 3
    assert bool(adapters_of(folder).isfinite().all())


def words(fed: Scene) -> str:
    return " ".join(event["text"] for event in fed.house.status.snapshot()["events"])
