"""Secure aggregation over gRPC: the adapters of one process bit for bit, nothing of a single client on the wire, members that die in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from splitft.deploy.identity import Identity, ServerIdentity
from splitft.deploy.sealing import SealedLetter
from splitft.engine.exchange import take
from splitft.errors import Interrupted, ProtocolError
from splitft.transport.session import Arrived

from .federation_scenes import Scene, adapters_of, events_of, scene, simulated
from .test_operator import authority

pytestmark = pytest.mark.timeout(120)

SEALED: dict[str, Any] = {
    "secure_aggregation": {"enabled": True},
    "train": {"moments": "reset", "local_steps": 3},
    "policy": {"name": "fixed", "cuts": [1, 2, 2, 2]},
    "partition": {"name": "files"},
}
SEATS = 4


def people(folder: Path) -> tuple[ServerIdentity, list[Identity]]:
    """A federation and its clients' identities, client-0 to client-3."""
    server, found = authority(folder, tuple(f"client-{k}" for k in range(SEATS)))
    return server, [found[f"client-{k}"] for k in range(SEATS)]


def start(made: Scene, known: list[Identity]) -> list[Any]:
    return [made.client(k, tls=known[k].tls, name=f"client-{k}") for k in range(SEATS)]


def changes_of(server: ServerIdentity, **more: Any) -> dict[str, Any]:
    federation = {"identity": str(server.folder), "enroll_address": "off", "absence_s": 20.0, **more.pop("federation", {})}
    return {**SEALED, "federation": federation, **more}


def test_a_sealed_federation_gives_the_bits_of_one_process(tmp_path: Path) -> None:
    server, known = people(tmp_path)
    hidden = simulated(tmp_path, SEATS, **SEALED)
    with scene(tmp_path, SEATS, server, **changes_of(server)) as made:
        start(made, known)
        folder = made.end(40)
    assert torch.equal(adapters_of(folder), adapters_of(hidden))
    for event, other in zip(events_of(folder), events_of(hidden), strict=True):
        assert event["metrics"]["sealed_clients"] == SEATS == other["metrics"]["sealed_clients"]
        assert event["metrics"]["sealed_step"] == other["metrics"]["sealed_step"]
        assert [one["status"] for one in event["clients"]] == ["done"] * SEATS
    # Beside the run without masks: the same adapters to float32's rounding.
    plain = simulated(tmp_path, SEATS, **{**SEALED, "secure_aggregation": {"enabled": False}, "run": {"folder": str(tmp_path / "plain")}})
    torch.testing.assert_close(adapters_of(folder), adapters_of(plain), rtol=1e-5, atol=1e-6)


def test_no_client_s_adapters_are_on_the_wire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the server hears, searched for any eight bytes of what a client hides: its adapters as numbers and as weighted words."""
    server, known = people(tmp_path)
    heard: list[bytes] = []
    with scene(tmp_path, SEATS, server, **changes_of(server, rounds=1)) as made:
        deliver = made.house.host.deliver

        def listen(event: object) -> None:
            if isinstance(event, Arrived):
                heard.append(bytes(event.message.payload))
            deliver(event)  # type: ignore[arg-type]

        assert made.house.listener is not None
        monkeypatch.setattr(made.house.listener, "_deliver", listen)
        start(made, known)
        made.end(40)
        members = [made.members[k][1] for k in range(SEATS)]
    everything = b"".join(heard)
    assert len(heard) > 5 * SEATS
    federation = made.run.assembly.federation
    for k, member in enumerate(members):
        assert member.sealing is not None
        row, columns = torch.from_numpy(member.sealing.row), member.sealing.columns
        client = member.sealing.client
        assert client is not None
        terms = client.phase.terms  # type: ignore[union-attr]
        own = torch.cat([row[one[0] : one[1]] for one in columns])
        moved = own[(own != take(federation.start, [slice(*one) for one in columns]))]
        assert len(moved) > 20, k
        for values in (own, moved):
            assert values[:2].numpy().tobytes() not in everything
        words = terms.number.encode(moved.numpy(), member.sealing.weight)
        assert not any(word.tobytes() in everything for word in words[:50])


@pytest.mark.parametrize("at", [SealedLetter.SEALED_BOOK, SealedLetter.SEALED_ENVELOPES, SealedLetter.SEALED_CONFIRMATIONS])
def test_a_client_that_dies_in_the_sealing_costs_nobody_else_the_round(tmp_path: Path, at: SealedLetter) -> None:
    server, known = people(tmp_path)
    changes = changes_of(server, rounds=1, policy={"name": "fixed", "cuts": [2]})
    with scene(tmp_path, SEATS, server, **changes) as made:
        threads = start(made, known)
        member = made.members[3][1]
        answer = member._seal

        def die(message: Any) -> None:
            if message.kind == at:
                raise Interrupted("gone.")
            answer(message)

        member._seal = die  # type: ignore[method-assign]
        folder = made.thread.end(40)
        with pytest.raises(Interrupted):
            threads[3].end(20)
        for thread in threads[:3]:
            thread.end(20)
    [event] = events_of(folder)
    counted = at == SealedLetter.SEALED_CONFIRMATIONS
    assert [one["status"] for one in event["clients"]] == ["done"] * 3 + ["done" if counted else "lost"]
    assert event["metrics"]["sealed_clients"] == 3 + counted
    assert event["aggregated"]


def test_a_server_that_asks_for_adapters_in_the_clear_is_refused(tmp_path: Path) -> None:
    """It has told its clients that their adapters are summed behind masks, and then opens a round without."""
    server, known = people(tmp_path)
    with scene(tmp_path, SEATS, server, **changes_of(server, rounds=1)) as made:
        made.run.engine.secrecy = None
        threads = start(made, known)
        for thread in threads:
            with pytest.raises(ProtocolError, match="differs from what the server announced in upload"):
                thread.end(40)
