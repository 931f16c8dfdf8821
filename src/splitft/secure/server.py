"""The server's side of secure aggregation: it passes letters on, and at the end opens the sum of the clients that came through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from splitft.errors import ProtocolError
from splitft.secure import masks, shamir
from splitft.secure.cohorts import openable
from splitft.secure.field import WORD_BYTES, Reals, Words, from_bytes
from splitft.secure.protocol import (
    COMMITMENT_BYTES,
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
    check_keys,
    check_signature,
    commitment,
    envelope_bytes,
    require_enough,
    survivors_text,
)
from splitft.secure.shamir import SAME_VERSION

PHASES = ("keys", "shares", "inputs", "confirmations", "answers")
FORMS: tuple[type[ToServer], ...] = (Keys, Shares, Masked, Confirmation, Unmasking)


@dataclass(frozen=True)
class Opened:
    """The outcome: sums by cohort in fixed point (a cohort left with too few survivors has none), of these clients."""

    terms: Terms
    survivors: tuple[int, ...]
    sums: Mapping[int, Words]

    def values(self) -> tuple[Reals, npt.NDArray[np.bool_]]:
        """The weighted sum of every column, the weights' own behind the adapter's, and which columns were opened; the others are 0."""
        total = np.zeros(self.terms.columns, dtype=np.float64)
        known = np.zeros(self.terms.columns, dtype=np.bool_)
        for number, words in self.sums.items():
            place = 0
            decoded = self.terms.number.decode(words)
            for start, stop in self.terms.cohorts[number].ranges:
                total[start:stop] = decoded[place : place + stop - start]
                known[start:stop] = True
                place += stop - start
        return total, known


@dataclass(frozen=True)
class Sealing:
    """A sealing on the server as a value: letters of the closed phases, and of the open one (`phase`), by client."""

    terms: Terms
    identities: Identities = field(repr=False)
    phase: int = 0
    keys: Mapping[int, Keys] = field(default_factory=dict)
    shares: Mapping[int, Shares] = field(default_factory=dict)
    inputs: Mapping[int, Masked] = field(default_factory=dict)
    confirmations: Mapping[int, Confirmation] = field(default_factory=dict)
    answers: Mapping[int, Unmasking] = field(default_factory=dict)

    @property
    def book(self) -> Book:
        return Book(tuple(self.keys[client] for client in sorted(self.keys)))

    @property
    def survivors(self) -> tuple[int, ...]:
        return tuple(sorted(self.inputs))

    @property
    def expected(self) -> tuple[int, ...]:
        """Who may send a letter in the open phase."""
        return tuple(sorted((self.terms.members, self.keys, self.shares, self.inputs, self.inputs, ())[self.phase]))

    @property
    def missing(self) -> tuple[int, ...]:
        """Who has not answered in the open phase."""
        have = getattr(self, PHASES[self.phase]) if self.phase < len(PHASES) else ()
        return tuple(client for client in self.expected if client not in have)

    def opening(self) -> dict[int, ToClient]:
        """The letters that begin the sealing."""
        return dict.fromkeys(self.terms.members, self.terms)

    def take(self, client: int, letter: ToServer) -> Sealing:
        """The sealing with a client's letter. Raises ProtocolError for one that is malformed, out of order, or a second one."""
        if self.phase >= len(FORMS) or type(letter) is not FORMS[self.phase] or client not in self.missing:
            raise ProtocolError(f"{type(letter).__name__} of client {client} is not due in a sealing.", SAME_VERSION)
        _CHECKS[self.phase](self, client, letter)
        name = PHASES[self.phase]
        changed: dict[str, Any] = {name: {**getattr(self, name), client: letter}}
        return replace(self, **changed)

    def advance(self) -> tuple[Sealing, dict[int, ToClient]]:
        """Close the open phase with those who have answered: what to send to whom. Empty at the end: then it can be `opened`.

        Raises ProtocolError when fewer than the threshold are left: the sealing has failed, and nobody's values were seen.
        """
        name = PHASES[self.phase]
        require_enough(self.terms, len(getattr(self, name)), name)
        after = replace(self, phase=self.phase + 1)
        letters: dict[int, ToClient] = {}
        if self.phase == 0:
            letters = dict.fromkeys(self.keys, self.book)
        elif self.phase == 1:
            for client in self.shares:
                others = {sender: one.envelopes[client] for sender, one in sorted(self.shares.items()) if sender != client}
                letters[client] = Envelopes(others)
        elif self.phase == 2:
            letters = dict.fromkeys(self.inputs, Survivors(self.survivors))
        elif self.phase == 3:
            letters = dict.fromkeys(self.inputs, Confirmations(tuple(self.confirmations[one] for one in sorted(self.confirmations))))
        return after, letters

    def opened(self) -> Opened:
        """The sums of the survivors. Raises ProtocolError when the shares do not fit together: then a client has lied."""
        terms, context = self.terms, self.terms.digest
        numbers = [number for number, cohort in enumerate(terms.cohorts) if openable(cohort, self.survivors, terms.minimum)]
        sums = {number: np.zeros(terms.cohorts[number].size, dtype=np.uint64) for number in numbers}
        for client in self.survivors:
            for number, data in zip(terms.own(client), self.inputs[client].vectors, strict=True):
                if number in sums:
                    np.add(sums[number], from_bytes(data), out=sums[number])
                    masks.add_mask(sums[number], self._seed(context, client, number), context, number, minus=True)
        for client in sorted(set(self.shares) - set(self.inputs)):
            self._without(context, client, sums)
        return Opened(terms, self.survivors, sums)

    def _seed(self, context: bytes, client: int, number: int) -> bytes:
        """A survivor's own seed of a cohort, from the shares."""
        terms = self.terms
        own = terms.own(client)
        opened = [one for one in own if openable(terms.cohorts[one], self.survivors, terms.minimum)]
        shares = {helper + 1: answer.seeds[client][opened.index(number)] for helper, answer in self.answers.items()}
        seed = shamir.combine(shares, terms.threshold)
        if commitment(context, client, number, seed) != self.shares[client].commitments[own.index(number)]:
            raise ProtocolError(f"the shares of client {client} do not give what it committed to.", "a client is not honest.")
        return seed

    def _without(self, context: bytes, gone: int, sums: Mapping[int, Words]) -> None:
        """Take out of the sums, in place, the masks that the survivors shared with one who fell silent."""
        shares = {helper + 1: answer.keys[gone] for helper, answer in self.answers.items()}
        pair = masks.pair_of(shamir.combine(shares, self.terms.threshold))
        if pair.public != self.keys[gone].mask:
            raise ProtocolError(f"the shares of client {gone} do not give its key.", "a client is not honest.")
        for client in self.survivors:
            shared = [number for number in self.terms.own(gone) if number in sums and client in self.terms.cohorts[number].owners]
            if shared:
                seed = masks.agree(pair, self.keys[client].mask, context, b"pairwise", f"client {client}")
                for number in shared:  # the survivor has added it if its number is the smaller one
                    masks.add_mask(sums[number], seed, context, number, minus=client < gone)


