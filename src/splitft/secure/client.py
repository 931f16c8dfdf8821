"""A client's side of secure aggregation: five phases, each a value made from the one before and what the server sends.

What a client refuses is its own protection: whatever the server says, an honest client signs one list of survivors, answers for no other,
and so never gives away both secrets of one peer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from splitft.errors import ProtocolError
from splitft.rng import fresh_bytes
from splitft.secure import masks, shamir
from splitft.secure.cohorts import Range, covers, openable, owned_by
from splitft.secure.field import Words, to_bytes
from splitft.secure.masks import KeyPair
from splitft.secure.protocol import (
    Book,
    Confirmation,
    Confirmations,
    Envelopes,
    Identities,
    Keys,
    Masked,
    Shares,
    Sign,
    Survivors,
    Terms,
    ToClient,
    ToServer,
    Unmasking,
    check_book,
    check_confirmations,
    commitment,
    envelope_bytes,
    keys_text,
    require_enough,
    survivors_text,
)
from splitft.secure.shamir import SAME_VERSION, SHARE_BYTES


@dataclass(frozen=True)
class Secrets:
    """What a client draws for one sealing and forgets after it."""

    channel: KeyPair = field(repr=False)
    mask: KeyPair = field(repr=False)
    seeds: Mapping[int, bytes] = field(repr=False)


@dataclass(frozen=True)
class Advertised:
    """A client whose keys are out."""

    terms: Terms
    context: bytes
    me: int
    drawn: Secrets


@dataclass(frozen=True)
class Shared(Advertised):
    """A client whose shares are out. `own`: the shares it keeps, of its mask key and then of each seed."""

    book: Book
    own: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True)
class Hidden(Shared):
    """A client whose masked input is out. `held`: shares of everyone who shared, itself too, by client."""

    held: Mapping[int, tuple[bytes, ...]] = field(repr=False)


@dataclass(frozen=True)
class Confirmed(Hidden):
    """A client that has signed a list of survivors, its only one."""

    survivors: tuple[int, ...]


Phase: TypeAlias = Advertised | Shared | Hidden | Confirmed


def advertise(terms: Terms, me: int, columns: tuple[Range, ...], sign: Sign) -> tuple[Advertised, Keys]:
    """Phase 1: fresh keys. `columns` are those of the client, by its own plan: the terms may leave some out (too few others own them) and
    add none but the weight's. Raises ProtocolError."""
    if me not in terms.members or not covers((*columns, (terms.columns - 1, terms.columns)), owned_by(terms.cohorts, me)):
        raise ProtocolError(f"the terms of a sealing give client {me} columns that its plan does not.", SAME_VERSION)
    context = terms.digest
    seeds = {cohort: fresh_bytes(shamir.SECRET_BYTES) for cohort in terms.own(me)}
    drawn = Secrets(masks.new_pair(), masks.new_pair(), seeds)
    channel, mask = drawn.channel.public, drawn.mask.public
    return Advertised(terms, context, me, drawn), Keys(me, channel, mask, sign(keys_text(context, me, channel, mask)))


def share(before: Advertised, book: Book, identities: Identities) -> tuple[Shared, Shares]:
    """Phase 2: shares of the mask key and of every seed, for everyone whose keys are in the book. Raises ProtocolError for a book that
    lacks this client's own keys, has too few, or holds any that their owner did not sign."""
    terms, me, drawn = before.terms, before.me, before.drawn
    check_book(terms, book, identities)
    mine = next((one for one in book.keys if one.client == me), None)
    if mine is None or (mine.channel, mine.mask) != (drawn.channel.public, drawn.mask.public):
        raise ProtocolError(f"the book has other keys of client {me} than it advertised.", "somebody in between has changed them.")
    points = [one.client + 1 for one in book.keys]
    parts = [shamir.split(secret, terms.threshold, points) for secret in (drawn.mask.private, *drawn.seeds.values())]
    envelopes = {}
    for peer in book.keys:
        if peer.client != me:
            text = b"".join(part[peer.client + 1] for part in parts)
            envelopes[peer.client] = masks.close_envelope(_channel(before, peer), before.context, me, peer.client, text)
    commitments = tuple(commitment(before.context, me, cohort, seed) for cohort, seed in drawn.seeds.items())
    own = tuple(part[me + 1] for part in parts)
    return Shared(terms, before.context, me, drawn, book, own), Shares(envelopes, commitments)


def hide(before: Shared, received: Envelopes, row: npt.NDArray[np.float32], weight: int) -> tuple[Hidden, Masked]:
    """Phase 3: this client's columns of `row` times its weight, and behind them the weight, under masks shared with everyone who shared.

    Raises ProtocolError for envelopes that are too few or not from whom they seem, AdapterError for values that cannot be summed.
    """
    terms, me = before.terms, before.me
    peers = {one.client: one for one in before.book.keys if one.client != me}
    if not set(received.envelopes) <= set(peers):
        raise ProtocolError("shares of a client whose keys are not in the book.", SAME_VERSION)
    require_enough(terms, len(received.envelopes) + 1, "shares")
    held = {me: before.own}
    for sender, data in sorted(received.envelopes.items()):
        text = masks.open_envelope(_channel(before, peers[sender]), before.context, sender, me, data)
        held[sender] = _shares_of(text, sender, len(terms.own(sender)))
    vectors = []
    agreed = {peer: _pairwise(before, peers[peer]) for peer in received.envelopes}
    for number in terms.own(me):
        cohort = terms.cohorts[number]
        words = terms.number.encode(_chosen(terms, cohort.ranges, row), weight)
        masks.add_mask(words, before.drawn.seeds[number], before.context, number)
        for peer in cohort.owners:
            if peer in agreed:
                masks.add_mask(words, agreed[peer], before.context, number, minus=me > peer)
        vectors.append(to_bytes(words))
    return Hidden(terms, before.context, me, before.drawn, before.book, before.own, held), Masked(tuple(vectors))


