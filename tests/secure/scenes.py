"""What the tests of secure aggregation share: members with identities, and a sealing played letter by letter with whoever falls silent."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import msgspec
import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric import ec

from splitft.secure.client import SealedClient, own_words
from splitft.secure.cohorts import Range, cohorts_of, owned_by
from splitft.secure.field import FixedPoint, Words
from splitft.secure.protocol import Terms, ToClient, ToServer, secure_threshold, signer
from splitft.secure.server import Opened, Sealing

PHASES = ("keys", "shares", "inputs", "confirmations", "answers")


def key_of(client: int) -> ec.EllipticCurvePrivateKey:
    """The certificate key of a client: fixed, since making keys is not what is tested."""
    return ec.derive_private_key(1000 + client, ec.SECP256R1())


def identities(clients: Collection[int]) -> dict[int, ec.EllipticCurvePublicKey]:
    return {client: key_of(client).public_key() for client in clients}


def terms_of(owned: Mapping[int, tuple[Range, ...]], columns: int, threshold: int = 0, round_index: int = 1) -> Terms:
    """Terms for clients with these columns of the adapter; the weight's column is added for all."""
    whole = {client: (*ranges, (columns, columns + 1)) for client, ranges in owned.items()}
    number = FixedPoint.fitting(8, 10_000, len(owned))
    chosen = threshold or secure_threshold(len(owned))
    return Terms("run", round_index, tuple(sorted(owned)), chosen, 3, number, columns + 1, cohorts_of(whole))


def even_terms(count: int, columns: int = 20, threshold: int = 0, round_index: int = 1) -> Terms:
    """All own every column."""
    return terms_of(dict.fromkeys(range(count), ((0, columns),)), columns, threshold, round_index)


@dataclass
class Played:
    """A sealing with honest clients. `silent`: the phase in which a client sends nothing any more."""

    terms: Terms
    seed: int = 0
    silent: Mapping[int, str] = field(default_factory=dict)
    tamper: Callable[[str, int, ToServer], ToServer] = lambda phase, client, letter: letter

    def __post_init__(self) -> None:
        draw = np.random.default_rng(self.seed)
        members, columns = self.terms.members, self.terms.columns - 1
        self.rows: dict[int, npt.NDArray[np.float32]] = {client: draw.uniform(-2, 2, columns).astype(np.float32) for client in members}
        self.weights = {client: int(draw.integers(1, 10_000)) for client in members}
        known = identities(members)
        self.clients = {client: self.client(client, known) for client in members}
        self.server = Sealing(self.terms, known)
        self.heard: dict[int, list[ToClient]] = {client: [] for client in members}
        self.up_bytes = dict.fromkeys(members, 0)
        self.down_bytes = dict.fromkeys(members, 0)

    def client(self, client: int, known: dict[int, ec.EllipticCurvePublicKey]) -> SealedClient:
        owned = owned_by(self.terms.cohorts, client)
        return SealedClient(client, owned, self.rows[client], self.weights[client], signer(key_of(client)), known)

    def speaks(self, client: int, phase: int) -> bool:
        return client not in self.silent or PHASES.index(self.silent[client]) > phase

    def play(self, until: str = "") -> Played:
        """All phases, or those before `until`. Every letter goes through its bytes."""
        letters = self.server.opening()
        for phase, name in enumerate(PHASES):
            if name == until:
                self.letters = letters
                return self
            for client, letter in letters.items():
                wire = msgspec.msgpack.encode(letter)
                self.heard[client].append(msgspec.msgpack.decode(wire, type=type(letter)))
                self.down_bytes[client] += len(wire)
                if self.speaks(client, phase):
                    answer = self.tamper(name, client, self.clients[client].answer(self.heard[client][-1]))
                    wire = msgspec.msgpack.encode(answer)
                    self.up_bytes[client] += len(wire)
                    self.server = self.server.take(client, msgspec.msgpack.decode(wire, type=type(answer)))
            self.server, letters = self.server.advance()
        return self

    def opened(self) -> Opened:
        return self.play().server.opened()

    def plain_sums(self, clients: Collection[int]) -> dict[int, Words]:
        """The sums without any mask, of these clients."""
        sums = {number: np.zeros(cohort.size, dtype=np.uint64) for number, cohort in enumerate(self.terms.cohorts)}
        for client in clients:
            for number, words in own_words(self.terms, client, self.rows[client], self.weights[client]).items():
                sums[number] = sums[number] + words
        return sums

    def integer_sums(self, clients: Collection[int]) -> list[int]:
        """The same column by column in Python's own integers and fractions: an oracle that shares no code with the field."""
        scale = 1 << self.terms.number.fraction_bits
        totals = [0] * self.terms.columns
        for client in clients:
            row = [*(Fraction(float(value)) for value in self.rows[client]), Fraction(1)]
            for cohort in (one for one in self.terms.cohorts if client in one.owners):
                for column in (column for start, stop in cohort.ranges for column in range(start, stop)):
                    totals[column] += self.weights[client] * round(row[column] * scale)
        return totals
