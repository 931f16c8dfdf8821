"""Terms of a sealing that are less than announced, or than a client's policy wants: refused over the network, and nothing follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from splitft.deploy.letters import Letter, pack, read
from splitft.deploy.policy import parse_policy
from splitft.deploy.sealing import Offer, SealedLetter
from splitft.errors import PolicyError

from .federation_scenes import scene
from .hostile import Said, Tamper, lying
from .test_sealed_federation import SEATS, changes_of, people

pytestmark = pytest.mark.timeout(60)

STRICT: dict[str, Any] = {"secure_aggregation": "required", "least_owners": 3, "least_threshold": 0.66}


def terms(**fields: Any) -> Tamper:
    """Every sealing on other terms than announced."""

    def tamper(number: int, payload: bytes) -> list[Said]:
        if number != SealedLetter.SEALED_TERMS:
            return [(number, payload)]
        offer = read(Offer, payload)
        return [(number, pack(msgspec.structs.replace(offer, terms=msgspec.structs.replace(offer.terms, **fields))))]

    return tamper


SILENT: Tamper = lambda kind, payload: [(kind, payload)]  # noqa: E731
ONE_CUT = {"name": "fixed", "cuts": [2]}
# What the server announces, what it says in the round, the clients' policy, a word of the refusal.
LESS: dict[str, tuple[dict[str, Any], Tamper, dict[str, Any], str]] = {
    "a threshold below the announced one": ({"threshold": 0.9}, terms(threshold=3), {}, "a sealing that 3 of 4 members can open"),
    "a minimum below the announced one": ({"minimum": 4}, terms(minimum=3), {}, "hides this client's adapters among 3"),
    "a stranger": ({}, SILENT, {"peers": ["client-0", "client-1", "client-2"]}, "a sealing with client-3"),
}


@pytest.mark.parametrize("what", LESS)
def test_less_than_announced_or_wanted_ends_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    announced, say, wanted, words = LESS[what]
    server, known = people(tmp_path)
    section = {"enabled": True, **announced}
    with scene(tmp_path, SEATS, server, **changes_of(server, rounds=1, policy=ONE_CUT, secure_aggregation=section)) as made:
        after = lying(made, monkeypatch, say=say)
        policy = parse_policy({**STRICT, **wanted})
        threads = [made.client(k, tls=known[k].tls, name=f"client-{k}", policy=policy) for k in range(SEATS)]
        refusing = threads[:3] if what == "a stranger" else threads
        for thread in refusing:
            with pytest.raises(PolicyError, match=words) as raised:
                thread.end(40)
            assert raised.value.exit_code == 17
        if say is not SILENT:
            assert {kind for kind, _ in after} == {Letter.REFUSED}, "nothing but the refusal follows the lie"


def test_a_server_that_keeps_to_it_is_followed(tmp_path: Path) -> None:
    """The same policy, an honest server: the run ends, and every update is summed."""
    server, known = people(tmp_path)
    policy = parse_policy({**STRICT, "peers": [f"client-{k}" for k in range(SEATS)]})
    with scene(tmp_path, SEATS, server, **changes_of(server, rounds=1, policy=ONE_CUT)) as made:
        for k in range(SEATS):
            made.client(k, tls=known[k].tls, name=f"client-{k}", policy=policy)
        made.end(40)
