"""Secure aggregation between processes: its letters, the server's talk with whoever has ended a round, a client's answers.

    server                                    client
    SEALED_TERMS (terms, certificates)   ->   SEALED_KEYS
    SEALED_BOOK                          ->   SEALED_SHARES
    SEALED_ENVELOPES                     ->   SEALED_INPUT
    SEALED_SURVIVORS                     ->   SEALED_CONFIRMATION
    SEALED_CONFIRMATIONS                 ->   SEALED_UNMASKING

What it is worth: the sum says nothing of one client's update beyond what activations, labels and gradients tell the same server already;
that is enough to compute the update again (docs/privacy.md). It protects against whoever gets hold of the aggregation's side alone.

It follows the last ROUND_ACCEPTED of a round, whose ROUND_ENDs carried no adapters. A client that breaks off, is too slow or sends what is
wrong is out of the sealing, and of the round if its input has not come; a process that was restarted has lost its secrets and is out too.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from torch import Tensor

from splitft.clock import monotonic_s
from splitft.deploy.certificates import Holder, check_dates, check_issued, public_bytes, read_certificate
from splitft.deploy.disk import read_bounded, write_atomically
from splitft.deploy.letters import Letter, Refused, pack, read
from splitft.errors import ConfigError, PolicyError, ProtocolError, SplitftError
from splitft.secure.client import SealedClient
from splitft.secure.cohorts import LEAST_COHORT, Range
from splitft.secure.protocol import (
    Book,
    Confirmation,
    Confirmations,
    Envelopes,
    Identities,
    Keys,
    Masked,
    Shares,
    Survivors,
    Terms,
    ToClient,
    ToServer,
    Unmasking,
    signer,
)
from splitft.secure.server import Sealing

LOOK_S = 0.25
PLEDGE_BYTES = 1 << 16
SAME_VERSION = "run the same splitft version on both sides."


class SealedLetter(enum.IntEnum):
    """The letters' numbers in a session; `Letter` goes up to 11."""

    SEALED_TERMS = 12
    SEALED_KEYS = 13
    SEALED_BOOK = 14
    SEALED_SHARES = 15
    SEALED_ENVELOPES = 16
    SEALED_INPUT = 17
    SEALED_SURVIVORS = 18
    SEALED_CONFIRMATION = 19
    SEALED_CONFIRMATIONS = 20
    SEALED_UNMASKING = 21


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The terms, and every member's certificate (PEM) in their order."""

    terms: Terms
    certificates: list[bytes]


# What follows the terms, and what answers each of the server's letters.
TO_CLIENT: dict[int, type[ToClient]] = {
    SealedLetter.SEALED_BOOK: Book,
    SealedLetter.SEALED_ENVELOPES: Envelopes,
    SealedLetter.SEALED_SURVIVORS: Survivors,
    SealedLetter.SEALED_CONFIRMATIONS: Confirmations,
}
FROM_SERVER: frozenset[int] = frozenset((SealedLetter.SEALED_TERMS, *TO_CLIENT))
TO_SERVER: dict[int, type[ToServer]] = {
    SealedLetter.SEALED_KEYS: Keys,
    SealedLetter.SEALED_SHARES: Shares,
    SealedLetter.SEALED_INPUT: Masked,
    SealedLetter.SEALED_CONFIRMATION: Confirmation,
    SealedLetter.SEALED_UNMASKING: Unmasking,
}


@dataclass(frozen=True)
class Came:
    """A letter of a client; without a payload the client has gone, or begun anew."""

    client: int
    kind: int = 0
    payload: bytes | None = None


class Line(Protocol):
    """The server's line to the members of a sealing."""

    def send(self, client: int, kind: int, payload: bytes) -> bool:
        """Whether somebody is there to take it."""

    def receive(self, timeout_s: float) -> Sequence[Came]:
        """What has come, after so long at most."""

    def refuse(self, client: int, problem: SplitftError) -> None:
        """A client has sent what is wrong."""


def seal(sealing: Sealing, certificates: Mapping[int, bytes], line: Line, patience_s: float) -> Sealing:
    """A sealing from its terms to its last letter, each phase for as long as all answer or `patience_s`; then it can be `opened`.

    Raises ProtocolError when too few are left to open anything.
    """
    offer = pack(Offer(sealing.terms, [certificates[member] for member in sealing.terms.members]))
    out = {client for client in sealing.terms.members if not line.send(client, SealedLetter.SEALED_TERMS, offer)}
    while True:
        sealing = _phase(sealing, line, out, patience_s)
        sealing, letters = sealing.advance()
        if not letters:
            return sealing
        kind = next(number for number, form in TO_CLIENT.items() if type(next(iter(letters.values()))) is form)
        for client, letter in letters.items():
            if client in out or not line.send(client, kind, pack(letter)):
                out.add(client)


