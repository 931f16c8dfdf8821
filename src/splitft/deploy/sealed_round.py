"""The sealing at the end of a round on the network: the server's line to the clients that have ended, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric import ec

from splitft.deploy.certificates import read_certificate
from splitft.deploy.letters import Letter, Refused, read
from splitft.deploy.sealing import Came, SealedLetter, seal
from splitft.engine.secure_round import Unsealed, terms_of, unsealed
from splitft.errors import ProtocolError, SplitftError
from splitft.secure.server import Sealing
from splitft.transport.session import Arrived, Closed, Event, Opened

if TYPE_CHECKING:
    from splitft.deploy.round import Round

TOO_FEW = "clients came through, too few for secure aggregation: nothing was merged."


class RoundLine:
    """The clients of a round that is over but for its sealing; every letter is counted."""

    def __init__(self, played: Round, members: Sequence[int]) -> None:
        self.played, self.members, self.host = played, frozenset(members), played.conductor.host

    def send(self, client: int, kind: int, payload: bytes) -> bool:
        self.played.ledger.add(client, "down", "control", len(payload))
        return self.played.conductor.send(client, kind, payload)

    def receive(self, timeout_s: float) -> list[Came]:
        with self.host.waits.waiting("letters of secure aggregation"):
            events = self.played.conductor.pump(timeout_s)
        return [came for event in events for came in self._heard(event)]

    def refuse(self, client: int, problem: SplitftError) -> None:
        self.host.strike(self.played.conductor.seat(client), self.played.index, problem)

    def _heard(self, event: Event) -> list[Came]:
        seat = self.host.seat_of(event.session)
        if isinstance(event, Closed):
            return [Came(client) for client in self.members if self.played.conductor.seat(client).session is None]
        if isinstance(event, Opened):  # another process, which has none of the secrets
            return [Came(seat.number)] if seat is not None and seat.number in self.members else []
        if not isinstance(event, Arrived):
            return []
        kind, data = event.message.kind, bytes(event.message.payload)
        event.message.release()
        if seat is None or seat.number not in self.members:
            return []
        if kind == Letter.REFUSED:
            return [self._declined(seat.number, data)]
        values = kind == SealedLetter.SEALED_INPUT
        self.played.ledger.add(seat.number, "up", "adapters" if values else "control", len(data))
        return [Came(seat.number, kind, data)]

    def _declined(self, client: int, data: bytes) -> Came:
        try:
            text = read(Refused, data).text
        except ProtocolError as problem:
            text = problem.message
        self.host.status.event("warning", f"declines secure aggregation: {text}", client)
        return Came(client)


def seal_round(played: Round) -> Unsealed:
    """Aggregate securely what the clients of a played round hold; whoever falls silent before its input has come is lost to the round."""
    run, conductor, server = played.run, played.conductor, played.server
    assert run.secrecy is not None
    conductor.host.status.stage("secure aggregation")
    ended = [client for client in played.plans if client not in played.lost and server.sessions[client].targets > 0]
    shown = {client: pem for client in ended if (pem := _certificate(played, client)) is not None}
    plans = [played.plans[client] for client in ended if client in shown]
    terms = terms_of(run.federation, run.secrecy, plans, conductor.host.run, played.index) if plans else None
    if terms is None:
        return Unsealed(None, {}, (f"{len(plans)} {TOO_FEW}",))
    tokens = {plan.client: server.sessions[plan.client].targets for plan in plans}
    values = server.bank.values.detach().cpu()[[server.sessions[plan.client].row for plan in plans]]
    try:
        sealing = seal(Sealing(terms, _identities(shown)), shown, RoundLine(played, list(tokens)), conductor.section.absence_s)
        opened = sealing.opened()
        found = unsealed(run.federation, plans, tokens, values, run.state.adapters, opened)
    except ProtocolError as problem:
        return Unsealed(None, {}, (f"secure aggregation failed: {problem.message} Nothing was merged.",))
    for client in ended:
        if client not in opened.survivors:
            played.drop(client, "fell silent while its update was sealed")
    return found


def _certificate(played: Round, client: int) -> bytes | None:
    session = played.conductor.seat(client).session
    return None if session is None else session.peer.certificate_pem


def _identities(shown: dict[int, bytes]) -> dict[int, ec.EllipticCurvePublicKey]:
    """The keys of certificates that TLS has checked."""
    found = {}
    for client, pem in shown.items():
        key = read_certificate(pem).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        found[client] = key
    return found