def confirm(before: Hidden, told: Survivors, sign: Sign) -> tuple[Confirmed, Confirmation]:
    """Phase 4: sign the list of survivors. Raises ProtocolError for one that is too short, has strangers in it, or not this client."""
    survivors = told.clients
    if list(survivors) != sorted(set(survivors)) or not set(survivors) <= set(before.held) or before.me not in survivors:
        raise ProtocolError(f"a list of survivors {survivors} that client {before.me} cannot be among.", SAME_VERSION)
    require_enough(before.terms, len(survivors), "inputs")
    signature = sign(survivors_text(before.context, before.book.digest, survivors))
    after = Confirmed(before.terms, before.context, before.me, before.drawn, before.book, before.own, before.held, survivors)
    return after, Confirmation(before.me, signature)


def unmask(before: Confirmed, told: Confirmations, identities: Identities) -> Unmasking:
    """Phase 5: the shares that open the sum of the survivors this client has confirmed, once a threshold has confirmed the same ones.

    Of a survivor the shares of its seeds, in cohorts with enough survivors; of anyone else the share of its mask key; never both.
    """
    check_confirmations(before.terms, before.book, before.survivors, told.signed, identities)
    keys = {peer: held[0] for peer, held in before.held.items() if peer not in before.survivors}
    seeds = {}
    for peer in before.survivors:
        own = enumerate(before.terms.own(peer), start=1)
        opened = [place for place, number in own if openable(before.terms.cohorts[number], before.survivors, before.terms.minimum)]
        seeds[peer] = tuple(before.held[peer][place] for place in opened)
    return Unmasking(keys, seeds)


def _channel(before: Advertised, peer: Keys) -> bytes:
    return masks.agree(before.drawn.channel, peer.channel, before.context, b"channel", f"client {peer.client}")


def _pairwise(before: Advertised, peer: Keys) -> bytes:
    return masks.agree(before.drawn.mask, peer.mask, before.context, b"pairwise", f"client {peer.client}")


def _chosen(terms: Terms, ranges: tuple[Range, ...], row: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Columns of a row whose last one, for the weight, is 1."""
    assert row.shape == (terms.columns - 1,)
    whole = [row[start : min(stop, len(row))] for start, stop in ranges]
    return np.concatenate([*whole, np.ones(1, dtype=np.float32)] if ranges[-1][1] == terms.columns else whole)


def _shares_of(text: bytes, sender: int, cohorts: int) -> tuple[bytes, ...]:
    """The shares in an opened envelope. Raises ProtocolError."""
    if len(text) + masks.TAG_BYTES != envelope_bytes(cohorts):
        raise ProtocolError(f"the envelope of client {sender} holds {len(text)} bytes.", SAME_VERSION)
    parts = [text[start : start + SHARE_BYTES] for start in range(0, len(text), SHARE_BYTES)]
    return tuple(shamir.check_share(part, f"what client {sender} sent") for part in parts)


class SealedClient:
    """A client through one sealing, letter by letter: what a network drives. A letter that comes again gets the same answer, byte for
    byte; another one of a kind that has been answered is refused. It holds secrets: it is not to be stored, nor used twice."""

    def __init__(
        self, me: int, columns: tuple[Range, ...], row: npt.NDArray[np.float32], weight: int, sign: Sign, identities: Identities
    ) -> None:
        self.me, self.columns, self.row, self.weight, self.sign, self.identities = me, columns, row, weight, sign, identities
        self.phase: Phase | None = None
        self.answers: dict[type, tuple[bytes, ToServer]] = {}

    def answer(self, letter: ToClient) -> ToServer:
        """The answer to a letter of the server. Raises ProtocolError for one that is wrong, out of order, or other than before."""
        said = msgspec.msgpack.encode(letter)
        if (known := self.answers.get(type(letter))) is not None:
            if known[0] != said:
                raise ProtocolError(f"a second {type(letter).__name__} other than the first, in one sealing.", "the server is not honest.")
            return known[1]
        found = self._step(letter)
        self.answers[type(letter)] = said, found
        return found

    def _step(self, letter: ToClient) -> ToServer:
        phase = self.phase
        if isinstance(letter, Terms) and phase is None:
            self.phase, keys = advertise(letter, self.me, self.columns, self.sign)
            return keys
        # By exact class: each phase holds all that the one before it held.
        if isinstance(letter, Book) and type(phase) is Advertised:
            self.phase, shares = share(phase, letter, self.identities)
            return shares
        if isinstance(letter, Envelopes) and type(phase) is Shared:
            self.phase, masked = hide(phase, letter, self.row, self.weight)
            return masked
        if isinstance(letter, Survivors) and type(phase) is Hidden:
            self.phase, confirmation = confirm(phase, letter, self.sign)
            return confirmation
        if isinstance(letter, Confirmations) and type(phase) is Confirmed:
            return unmask(phase, letter, self.identities)
        where = "anything" if phase is None else type(phase).__name__.lower()
        raise ProtocolError(f"{type(letter).__name__} after {where}: a letter of a sealing out of order.", SAME_VERSION)


def own_words(terms: Terms, me: int, row: npt.NDArray[np.float32], weight: int) -> dict[int, Words]:
    """A client's input before any mask, by cohort: what the oracle adds up."""
    return {number: terms.number.encode(_chosen(terms, terms.cohorts[number].ranges, row), weight) for number in terms.own(me)}