def _check_keys(sealing: Sealing, client: int, letter: ToServer) -> None:
    assert isinstance(letter, Keys)
    if letter.client != client:
        raise ProtocolError(f"client {client} sent keys of client {letter.client}.", SAME_VERSION)
    check_keys(sealing.terms, letter, sealing.identities)


def _check_shares(sealing: Sealing, client: int, letter: ToServer) -> None:
    assert isinstance(letter, Shares)
    count = len(sealing.terms.own(client))
    envelopes = letter.envelopes
    sized = all(len(data) == envelope_bytes(count) for data in envelopes.values())
    if set(envelopes) != set(sealing.keys) - {client} or not sized:
        raise ProtocolError(f"the envelopes of client {client} are not one for every other.", SAME_VERSION)
    if [len(one) for one in letter.commitments] != [COMMITMENT_BYTES] * count:
        raise ProtocolError(f"the commitments of client {client} are not one for every cohort.", SAME_VERSION)


def _check_input(sealing: Sealing, client: int, letter: ToServer) -> None:
    assert isinstance(letter, Masked)
    due = [WORD_BYTES * sealing.terms.cohorts[number].size for number in sealing.terms.own(client)]
    if [len(data) for data in letter.vectors] != due:
        raise ProtocolError(f"the masked input of client {client} has a wrong length.", SAME_VERSION)


def _check_confirmation(sealing: Sealing, client: int, letter: ToServer) -> None:
    assert isinstance(letter, Confirmation)
    if letter.client != client:
        raise ProtocolError(f"client {client} sent a confirmation of client {letter.client}.", SAME_VERSION)
    text = survivors_text(sealing.terms.digest, sealing.book.digest, sealing.survivors)
    check_signature(sealing.identities, client, letter.signature, text, "the confirmation")


def _check_answer(sealing: Sealing, client: int, letter: ToServer) -> None:
    assert isinstance(letter, Unmasking)
    terms, survivors = sealing.terms, sealing.survivors
    due = {one: sum(openable(terms.cohorts[number], survivors, terms.minimum) for number in terms.own(one)) for one in survivors}
    if set(letter.keys) != set(sealing.shares) - set(survivors) or {one: len(shares) for one, shares in letter.seeds.items()} != due:
        raise ProtocolError(f"client {client} answered for others than were asked about.", SAME_VERSION)
    for share in chain(letter.keys.values(), *letter.seeds.values()):
        shamir.check_share(share, f"what client {client} answered")


_CHECKS = (_check_keys, _check_shares, _check_input, _check_confirmation, _check_answer)