def _phase(sealing: Sealing, line: Line, out: set[int], patience_s: float) -> Sealing:
    """Hear the members until all that are not `out` have answered, or patience is at its end: then the silent ones are out as well."""
    end_s = monotonic_s() + patience_s
    while any(client not in out for client in sealing.missing):
        left_s = end_s - monotonic_s()
        if left_s <= 0.0:
            out.update(sealing.missing)
            break
        for came in line.receive(min(LOOK_S, left_s)):
            if came.payload is None:
                out.add(came.client)
            elif came.client not in out and came.kind in TO_SERVER:
                try:
                    sealing = sealing.take(came.client, read(TO_SERVER[came.kind], came.payload))
                except ProtocolError as problem:
                    out.add(came.client)
                    line.refuse(came.client, problem)
    return sealing


@dataclass
class Returned:
    """The gradients that a server has returned in a round: how many, and whether all were exactly zero.

    A server that returns zeros to all clients but one reads that one's update from the sum, since the others' adapters stay as they were
    (model inconsistency: Pasquini, Francati, Ateniese 2022, arXiv 2111.07380). This stops the crudest form alone: a gradient that is
    merely tiny, a learning rate of zero or a squared norm that clips everything away does the same and is not seen here.
    """

    gradients: int = 0
    all_zero: bool = True

    def note(self, gradient: Tensor) -> None:
        """One more has come."""
        self.gradients += 1
        self.all_zero = self.all_zero and not bool(gradient.any())

    def check(self) -> None:
        """Raise PolicyError when a whole round's gradients, one at least, were exactly zero."""
        if self.gradients and self.all_zero:
            raise PolicyError(
                f"all {self.gradients} gradients that the server returned in this round are exactly zero: among updates that have not "
                "moved, the sum would show somebody else's.",
                "do not go on with this server before its operator has explained it; training never gives zeros only.",
            )


@dataclass(frozen=True)
class Insider:
    """A client's own standing: its seat, certificate, key, and the authority that it trusts. `peers`: the only names it shares a sealing
    with (none: anybody the authority has certified); `least_threshold`: the share of the members that must be needed to open a sum;
    `least_owners`: fewest members that share a column of its own, at the start and of those whose input has come; `returned`: the
    gradients of the round that is to be summed."""

    seat: int
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    authority: x509.Certificate
    peers: frozenset[str] = frozenset()
    least_threshold: float = 0.5
    least_owners: int = LEAST_COHORT
    returned: Returned = field(default_factory=Returned)

    def identities(self, offer: Offer) -> Identities:
        """The members' keys, from certificates that hold: signed by the authority, in date, one each, this client's own in its place.

        Raises ProtocolError, IdentityError for a certificate that does not hold, PolicyError for a peer that is not wanted.
        """
        members = offer.terms.members
        if len(members) != len(offer.certificates) or self.seat not in members:
            raise ProtocolError(f"{len(offer.certificates)} certificates for {len(members)} members of a sealing.", SAME_VERSION)
        found: dict[int, ec.EllipticCurvePublicKey] = {}
        holders: list[Holder] = []
        for member, pem in zip(members, offer.certificates, strict=True):
            certificate = read_certificate(pem, f"the certificate of client {member}")
            holders.append(check_issued(certificate, self.authority, "client"))
            check_dates(certificate, f"the certificate of client {member}")
            if member == self.seat and certificate != self.certificate:
                raise ProtocolError("a sealing names another certificate in this client's place.", "somebody in between has changed it.")
            key = certificate.public_key()
            assert isinstance(key, ec.EllipticCurvePublicKey)
            found[member] = key
        if len({holder.name for holder in holders}) != len(members) or len({public_bytes(key) for key in found.values()}) != len(members):
            raise ProtocolError("one client stands twice among the members of a sealing.", "the server is not honest.")
        self._check_policy(offer.terms, holders)
        return found

    def _check_policy(self, terms: Terms, holders: Sequence[Holder]) -> None:
        own = next(holder for member, holder in zip(terms.members, holders, strict=True) if member == self.seat)
        strangers = sorted({holder.name for holder in holders} - self.peers - {own.name}) if self.peers else []
        if strangers:
            raise PolicyError(
                f"a sealing with {', '.join(strangers)[:200]}.", "add them to the peers in this client's policy if you know them."
            )
        if terms.threshold < self.least_threshold * len(terms.members):
            raise PolicyError(
                f"a sealing that {terms.threshold} of {len(terms.members)} members can open.",
                f"what the server announced, or this client's policy (least_threshold), wants {self.least_threshold:.0%} of them.",
            )
        fewest = min([terms.minimum, *(len(terms.cohorts[number].owners) for number in terms.own(self.seat))])
        if fewest < self.least_owners:
            raise PolicyError(
                f"a sealing that hides this client's adapters among {fewest}.",
                f"what the server announced, or this client's policy (least_owners), wants {self.least_owners} or more.",
            )


class Pledge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last list of survivors that a client has confirmed in a run."""

    round: int
    survivors: tuple[int, ...]


class Pledges:
    """One list of survivors a round, for good, in a file: a round that is done again gives the same update, and the sums of two different
    lists would differ by what a single client has sent."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep(self, index: int, survivors: tuple[int, ...]) -> None:
        """Put on the disk what is about to be confirmed. Raises ProtocolError for an earlier round, or another list in the same one."""
        before = read(Pledge, read_bounded(self.path, PLEDGE_BYTES, "the list of survivors")) if self.path.is_file() else None
        if before is not None and (index < before.round or (index == before.round and survivors != before.survivors)):
            raise ProtocolError(
                f"a sealing of round {index} with clients {survivors}; confirmed was round {before.round} with {before.survivors}.",
                "after a restart of the server this is how a lost round looks: the next one goes through.",
            )
        write_atomically(self.path, pack(Pledge(index, survivors)))


class SealingMember:
    """A client's part in the sealing of one round that it has ended: `row` [p] are its adapters, `columns` its own, `weight` its tokens."""

    def __init__(
        self,
        insider: Insider,
        run: str,
        index: int,
        columns: tuple[Range, ...],
        row: npt.NDArray[np.float32],
        weight: int,
        pledges: Pledges,
    ) -> None:
        self.insider, self.run, self.index, self.pledges = insider, run, index, pledges
        self.columns, self.row, self.weight = columns, row, weight
        self.offer = b""
        self.client: SealedClient | None = None

    def answer(self, kind: int, payload: bytes) -> tuple[int, bytes]:
        """Number and bytes of the answer to a letter, which may be REFUSED.

        Raises ProtocolError, IdentityError or PolicyError, and has given nothing away.
        """
        if kind == SealedLetter.SEALED_TERMS:
            return self._reply(self._begin(payload))
        form = TO_CLIENT.get(kind)
        if form is None or self.client is None:
            raise ProtocolError(f"letter {kind} before the terms of a sealing.", SAME_VERSION)
        letter: ToClient = read(form, payload)
        if isinstance(letter, Survivors):
            try:
                self.pledges.keep(self.index, letter.clients)
            except ProtocolError as problem:  # of an honest server after a restart as well: no reason to leave
                return Letter.REFUSED, pack(Refused(self.index, problem.message[:2000], problem.remedy))
        return self._reply(self.client.answer(letter))

    def _begin(self, payload: bytes) -> ToServer:
        try:
            offer = read(Offer, payload)
        except ConfigError as problem:  # a fixed point that could overflow
            raise ProtocolError(f"the terms of a sealing: {problem.message}", "check the server's configuration.") from problem
        if (offer.terms.run, offer.terms.round) != (self.run, self.index):
            raise ProtocolError(f"a sealing of round {offer.terms.round} of {offer.terms.run[:80]!r}; this is {self.index}.", SAME_VERSION)
        if self.client is None:
            self.insider.returned.check()
            known, sign = self.insider.identities(offer), signer(self.insider.key)
            client = SealedClient(self.insider.seat, self.columns, self.row, self.weight, sign, known)
            keys, self.offer, self.client = client.answer(offer.terms), payload, client
            return keys
        if payload != self.offer:
            raise ProtocolError("a second offer of a sealing other than the first.", "the server is not honest.")
        return self.client.answer(offer.terms)

    @staticmethod
    def _reply(letter: ToServer) -> tuple[int, bytes]:
        return next(number for number, form in TO_SERVER.items() if type(letter) is form), pack(letter)
